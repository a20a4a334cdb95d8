"""The installed package: one import package, complete, which builds and generates from another folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("export", "plugins", "runtime", "validation")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """site-packages with the wheel of this checkout in it, and nothing else."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    source.mkdir()
    for name in ("latentrt", *ROOMS):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("build.py", "setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("latentrt-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site-packages")
    return folder / "site-packages"


def test_there_is_one_import_package_and_it_is_complete(installed):
    assert {p.name for p in installed.iterdir() if not p.name.endswith(".dist-info")} == {"latentrt"}
    mine = {Path("latentrt") / f.relative_to(ROOT / "latentrt") for f in (ROOT / "latentrt").rglob("*.py")}
    mine |= {Path("latentrt") / f.relative_to(ROOT) for room in ROOMS for f in (ROOT / room).rglob("*.py")}
    mine |= {Path("latentrt") / f.relative_to(ROOT) for room in ROOMS for f in (ROOT / room).rglob("*.j2")}
    mine |= {Path("latentrt") / f.relative_to(ROOT) for f in (ROOT / "plugins" / "cpu" / "native").iterdir()}
    mine.add(Path("latentrt/runtime/server/page.html"))
    assert {f.relative_to(installed) for f in installed.rglob("*") if f.is_file() and "dist-info" not in str(f)} == mine
    assert "latentrt = latentrt.cli:run" in next(installed.glob("*.dist-info/entry_points.txt")).read_text()


def latentrt(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The command, as the installed package alone gives it."""
    cwd.mkdir(exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, "-m", "latentrt", *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_the_children_of_an_install_find_it(installed, tmp_path):
    """Kernels are compiled in child processes: they must not need the checkout."""
    code = "import latentrt, sys; from latentrt.plugins.launch import compile; print(latentrt.__file__, compile.PLUGINS)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(installed)})  # fmt: skip
    assert done.stdout.split() == [str(installed / "latentrt" / "__init__.py"), str(installed / "latentrt" / "plugins")]


@pytest.mark.slow
def test_build_and_generate_from_another_folder(installed, tiny_checkpoint, tmp_path):
    built = latentrt(installed, tmp_path / "elsewhere", "build", str(tiny_checkpoint), "--precision", "fp32", "--out", "B")
    assert built.returncode == 0, built.stderr
    done = latentrt(installed, tmp_path / "elsewhere", "generate", "B", "--prompt", "ab", "--max-new-tokens", "4")
    assert done.returncode == 0 and "4 new" in done.stderr, done.stderr


@pytest.mark.parametrize("command", [["-m", "latentrt"], ["build.py"]])
def test_a_checkout_needs_no_install(command, tmp_path):
    done = subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Usage: latentrt" in done.stdout
