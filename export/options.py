"""What a build may be asked for, checked once, and resolved to one specification per target."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from latentrt.export import targets
from latentrt.export.errors import BuildError
from latentrt.export.recipe import QUANTIZED_ROLES
from latentrt.export.targets import TargetRow
from latentrt.plugins.step_graph import ABSORBED, EXPANDED

AUTO = "auto"
FLOAT8 = ("fp8", "fp8-int4")  # precisions whose linears are FP8 products


@dataclass(frozen=True)
class TargetSpec:
    """What one target is built from; equal specifications give equal targets. Nothing is "auto" but the cache format."""

    target: TargetRow
    precision: str
    accuracy: str = "fast"  # int8 and int4 products: "exact" (float32 sums), "fast" (int8 activations)
    cache_format: str = AUTO  # resolved by the lowering
    max_context: int = 0  # tokens; 0: the model's own
    weights: str = "inputs"  # or "embedded" in the plan; a matter of TensorRT
    activations: str = "dynamic"  # scales of FP8 activations: one per token, or "static": one per linear
    forms: tuple[str, ...] = (ABSORBED,)  # of attention; an engine each
    ranks: int = 1  # processes, a GPU each, that share the experts
    collectives: str = "native"  # TensorRT's own, or "plugin": NCCL called by plugins of ours
    plain_modules: tuple[str, ...] = ()  # whose weights a recipe leaves unquantized

    def identity(self) -> dict:
        """For JSON: all fields, the target by name."""
        lists = {"forms": list(self.forms), "plain_modules": list(self.plain_modules)}
        return asdict(self) | {"target": self.target.name} | lists


@dataclass(frozen=True)
class Choice:
    """An option that concerns some targets: its values, the default first. `applies(target, precision)` says to which."""

    name: str
    values: tuple[str, ...]
    concerns: str  # ends "but only ..."
    applies: Callable[[TargetRow, str], bool]


CHOICES = (
    Choice("accuracy", ("fast", "exact"), "target cpu has a choice of it", lambda row, precision: row.name == "cpu"),
    Choice("weights", ("inputs", "embedded"), "GPU targets have a plan", lambda row, precision: row.compute_capability),
    Choice("activations", ("dynamic", "static"), "fp8 products scale them", lambda row, precision: precision in FLOAT8),
    Choice("collectives", ("native", "plugin"), "engines of several ranks have them", lambda row, p: row.compute_capability),
    Choice("prefill", (AUTO, EXPANDED, ABSORBED), "other targets have two forms", lambda row, precision: row.name != "cpu"),
)


@dataclass(frozen=True)
class BuildOptions:
    """The options of `latentrt build`. `target` names one target or several, with commas between them."""

    target: str = "cpu"
    precision: str = AUTO
    accuracy: str = "fast"
    cache_format: str = AUTO
    max_context: int | None = None
    weights: str = "inputs"
    activations: str = "dynamic"
    calibration: Path | None = None
    prefill: str = AUTO
    force: bool = False
    recipe: Path | None = None  # export/recipe.py
    ranks: int = 1
    collectives: str = "native"

    def specs(self) -> list[TargetSpec]:
        """One per target, in order. BuildError for a value that is not accepted, or that concerns no target of this build."""
        names = dict.fromkeys(name.strip() for name in self.target.split(","))
        rows = [targets.find(name) for name in names]
        precisions = {row.name: targets.precision(row, self.precision) for row in rows}
        self._check(precisions)
        self._check_ranks(rows)
        return [self._spec(row, precisions[row.name]) for row in rows]

    def _check(self, precisions: Mapping[str, str]) -> None:
        """`precisions`: target -> precision."""
        for choice in CHOICES:
            value = getattr(self, choice.name)
            if value not in choice.values:
                raise BuildError(f"{choice.name} is {value!r}, accepted: {', '.join(choice.values)}")
            concerned = any(choice.applies(targets.find(name), p) for name, p in precisions.items())
            if value != choice.values[0] and not concerned:
                built = ", ".join(f"target {name} is built in {precision}" for name, precision in precisions.items())
                raise BuildError(f"{choice.name} is {value!r}, but only {choice.concerns}, and {built}; leave it out")
        if self.recipe is not None and not any(p in QUANTIZED_ROLES for p in precisions.values()):
            quantized = ", ".join(QUANTIZED_ROLES)
            built = ", ".join(f"target {name} is built in {precision}" for name, precision in precisions.items())
            raise BuildError(f"recipe is given, but only {quantized} quantize weights, and {built}; leave it out")
        if self.activations == "static" and self.calibration is None:
            raise BuildError("activations is 'static', but there are no sample tokens; give them with --calibration FILE")
        if self.activations == "dynamic" and self.calibration is not None:
            raise BuildError("calibration is given, but activations is 'dynamic', which needs none; add --activations static")

    def _check_ranks(self, rows: list[TargetRow]) -> None:
        if self.ranks < 1:
            raise BuildError(f"ranks is {self.ranks}, accepted: 1 (one process) or more")
        alone = [row.name for row in rows if row.backend == "onnxruntime"]
        if self.ranks > 1 and alone:
            found = f"ranks is {self.ranks}, but ONNX Runtime's target {alone[0]} cannot join processes"
            raise BuildError(f"{found}; use --target torch (CPU or GPU), or a GPU target")
        if self.ranks == 1 and self.collectives != "native":
            raise BuildError(f"collectives is {self.collectives!r}, but ranks is 1, which has none; leave it out")
        if self.ranks > 1 and self.weights == "embedded":
            raise BuildError(f"ranks is {self.ranks}: all share a plan, but not its embedded weights; leave --weights out")

    def _spec(self, row: TargetRow, precision: str) -> TargetSpec:
        chosen = {c.name: getattr(self, c.name) if c.applies(row, precision) else c.values[0] for c in CHOICES}
        forms = _forms(row, chosen["weights"], chosen.pop("prefill"))
        own = {"cache_format": self.cache_format, "max_context": self.max_context or 0, "forms": forms, "ranks": self.ranks}
        return TargetSpec(row, precision, **own, **chosen)


def _forms(row: TargetRow, weights: str, prefill: str) -> tuple[str, ...]:
    """Forms of attention that get an engine. BuildError where a second one would hold all weights again."""
    if row.backend == "onnxruntime":  # each of its graphs loads the weights
        return (ABSORBED,)
    if prefill == EXPANDED and weights == "embedded":
        why = "which would hold all weights twice: with embedded weights each plan holds them"
        raise BuildError(f"prefill is 'expanded', {why}; leave it out, or give --weights inputs")
    if prefill == AUTO:
        prefill = ABSORBED if weights == "embedded" else EXPANDED
    return tuple(dict.fromkeys((ABSORBED, prefill)))
