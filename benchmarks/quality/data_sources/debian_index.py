"""Reads package descriptions out of the indices of the Debian archive."""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

# Packages that belong to another one and repeat its text, or have no text worth reading.
DROPPED_NAMES = re.compile(
    r"^lib|^task-|^r-(cran|bioc|other)-|^(golang|node|ruby|php|elpa|librust)-"
    r"|-(dev|dbg|dbgsym|docs?|data|common|examples?|i18n|locales?|l10n(-.*)?|headers|runtime|plugins?|core|bin|base|all)$"
)
DROPPED_SECTIONS = {"debug", "doc", "fonts", "haskell", "introspection", "libdevel", "libs", "localization"} | {
    *("metapackages", "oldlibs", "tasks", "translations")
}
DROPPED_TEXTS = re.compile(r"transitional|dummy package|meta-?package|empty package|debugging symbols", re.IGNORECASE)
BULLET = re.compile(r"^([-*+•o]|\d+[.)])\s+")


class Package(NamedTuple):
    """A binary package with its English description."""

    name: str
    source: str
    section: str
    synopsis: str
    description: str


def parse_stanzas(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """Parse a file of Debian's control format.

    Fields start at the beginning of a line; lines that start with a space or tab continue the field above; an empty
    line ends the stanza.

    Args:
        lines (`Iterable[str]`): with or without line ends.

    Yields:
        `dict[str, str]`: the fields of one stanza. Continuation lines keep their first space.

    Raises:
        ValueError: naming the line, if it is neither.
    """
    stanza: dict[str, list[str]] = {}
    field: list[str] | None = None
    for number, line in enumerate(lines, start=1):
        line = line.rstrip("\r\n")
        if not line.strip():
            if stanza:
                yield {name: "\n".join(values) for name, values in stanza.items()}
            stanza, field = {}, None
        elif line[0] in " \t":
            if field is None:
                raise ValueError(f"Line {number} continues no field: {line!r}.")
            field.append(line)
        else:
            name, colon, value = line.partition(":")
            if not colon:
                raise ValueError(f"Line {number} is neither `Field: value` nor a continuation: {line!r}.")
            field = stanza[name] = [value.strip()]
    if stanza:
        yield {name: "\n".join(values) for name, values in stanza.items()}


def parse_packages(packages: str, translation: str) -> list[Package]:
    """Join the two indices: sections and sources from one, descriptions from the other.

    Args:
        packages (`str`): text of `Packages`.
        translation (`str`): text of `Translation-en`.

    Returns:
        `list[Package]`: sorted by name, each name once. Packages without a long description are left out.
    """
    descriptions = {
        (stanza["Package"], stanza["Description-md5"]): stanza["Description-en"]
        for stanza in parse_stanzas(translation.splitlines())
    }
    found: dict[str, Package] = {}
    for stanza in parse_stanzas(packages.splitlines()):
        name = stanza["Package"]
        text = descriptions.get((name, stanza.get("Description-md5", "")), "")
        synopsis, _, body = text.partition("\n")
        if body and name not in found:
            # `Source` holds a version as well where it differs from the package's.
            source = stanza.get("Source", name).split()[0]
            found[name] = Package(name, source, stanza["Section"], synopsis.strip(), format_description(body))
    return [found[name] for name in sorted(found)]


def format_description(body: str) -> str:
    """Undo the line breaks of a long description.

    Args:
        body (`str`): its lines, each with a leading space; ` .` is an empty line.

    Returns:
        `str`: one line a paragraph, and one a bullet.
    """
    lines: list[str] = []
    joins = False
    for line in body.splitlines():
        text = " ".join(line.split())
        if text in ("", "."):
            joins = False
        elif joins and not BULLET.match(text):
            lines[-1] += " " + text
        else:
            lines.append(text)
            joins = True
    return "\n".join(lines)


def is_program(package: Package) -> bool:
    """Whether a package has a description of its own: no library, data, documentation or transitional package."""
    return (
        package.section not in DROPPED_SECTIONS
        and not DROPPED_NAMES.search(package.name)
        and not DROPPED_TEXTS.search(f"{package.synopsis}\n{package.description}")
    )


def choose_one_per_source(packages: Iterable[Package]) -> list[Package]:
    """Of packages that are built from one source keep the one named like it, else the one with the shortest name."""
    chosen: dict[str, Package] = {}
    for package in sorted(packages, key=lambda p: (p.source, p.name != p.source, len(p.name), p.name)):
        chosen.setdefault(package.source, package)
    return list(chosen.values())
