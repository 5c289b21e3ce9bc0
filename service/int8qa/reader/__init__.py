"""Text to tensors and logits to answers, in the order the data flows.

tokenizer -> windows -> (an engine, elsewhere) -> spans; squad holds data and scores.
In and out: Python strings and numpy arrays. Reads a tokenizer or data file, and does
no other I/O; knows no HTTP, no Triton, no torch, no transformers.
"""
