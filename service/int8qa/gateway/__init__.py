"""HTTP to Triton and back, in the order a request meets it.

edge -> routes (bodies, schemas, problems) -> pipeline -> batcher -> engine -> triton;
telemetry, comparison and logs at each edge, app puts them together. Imports no torch,
no ONNX and no engine.
"""
