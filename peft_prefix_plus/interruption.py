"""Which checkpoint an interrupted training run can go on from."""

import json
import os
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

_CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
# `Trainer` writes these files in this order, behind the adapter; the last one means that all of them are there.
_STATE_FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
# Where other files stand for some of those: DeepSpeed and FSDP, and several processes.
_STAND_INS = {
    "optimizer.pt": ("global_step*", "optimizer_*", "optimizer.bin"),
    "scheduler.pt": ("global_step*",),
    "rng_state.pth": ("rng_state_*.pth",),
}


def find_last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """Find the newest checkpoint of an adapter from which training goes on as if it had never stopped.

    A run that is killed while it saves leaves a checkpoint behind that is not complete. `Trainer` would pick it, as
    its number is the highest, and stop with an error about one of its files.

    Args:
        output_dir (`str` or `os.PathLike`): `output_dir` of the `TrainingArguments`.

    Returns:
        `str`, *optional*: for `trainer.train(resume_from_checkpoint=...)`; `None`, which starts a new run there, if
        there is no complete checkpoint. A warning names those that are passed over.
    """
    for checkpoint in _list_checkpoints(Path(output_dir)):
        problem = find_checkpoint_damage(checkpoint)
        if problem is None:
            return str(checkpoint)
        warnings.warn(f"{checkpoint} is passed over: {problem}", stacklevel=2)
    return None


def find_checkpoint_damage(checkpoint: str | os.PathLike[str]) -> str | None:
    """Say what a checkpoint of an adapter lacks, or which of its files was cut off; `None` if all is well.

    Args:
        checkpoint (`str` or `os.PathLike`): directory that a `Trainer` wrote. Tensors are not read, only looked for.

    Returns:
        `str`, *optional*
    """
    directory = Path(checkpoint)
    if not directory.is_dir():
        return "it is no directory."
    for name in _STATE_FILES:
        stand_ins = (path for pattern in _STAND_INS.get(name, ()) for path in directory.glob(pattern))
        if not (directory / name).is_file() and next(stand_ins, None) is None:
            return f"it has no {name}."
    problem = _find_missing_adapter_file(directory)
    if problem is not None:
        return problem
    for path in _list_files(directory):
        problem = _find_file_damage(path)
        if problem is not None:
            return f"{path.relative_to(directory)} is not complete ({problem})."
    return None


def _find_missing_adapter_file(directory: Path) -> str | None:
    """An adapter is a configuration and its weights; adapters that are not named `default` have their own folders."""
    folders = [directory, *(path for path in directory.iterdir() if path.is_dir())]
    found = 0
    for folder in folders:
        has_config = (folder / CONFIG_NAME).is_file()
        has_weights = any((folder / name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))
        if has_config != has_weights:
            missing = folder / (SAFETENSORS_WEIGHTS_NAME if has_config else CONFIG_NAME)
            return f"it has no {missing.relative_to(directory)}."
        found += has_config
    return None if found else f"it has no {SAFETENSORS_WEIGHTS_NAME}."


def _list_checkpoints(output_dir: Path) -> list[Path]:
    """The newest first."""
    if not output_dir.is_dir():
        return []
    found = [(match, path) for path in output_dir.iterdir() if (match := _CHECKPOINT_NAME.fullmatch(path.name))]
    return [path for match, path in sorted(found, key=lambda pair: -int(pair[0].group(1))) if path.is_dir()]


def _list_files(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.rglob("*")) if path.is_file())


def _find_file_damage(path: Path) -> str | None:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix in (".pt", ".pth"):
            # The directory of these archives is at their end.
            with zipfile.ZipFile(path):
                pass
    except (SafetensorError, ValueError, zipfile.BadZipFile, OSError) as error:
        return str(error) or type(error).__name__
    return None
