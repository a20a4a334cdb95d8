"""The GPU architectures kernels are compiled for, one row each. No heavy imports."""

from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Architecture:
    """One CUDA compute capability (89 for 8.9) and what a kernel may use on it."""

    capability: int
    shared_bytes: int  # dynamic shared memory a block may ask for
    num_sms: int  # of the GPU most often met; a plan may be given another number
    float8: bool  # FP8 tensor cores
    mma: dict[str, str]  # product kind -> SASS instruction that its tensor cores run


_SYNC = {"f16_sync": "HMMA"}  # on registers, by warps: every architecture still has these
_HMMA = _SYNC | {"f16": "HMMA"}
_QMMA = _HMMA | {"fp8": "QMMA"}

ARCHITECTURES: dict[int, Architecture] = {
    a.capability: a
    for a in (
        Architecture(80, 163 * KIB, 108, False, _HMMA),
        Architecture(86, 99 * KIB, 84, False, _HMMA),
        Architecture(89, 99 * KIB, 128, True, _QMMA),
        Architecture(90, 227 * KIB, 132, True, _SYNC | {"f16": "HGMMA", "fp8": "QGMMA"}),
        Architecture(100, 227 * KIB, 148, True, _SYNC | {"f16": "UTCHMMA", "fp8": "UTCQMMA"}),
        Architecture(103, 227 * KIB, 160, True, _SYNC | {"f16": "UTCHMMA", "fp8": "UTCQMMA"}),
        Architecture(120, 99 * KIB, 170, True, _QMMA),
        Architecture(121, 99 * KIB, 48, True, _QMMA),
    )
}


def get(capability: int) -> Architecture:
    """The row of `capability`; ValueError lists the choices."""
    if capability not in ARCHITECTURES:
        raise ValueError(f"unknown compute capability {capability!r}, accepted: {', '.join(map(str, ARCHITECTURES))}")
    return ARCHITECTURES[capability]


@dataclass(frozen=True)
class Gpu:
    """The GPU a plan is made for: grids follow its number of multiprocessors, tiles its capability."""

    capability: int
    num_sms: int

    @classmethod
    def of(cls, capability: int, num_sms: int | None = None) -> "Gpu":
        """The usual GPU of `capability`, or one with `num_sms` multiprocessors."""
        return cls(capability, num_sms or get(capability).num_sms)
