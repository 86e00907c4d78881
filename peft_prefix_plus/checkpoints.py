"""Checks a checkpoint against a model, and takes an adapter out again whose checkpoint does not fit."""

import dataclasses
from collections.abc import Iterable, Mapping

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from .architectures import find_token_embeddings
from .auxiliary import remove_auxiliary
from .config import PrefixPlusConfig
from .injection import InjectionPlan
from .layer import PrefixPlusLayer, PrefixPlusLayerBase, list_layers
from .removal import unwrap_layers
from .token_rows import find_token_rows
from .weights import (
    FLOATING_DTYPES,
    PEFT_PREFIX,
    TensorInfo,
    describe_tensors,
    find_local_weights,
    iterate_tensors,
    locate_weights,
    read_tensor_infos,
)

# What adapters lack that were saved before embeddings had a step.
STEP = "embedding_step"
# The rows of an embedding in the file of an adapter with `trainable_token_indices`.
TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"


def check_saved_weights(
    config: PrefixPlusConfig, adapter_name: str, plan: InjectionPlan, model: PreTrainedModel
) -> None:
    """Compare a configuration that was read from an adapter with the weights beside it; the model stays as it is.

    Args:
        config ([`PrefixPlusConfig`]): remembers where it was read; once its weights were found good it forgets.
        adapter_name (`str`): the adapter's name, for the message.
        plan ([`InjectionPlan`]): what the configuration means for the model.
        model (`PreTrainedModel`): the base model.

    Raises:
        ValueError: if the weights are missing, are damaged, or do not fit.
    """
    modules_to_save = find_modules_to_save(config, plan, model)
    if config.source is None or not config.prefix_is_initialized:
        return
    path = locate_weights(config.source)
    infos = _remove_prefix(read_tensor_infos(path))
    planned = _list_planned_tensors(plan, modules_to_save) | _list_token_rows(config, model)
    if config.embedding_step == 1.0:
        planned = _leave_out_steps(planned, infos)
    problem = _find_misfit(planned, _list_embeddings(model), infos)
    problem = problem or _find_bad_values(iterate_tensors(path))
    if problem is not None:
        raise ValueError(describe_misfit(config, adapter_name, f"In {path}, {problem}"))
    config.source = None


def refuse_pickled_weights(config: PrefixPlusConfig) -> None:
    """Refuse an adapter that transformers could not read itself: its `load_adapter` takes safetensors only.

    Raises:
        ValueError: if the configuration was read beside another kind of file.
    """
    path = None if config.source is None else find_local_weights(config.source.folder)
    if path is not None and not path.endswith(".safetensors"):
        raise ValueError(
            f"{path} is not a safetensors file, and transformers reads no others. Load the adapter with "
            "`PeftModel.from_pretrained`, and save it again."
        )


def find_modules_to_save(
    config: PrefixPlusConfig, plan: InjectionPlan, model: PreTrainedModel
) -> dict[str, nn.Module]:
    """Find what `modules_to_save` means in a model, by PEFT's rule: every name that ends so.

    Raises:
        ValueError: if one of them holds an attention module that gets a prefix, or a table of positions in which it
            moves the input, or is held by one.
    """
    needed = dict.fromkeys(
        plan.lengths, "gets a prefix. Name other modules, or leave this one out of `target_modules`."
    ) | dict.fromkeys(plan.position_shifts, "numbers the input behind the prefix. Name other modules.")
    found = {}
    for name, module in model.named_modules():
        if not name.endswith(tuple(config.modules_to_save or ())) or ".modules_to_save." in name:
            continue
        bare = name.replace(".base_layer", "")
        clash = [other for other in needed if f"{other}.".startswith(f"{bare}.") or bare.startswith(f"{other}.")]
        if clash:
            raise ValueError(
                f"`modules_to_save` {config.modules_to_save} means {bare}, which has modules in common with "
                f"{clash[0]}, which {needed[clash[0]]}"
            )
        found[name] = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
    return found


def describe_misfit(config: PrefixPlusConfig, adapter_name: str, problem: str) -> str:
    """Say what is wrong with some weights, and which base model they are for."""
    return (
        f"The weights do not fit adapter {adapter_name!r} of this model: {problem} Load the adapter onto the base "
        f"model that it was trained on ({config.base_model_name_or_path or 'its name was not saved'})."
    )


