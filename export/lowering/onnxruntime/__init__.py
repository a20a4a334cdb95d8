"""Lowering for ONNX Runtime on the CPU."""
