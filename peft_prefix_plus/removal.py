"""Takes layers out of a model again."""

from peft.utils import _get_submodules
from torch import nn

from .layer import PrefixPlusLayerBase
from .positions import stop_aligning_positions


def unwrap_layers(model: nn.Module, only_empty: bool = False) -> None:
    """Put the modules back that PrefixPlus wrapped; layers of other methods inside of them stay.

    Args:
        model (`nn.Module`): a model that may have PrefixPlus layers.
        only_empty (`bool`): only where no adapter is left.
    """
    is_bare = True
    for name, module in list(model.named_modules()):
        if not isinstance(module, PrefixPlusLayerBase):
            continue
        if only_empty and module.list_adapters():
            is_bare = False
            continue
        parent, _, child_name = _get_submodules(model, name)
        setattr(parent, child_name, module.restore_base_layer())
    if is_bare:
        stop_aligning_positions(model)
