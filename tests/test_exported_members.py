"""Everything that is exported exists, is sorted, and is documented."""

import dataclasses
import importlib
import inspect
import pkgutil
import re

import pytest

import peft_prefix_plus
from peft_prefix_plus import PrefixPlusConfig, encoders

MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(peft_prefix_plus.__path__, "peft_prefix_plus.")
    if not name.startswith("peft_prefix_plus.cli")
]
packages = pytest.mark.parametrize("package", [peft_prefix_plus, encoders], ids=lambda module: module.__name__)


def isort_key(name: str) -> tuple[int, str]:
    """Constants, classes, functions: the order of ruff's RUF022."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


def list_public(module) -> list[tuple[str, object]]:
    """Classes and functions that a module defines itself."""
    return [
        (name, member)
        for name, member in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(member) or inspect.isfunction(member))
        and member.__module__ == module.__name__
    ]


@packages
def test_all_is_sorted_and_without_repetition(package):
    assert package.__all__ == sorted(set(package.__all__), key=isort_key)


@packages
def test_every_exported_name_can_be_imported(package):
    namespace: dict[str, object] = {}
    exec(f"from {package.__name__} import *", namespace)
    assert set(package.__all__) <= set(namespace)
    assert all(getattr(package, name) is namespace[name] for name in package.__all__)


@packages
def test_nothing_public_is_left_out(package):
    public = {
        name
        for name, member in vars(package).items()
        if not name.startswith("_")
        and (inspect.isclass(member) or inspect.isfunction(member))
        and member.__module__.startswith(package.__name__)
    }
    assert public - {"register"} == {name for name in package.__all__ if not name.isupper()}


@packages
def test_every_exported_name_is_documented(package):
    for name in package.__all__:
        if not name.isupper():
            assert inspect.getdoc(getattr(package, name)), name


def test_the_version_is_a_release():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", peft_prefix_plus.__version__)


@pytest.mark.parametrize("name", MODULES)
def test_modules_and_what_they_define_are_documented(name):
    module = importlib.import_module(name)
    assert module.__doc__, name
    for member_name, member in list_public(module):
        assert member.__doc__ and not member.__doc__.startswith(f"{member_name}("), f"{name}.{member_name}"


def list_documented(text: str) -> set[str]:
    """Names that start an entry of a docstring: `name (`, `name:`, or several before one colon."""
    entries = re.findall(r"^ *((?:\*{0,2}\w+, )*\*{0,2}\w+)(?: \(|:)", text, flags=re.MULTILINE)
    return {name.lstrip("*") for entry in entries for name in entry.split(", ")}


@pytest.mark.parametrize("name", MODULES)
def test_every_argument_that_has_a_docstring_for_it_has_its_own_entry(name):
    for member_name, member in list_public(importlib.import_module(name)):
        inherited = inspect.isclass(member) and "__init__" not in vars(member)
        if "Args:" not in (member.__doc__ or "") or inherited or dataclasses.is_dataclass(member):
            continue
        arguments = set(inspect.signature(member).parameters) - {"self", "args", "kwargs"}
        assert arguments <= list_documented(member.__doc__), f"{name}.{member_name}"


def test_every_field_of_the_configuration_has_its_own_entry_and_help():
    own = set(PrefixPlusConfig.__annotations__)
    assert own <= list_documented(PrefixPlusConfig.__doc__)
    for field in dataclasses.fields(PrefixPlusConfig):
        assert field.name not in own or field.metadata["help"].endswith("."), field.name
