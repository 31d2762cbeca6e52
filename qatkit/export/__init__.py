"""From a trained model to a verified QDQ ONNX file."""
