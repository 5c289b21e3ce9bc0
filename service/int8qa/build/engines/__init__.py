"""ONNX graphs to engines, one module per engine."""