def find_checkpoint_problem(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> str | None:
    """Say what is missing, foreign or misshapen in an adapter's weights; `None` if all is well.

    Args:
        model (`nn.Module`): with the adapter in it.
        adapter_name (`str`): its name.
        state_dict (`Mapping[str, Tensor]`): by the names that they have in the model, or with PEFT's prefix.
    """
    required = describe_tensors(find_adapter_tensors(model, adapter_name))
    given = _remove_prefix(describe_tensors(state_dict))
    # Only one of two tables that are tied is saved.
    own_rows = f"{TOKEN_ROWS}.{adapter_name}"
    rows = {name: tensor for name, tensor in model.state_dict().items() if name.endswith(own_rows)}
    optional = _list_embeddings(model) | _remove_prefix(describe_tensors(rows))
    problem = _find_misfit(_leave_out_steps(_remove_prefix(required), given), optional, given)
    return problem or _find_bad_values(state_dict.items())


def find_adapter_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Return what a checkpoint of an adapter must hold, from the model that the adapter is in."""
    wrappers = [name for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    starts = tuple(f"{name}.modules_to_save.{adapter_name}." for name in wrappers)
    marker = f".prefix_plus_encoder.{adapter_name}."
    return {name: tensor for name, tensor in model.state_dict().items() if marker in name or name.startswith(starts)}


def match_dtypes(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring an adapter's weights to the dtypes of the model: `low_cpu_mem_usage` takes tensors as they are."""
    own = find_adapter_tensors(model, adapter_name)
    own |= {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in own.items()}
    return {
        name: tensor.to(own[name.removeprefix(PEFT_PREFIX)].dtype) if name.removeprefix(PEFT_PREFIX) in own else tensor
        for name, tensor in state_dict.items()
    }


def _list_planned_tensors(plan: InjectionPlan, modules_to_save: Mapping[str, nn.Module]) -> dict[str, TensorInfo]:
    """What a checkpoint must hold, before the adapter is in the model; nothing of it is allocated."""
    config = plan.config
    tensors: dict[str, Tensor] = {}
    for name, length in plan.lengths.items():
        geometry = dataclasses.replace(plan.geometries[name], device=torch.device("meta"))
        encoder = config.build_encoder(geometry, length)
        tensors |= {f"{name}.prefix_plus_encoder.{key}": tensor for key, tensor in encoder.state_dict().items()}
    for name, module in modules_to_save.items():
        tensors |= {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}
    return describe_tensors(tensors)


def _list_token_rows(config: PrefixPlusConfig, model: PreTrainedModel) -> dict[str, TensorInfo]:
    """The rows of embeddings that are trained beside the prefix."""
    return {
        f"{name}{TOKEN_ROWS}": TensorInfo(shape, torch.float32)
        for name, shape in find_token_rows(config, model).items()
    }


def _list_embeddings(model: nn.Module) -> dict[str, TensorInfo]:
    """Tensors of the base model that PEFT saves when the vocabulary has grown; no others may be overwritten."""
    tables: list[nn.Module | None] = []
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            tables += [find_token_embeddings(part), part.get_output_embeddings()]
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if any(module is table for table in tables):
            bare = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
            # PEFT takes all names with that of the table in them, so those of a wrapper are in the file as well.
            for place in (name, f"{name}.original_module", f"{name}.modules_to_save"):
                tensors |= {f"{place}.{key}": tensor for key, tensor in bare.state_dict().items()}
    return _remove_prefix(describe_tensors(tensors))


def _remove_prefix(infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    return {name.removeprefix(PEFT_PREFIX): info for name, info in infos.items()}


def _leave_out_steps(required: Mapping[str, TensorInfo], given: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """What a checkpoint from before embeddings had a step must hold, if the given one is such."""
    endings = {name.rpartition(".")[2] for name in given}
    is_older = "embedding" in endings and STEP not in endings
    return {name: info for name, info in required.items() if not (is_older and name.endswith(f".{STEP}"))}


def _find_misfit(
    required: Mapping[str, TensorInfo], optional: Mapping[str, TensorInfo], given: Mapping[str, TensorInfo]
) -> str | None:
    """Compare names, shapes and dtypes."""
    missing = [name for name in required if name not in given]
    if missing:
        return f"{len(missing)} of {len(required)} tensors are missing, for instance {missing[0]!r}."
    known = {**optional, **required}
    foreign = [name for name in given if name not in known]
    if foreign:
        return f"{len(foreign)} tensors have no place in it, for instance {foreign[0]!r:.200}."
    for name, info in given.items():
        if info.shape != known[name].shape:
            return f"{name!r} has shape {info.shape}, but the model needs {known[name].shape}."
        if known[name].dtype in FLOATING_DTYPES and info.dtype not in FLOATING_DTYPES:
            return f"{name!r} has dtype {info.dtype}, but the model needs a floating dtype of at least 16 bits."
    return None


def _find_bad_values(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    for name, tensor in tensors:
        # The range of float64 is larger.
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            return f"{name!r} holds values that are not finite numbers."
    return None


def discard_uninitialized_adapter(model: PreTrainedModel, adapter_name: str) -> None:
    """Take an adapter that never got its weights out of a model, and the wrappers that are left without one."""
    layers = list_layers(model, PrefixPlusLayer)
    encoders = [layer.get_encoder(adapter_name) for layer in layers if adapter_name in layer.list_adapters()]
    if any(encoder.initialized for encoder in encoders):
        return
    for layer in list_layers(model, PrefixPlusLayerBase):
        if adapter_name in layer.list_adapters():
            layer.delete_adapter(adapter_name)
    unwrap_layers(model, only_empty=True)
    remove_auxiliary(model, {adapter_name})
    model.peft_config.pop(adapter_name, None)
    if not model.peft_config:
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                vars(module).pop("peft_config", None)
