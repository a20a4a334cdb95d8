"""What fits where, and how fast it can be at best: computed from a model's dimensions before any work."""
