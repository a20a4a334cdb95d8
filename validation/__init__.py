"""Proof that an engine computes the checkpoint's model: an audited reference, a stage by stage comparison, a report."""
