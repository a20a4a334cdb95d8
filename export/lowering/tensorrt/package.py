"""Which TensorRT package a target needs, whether it is here, and the child process that builds with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import latentrt
from latentrt.export.errors import BuildError

if TYPE_CHECKING:
    from latentrt.export.lowering.tensorrt.build import BuildJob

ROOT = Path(latentrt.__file__).parents[1]  # from where the child finds the package, in a checkout or installed
_LOG_TAIL = 4000  # characters of the child's messages that an error shows


@dataclass(frozen=True)
class Package:
    """A TensorRT package: the module, its distributions on PyPI, and the Python packages whose folders hold the libraries."""

    module: str
    distributions: tuple[str, ...]
    libraries: str
    links: tuple[tuple[str, str], ...]  # (name that is looked for, library's file)


PACKAGES = {
    "tensorrt_rtx": Package(
        "tensorrt_rtx", ("tensorrt-rtx-cu13", "tensorrt-rtx"), "tensorrt_rtx_libs",
        # plugins that come in through the ONNX parser abort the process unless this name resolves
        (("libtensorrt_rtx.so", "libtensorrt_rtx.so.1"),),
    ),
    "tensorrt": Package("tensorrt", ("tensorrt-cu13", "tensorrt"), "tensorrt_libs", ()),
}  # fmt: skip


def require(module: str, target: str) -> str:
    """The installed version of the package that `target` needs. BuildError says what to install, and where."""
    package = PACKAGES[module]
    if find_spec(module) is not None:
        for name in package.distributions:
            try:
                return version(name)
            except PackageNotFoundError:
                continue
        raise BuildError(f"module {module} is there, but none of {', '.join(package.distributions)}: install it with pip")
    if module == "tensorrt_rtx":
        raise BuildError(f"target {target} needs TensorRT-RTX: pip install tensorrt-rtx-cu13 (no GPU needed to build)")
    raise BuildError(
        f"target {target} needs the full TensorRT, which builds on the GPU that it builds for: on a machine with an {target} "
        "GPU, pip install tensorrt-cu13, then run the same command there with the same --out (targets of one bundle add up)"
    )


def require_gpu(target: str, capability: int) -> None:
    """The full TensorRT builds for the GPU that it finds: BuildError unless the first one is `capability`."""
    from cuda.bindings import driver

    try:
        code, *_ = driver.cuInit(0)
    except RuntimeError:  # no libcuda
        code = driver.CUresult.CUDA_ERROR_NO_DEVICE
    if code != driver.CUresult.CUDA_SUCCESS:
        raise BuildError(f"target {target} is built on the GPU itself, and this machine has none ({code.name})")
    _, device = driver.cuDeviceGet(0)
    attribute = driver.CUdevice_attribute
    _, major = driver.cuDeviceGetAttribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
    _, minor = driver.cuDeviceGetAttribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
    if major * 10 + minor != capability:
        raise BuildError(f"target {target} is built on the GPU itself; this machine's is sm{major * 10 + minor}")


def run_all(jobs: Mapping[Path, BuildJob], progress: Callable[[float], None]) -> None:
    """Runs jobs, each in a folder of its own, as many at once as this process has cores; the first error is raised.

    One after another where TensorRT chooses kernels by timing them on the GPU. `progress` gets parts that add up to 1.
    """
    def share(part: float) -> None:
        progress(part / len(jobs))

    if any(job.module == "tensorrt" for job in jobs.values()):
        for folder, job in jobs.items():
            run(job, folder, share)
        return
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for future in [pool.submit(run, job, folder, share) for folder, job in jobs.items()]:
            future.result()


def run(job: BuildJob, folder: Path, progress: Callable[[float], None]) -> None:
    """Builds in a child process. BuildError with the end of its messages if it fails, whatever way it ends.

    `folder` takes the job file and the log. `progress` gets increments that add up to at most 1.
    """
    job_file, log = folder / "job.json", folder / "build.log"
    job.save(job_file)
    command = [sys.executable, "-m", "latentrt.export.lowering.tensorrt.build", str(job_file)]
    with tempfile.TemporaryDirectory() as links, log.open("w") as errors:
        child = subprocess.Popen(
            command, cwd=ROOT, env=_environment(job.module, Path(links)), stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            _follow(child.stdout, progress)
            code = child.wait()
        finally:
            child.kill()
    if code:
        raise BuildError(_failure(job, code, log.read_text(errors="replace")))


def _follow(lines, progress: Callable[[float], None]) -> None:
    furthest = 0.0
    for line in lines:
        fraction = json.loads(line)["fraction"] if line.startswith("{") else 0.0
        if fraction > furthest:
            progress(fraction - furthest)
            furthest = fraction


def _environment(module: str, links: Path) -> dict[str, str]:
    package = PACKAGES[module]
    spec = find_spec(package.libraries)
    libraries = Path(spec.origin).parent if spec and spec.origin else None
    if libraries:
        for name, file in package.links:
            (links / name).symlink_to(libraries / file)
    path = [str(links), os.environ.get("LD_LIBRARY_PATH", "")]
    return os.environ | {"LD_LIBRARY_PATH": ":".join(filter(None, path))}


def _failure(job: BuildJob, code: int, log: str) -> str:
    how = f"was ended by signal {-code}" if code < 0 else f"failed (exit code {code})"
    memory = ", which is what a machine out of memory does" if code == -9 else ""
    tail = log[-_LOG_TAIL:].strip() or "(no messages)"
    return f"{job.module} {how}{memory} while building for sm{job.compute_capability}:\n{tail}"
