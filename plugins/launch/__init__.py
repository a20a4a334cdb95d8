"""Launch plans, and what carries them out: compiler, CUDA driver, Triton on torch tensors, interpreter."""
