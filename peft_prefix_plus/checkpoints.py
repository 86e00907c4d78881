"""Checks a checkpoint against a model, and takes an adapter out again whose checkpoint does not fit."""

import torch
from peft.utils import ModulesToSaveWrapper, _get_submodules
from torch import Tensor, nn
from transformers import PreTrainedModel

from .layer import PrefixPlusLayer, PrefixPlusLayerBase
from .positions import stop_aligning_positions


def find_checkpoint_problem(model: PreTrainedModel, adapter_name: str, state_dict: dict[str, Tensor]) -> str | None:
    """Say what is missing, foreign or misshapen in an adapter's weights; `None` if all is well."""
    own = {key: tensor for key, tensor in model.state_dict().items() if f".prefix_plus_encoder.{adapter_name}." in key}
    prefix = "" if any(key in state_dict for key in own) else "base_model.model."
    missing = [key for key in own if prefix + key not in state_dict]
    if missing:
        return f"{len(missing)} of {len(own)} tensors are missing, for instance {missing[0]!r}."
    foreign = [key for key in state_dict if ".prefix_plus_" in key and key.removeprefix(prefix) not in own]
    if foreign:
        return f"{len(foreign)} tensors have no place in it, for instance {foreign[0]!r}."
    for key, tensor in own.items():
        given = state_dict[prefix + key]
        if given.shape != tensor.shape:
            return f"{key!r} has shape {tuple(given.shape)}, but the model needs {tuple(tensor.shape)}."
        if not given.is_floating_point() or not bool(torch.isfinite(given).all()):
            return f"{key!r} holds values that are not finite numbers."
    return None


def discard_uninitialized_adapter(model: PreTrainedModel, adapter_name: str) -> None:
    """Take an adapter that never got its weights out of a model, and the wrappers that are left without one."""
    layers = [module for module in model.modules() if isinstance(module, PrefixPlusLayer)]
    encoders = [layer.get_encoder(adapter_name) for layer in layers if adapter_name in layer.list_adapters()]
    if any(encoder.initialized for encoder in encoders):
        return
    for name, module in list(model.named_modules()):
        bare: nn.Module | None = None
        if isinstance(module, PrefixPlusLayerBase) and adapter_name in module.list_adapters():
            module.delete_adapter(adapter_name)
            bare = None if module.list_adapters() else module.unload_and_optionally_merge_module(merge=False)
        elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            module.delete_adapter(adapter_name, new_active_adapters=None)
            bare = None if len(module.modules_to_save) else module.original_module
        if bare is not None:
            parent, _, child_name = _get_submodules(model, name)
            setattr(parent, child_name, bare)
    model.peft_config.pop(adapter_name, None)
    if not model.peft_config:
        stop_aligning_positions(model)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                vars(module).pop("peft_config", None)
