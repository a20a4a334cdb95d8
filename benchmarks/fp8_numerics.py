"""What fp8 costs by the grain of its scales, and what recipes do: part of docs/numerics.md, results/fp8-numerics.json.

    python -m benchmarks.fp8_numerics [--tokens 8192]

On synthetic weights of a real shape: the error of a product's outputs, everything else in float64. On the example model: KL to
float32 over its held-out text, in windows of 512 tokens. All of it is emulated in PyTorch on the CPU: weights are rounded to
e4m3 and taken back, and so are, where it says so, the inputs of the same products; sums are float32. The engine's other
roundings, to bfloat16, are left out. Then recipes of `latentrt rank`, measured in the same way.
"""

import json
import platform
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from torch import Tensor

from benchmarks.cache_numerics import EXAMPLE, ROOT, table
from latentrt.export.checkpoint import Checkpoint
from latentrt.export.models.base import Weight
from latentrt.export.quantization.fp8 import LARGEST, SMALLEST_ABSMAX, Fp8
from latentrt.plugins.moe_experts import reference as experts
from latentrt.validation import sensitivity, tokens
from latentrt.validation.sensitivity import Group, Ranked, Sensitivity

OUTPUTS, INPUTS, ROWS, BLOCK = 2048, 1408, 256, 128  # down_proj of V2-Lite's experts
BEGIN, END = "<!-- benchmarks.fp8_numerics writes from here -->", "<!-- to here -->"
DOCUMENT, RECORD = ROOT / "docs" / "numerics.md", ROOT / "benchmarks" / "results" / "fp8-numerics.json"
Rounding = Callable[[Tensor], Tensor]


def _e4m3(values: Tensor, largest: Tensor) -> Tensor:
    """Values through e4m3 with scales of which `largest` is what becomes 448."""
    scale = largest.clamp_min(SMALLEST_ABSMAX) / LARGEST
    return (values / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).to(values.dtype) * scale


def per_tensor(w: Tensor) -> Tensor:
    """One scale for [..., out, in]: for each expert of a stack."""
    return _e4m3(w, w.abs().amax((-2, -1), keepdim=True))


def per_channel(w: Tensor) -> Tensor:
    """One scale per output, as the weight format fp8 has them; of activations, one per token."""
    return _e4m3(w, w.abs().amax(-1, keepdim=True))


def by_blocks(w: Tensor) -> Tensor:
    """One scale per 128 x 128 block, as DeepSeek-V3's checkpoints have them."""
    outputs, inputs = w.shape[-2:]
    padded = F.pad(w, (0, -inputs % BLOCK, 0, -outputs % BLOCK))
    blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))  # [..., out / 128, 128, in / 128, 128]
    rounded = _e4m3(blocks, blocks.abs().amax((-3, -1), keepdim=True))
    return rounded.flatten(-4, -3).flatten(-2)[..., :outputs, :inputs]


