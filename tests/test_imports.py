"""The arrows of docs/ and design.md, read from the sources: who may import what of the project."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("build", "export", "plugins", "runtime", "validation", "tests", "benchmarks", "examples")
# Of plugins, export takes contracts and cache formats; a lowering also what it hands to its backend.
CONTRACTS = ("plugins.contract", "plugins.*.op", "plugins.mla_attention.formats")
DELIVERABLE = ("kernel", "tiles", "plan", "trt", "ort")


def imported(file: Path) -> set[str]:
    """Full names of all modules that a file imports, at the top or inside functions; relative imports resolved."""
    package = file.relative_to(ROOT).with_suffix("").parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            names |= {f"{module}.{a.name}" if is_module(f"{module}.{a.name}") else module for a in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "import_module":
            names |= {first_text(node.args[0])} - {""}
    return {n for n in names if n.split(".")[0] in PACKAGES}


def first_text(node: ast.expr) -> str:
    """The constant beginning of a module name: "export.lowering." of f"export.lowering.{name}"."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return parts[0].value.rstrip(".") if isinstance(parts[0], ast.Constant) else ""


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def sources(folder: str) -> list[Path]:
    return sorted(f for f in (ROOT / folder).rglob("*.py"))


def strangers(folder: str, allowed: tuple[str, ...], skip: str = "") -> list[str]:
    """Imports of the project from `folder` that no pattern allows."""
    return [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in sources(folder)
        if not skip or skip not in file.parts
        for name in sorted(imported(file))
        if not any(fits(name, pattern) for pattern in allowed)
    ]


def fits(name: str, pattern: str) -> bool:
    """`a.*.b` fits one part in between; a pattern also fits what lies below it."""
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) >= len(wanted) and all(w in ("*", p) for p, w in zip(parts, wanted, strict=False))


def test_there_is_something_to_guard():
    assert all(sources(folder) for folder in ("export", "plugins", "runtime", "validation"))
    assert "plugins.mla_attention.op" in imported(ROOT / "export" / "models" / "deepseek_v2.py")
    assert "plugins.moe_route.reference" in imported(ROOT / "plugins" / "moe_route" / "op.py")  # inside a function


def test_plugins_import_plugins_only():
    assert strangers("plugins", ("plugins",)) == []


def test_runtime_imports_plugins_but_never_export():
    assert strangers("runtime", ("runtime", "plugins")) == []


def test_export_imports_contracts_only():
    assert strangers("export", ("export", *CONTRACTS), skip="lowering") == []


def test_lowerings_import_what_backends_are_given():
    shared = ("plugins.compile", "plugins.architecture", "plugins.launch", "plugins.onnx_function", "plugins.trt",
              "plugins.trt_base")  # fmt: skip
    assert strangers("export/lowering", ("export", *CONTRACTS, *(f"plugins.*.{d}" for d in DELIVERABLE), *shared)) == []


def test_validation_imports_export_and_runtime():
    assert strangers("validation", ("validation", "export", "runtime", "plugins")) == []


@pytest.mark.parametrize("folder", ["export", "plugins", "runtime", "validation"])
def test_nobody_imports_the_top(folder):
    """build.py is the composition root; validation judges and is used by no one; tests and benchmarks are leaves."""
    tops = ("build", "tests", "benchmarks", "examples") + (() if folder == "validation" else ("validation",))
    found = [f"{f.relative_to(ROOT)}: {n}" for f in sources(folder) for n in imported(f) if n.split(".")[0] in tops]
    assert found == []
