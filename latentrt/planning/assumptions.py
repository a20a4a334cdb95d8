"""What the simulator assumes of GPUs, links and the host: every number has a name, a default, and where that comes from."""

from dataclasses import dataclass, field, fields
from typing import Self

from latentrt.errors import UserError


def _number(default: float, unit: str, source: str, lowest: float = 0.0, highest: float = 1e6):
    return field(default=default, metadata={"unit": unit, "source": source, "range": (lowest, highest)})


def _share(default: float, unit: str, source: str):
    return _number(default, unit, source, 0.01, 1.0)


@dataclass(frozen=True)
class Assumptions:
    """See `table` for what each means. docs/many-gpus.md holds them against one H100."""

    hbm: float = _share(0.8, "of the memory's bandwidth, where weights are read", "guess; an H100: 0.88 in experts")
    cache_hbm: float = _share(0.7, "of the same, where a latent cache is read", "guess; an H100: 0.5 to 0.88; FlashMLA: 0.9")
    bf16: float = _share(0.6, "of the bf16 rate, in products with weights", "guess")
    fp8: float = _share(0.5, "of the FP8 rate", "on an H100 0.42 to 0.52; DeepGEMM's README: 0.61 to 0.68 on H800")
    attention: float = _share(0.5, "of the bf16 rate, in attention", "guess; an H100: 0.26, prompts 0.38; FlashMLA: 0.67")
    link: float = _share(0.75, "of the link's rate in one direction, which is half of both", "guess")
    latency_us: float = _number(12.0, "us of a collective that moves nothing", "guess for NCCL on NVLink")
    overlap: float = _number(0.0, "of the collectives' time, hidden behind kernels", "the step graph hides none", 0.0, 1.0)
    kernels: float = _number(20.0, "kernels a layer", "counted on V2-Lite's FP8 step, docs/results.md")
    graph_us: float = _number(1.0, "us between two kernels of a captured step", "guess; V2-Lite's steps on an H100 fit 2.2")
    launch_us: float = _number(4.0, "us between two kernels, else", "guess")
    host_ms: float = _number(0.5, "ms of the host a step: messages to ranks, inputs", "guess")
    host_us: float = _number(15.0, "us of the host a step and sequence: scheduler, sampling, events",
                             "measured on a CPU, greedy, docs/results.md")  # fmt: skip

    def __post_init__(self):
        for f in fields(self):
            value, (lowest, highest) = getattr(self, f.name), f.metadata["range"]
            if not lowest <= value <= highest:
                raise UserError(f"--assume {f.name} is {value:g}, accepted: {lowest:g} to {highest:g} ({f.metadata['unit']})")

    @classmethod
    def of(cls, settings: list[str]) -> Self:
        """Of "name=value" texts; UserError lists the names."""
        found, names = {}, [f.name for f in fields(cls)]
        for setting in settings:
            name, _, value = setting.partition("=")
            if name not in names:
                raise UserError(f"--assume is {setting!r}, accepted: NAME=NUMBER with a name of {', '.join(names)}")
            try:
                found[name] = float(value)
            except ValueError:
                raise UserError(f"--assume is {setting!r}, accepted: a number after {name}=") from None
        return cls(**found)

    def host_seconds(self, sequences: int) -> float:
        """The host's part of a step with so many sequences on all ranks."""
        return self.host_ms / 1e3 + self.host_us / 1e6 * sequences

    def table(self) -> list[dict]:
        """Name, value, default, unit and source of each."""
        return [
            {"name": f.name, "value": getattr(self, f.name), "default": f.default, "unit": f.metadata["unit"],
             "source": f.metadata["source"]}
            for f in fields(self)
        ]  # fmt: skip
