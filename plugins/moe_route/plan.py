"""Launch plans of `moe_route`: one kernel."""

from dataclasses import dataclass
from functools import lru_cache

from latentrt.plugins.architecture import Gpu
from latentrt.plugins.launch.plan import KernelSpec, Plan, PlanError, bind, cdiv, power_of_two
from latentrt.plugins.moe_route.tiles import TILES


@dataclass(frozen=True)
class Routing:
    """The static part of an op call: the contract's attributes, the number of experts, and whether there is a bias."""

    num_experts: int
    scoring_func: str
    topk_method: str
    group_score: str
    n_group: int
    topk_group: int
    top_k: int
    norm_topk_prob: int
    routed_scaling_factor: float
    has_bias: bool

    def __post_init__(self) -> None:
        choices = dict(
            scoring_func=("softmax", "sigmoid"), topk_method=("greedy", "group_limited_greedy"),
            group_score=("max", "top2_sum"), norm_topk_prob=(0, 1),
        )  # fmt: skip
        for name, accepted in choices.items():
            if getattr(self, name) not in accepted:
                raise PlanError(f"moe_route kernel: {name} is {getattr(self, name)!r}, accepted: {accepted}")
        if not 1 <= self.top_k <= self.num_experts:
            raise PlanError(f"moe_route kernel: top_k is {self.top_k}, accepted: 1 to {self.num_experts}")
        if self.topk_method == "group_limited_greedy" and self.num_experts % self.n_group:
            raise PlanError(f"moe_route kernel: {self.num_experts} experts do not make {self.n_group} equal groups")


@lru_cache(maxsize=1024)
def plan(config: Routing, tokens: int, target: Gpu) -> Plan:
    """The launch for router_logits [T, E], T = tokens."""
    if tokens == 0:
        return Plan(())
    (kernel,) = kernels(config, target)
    tensors = ["router_logits", "num_tokens", "topk_ids", "topk_weights"] + ["correction_bias"] * config.has_bias
    scale = float(config.routed_scaling_factor)
    grid = (cdiv(tokens, TILES[target.capability].block_t),)
    return Plan((bind(kernel, grid, tokens=tokens, scale=scale, **{n: n for n in tensors}),))


def kernels(config: Routing, target: Gpu) -> tuple[KernelSpec, ...]:
    """The one kernel of `config`."""
    tile = TILES[target.capability]
    limited = config.topk_method == "group_limited_greedy"
    groups = config.n_group if limited else 1
    arguments = (
        ("router_logits", "*fp32"), ("num_tokens", "*i32"), ("correction_bias", "*fp32"), ("topk_ids", "*i32"),
        ("topk_weights", "*fp32"), ("tokens", "i32"), ("scale", "fp32"),
    )  # fmt: skip
    size = config.num_experts // groups
    constexprs = dict(
        EXPERTS=config.num_experts, GROUPS=groups, GROUPS_PAD=power_of_two(groups), SIZE=size,
        SIZE_PAD=power_of_two(size), KEEP=config.topk_group if limited else 1, TOP_K=config.top_k,
        TOP_K_PAD=power_of_two(config.top_k), SIGMOID=int(config.scoring_func == "sigmoid"),
        TOP2=int(config.group_score == "top2_sum"), NORMALIZE=config.norm_topk_prob, BLOCK_T=tile.block_t,
    )  # fmt: skip
    if not config.has_bias:
        arguments = tuple(a for a in arguments if a[0] != "correction_bias")
        constexprs["correction_bias"] = None
    grid = f"(cdiv(tokens, {tile.block_t}),)"
    return (KernelSpec("moe_route", "route", arguments, tuple(constexprs.items()), tile.warps, 1, grid),)
