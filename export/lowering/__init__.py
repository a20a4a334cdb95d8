"""Lowerings: one file per backend. Each turns the step graph and a weight set into what that backend loads."""
