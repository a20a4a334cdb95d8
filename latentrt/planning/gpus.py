"""GPUs that plans are made for, one row each. `source` says where its figures were read, and what was only remembered."""

from dataclasses import dataclass

from latentrt.errors import UserError


@dataclass(frozen=True)
class GpuRow:
    """memory in GB, bandwidth in GB/s (10^9 bytes); products in TFLOPS without sparsity, summed in float32; fp8 may be None.

    link: GB/s between one GPU and all others of its node, both directions together, over NVLink or else PCIe x16.
    """

    name: str
    target: str  # of export/targets.py
    memory: float
    bandwidth: float
    bf16: float
    fp8: float | None
    link: float  # from memory, of all rows
    source: str


_READ = "a third party's copy of the data sheet, read 2026-11-27"
_MEMORY = "from memory, not read again"
_HOPPER = f"{_READ}: half of the figures with sparsity"
_BLACKWELL = f"{_READ}: memory, and sparse FP16 with FP16 sums, of which bf16 is a quarter and FP8 a half"
GPUS = {
    gpu.name: gpu
    for gpu in (
        GpuRow("RTX 3090", "sm86", 24, 936, 71, None, 64, _MEMORY),
        GpuRow("RTX 4090", "sm89", 24, 1008, 165.2, 330.3, 64, _READ),
        GpuRow("RTX 5090", "sm120", 32, 1792, 209.5, 419, 128, _BLACKWELL),
        GpuRow("L40S", "sm89", 48, 864, 362, 733, 64, _HOPPER),
        GpuRow("A100", "sm80", 80, 2039, 312, None, 600, _MEMORY),
        GpuRow("H100", "sm90", 80, 3350, 989, 1979, 900, _HOPPER),
        GpuRow("H800", "sm90", 80, 3350, 989, 1979, 400, f"as H100, {_MEMORY}: it differs in NVLink and float64 alone"),
        GpuRow("H200", "sm90", 141, 4800, 989, 1979, 900, _HOPPER),
        GpuRow("B200", "sm100", 180, 8000, 2250, 4500, 1800, f"{_READ}: memory, bandwidth, FP8; bf16 is half of FP8"),
    )
}


def _plain(gpu: GpuRow) -> str:
    return gpu.name.lower().replace(" ", "")


def chosen(names: list[str] | None) -> list[GpuRow]:
    """The rows that `names` name, by target ("sm89"), name or its end ("4090"); all for None. UserError lists the choices."""
    if not names:
        return list(GPUS.values())
    found = []
    for name in names:
        asked = name.lower().replace(" ", "")
        rows = [g for g in GPUS.values() if asked == g.target or (len(asked) > 2 and _plain(g).endswith(asked))]
        if not rows:
            targets = dict.fromkeys(g.target for g in GPUS.values())
            raise UserError(f"--target is {name!r}, accepted: {', '.join((*targets, *GPUS))}")
        found += [row for row in rows if row not in found]
    return found
