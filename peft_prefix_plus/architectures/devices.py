"""Where modules compute, and whether their weights are there."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

META = torch.device("meta")


def find_device(module: nn.Module) -> torch.device:
    """Find the device that a module computes on.

    Weights that accelerate offloads are on the meta device between two forwards; its hooks know where they will be.

    Args:
        module (`nn.Module`): a module with parameters.

    Returns:
        `torch.device`: the meta device only if the weights have not been loaded at all.
    """
    for parameter in module.parameters():
        if parameter.device != META:
            return parameter.device
    for part in module.modules():
        for hook in _list_hooks(part):
            if getattr(hook, "execution_device", None) is not None:
                return torch.device(hook.execution_device)
    return META


def find_missing_weights(model: nn.Module) -> list[str]:
    """Name the parameters of a model that hold no values and that no hook will bring."""
    missing: list[str] = []
    covered: tuple[str, ...] = ()
    for name, module in model.named_modules():
        hooks = [hook for hook in _list_hooks(module) if getattr(hook, "offload", False)]
        if any(hook.place_submodules for hook in hooks):
            covered = (*covered, f"{name}." if name else "")
        if hooks or (covered and f"{name}.".startswith(covered)):
            continue
        missing += [
            f"{name}.{own}" if name else own
            for own, parameter in module.named_parameters(recurse=False)
            if parameter.device == META
        ]
    return missing


def creates_empty_parameters() -> bool:
    """Whether new parameters go to the meta device: PEFT's `low_cpu_mem_usage=True` asks accelerate for that."""
    return nn.Linear(1, 1).weight.device == META


def is_on_disk(model: nn.Module) -> bool:
    """Whether parts of a model were mapped to the disk when it was loaded."""
    return "disk" in getattr(model, "hf_device_map", {}).values()


def runs_offloaded(model: nn.Module) -> bool:
    """Whether hooks of accelerate bring weights of a model for the time of a forward."""
    return any(getattr(hook, "offload", False) for module in model.modules() for hook in _list_hooks(module))


def fetch_offloaded(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace what is on the meta device, because accelerate has offloaded it, by its values.

    Args:
        model (`nn.Module`): what the tensors belong to.
        tensors (`Mapping[str, torch.Tensor]`): parameters and buffers by their names in the model.

    Returns:
        `dict[str, torch.Tensor]`: the same names; what no hook knows stays as it is.
    """
    fetched = dict(tensors)
    for name in (name for name, tensor in tensors.items() if tensor.device == META):
        owner, _, own = name.rpartition(".")
        for hook in _list_hooks(model.get_submodule(owner)):
            if getattr(hook, "offload", False):
                fetched[name] = hook.weights_map[own]
    return fetched


def _list_hooks(module: nn.Module) -> list[Any]:
    """The hooks of accelerate on a module; a chain of hooks in its parts."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


@contextmanager
def gather_weights(model: PreTrainedModel) -> Iterator[None]:
    """Let a model run whose weights DeepSpeed has partitioned over processes, and which it has not wrapped yet.

    The layers that the model never splits gather their weights for the time of their forward; what is left, such as
    the embeddings, stays gathered for the whole context. Other models are left alone.

    Args:
        model (`PreTrainedModel`): the base model; all processes have to enter.
    """
    partitioned = {parameter: None for parameter in model.parameters() if _is_partitioned(parameter)}
    layers = [module for module in model.modules() if type(module).__name__ in set(model._no_split_modules or ())]
    inside = {parameter for layer in layers for parameter in layer.parameters()}
    with ExitStack() as stack:
        stack.callback(_partition, list(partitioned))
        _gather([parameter for parameter in partitioned if parameter not in inside])
        for layer in layers if partitioned else ():
            own = [parameter for parameter in layer.parameters() if parameter in partitioned]
            stack.callback(layer.register_forward_pre_hook(lambda *_, own=own: _gather(own)).remove)
            stack.callback(layer.register_forward_hook(lambda *_, own=own: _partition(own)).remove)
        yield


def _is_partitioned(parameter: nn.Parameter) -> bool:
    # What `zero.Init` of DeepSpeed makes of a parameter: its values are elsewhere, and it is empty.
    return hasattr(parameter, "ds_status") and parameter.numel() == 0


def _gather(parameters: list[Any]) -> None:
    missing = [parameter for parameter in parameters if _is_partitioned(parameter)]
    if missing:
        missing[0].all_gather(param_list=missing)


def _partition(parameters: list[Any]) -> None:
    gathered = [parameter for parameter in parameters if not _is_partitioned(parameter)]
    if gathered:
        gathered[0].partition(param_list=gathered, has_been_updated=False)
