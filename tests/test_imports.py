"""The arrows of docs/ and design.md, read from the sources: who may import what of the project."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("export", "plugins", "runtime", "validation")
EVERYWHERE = ("latentrt.errors",)
CONTRACTS = ("plugins.contract", "plugins.*.op", "plugins.ops", "plugins.step_graph", "plugins.cache_formats")
DELIVERABLE = ("kernel", "tiles", "plan", "trt", "ort")


def imported(file: Path) -> set[str]:
    """Full names of all modules that a file imports, at the top or inside functions, without "latentrt." before a room."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {n if is_module(n := f"{node.module}.{a.name}") else node.module for a in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "import_module":
            names |= {first_text(node.args[0])} - {""}
    mine = {n for n in names if n.split(".")[0] in ("latentrt", "tests", "benchmarks", "examples", *ROOMS)}
    return {re.sub(rf"^latentrt\.(?=({'|'.join(ROOMS)})\b)", "", n) for n in mine}


def first_text(node: ast.expr) -> str:
    """The constant beginning of a module name: "export.lowering." of f"export.lowering.{name}"."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return parts[0].value.rstrip(".") if isinstance(parts[0], ast.Constant) else ""


def is_module(name: str) -> bool:
    parts = name.split(".")
    parts = parts[1:] if parts[0] == "latentrt" and parts[1] in ROOMS else parts
    path = ROOT.joinpath(*parts)
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def sources(folder: str) -> list[Path]:
    """All modules; `python -m <folder>` hands over to the command line, which is above everything."""
    return sorted(f for f in (ROOT / folder).rglob("*.py") if f.name != "__main__.py" or folder == "latentrt")


def strangers(folder: str, allowed: tuple[str, ...], skip: str = "") -> list[str]:
    """Imports of the project from `folder` that no pattern allows."""
    return [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in sources(folder)
        if not skip or skip not in file.parts
        for name in sorted(imported(file))
        if not any(fits(name, pattern) for pattern in (*allowed, *EVERYWHERE))
    ]


def fits(name: str, pattern: str) -> bool:
    """`a.*.b` fits one part in between; a pattern also fits what lies below it."""
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) >= len(wanted) and all(w in ("*", p) for p, w in zip(parts, wanted, strict=False))


def test_there_is_something_to_guard():
    assert all(sources(folder) for folder in ROOMS)
    assert "plugins.mla_attention.op" in imported(ROOT / "export" / "models" / "deepseek_v2" / "model.py")
    assert "plugins.moe_route.reference" in imported(ROOT / "plugins" / "moe_route" / "op.py")  # inside a function


def test_no_room_is_imported_by_its_bare_name():
    """`import runtime` beside `import latentrt.runtime` would load everything twice, and register the ops twice."""
    bare = re.compile(rf"^\s*(?:from|import) (?:{'|'.join(ROOMS)}|build)\b|import_module\(f?[\"'](?:{'|'.join(ROOMS)})\b", re.M)
    others = {".venv", ".venv-clients", "build"}
    files = [f for f in ROOT.rglob("*.py") if not others & {*f.relative_to(ROOT).parts}]
    assert [f"{f.relative_to(ROOT)}: {m[0].strip()}" for f in files for m in bare.finditer(f.read_text())] == []


def test_plugins_import_plugins_only():
    assert strangers("plugins", ("plugins", "latentrt")) == []
    ours = [n for f in sources("plugins") for n in imported(f) if fits(n, "latentrt")]
    assert set(ours) <= {"latentrt", *EVERYWHERE}


def test_runtime_imports_plugins_but_never_export():
    assert strangers("runtime", ("runtime", "plugins")) == []


def test_export_imports_contracts_only():
    assert strangers("export", ("export", *CONTRACTS), skip="lowering") == []


def test_lowerings_import_what_backends_are_given():
    shared = ("plugins.architecture", "plugins.launch", "plugins.onnx_function", "plugins.trt_base")
    mine = ("export", *CONTRACTS, *(f"plugins.*.{d}" for d in DELIVERABLE), *shared, "latentrt")
    assert strangers("export/lowering", mine) == []


def test_only_the_family_knows_itself():
    """A new family is a folder and a row: nothing else of export, and nothing of runtime, imports one."""
    inside = ROOT / "export" / "models" / "deepseek_v2"
    files = [f for room in ("export", "runtime", "plugins") for f in sources(room) if inside not in f.parents]
    assert [f"{f}: {n}" for f in files for n in imported(f) if fits(n, "export.models.deepseek_v2")] == []


def test_validation_imports_export_and_runtime():
    assert strangers("validation", ("validation", "export", "runtime", "plugins")) == []


@pytest.mark.parametrize("folder", ROOMS)
def test_nobody_imports_the_top(folder):
    """latentrt/ composes; validation judges and is used by no one; tests and benchmarks are leaves."""
    tops = ("tests", "benchmarks", "examples", "latentrt.builder", "latentrt.cli", "latentrt.commands")
    tops += () if folder == "validation" else ("validation",)
    assert [f"{f}: {n}" for f in sources(folder) for n in imported(f) if any(fits(n, top) for top in tops)] == []
