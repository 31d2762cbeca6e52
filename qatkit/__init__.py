"""qatkit: quantization-aware training for PyTorch, from a float model to a verified QDQ ONNX file."""
