"""The modules stand in one order, and import only from those before them."""

import ast
import graphlib
from pathlib import Path

import pytest

import peft_prefix_plus

ROOT = Path(peft_prefix_plus.__file__).parent
ORDER = [
    "peft_type",
    "states",
    "architectures",
    "mixing",
    "encoders",
    "dropout",
    "attention",
    "patterns",
    "weights",
    "base_models",
    "card_text",
    "model_card",
    "config",
    "auxiliary",
    "token_rows",
    "layer",
    "positions",
    "removal",
    "offloading",
    "capture",
    "initialization",
    "folding",
    "targets",
    "injection",
    "combination",
    "checkpoints",
    "hotswap",
    "model",
    "registration",
    "supported",
    "examples",
    "inference",
    "demonstrations",
    "metrics",
    "evaluation",
    "interruption",
    "plotting",
    "report",
    "cli",
]
FILES = {str(path.relative_to(ROOT)): path for path in sorted(ROOT.rglob("*.py"))}
files = pytest.mark.parametrize("file", FILES)

# Every other attribute that may be missing is asked for in architectures/.
LITERAL_GETATTR = {
    # The rule of transformers' functions, repeated for each call, where a lookup in architectures/ would be a detour.
    ("attention/dense.py", "is_causal"),
    ("attention/flash.py", "is_causal"),
    # The name of a function of torch, which says nothing about architectures.
    ("attention/arithmetic.py", "__name__"),
    # The check that a model comes from transformers at all, before architectures/ may look at it.
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


@pytest.mark.parametrize("package", sorted({Path(file).parts[0] for file in FILES if len(Path(file).parts) > 1}))
def test_files_of_a_package_import_one_another_in_one_order(package):
    siblings = {Path(file).stem: file for file in FILES if Path(file).parts[0] == package}
    imports = {
        name: {
            node.module
            for node in ast.walk(parse(file))
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module in siblings
        }
        for name, file in siblings.items()
    }
    graphlib.TopologicalSorter(imports).prepare()
    assert not any("__init__" in imported for imported in imports.values())


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


def list_asked(file: str) -> set[tuple[str, str]]:
    """Attributes that a file asks for by a literal name and with a default."""
    return {
        (file, node.args[1].value)
        for node in ast.walk(parse(file))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "getattr"
        and len(node.args) == 3
        and isinstance(node.args[1], ast.Constant)
    }


@files
def test_only_architectures_asks_for_attributes_that_may_be_missing(file):
    assert file.startswith("architectures") or list_asked(file) <= LITERAL_GETATTR


def test_the_exceptions_are_still_needed():
    assert {
        asked for file in FILES if not file.startswith("architectures") for asked in list_asked(file)
    } == LITERAL_GETATTR
