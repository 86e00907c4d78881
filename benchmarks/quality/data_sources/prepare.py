"""Writes the data sets of the quality benchmark: one directory each, with `train.jsonl`, `dev.jsonl` and `test.jsonl`.

    python -m benchmarks.quality.data_sources.prepare --output DIR

Data sets that are there already are left alone. Downloads go to `DIR/downloads` and can be deleted afterwards.
"""

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path

from . import debian_section, debian_synopsis, django_french, opening_hours
from .debian_index import Package, parse_packages
from .downloads import PACKAGES, TRANSLATION, check_sha256, read_debian_index, read_wheel
from .splits import Splits, check_splits, is_complete, write_splits

# What `sha256sum` prints for the finished files, in their directory.
CHECKSUMS = Path(__file__).parent / "SHA256SUMS"


@functools.cache
def read_debian(downloads: Path) -> list[Package]:
    """All packages of the archive, read once for two data sets."""
    return parse_packages(read_debian_index(PACKAGES, downloads), read_debian_index(TRANSLATION, downloads))


def build_django_french(downloads: Path) -> Splits:
    paths = [read_wheel(wheel, downloads) for wheel in django_french.WHEELS]
    catalogues = [catalogue for path in paths for catalogue in django_french.read_catalogues(path)]
    return django_french.build_splits(django_french.parse_messages(catalogues))


BUILDERS: dict[str, Callable[[Path], Splits]] = {
    debian_synopsis.NAME: lambda downloads: debian_synopsis.build_splits(read_debian(downloads)),
    django_french.NAME: build_django_french,
    opening_hours.NAME: lambda downloads: opening_hours.build_splits(),
    debian_section.NAME: lambda downloads: debian_section.build_splits(read_debian(downloads)),
}


def prepare_data_set(name: str, output: Path, downloads: Path) -> str:
    """Write one data set unless it is there.

    Args:
        name (`str`): a key of `BUILDERS`.
        output (`Path`): directory of the data sets.
        downloads (`Path`): directory of the downloads.

    Returns:
        `str`: what was done.
    """
    if is_complete(output / name):
        check_files(output, name)
        return f"{name}: is there already"
    downloads.mkdir(parents=True, exist_ok=True)
    splits = BUILDERS[name](downloads)
    check_splits(name, splits)
    write_splits(output / name, splits)
    check_files(output, name)
    return f"{name}: {', '.join(f'{len(rows)} {split}' for split, rows in splits.items())}"


def check_files(output: Path, name: str) -> None:
    """Make sure that a data set is the one that the results were measured on.

    Raises:
        ValueError: naming the first file that is not.
    """
    remedy = (
        f"Delete {output / name} and run again. If that does not help, the rules in {CHECKSUMS.parent.name} have "
        f"changed since {CHECKSUMS.name} was written there."
    )
    for line in CHECKSUMS.read_text(encoding="utf-8").splitlines():
        checksum, file_name = line.split()
        if file_name.startswith(f"{name}/"):
            path = output / file_name
            check_sha256(str(path), path.read_bytes(), checksum, remedy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="directory of the data sets")
    parser.add_argument("--downloads", type=Path, help="directory of the downloads; OUTPUT/downloads by default")
    parser.add_argument("--only", nargs="+", choices=BUILDERS, help="names of data sets; all by default")
    arguments = parser.parse_args()
    downloads = arguments.downloads or arguments.output / "downloads"
    for name in arguments.only or BUILDERS:
        try:
            print(prepare_data_set(name, arguments.output, downloads), flush=True)
        except (OSError, RuntimeError, ValueError) as error:
            sys.exit(f"{name} cannot be prepared: {error}")


if __name__ == "__main__":
    main()
