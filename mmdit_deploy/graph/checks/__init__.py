"""Checks of ONNX files that nobody vouches for, before any library or runtime sees them."""
