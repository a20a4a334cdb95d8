"""Plain torch form of `moe_experts`."""

import torch
import torch.nn.functional as F

_MIDDLE = {1: 128, 2: 8}  # what stands for 0 among 8 bits, and among 4


def moe_experts(
    x: torch.Tensor,  # [T, hidden_size]
    topk_ids: torch.Tensor,  # [T, top_k] int32
    topk_weights: torch.Tensor,  # [T, top_k] float32
    gate_up_proj: torch.Tensor,  # [E, 2 * moe_intermediate_size, hidden_size / packed]
    down_proj: torch.Tensor,  # [E, hidden_size, moe_intermediate_size / packed]
    gate_up_scale: torch.Tensor | None,  # [E, 2 * moe_intermediate_size] or [..., gate_up_blocks] float32
    down_scale: torch.Tensor | None,  # [E, hidden_size] or [..., down_blocks] float32
    first_expert: int,
    gate_up_layout: str,
    packed: int = 1,
    total_experts: int = 0,
) -> torch.Tensor:
    """Returns y [T, hidden_size]; products and sums in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = torch.zeros(x.shape, dtype=wide, device=x.device)
    local = topk_ids.long() - first_expert
    for expert in local.unique().tolist():
        if not 0 <= expert < gate_up_proj.shape[0]:
            continue
        rows, choice = torch.where(local == expert)
        gate_up = _dequantize(gate_up_proj[expert], gate_up_scale, expert, wide, packed)
        down = _dequantize(down_proj[expert], down_scale, expert, wide, packed)
        gate_up = F.linear(x[rows].to(wide), gate_up)
        gate, up = gate_up.chunk(2, -1) if gate_up_layout == "concatenated" else (gate_up[:, 0::2], gate_up[:, 1::2])
        y.index_add_(0, rows, F.linear(F.silu(gate) * up, down) * topk_weights[rows, choice, None].to(wide))
    return y.to(x.dtype)


def _dequantize(
    weight: torch.Tensor, scale: torch.Tensor | None, expert: int, dtype: torch.dtype, packed: int
) -> torch.Tensor:
    """[out, in / packed] -> the real weight [out, in]; scale [E, out] or [E, out, blocks]."""
    if packed == 2:
        weight = weight.view(torch.uint8)
        weight = torch.stack([weight & 15, weight >> 4], -1).flatten(-2)
    weight = weight.to(dtype) - _MIDDLE[packed] if weight.dtype == torch.uint8 else weight.to(dtype)
    if scale is None:
        return weight
    blocks = scale[expert].reshape(len(weight), -1).to(dtype)  # [out, blocks]
    return (weight.unflatten(-1, (blocks.shape[1], -1)) * blocks[..., None]).flatten(-2)
