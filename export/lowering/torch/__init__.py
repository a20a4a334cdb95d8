"""Step graphs that PyTorch interprets as they are exported."""
