"""GPUs that plans are made for, one row each: what their vendor's data sheets say."""

from dataclasses import dataclass

from latentrt.errors import UserError


@dataclass(frozen=True)
class GpuRow:
    """memory in GB, bandwidth in GB/s (10^9 bytes); products in TFLOPS without sparsity, summed in float32; fp8 may be None."""

    name: str
    target: str  # of export/targets.py
    memory: float
    bandwidth: float
    bf16: float
    fp8: float | None
    source: str


_ADA = "NVIDIA Ada GPU architecture, white paper, table of GeForce RTX GPUs"
_HOPPER = "NVIDIA H100 data sheet, SXM; half of the figures with sparsity"
GPUS = {
    gpu.name: gpu
    for gpu in (
        GpuRow("RTX 3090", "sm86", 24, 936, 71, None, "NVIDIA Ampere GA102 white paper, table of GeForce RTX GPUs"),
        GpuRow("RTX 4090", "sm89", 24, 1008, 165.2, 330.3, _ADA),
        GpuRow("RTX 5090", "sm120", 32, 1792, 209.5, 419, "NVIDIA RTX Blackwell GPU architecture, white paper"),
        GpuRow("L40S", "sm89", 48, 864, 362, 733, "NVIDIA L40S data sheet; half of the figures with sparsity"),
        GpuRow("A100", "sm80", 80, 2039, 312, None, "NVIDIA A100 data sheet, SXM 80 GB"),
        GpuRow("H100", "sm90", 80, 3350, 989, 1979, _HOPPER),
        GpuRow("H800", "sm90", 80, 3350, 989, 1979, f"{_HOPPER}; H800 differs in NVLink and float64 alone"),
        GpuRow("H200", "sm90", 141, 4800, 989, 1979, "NVIDIA H200 data sheet, SXM; half of the figures with sparsity"),
        GpuRow("B200", "sm100", 180, 8000, 2250, 4500, "NVIDIA HGX B200 data sheet, an eighth of it; half of sparse figures"),
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
