"""Expanded multi-head latent attention (MLA) of prompt chunks over a paged latent cache."""
