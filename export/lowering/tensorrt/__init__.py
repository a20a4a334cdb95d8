"""Lowering for TensorRT and TensorRT-RTX."""
