"""Runs every behaviour with every method and writes comparison.json, or shows single ones: comparison.py NAME."""

import argparse
import contextlib
import importlib.metadata
import json
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from multiprocessing import Process, connection, get_context
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    sys.path[0] = str(Path(__file__).parents[1])

import torch

from behaviours import BEHAVIOURS, METHODS
from behaviours.hub_client import start_client
from behaviours.subjects import warm_up

RESULTS = Path(__file__).with_name("comparison.json")
PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl")
TIME_LIMIT = 120.0
MAX_REASON_LENGTH = 160


class Run(NamedTuple):
    """One behaviour with one method, in a process of its own.

    Attributes:
        name (`str`): the behaviour.
        method (`str`): the method.
        process (`Process`): forked from this one, so that nothing is imported again.
        directory (`Path`): holds `outcome`, once it is known, and `log`.
        deadline (`float`): when the process is ended, by `time.monotonic()`.
    """

    name: str
    method: str
    process: Process
    directory: Path
    deadline: float


def describe_error(error: BaseException, directory: Path) -> str:
    """The first line of an error, without what differs from run to run; a bare assertion is told by its source."""
    lines = str(error).strip().splitlines()
    if lines and lines[0]:
        text = f"{type(error).__name__}: {lines[0]}"
    else:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {frame.line}"
    text = text.replace(str(directory), "DIRECTORY")
    text = re.sub(r"/\S*/site-packages/", "", text)
    text = re.sub(r"0x[0-9a-f]{6,}", "0x...", text)
    return text if len(text) <= MAX_REASON_LENGTH else text[: MAX_REASON_LENGTH - 4] + " ..."


def run_alone(name: str, method: str, directory: Path) -> None:
    """Body of the process: run one behaviour and write what came of it."""
    os.setsid()
    log = os.open(directory / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    place = directory / "work"
    place.mkdir()
    torch.manual_seed(0)
    try:
        BEHAVIOURS[name].check(METHODS[method], place)
        outcome = "pass"
    except BaseException as error:
        traceback.print_exc()
        outcome = f"fail: {describe_error(error, place)}"
    (directory / "outcome").write_text(outcome, encoding="utf-8")
    # Threads and exit handlers of the libraries could wait for one another.
    sys.stderr.flush()
    os._exit(0)


def start(name: str, method: str, root: Path) -> Run:
    """Fork a process for one behaviour."""
    directory = root / f"{name}-{method}"
    directory.mkdir()
    process = get_context("fork").Process(target=run_alone, args=(name, method, directory))
    process.start()
    return Run(name, method, process, directory, time.monotonic() + TIME_LIMIT)


def read_outcome(run: Run) -> str:
    """What came of a run that has ended, or that has to end now, with all processes that it started."""
    has_ended = not run.process.is_alive()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.process.pid, signal.SIGKILL)
    run.process.join()
    written = run.directory / "outcome"
    if written.exists():
        return written.read_text(encoding="utf-8")
    if not has_ended:
        return f"fail: did not end within {TIME_LIMIT:.0f} seconds"
    return f"fail: the process ended with exit code {run.process.exitcode}"


def iterate_outcomes(pairs: list[tuple[str, str]], workers: int, root: Path) -> Iterator[tuple[Run, str]]:
    """Run pairs of behaviour and method, some at the same time, and yield each as it ends."""
    waiting, running = list(reversed(pairs)), []
    while waiting or running:
        while waiting and len(running) < workers:
            running.append(start(*waiting.pop(), root))
        connection.wait([run.process.sentinel for run in running], timeout=1.0)
        for run in list(running):
            if not run.process.is_alive() or time.monotonic() > run.deadline:
                running.remove(run)
                yield run, read_outcome(run)


def write_results(outcomes: dict[str, dict[str, str]]) -> None:
    """Write what came of each behaviour and method."""
    comparison = {
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "behaviours": {
            name: {
                "group": BEHAVIOURS[name].group,
                "title": BEHAVIOURS[name].title,
                "outcomes": {method: outcomes[name][method] for method in METHODS},
            }
            for name in BEHAVIOURS
        },
    }
    RESULTS.write_text(json.dumps(comparison, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Run everything, or what is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="behaviours to run, with their output; nothing is written")
    parser.add_argument("--group", help="behaviours of one group; nothing is written")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    is_partial = bool(arguments.names or arguments.group or arguments.methods != list(METHODS))
    names = arguments.names or [name for name in BEHAVIOURS if arguments.group in (None, BEHAVIOURS[name].group)]
    pairs = [(name, method) for name in names for method in arguments.methods]
    outcomes: dict[str, dict[str, str]] = {name: {} for name in names}
    warm_up()
    # Once, and not in every fork.
    start_client()
    with tempfile.TemporaryDirectory() as root:
        for done, (run, outcome) in enumerate(iterate_outcomes(pairs, arguments.workers, Path(root)), start=1):
            outcomes[run.name][run.method] = outcome
            seconds = time.monotonic() - run.deadline + TIME_LIMIT
            print(f"{done}/{len(pairs)} {run.name}, {run.method}: {outcome} ({seconds:.1f} s)", flush=True)
            if arguments.names and outcome != "pass":
                print((run.directory / "log").read_text(encoding="utf-8", errors="replace"))
    if not is_partial:
        write_results(outcomes)


if __name__ == "__main__":
    main()
