"""PyTorch: interprets a target's ONNX graph, on any CUDA GPU and on the CPU."""
