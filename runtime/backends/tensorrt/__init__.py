"""TensorRT and TensorRT-RTX plans on a GPU."""
