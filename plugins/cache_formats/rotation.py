"""The rotated basis of latents: an orthogonal matrix with which no element of a latent is much larger than the others.

R is block-diagonal with Hadamard matrices over their root, in blocks of the largest power of two that divides kv_lora_rank. It
is symmetric, so that R R = 1. RMS norm does not see it: norm(R x) = R norm(x). Folded into the weights it costs nothing at run
time: rows of kv_a_proj_with_mqa become R times what they were, kv_a_layernorm's gain goes into w_uk and w_uv and becomes 1, and
these two get R on the latent's side.
"""

import torch


def rotate(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """R along axis `dim`, in float64; given back in x's dtype."""
    x = x.movedim(dim, -1)
    size = x.shape[-1]
    block = size & -size
    turned = x.double().unflatten(-1, (-1, block))
    step = 1
    while step < block:
        left, right = turned.unflatten(-1, (-1, 2, step)).unbind(-2)
        turned = torch.stack([left + right, left - right], -2).flatten(-3)
        step *= 2
    return (turned / block**0.5).flatten(-2).to(x.dtype).movedim(-1, dim)
