"""Folds saved adapters: replaces a projection by its result, on disk."""

import dataclasses
import os
import shutil

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor

from .architectures import AttentionGeometry
from .config import PrefixPlusConfig
from .encoders import PrefixEncoder, fold_encoder
from .model_card import CARD_NAME
from .weights import PEFT_PREFIX

_ENCODER = ".prefix_plus_encoder."


def fold_adapter(adapter_dir: str, output_dir: str) -> str:
    """Fold a saved adapter without its base model.

    Args:
        adapter_dir (`str`): directory of a saved PrefixPlus adapter.
        output_dir (`str`): another directory for the result; made if needed.

    Returns:
        `str`: path of the weights file that was written.

    Raises:
        ValueError: if there is no complete adapter in `adapter_dir`, or both directories are the same.
    """
    if os.path.realpath(adapter_dir) == os.path.realpath(output_dir):
        raise ValueError(f"The folded adapter needs a directory of its own, got {output_dir!r} twice.")
    weights_path = os.path.join(adapter_dir, SAFETENSORS_WEIGHTS_NAME)
    for path in (os.path.join(adapter_dir, CONFIG_NAME), weights_path):
        if not os.path.isfile(path):
            raise ValueError(f"There is no {path}; expected the directory of a saved adapter.")
    config = PrefixPlusConfig.from_pretrained(adapter_dir)
    if not isinstance(config, PrefixPlusConfig):
        raise ValueError(f"{adapter_dir} holds an adapter of type {config.peft_type}; only PrefixPlus can be folded.")
    modules, folded = group_weights(load_file(weights_path))
    for module_name, tensors in modules.items():
        encoder = fold_encoder(_rebuild_encoder(module_name, tensors, config))
        folded.update({f"{module_name}{_ENCODER}{name}": tensor for name, tensor in encoder.state_dict().items()})
    os.makedirs(output_dir, exist_ok=True)
    output_path = os.path.join(output_dir, SAFETENSORS_WEIGHTS_NAME)
    save_file({key: tensor.contiguous() for key, tensor in folded.items()}, output_path, metadata={"format": "pt"})
    readme = os.path.join(adapter_dir, CARD_NAME)
    # A card that stands there keeps its text, as it does whenever an adapter is saved.
    if os.path.isfile(readme) and not os.path.exists(os.path.join(output_dir, CARD_NAME)):
        shutil.copy(readme, output_dir)
    dataclasses.replace(config, projection="none").save_pretrained(output_dir)
    return output_path


def group_weights(weights: dict[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Sort the tensors of a saved adapter by the module that they belong to.

    Args:
        weights (`dict[str, torch.Tensor]`): by the names in its file.

    Returns:
        `tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]`: for each attention module the tensors of
            its encoder; and the tensors of other modules.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    others = {key: tensor for key, tensor in weights.items() if _ENCODER not in key}
    for key in sorted(weights.keys() - others.keys()):
        module_name, _, tensor_name = key.rpartition(_ENCODER)
        modules.setdefault(module_name, {})[tensor_name] = weights[key]
    return modules, others


def _rebuild_encoder(module_name: str, tensors: dict[str, Tensor], config: PrefixPlusConfig) -> PrefixEncoder:
    """Build the encoder of one module from its saved tensors, whose shapes tell its geometry."""
    expected = config.resolve_num_virtual_tokens(module_name.removeprefix(PEFT_PREFIX))
    if "anchor_keys" in tensors and tensors["anchor_keys"].shape[1] != expected:
        raise ValueError(
            f"The weights of {module_name} hold {tensors['anchor_keys'].shape[1]} virtual tokens, the configuration "
            f"says {expected}. The files belong to different adapters."
        )
    try:
        keys, values = tensors["anchor_keys"], tensors["anchor_values"]
        geometry = AttentionGeometry(keys.shape[0], keys.shape[-1], values.shape[-1], keys.device)
        # Before memory is allocated for whatever the configuration says.
        if "embedding" in tensors and tensors["embedding"].shape[-1] != config.projection_dim:
            raise ValueError(
                f"The weights of {module_name} do not fit the adapter's configuration: the embeddings have size "
                f"{tensors['embedding'].shape[-1]}, the configuration says {config.projection_dim}. The files belong "
                "to different adapters."
            )
        encoder = config.build_encoder(geometry, keys.shape[1])
        encoder.load_state_dict(tensors)
    except (KeyError, IndexError, RuntimeError) as error:
        raise ValueError(f"The weights of {module_name} do not fit the adapter's configuration: {error}") from error
    return encoder
