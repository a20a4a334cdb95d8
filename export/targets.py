"""What can be built for: one row per CPU or GPU, and what can be chosen for it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from export.errors import BuildError


@dataclass(frozen=True)
class BuildTarget:
    """A row: `backend` names the lowering and the runtime's backend, `precisions` are best first ("auto" takes the first).

    `hardware_lacks`: precision -> what this GPU has no hardware for, so that the error can say so.
    """

    name: str
    backend: str
    compute_capability: str | None
    precisions: tuple[str, ...]
    hardware_lacks: tuple[str, ...] = ()


def _gpu(name: str, backend: str, float8: bool) -> BuildTarget:
    precisions = ("fp8", "bf16") if float8 else ("bf16",)
    return BuildTarget(name, backend, name, precisions, () if float8 else ("fp8",))


_ROWS = (
    BuildTarget("cpu", "onnxruntime", None, ("int8", "fp32")),
    _gpu("sm80", "tensorrt_rtx", float8=False),
    _gpu("sm86", "tensorrt_rtx", float8=False),
    _gpu("sm89", "tensorrt_rtx", float8=True),
    _gpu("sm90", "tensorrt", float8=True),
    _gpu("sm100", "tensorrt", float8=True),
    _gpu("sm120", "tensorrt_rtx", float8=True),
    _gpu("sm121", "tensorrt_rtx", float8=True),
)
TARGETS = {t.name: t for t in _ROWS}


@dataclass(frozen=True)
class Choice:
    """An option that concerns some targets: its values, the default first. `applies(target, precision)` says to which."""

    name: str
    values: tuple[str, ...]
    concerns: str  # ends "but only ..."
    applies: Callable[[BuildTarget, str], bool]


CHOICES = (
    Choice("accuracy", ("fast", "exact"), "target cpu has a choice of it", lambda row, precision: row.name == "cpu"),
    Choice("weights", ("inputs", "embedded"), "GPU targets have a plan for them", lambda row, precision: row.name != "cpu"),
    Choice("activations", ("dynamic", "static"), "fp8 products scale them", lambda row, precision: precision == "fp8"),
    Choice("prefill", ("auto", "expanded", "absorbed"), "GPU targets have two forms", lambda row, precision: row.name != "cpu"),
)


def find(name: str) -> BuildTarget:
    """The target called `name`; BuildError lists the choices."""
    if name not in TARGETS:
        raise BuildError(f"unknown target {name!r}, accepted: {', '.join(TARGETS)}")
    return TARGETS[name]


def precision(target: BuildTarget, asked: str) -> str:
    """Resolves "auto"; BuildError if the target lacks the precision."""
    if asked == "auto":
        return target.precisions[0]
    if asked not in target.precisions:
        why = f": its hardware has no {asked}" if asked in target.hardware_lacks else ""
        accepted = ", ".join(target.precisions)
        raise BuildError(f"precision {asked!r} is not to be had on {target.name}{why}; accepted: auto, {accepted}")
    return asked


def check_choices(built: Mapping[str, str], asked: Mapping[str, str], calibrated: bool) -> None:
    """`built`: target -> precision; `asked`: name of every choice -> value. BuildError for a value that is not accepted,
    one that concerns no target of this build, and activations that `calibrated` (are there sample tokens?) does not fit."""
    for choice in CHOICES:
        value = asked[choice.name]
        if value not in choice.values:
            raise BuildError(f"{choice.name} is {value!r}, accepted: {', '.join(choice.values)}")
        if value != choice.values[0] and not any(choice.applies(TARGETS[name], p) for name, p in built.items()):
            targets = ", ".join(f"target {name} is built in {precision}" for name, precision in built.items())
            raise BuildError(f"{choice.name} is {value!r}, but only {choice.concerns}, and {targets}; leave it out")
    if asked["activations"] == "static" and not calibrated:
        raise BuildError("activations is 'static', but there are no sample tokens; give them with --calibration FILE")
    if asked["activations"] == "dynamic" and calibrated:
        raise BuildError("calibration is given, but activations is 'dynamic', which needs none; add --activations static")


def choices(target: BuildTarget, precision: str, asked: Mapping[str, str]) -> dict[str, str]:
    """The choices as one target takes them: the default where it is not concerned, "auto" resolved."""
    found = {c.name: asked[c.name] if c.applies(target, precision) else c.values[0] for c in CHOICES}
    return found | {"prefill": _prefill(target, found["weights"], found["prefill"])}


def _prefill(target: BuildTarget, weights: str, asked: str) -> str:
    """How prompt chunks attend. BuildError where a second, expanded engine would hold all weights again."""
    if target.backend == "onnxruntime":  # each of its graphs loads the weights
        return "absorbed"
    if asked == "expanded" and weights == "embedded":
        why = "which would hold all weights twice: with embedded weights each plan holds them"
        raise BuildError(f"prefill is 'expanded', {why}; leave it out, or give --weights inputs")
    if asked == "auto":
        return "absorbed" if weights == "embedded" else "expanded"
    return asked


def capability(target: BuildTarget) -> int:
    """89 for a GPU of compute capability 8.9."""
    return int(target.compute_capability.removeprefix("sm"))
