"""A process of its own whose Hub is on loopback: `huggingface_hub` reads the address once, when it is imported."""

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

TOKEN = "hf_" + "OwnerOfEverythingOnLoopback00000"
STRANGER_TOKEN = "hf_" + "SomebodyElseEntirelyOnLoopback00"
OWNER = "owner"
_MARK = "PREFIX_PLUS_HUB_DIRECTORY"
_UNWANTED = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE")


class _Process:
    """The process, and the directory that it keeps everything in. It ends when the last one that knows it does."""

    def __init__(self) -> None:
        root = Path(tempfile.mkdtemp(prefix="hub-"))
        environment = {name: value for name, value in os.environ.items() if name not in _UNWANTED}
        environment |= {
            _MARK: str(root),
            "HF_HOME": str(root / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "PYTHONPATH": os.pathsep.join(str(Path(path).resolve()) for path in sys.path if path),
            # Everything that the libraries may write is written, to be searched for tokens.
            "HF_DEBUG": "1",
            "HF_HUB_VERBOSITY": "debug",
            "TRANSFORMERS_VERBOSITY": "debug",
        }
        self.address = str(root / "socket")
        with open(root / "log", "wb") as log:
            command = [sys.executable, __file__]
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=root,
                # Whoever ends a group of processes must not end this one while it cleans up.
                start_new_session=True,
            )
        while not Path(self.address).exists():
            if self.process.poll() is not None:
                raise RuntimeError(f"The client of the Hub did not start: {(root / 'log').read_text()}")
            time.sleep(0.05)


@functools.cache
def start_client() -> _Process:
    """Start the process, once; processes that are forked later share it."""
    return _Process()


def in_client(function: Callable[..., None]) -> Callable[..., None]:
    """Run a function of a module in the process whose Hub is on loopback; what it raises is raised here."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> None:
        if _MARK in os.environ:
            function(*args, **kwargs)
            return
        with Client(start_client().address) as connection:
            connection.send((function.__module__, function.__qualname__, args, kwargs))
            outcome, text = connection.recv()
        if text is not None:
            with contextlib.suppress(Exception):
                outcome = pickle.loads(outcome)
            if not isinstance(outcome, BaseException):
                outcome = RuntimeError(text.strip().splitlines()[-1])
            outcome.add_note(text)
            raise outcome

    return call


def get_hub() -> Any:
    """The server, for what runs in the process."""
    return sys.modules["behaviours.hub_server"].HubServer.running


def get_directory() -> Path:
    """Where the process keeps its log and its cache, for what runs in the process."""
    return Path(os.environ[_MARK])


def _answer(connection: Any) -> None:
    try:
        module, name, args, kwargs = connection.recv()
        getattr(importlib.import_module(module), name)(*args, **kwargs)
    except BaseException as error:
        try:
            pickled = pickle.dumps(error)
        except Exception:
            pickled = b""
        connection.send((pickled, traceback.format_exc()))
    else:
        connection.send((b"", None))


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    shutil.rmtree(get_directory(), ignore_errors=True)
    os._exit(0)


def _start_server() -> None:
    """Start the Hub before anything imports `huggingface_hub`, as the package of this module would."""
    name, path = "behaviours.hub_server", Path(__file__).with_name("hub_server.py")
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    server = sys.modules[name].HubServer({TOKEN: OWNER, STRANGER_TOKEN: "stranger"})
    os.environ["HF_ENDPOINT"] = server.url


def main() -> None:
    """Body of the process: run one function after the other."""
    logging.basicConfig(level=logging.DEBUG)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _start_server()
    socket = get_directory() / "socket"
    with Listener(str(socket.with_name("unnamed-socket")), backlog=16) as listener:
        # A socket's file is there before it takes connections: its name appears once it does.
        socket.with_name("unnamed-socket").rename(socket)
        while True:
            with listener.accept() as connection:
                _answer(connection)


if __name__ == "__main__":
    # The directory of this file holds parts of a package, not modules.
    sys.path.pop(0)
    main()
