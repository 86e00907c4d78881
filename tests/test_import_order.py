"""The modules stand in one order, and import only from those before them."""

import ast
from pathlib import Path

import pytest

import peft_prefix_plus

ROOT = Path(peft_prefix_plus.__file__).parent
ORDER = [
    "peft_type",
    "states",
    "geometry",
    "encoders",
    "dropout",
    "attention",
    "config",
    "layer",
    "positions",
    "capture",
    "initialization",
    "folding",
    "injection",
    "checkpoints",
    "model",
    "registration",
    "examples",
    "metrics",
    "evaluation",
    "base_models",
    "plotting",
    "report",
    "cli",
]
FILES = {str(path.relative_to(ROOT)): path for path in sorted(ROOT.rglob("*.py"))}
files = pytest.mark.parametrize("file", FILES)

# Every other attribute that may be missing is asked for in geometry.py, which knows architectures.
LITERAL_GETATTR = {
    # The rule of `sdpa_attention_forward`, repeated for each call, where a lookup in geometry.py would be a detour.
    ("attention.py", "is_causal"),
    # The check that a model comes from transformers at all, before geometry.py may look at it.
    ("injection.py", "config"),
}


def parse(file: str) -> ast.Module:
    return ast.parse(FILES[file].read_text(encoding="utf-8"))


def name_module(file: str) -> str:
    """`encoders/base.py` belongs to `encoders`."""
    return Path(file).parts[0].removesuffix(".py")


def list_own_imports(file: str) -> set[str]:
    """Modules of the package that a file imports from, as they stand in `ORDER`."""
    package = ["peft_prefix_plus", *Path(file).parts[:-1]]
    imported = set()
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        imported |= {name.split(".")[1] for name in names if name.startswith("peft_prefix_plus.")}
    return imported


def test_every_module_has_its_place():
    assert {name_module(file) for file in FILES} - {"__init__"} == set(ORDER)


@files
def test_modules_import_only_from_those_before_them(file):
    module, imported = name_module(file), list_own_imports(file) - {"__version__"}
    if module == "__init__":
        return
    later = {name for name in imported if name not in ORDER or ORDER.index(name) > ORDER.index(module)}
    inside = Path(file).parent.name == module
    assert not later and (inside or module not in imported)


@files
def test_functions_import_nothing(file):
    functions = (node for node in ast.walk(parse(file)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    lines = [
        inner.lineno
        for function in functions
        for inner in ast.walk(function)
        if isinstance(inner, ast.Import | ast.ImportFrom)
    ]
    assert not lines


@files
def test_only_geometry_asks_for_attributes_that_may_be_missing(file):
    asked = {
        (file, node.args[1].value)
        for node in ast.walk(parse(file))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "getattr"
        and len(node.args) == 3
        and isinstance(node.args[1], ast.Constant)
    }
    assert file == "geometry.py" or asked <= LITERAL_GETATTR


def test_the_exceptions_are_still_needed():
    for file, name in LITERAL_GETATTR:
        assert f'getattr(module, "{name}"' in FILES[file].read_text() or f'"{name}", None)' in FILES[file].read_text()