def by_groups(x: Tensor) -> Tensor:
    """One scale per token and 128 inputs, which is what products of 128 x 128 blocks take."""
    groups = F.pad(x, (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    return per_channel(groups).flatten(-2)[..., : x.shape[-1]]


def plain(values: Tensor) -> Tensor:
    """As they are."""
    return values


WEIGHTS = {"per tensor": per_tensor, "per channel": per_channel, "128 x 128": by_blocks}
WAYS = {  # of rounding weights and inputs
    **{f"{name}, weights alone": (rounding, plain) for name, rounding in WEIGHTS.items()},
    "per tensor, inputs per token": (per_tensor, per_channel),
    "per channel, inputs per token (the engine's)": (per_channel, per_channel),
    "128 x 128, inputs per token and 128": (by_blocks, by_groups),
}


def synthetic() -> dict[str, tuple[Tensor, Tensor]]:
    """Weights [OUTPUTS, INPUTS] and inputs [ROWS, INPUTS], float64, by what is unusual about them.

    Inputs that meet large columns of the weights are as much smaller, so that every column counts alike.
    """
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    w, x, found = normal(OUTPUTS, INPUTS), normal(ROWS, INPUTS), {}
    found["Gaussian"] = w, x
    found["heavy tails"] = w / (normal(2, OUTPUTS, INPUTS).square().sum(0) / 2).sqrt(), x  # Student's t, 2 degrees of freedom
    rows, columns = torch.randperm(OUTPUTS, generator=rng)[:20], torch.randperm(INPUTS, generator=rng)[:14]
    for factor in (30, 3000):
        found[f"outputs x {factor}"] = w.index_copy(0, rows, w[rows] * factor), x
        larger, smaller = w.index_copy(1, columns, w[:, columns] * factor), x.index_copy(1, columns, x[:, columns] / factor)
        found[f"inputs x {factor}"] = larger, smaller
    found["activations x 3000"] = w, x.index_copy(1, columns, x[:, columns] * 3000)
    return found


def synthetic_errors() -> dict[str, dict[str, float]]:
    """The relative error of an output channel, percent, root mean square over channels: by way and kind of weights."""
    found: dict[str, dict[str, float]] = {}
    for kind, (w, x) in synthetic().items():
        exact = x @ w.T
        for name, (of_weights, of_inputs) in WAYS.items():
            error = (of_inputs(x) @ of_weights(w).T - exact).norm(dim=0) / exact.norm(dim=0)
            found.setdefault(name, {})[kind] = 100 * error.square().mean().sqrt().item()
    return found


class Emulated(Sensitivity):
    """Rounds weights by `ways[0]`, and the inputs of the same products by `ways[1]`; weights go through the format if None."""

    ways: tuple[Rounding | None, Rounding] = (None, plain)

    def through_format(self, weight: Weight, values: Tensor) -> Tensor:
        return self.ways[0](values) if self.ways[0] else super().through_format(weight, values)

    @contextmanager
    def rounded(self, modules: Collection[str]) -> Iterator[None]:
        rounding, linear, before = self.ways[1], F.linear, experts.F
        with ExitStack() as hooks, super().rounded(modules):
            if any(m.endswith(".experts") for m in modules):
                hooks.callback(setattr, experts, "F", before)
                experts.F = SimpleNamespace(silu=F.silu, linear=lambda x, w: linear(rounding(x), w))
            for name in modules:
                module = self.module.get_submodule(name.removeprefix("model."))
                if isinstance(module, torch.nn.Linear):
                    hooks.callback(module.register_forward_pre_hook(lambda m, x: (rounding(x[0]),)).remove)
            yield

    def costs(self, modules: Collection[str], rounding: Rounding | None = None) -> dict[str, float]:
        """KL and top-1 with weights alone rounded, and with the inputs, which get a scale per token."""
        found = {}
        for name, of_inputs in (("weights alone", plain), ("and inputs", per_channel)):
            self.ways = rounding, of_inputs
            cost = self.cost(modules)
            found |= {f"KL, {name}": cost.kl, f"top-1, {name}": cost.top1}
        self.ways = (None, plain)
        return found


def scales_bytes(model: Sensitivity, name: str) -> int:
    """Bytes of all scales, float32."""
    count = 0
    for weight in model.weights:
        *stack, outputs, inputs = weight.shape
        each = {"per tensor": 1, "per channel": outputs, "128 x 128": -(-outputs // BLOCK) * -(-inputs // BLOCK)}[name]
        count += each * (stack[0] if stack else 1)
    return 4 * count


def model_costs(model: Emulated) -> dict[str, dict[str, float]]:
    """All that fp8 quantizes, by the grain of its scales. Blocks get their inputs' scales per 128 of them."""
    everything, found = [w.module for w in model.weights], {}
    for name, rounding in WEIGHTS.items():
        row = {}
        for label, of_inputs in (("weights alone", plain), ("and inputs", by_groups if rounding is by_blocks else per_channel)):
            model.ways = rounding, of_inputs
            cost = model.cost(everything)
            row |= {f"KL, {label}": cost.kl, f"top-1, {label}": cost.top1}
        found[name] = row | {"scales, kB": scales_bytes(model, name) / 1e3}
    model.ways = (None, plain)
    return found


def recipe_costs(model: Emulated) -> dict[str, dict[str, float]]:
    """fp8 without a recipe and with some: the worst kinds, the first layer, and what halves the KL of weights by tensor."""
    of = {by: sensitivity.rank(model, sensitivity.groups(model.weights, model.format, by)) for by in sensitivity.BY}
    half = model.cost([w.module for w in model.weights]).kl / 2
    chosen = {"none": [], **{f"--by kind --keep {k}": of["kind"][:k] for k in (1, 2)}, "--by layer --keep 1": of["layer"][:1]}
    chosen |= {f"--by {by} --budget {half:.2g}": sensitivity.within(model, of[by], half) for by in sensitivity.BY}
    return {name: _with_recipe(model, kept) for name, kept in chosen.items()}


def _with_recipe(model: Emulated, kept: list[Ranked]) -> dict[str, float]:
    names = {m for r in kept for m in r.group.modules}
    costs = model.costs([w.module for w in model.weights if w.module not in names])
    return costs | {"kept modules": len(names), "MB more": sum(r.plain_bytes for r in kept) / 1e6}


def kinds(model: Emulated) -> dict[str, dict[str, float]]:
    """Every kind of module alone, the worst first, and what its inputs add."""

    def row(group: Group) -> dict[str, float]:
        more = sensitivity.plain_bytes(model.weights, model.format, group.modules) / 1e6
        costs = model.costs(group.modules)
        return {k: v for k, v in costs.items() if k.startswith("KL")} | {"MB more if plain": more}

    found = {g.pattern.removeprefix("model.layers.*."): row(g) for g in sensitivity.groups(model.weights, model.format, "kind")}
    return dict(sorted(found.items(), key=lambda item: -item[1]["KL, weights alone"]))


def integers(checkpoint: Checkpoint, windows: list) -> dict[str, dict[str, float]]:
    """int8 and int4, weights alone: without a recipe, and with the one by tensor that halves the KL."""
    found = {}
    for precision in ("int8", "int4"):
        model = Sensitivity(checkpoint, windows, sensitivity.format_of(precision, checkpoint.weights()))
        everything = [w.module for w in model.weights]
        whole = model.cost(everything)
        ranked = sensitivity.rank(model, sensitivity.groups(model.weights, model.format, "tensor"))
        kept = sensitivity.within(model, ranked, whole.kl / 2)
        names = {m for r in kept for m in r.group.modules}
        found[f"{precision}, none"] = {"KL": whole.kl, "top-1": whole.top1, "kept modules": 0, "MB more": 0.0}
        cost = model.cost([m for m in everything if m not in names])
        found[f"{precision}, --by tensor --budget {whole.kl / 2:.2g}"] = {
            "KL": cost.kl, "top-1": cost.top1, "kept modules": len(names), "MB more": sum(r.plain_bytes for r in kept) / 1e6
        }  # fmt: skip
    return found


def section(record: dict) -> str:
    """The part of docs/numerics.md that is tables."""
    parts = [f"`{record['command']}` makes these tables ({record['seconds']:.0f} s on two cores, {record['date'][:10]})."]
    for title, key, form in (
        ("error of an output, %", "synthetic", ".3g"), (f"example, {record['tokens']} tokens", "model", ".3g"),
        ("recipe for fp8", "recipes", ".3g"), ("only these modules in fp8", "kinds", ".3g"), ("recipe", "integers", ".3g"),
    ):  # fmt: skip
        parts.append(table(title, record[key], form))
    return "\n\n".join(parts)


def replace_section(document: str, text: str) -> str:
    """`document` with what lies between the markers replaced. ValueError where they are not there once each."""
    if document.count(BEGIN) != 1 or document.count(END) != 1:
        raise ValueError(f"docs/numerics.md: needs the lines {BEGIN} and {END}, once each")
    before, rest = document.split(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}"


def main(count: Annotated[int, typer.Option("--tokens", help="Of the held-out text.")] = 8192) -> None:
    """Measures, and writes the tables into docs/numerics.md and the record beside the other results."""
    start, console = datetime.now(UTC), Console(stderr=True)
    checkpoint = Checkpoint(EXAMPLE)
    windows = tokens.load(checkpoint, None, count, checkpoint.config.max_position_embeddings).windows
    record = {
        "command": f"python -m benchmarks.fp8_numerics {' '.join(sys.argv[1:])}".strip(), "tokens": sum(map(len, windows)),
        "date": start.isoformat(timespec="seconds"), "machine": platform.processor() or platform.machine(),
    }  # fmt: skip
    model = Emulated(checkpoint, windows, Fp8())
    for name, measure in (
        ("synthetic", synthetic_errors), ("model", lambda: model_costs(model)), ("recipes", lambda: recipe_costs(model)),
        ("kinds", lambda: kinds(model)), ("integers", lambda: integers(checkpoint, windows)),
    ):  # fmt: skip
        console.print(name)
        record[name] = measure()
    record["seconds"] = (datetime.now(UTC) - start).total_seconds()
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    DOCUMENT.write_text(replace_section(DOCUMENT.read_text(), section(record)))
    print(section(record))


if __name__ == "__main__":
    typer.run(main)
