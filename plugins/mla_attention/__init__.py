"""Absorbed latent attention (MLA) over a paged latent cache."""
