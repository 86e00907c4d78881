"""Runs a function in several processes that work together, forked from this one, so that nothing is imported again."""

import os
import socket
import time
from collections.abc import Callable
from typing import Any

# `datasets` and `torch._dynamo` are what accelerate imports late, in every process anew.
import datasets  # noqa: F401
import torch
import torch._dynamo
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from torch import multiprocessing
from torch.multiprocessing.spawn import ProcessException


def run_processes(
    function: Callable[..., None], *args: Any, num_processes: int = 2, time_limit: float = 90.0, **environment: str
) -> None:
    """Run a function in several processes, as a launcher would start them on a CPU, and wait.

    Args:
        function (`Callable`): what every process runs.
        *args: passed to it.
        num_processes (`int`): how many there are.
        time_limit (`float`): seconds after which they are ended.
        **environment: further environment variables.

    Raises:
        RuntimeError: the last line of what went wrong in one of them, and its traceback.
        TimeoutError: if they take too long.
    """
    common = {"WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes, "MASTER_PORT": _find_port()}
    common |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true", "ACCELERATE_TORCH_DEVICE": "cpu"}
    variables = {name: str(value) for name, value in (common | environment).items()}
    context = multiprocessing.start_processes(
        _run, (variables, function, args), nprocs=num_processes, join=False, start_method="fork"
    )
    deadline = time.monotonic() + time_limit
    try:
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{function.__name__} did not end within {time_limit:.0f} seconds.")
    except ProcessException as error:
        log = str(error).strip()
        raise RuntimeError(f"{log.splitlines()[-1]}\n{log}") from None
    finally:
        for process in context.processes:
            process.kill()


def _run(rank: int, variables: dict[str, str], function: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.update(variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    torch.set_num_threads(1)
    # What the process has inherited is about a single one.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    function(*args)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _find_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def pretend_accelerators(kind: DistributedType = DistributedType.MULTI_GPU) -> None:
    """Tell accelerate that these processes have accelerators, without which it turns neither FSDP nor DeepSpeed on.

    The device stays the CPU, and the processes talk through gloo.
    """
    PartialState._reset_state()
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = kind
