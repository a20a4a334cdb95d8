"""The rows of all ranks, on every rank."""
