"""The build stage, offline: a checkpoint becomes a Triton model repository.

Modules in the order the data flows: checkpoint, export, graph, calibration,
quantization, accuracy, engines, triton_config, repository, report, pipeline.
Only this package (and training) may import torch, ModelOpt and ONNX.
"""
