"""Plain torch form of `moe_route`."""

import torch


def moe_route(
    router_logits: torch.Tensor,  # [T, E] float32
    num_tokens: torch.Tensor,  # [1] int32
    correction_bias: torch.Tensor | None,  # [E] float32
    scoring_func: str,
    topk_method: str,
    group_score: str,
    n_group: int,
    topk_group: int,
    top_k: int,
    norm_topk_prob: int,
    routed_scaling_factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns topk_ids [T, top_k] int32 (best first) and topk_weights [T, top_k] float32."""
    scores = router_logits.softmax(-1) if scoring_func == "softmax" else router_logits.sigmoid()
    choice = scores if correction_bias is None else scores + correction_bias
    if topk_method == "group_limited_greedy":
        choice = _limit_to_groups(choice, group_score, n_group, topk_group)
    ids = _top(choice, top_k)
    weights = (choice if correction_bias is None else scores).gather(-1, ids)
    if norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    weights = weights * routed_scaling_factor
    padding = torch.arange(router_logits.shape[0], device=router_logits.device)[:, None] >= num_tokens
    return ids.int().masked_fill(padding, -1), weights.masked_fill(padding, 0.0)


def _limit_to_groups(choice: torch.Tensor, group_score: str, n_group: int, topk_group: int) -> torch.Tensor:
    """Sets the scores of all experts outside the best groups to 0. [T, E] -> [T, E]."""
    groups = choice.unflatten(-1, (n_group, -1))  # [T, n_group, E / n_group]
    best = groups.amax(-1) if group_score == "max" else groups.topk(2, -1).values.sum(-1)
    kept = torch.zeros_like(best).scatter_(1, _top(best, topk_group), 1.0)
    return (groups * kept[..., None]).flatten(-2)


def _top(values: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the k largest, best first; a stable sort, so ties go to the lowest index."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :k]
