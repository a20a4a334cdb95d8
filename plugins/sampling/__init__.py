"""The next tokens, chosen where the logits are: not an op of the graph, a kernel of the runtime on GPUs."""
