"""Proof that an engine computes the checkpoint's model: an audited transformers reference, stage by stage comparison, report."""
