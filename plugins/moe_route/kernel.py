"""Triton kernel of `moe_route`, and its launcher on torch tensors. Everything is float32; ties go to the lowest index."""

import torch
import triton
import triton.language as tl

from latentrt.plugins.architecture import Gpu
from latentrt.plugins.launch.torch import contiguous, run, target_of
from latentrt.plugins.moe_route.plan import Routing, plan


@triton.jit
def _scores(logits, real, SIGMOID: tl.constexpr):
    """Logits [T, GROUPS_PAD, SIZE_PAD] -> scores; padding lanes are -inf on entry, and 0 on return."""
    if SIGMOID:
        return tl.where(real, 1.0 / (1.0 + tl.exp(-logits)), 0.0)
    top = tl.max(tl.max(logits, 2), 1)
    scores = tl.where(real, tl.exp(logits - top[:, None, None]), 0.0)
    return scores / tl.sum(tl.sum(scores, 2), 1)[:, None, None]


@triton.jit
def _keep_groups(choice, g, e, GROUPS: tl.constexpr, KEEP: tl.constexpr, TOP2: tl.constexpr):
    """choice [T, GROUPS_PAD, SIZE_PAD] (-inf in padding lanes) -> whether a group is among the KEEP best, [T, GROUPS_PAD]."""
    best = tl.max(choice, 2)
    if TOP2:
        lanes: tl.constexpr = choice.shape[2]
        first = tl.min(tl.where(choice == best[:, :, None], e[None, None, :], lanes), 2)
        best += tl.max(tl.where(e[None, None, :] == first[:, :, None], float("-inf"), choice), 2)
    best = tl.where((g < GROUPS)[None, :], best, float("-inf"))
    mine, other = best[:, :, None], best[:, None, :]
    beaten = (other > mine) | ((other == mine) & (g[None, None, :] < g[None, :, None]))
    return tl.sum(beaten.to(tl.int32), 2) < KEEP


@triton.jit(do_not_specialize=["tokens"])
def route(router_logits, num_tokens, correction_bias, topk_ids, topk_weights, tokens, scale,
          EXPERTS: tl.constexpr, GROUPS: tl.constexpr, GROUPS_PAD: tl.constexpr, SIZE: tl.constexpr,
          SIZE_PAD: tl.constexpr, KEEP: tl.constexpr, TOP_K: tl.constexpr, TOP_K_PAD: tl.constexpr,
          SIGMOID: tl.constexpr, TOP2: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_T: tl.constexpr):  # fmt: skip
    """router_logits [T, EXPERTS] -> topk_ids, topk_weights [T, TOP_K]; BLOCK_T tokens a program, groups of SIZE experts."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    valid = (t < tokens) & (t < tl.load(num_tokens))
    g = tl.arange(0, GROUPS_PAD)
    e = tl.arange(0, SIZE_PAD)
    expert = g[:, None] * SIZE + e[None, :]  # [GROUPS_PAD, SIZE_PAD]
    exists = ((g < GROUPS)[:, None] & (e < SIZE)[None, :])[None, :, :]
    at = t[:, None, None].to(tl.int64) * EXPERTS + expert[None, :, :]
    logits = tl.load(router_logits + at, mask=exists & valid[:, None, None], other=0.0)
    scores = _scores(tl.where(exists, logits, float("-inf")), exists, SIGMOID)
    choice = scores
    if correction_bias is not None:
        choice += tl.load(correction_bias + expert, mask=(g < GROUPS)[:, None] & (e < SIZE)[None, :], other=0.0)[None]
    choice = tl.where(exists, choice, float("-inf"))
    if KEEP < GROUPS:
        kept = _keep_groups(choice, g, e, GROUPS, KEEP, TOP2)
        choice = tl.where(exists & ~kept[:, :, None], 0.0, choice)
        if correction_bias is None:
            scores = choice
    LANES: tl.constexpr = GROUPS_PAD * SIZE_PAD
    choice = tl.reshape(choice, [BLOCK_T, LANES])
    scores = tl.reshape(scores, [BLOCK_T, LANES])
    expert = tl.reshape(tl.broadcast_to(expert[None, :, :], [BLOCK_T, GROUPS_PAD, SIZE_PAD]), [BLOCK_T, LANES])
    k = tl.arange(0, TOP_K_PAD)
    ids = tl.full([BLOCK_T, TOP_K_PAD], -1, tl.int32)
    weights = tl.zeros([BLOCK_T, TOP_K_PAD], tl.float32)
    for i in tl.static_range(TOP_K):
        best = tl.max(choice, 1)
        # padding lanes repeat the numbers of other groups' experts: only lanes that hold the maximum are candidates
        chosen = tl.min(tl.where((choice == best[:, None]) & (choice > float("-inf")), expert, EXPERTS), 1)
        hit = (expert == chosen[:, None]) & (choice > float("-inf"))
        weight = tl.sum(tl.where(hit, scores, 0.0), 1)
        ids = tl.where(k[None, :] == i, chosen[:, None], ids)
        weights = tl.where(k[None, :] == i, weight[:, None], weights)
        choice = tl.where(hit, float("-inf"), choice)
    if NORMALIZE:
        weights = weights / (tl.sum(weights, 1) + 1e-20)[:, None]
    at = t[:, None].to(tl.int64) * TOP_K + k[None, :]
    store = (t < tokens)[:, None] & (k < TOP_K)[None, :]
    tl.store(topk_ids + at, tl.where(valid[:, None], ids, -1), mask=store)
    tl.store(topk_weights + at, tl.where(valid[:, None], weights * scale, 0.0), mask=store)


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
    target: Gpu | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the kernel: topk_ids [T, top_k] int32, topk_weights [T, top_k] float32. Contract: op.py."""
    config = Routing(
        router_logits.shape[1], scoring_func, topk_method, group_score, n_group, topk_group, top_k, norm_topk_prob,
        routed_scaling_factor, correction_bias is not None,
    )  # fmt: skip
    inputs = dict(router_logits=router_logits, num_tokens=num_tokens, correction_bias=correction_bias)
    tensors, shape = contiguous(inputs), (router_logits.shape[0], top_k)
    tensors["topk_ids"] = torch.empty(shape, dtype=torch.int32, device=router_logits.device)
    tensors["topk_weights"] = torch.empty(shape, dtype=torch.float32, device=router_logits.device)
    run(plan(config, shape[0], target or target_of(router_logits)), tensors)
    return tensors["topk_ids"], tensors["topk_weights"]
