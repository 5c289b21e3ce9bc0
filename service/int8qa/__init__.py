"""int8qa: extractive question answering in INT8, beside FP16, on Triton."""

__version__ = "0.1.0"
