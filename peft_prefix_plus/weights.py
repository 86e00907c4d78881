"""The weights file of an adapter: where it is and what it holds, found out before any of it is loaded."""

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

# What can become the float32 of a prefix. The floats of 8 bits and less have no arithmetic of their own.
FLOATING_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
# In front of the names in the file of a `PeftModel`, and of the base model's weights inside of one.
PEFT_PREFIX = "base_model.model."
REMEDY = "Download or copy the adapter once more."


class AdapterSource(NamedTuple):
    """Where the configuration of an adapter was read from.

    Attributes:
        model_id (`str`): a directory or a repository of the Hub.
        subfolder (`str`, *optional*): below it.
        download_kwargs (`dict`): for `huggingface_hub.hf_hub_download`.
    """

    model_id: str
    subfolder: str | None
    download_kwargs: dict[str, Any]

    @property
    def folder(self) -> str:
        return self.model_id if self.subfolder is None else os.path.join(self.model_id, self.subfolder)


class TensorInfo(NamedTuple):
    """What a file says about a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str


def halve_exactly(tensor: Tensor) -> Tensor:
    """Return a tensor in half precision if that loses nothing, as with what a model in half precision has computed."""
    if type(tensor) is not Tensor or tensor.dtype != torch.float32 or tensor.is_meta:
        return tensor
    halves = (tensor.to(dtype) for dtype in (torch.bfloat16, torch.float16))
    return next((half for half in halves if torch.equal(half.float(), tensor)), tensor)


def describe_tensors(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    """Return shape and dtype of some tensors."""
    return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def find_local_weights(folder: str) -> str | None:
    """Return the path that PEFT would load the weights from, `None` if there is none.

    Raises:
        ValueError: if it is not a file.
    """
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        path = os.path.join(folder, name)
        if os.path.lexists(path):
            if not os.path.isfile(path):
                raise ValueError(f"{path} is not a file. {REMEDY}")
            return path
    return None


def refuse_pickle(folder: str) -> None:
    """Raise a `ValueError` if the weights that were last written to a folder are a pickle, and remove that."""
    pickled, path = os.path.join(folder, WEIGHTS_NAME), os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    if not os.path.isfile(pickled):
        return
    if os.path.isfile(path) and os.stat(path).st_mtime_ns >= os.stat(pickled).st_mtime_ns:
        return
    os.remove(pickled)
    raise ValueError(
        "PrefixPlus adapters are saved as safetensors only. Leave out `safe_serialization`, or set it to `True`."
    )


def locate_weights(source: AdapterSource) -> str:
    """Return the path of an adapter's weights, downloaded if need be.

    Raises:
        ValueError: if there are none.
    """
    if os.path.isdir(source.folder):
        path = find_local_weights(source.folder)
        if path is not None:
            return path
    else:
        for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
            try:
                downloaded: str = hf_hub_download(
                    source.model_id, name, subfolder=source.subfolder, **source.download_kwargs
                )
                return downloaded
            except EntryNotFoundError:
                continue
    raise ValueError(
        f"There are no weights ({SAFETENSORS_WEIGHTS_NAME}) beside the configuration in {source.folder}. Copy the "
        "whole adapter; or, to make a new prefix by this configuration, use "
        "`dataclasses.replace(config, prefix_is_initialized=False)`."
    )


def read_tensor_infos(path: str) -> dict[str, TensorInfo]:
    """Read what a weights file holds, without the values.

    Args:
        path (`str`): a safetensors file, or one that `torch.save` has written.

    Raises:
        ValueError: if the file is damaged.
    """
    if not path.endswith(".safetensors"):
        return _describe_pickled(path)
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: TensorInfo(tuple(part.get_shape()), _DTYPES.get(part.get_dtype(), part.get_dtype()))
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}). {REMEDY}") from error


def iterate_tensors(path: str) -> Iterator[tuple[str, Tensor]]:
    """Read the tensors of a weights file one by one; its infos must have been read before."""
    if not path.endswith(".safetensors"):
        yield from _load_pickled(path, "cpu").items()
        return
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            yield name, file.get_tensor(name)


def _describe_pickled(path: str) -> dict[str, TensorInfo]:
    infos = describe_tensors(_load_pickled(path, "meta"))
    num_bytes = sum(math.prod(info.shape) * info.dtype.itemsize for info in infos.values())  # type: ignore[union-attr,misc]
    # Strides of zero and compression let a small file hold tensors of any size.
    if num_bytes > os.path.getsize(path):
        raise ValueError(f"{path} has tensors that are larger than the file. {REMEDY}")
    return infos


def _load_pickled(path: str, device: str) -> dict[str, Tensor]:
    """Load what `torch.save` has written: tensors only, nothing that is in the file can run."""
    try:
        loaded = torch.load(path, map_location=device, weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(
            f"{path} is not a complete file of tensors ({str(error).splitlines()[0] if str(error) else error!r}). "
            f"{REMEDY} Better is {SAFETENSORS_WEIGHTS_NAME}, which `save_pretrained` writes by default."
        ) from error
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in loaded.items()
    ):
        raise ValueError(f"{path} must hold a dict of names and tensors. {REMEDY}")
    return loaded
