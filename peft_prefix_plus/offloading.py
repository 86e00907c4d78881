"""Lets PEFT put a model back to the disk that it has loaded an adapter onto."""

import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .architectures import is_on_disk, runs_offloaded
from .weights import PEFT_PREFIX

# What accelerate knows about weights on the disk: by name, the file, the name in it, and the dtype.
OffloadIndex = dict[str, dict[str, str]]


def check_loader(model: nn.Module, is_saved: bool) -> None:
    """Refuse an adapter from the loader of transformers, which leaves out what belongs to modules on the disk.

    `PeftModel.from_pretrained` takes the hooks off before it adds the adapter; here they are still there.

    Args:
        model (`nn.Module`): the base model, to which a first adapter is added.
        is_saved (`bool`): whether the weights of the adapter come from a file.

    Raises:
        ValueError: if a saved adapter meets a model that runs from the disk.
    """
    if is_saved and is_on_disk(model) and runs_offloaded(model):
        raise ValueError(
            "Parts of the model are offloaded to the disk, where transformers' `load_adapter` does not load adapters "
            "correctly. Use `PeftModel.from_pretrained(model, adapter_dir, device_map=..., offload_folder=...)`."
        )


def follow_offloading(model: nn.Module) -> None:
    """Teach a `PeftModel` where its offloaded weights are, now that attention modules have a layer around them.

    PEFT expects tuner layers around modules that hold the weights themselves, and copies the files of the base model.
    The weights of the base model stay where they are; those of the prefix go to a file that is removed with the model.

    Args:
        model (`nn.Module`): any other model, or one that is not on the disk, is left alone.
    """
    if not isinstance(model, PeftModel) or not is_on_disk(model):
        return
    directory = tempfile.mkdtemp(prefix="prefix-plus-offload-")
    weakref.finalize(model, shutil.rmtree, directory, ignore_errors=True)

    def update(offload_index: OffloadIndex | None, adapters_weights: Mapping[str, Tensor]) -> OffloadIndex | None:
        if offload_index:
            parameters = dict(model.named_parameters())
            _rename(offload_index, list(parameters))
            _add_prefixes(offload_index, parameters, os.path.join(directory, "prefixes.safetensors"))
        return offload_index

    model._update_offload = update


def _rename(offload_index: OffloadIndex, names: list[str]) -> None:
    """Give the weights of the base model the names that they have by now, in place."""
    current = {name.removeprefix(PEFT_PREFIX).replace(".base_layer.", "."): name for name in names}
    for old, entry in list(offload_index.items()):
        with safe_open(entry["safetensors_file"], framework="pt") as file:
            saved = [name for name in file.keys() if name == old or old.endswith(f".{name}")]  # noqa: SIM118
        del offload_index[old]
        offload_index[current[old]] = entry | {"weight_name": saved[0] if saved else old}


def _add_prefixes(offload_index: OffloadIndex, parameters: Mapping[str, Any], path: str) -> None:
    """Write the parameters of the prefixes to a file, and their place to the index."""
    own = {name: tensor.detach().contiguous() for name, tensor in parameters.items() if ".prefix_plus_" in name}
    save_file(own, path)
    for name, tensor in own.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        offload_index[name] = {"safetensors_file": path, "weight_name": name, "dtype": dtype}
