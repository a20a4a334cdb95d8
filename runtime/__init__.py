"""Running bundles: load one, generate text, read logits. Nothing here imports `export`, and the CPU path needs no torch."""
