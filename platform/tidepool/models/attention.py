"""Attention with the masks that it is given: a whole one (see `packed`), or none where plain causal attention is right.

Where there is none, transformers looks whether the positions ask for one, and has to wait for the device to know: in every
forward pass a GPU would run dry. Here nothing is looked for. The computation is transformers' own SDPA.
"""

from torch.nn import Module
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

_NAME = "sdpa_given_masks"
AttentionInterface.register(_NAME, sdpa_attention_forward)  # without a way to make masks


def use_given_masks(model: Module) -> None:
    """Let a causal language model (or one with an adapter) attend so from now on; one with other than full attention stays as it is."""
    inner = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    if inner.config._attn_implementation == "sdpa" and inner._can_set_attn_implementation() and not has_windows(inner):
        inner.set_attn_implementation(_NAME)


def has_windows(model: Module) -> bool:
    """Whether some layers attend to less than all that came before: a mask of ours would take their windows away."""
    inner = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    config = inner.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    return set(kinds) != {"full_attention"} if kinds else getattr(config, "sliding_window", None) is not None
