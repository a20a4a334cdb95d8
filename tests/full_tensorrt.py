"""The full `tensorrt` package's bindings on top of TensorRT-RTX's libraries, for child processes without a GPU."""

import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

LINKS = (
    ("libnvinfer.so.11", "libtensorrt_rtx.so.1"), ("libtensorrt_rtx.so", "libtensorrt_rtx.so.1"),
    ("libnvonnxparser.so.11", "libtensorrt_onnxparser_rtx.so.1"),
)  # fmt: skip


def require() -> None:
    """Skips the module where a part is missing."""
    pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx-cu13: its libraries do the work")
    # not importorskip: importing it looks for libraries that only the child process has
    if find_spec("tensorrt_bindings") is None:
        pytest.skip("pip install tensorrt-cu13-bindings (requirements-dev.txt)", allow_module_level=True)
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc for a stub of libnvinfer_plugin", allow_module_level=True)


def install(folder: Path, links: bool = False) -> dict[str, str]:
    """Writes module `tensorrt` into `folder`; the environment that a child needs. links: the libraries' too."""
    (folder / "site" / "tensorrt").mkdir(parents=True)
    (folder / "site" / "tensorrt" / "__init__.py").write_text("from tensorrt_bindings import *\n")
    stub = "int initLibNvInferPlugins(void* logger, const char* name) { return 1; }"
    command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(folder / "libnvinfer_plugin.so.11")]
    subprocess.run(command, input=stub, text=True, check=True)
    libraries = Path(find_spec("tensorrt_rtx_libs").origin).parent
    for name, file in LINKS if links else ():
        (folder / name).symlink_to(libraries / file)
    return {"PYTHONPATH": str(folder / "site"), "LD_LIBRARY_PATH": str(folder)}
