"""Trace, assemble, fuse, lower: from the model's calls to ONNX graphs without weights."""
