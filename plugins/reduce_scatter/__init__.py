"""Sums over all ranks of a rank's own rows."""
