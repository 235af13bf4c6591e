"""The model at work. All of it runs in the engine's one compute thread, and nothing else touches the model.

Invariants:
- The base model computes as if no adapter had ever been loaded; an adapter as if it were the only one.
- A failure ends the sequences that were being computed, and no others: a failed prefill that sequence alone.
"""

import inspect
from pathlib import Path
from typing import Protocol, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from tidepool.errors import ModelError
from tidepool.inference.batch import Batch
from tidepool.inference.engine import Output
from tidepool.inference.schedule import Group
from tidepool.inference.sequence import Sequence

_INPUTS = {"attention_mask", "position_ids", "past_key_values", "logits_to_keep"}
_ATTENTIONS = {"full_attention", "sliding_attention"}

Result = tuple[Sequence, Output | Exception]


class Attach(Protocol):
    """Loads the adapter of a folder under a name into the model, in place, and returns the model that holds it."""

    def __call__(self, model: PreTrainedModel | PeftModel, folder: Path, name: str, /) -> PeftModel: ...


class ModelRunner:
    """A base model and its adapters. Raises `ModelError` for a model whose tokens cannot be cached in batches."""

    def __init__(self, model: PreTrainedModel, attach: Attach) -> None:
        _check(model)
        self._base = model
        self._adapted: PeftModel | None = None
        self._attach = attach
        self._selected: str | None = None

    @torch.inference_mode()
    def take_turn(self, group: Group, sequences: list[Sequence]) -> list[Result]:
        """The next token of each sequence that has been prefilled, and the first one of the oldest that has not.

        One prompt a turn, so that those who are reading never wait for more than that.
        """
        old = [sequence for sequence in sequences if sequence in group.batch]
        new = [sequence for sequence in sequences if sequence not in old][:1]
        results: list[Result] = []
        try:
            self._select(group.adapter)
            if old:
                results += _advance(old, group.batch.decode(self._base, old))
            else:
                group.batch = Batch()
        except Exception as error:  # noqa: BLE001 whatever the model raises, the engine must serve the requests after these
            group.batch = Batch()  # gives the memory back at once, which may be what was missing
            results = [(sequence, error) for sequence in old]
        try:
            self._select(group.adapter)
            if new:
                results += _advance(new, group.batch.prefill(self._base, new[0])[None])
        except Exception as error:  # noqa: BLE001 as above; the others in the batch are untouched
            results += [(sequence, error) for sequence in new]
        return results

    def attach(self, digest: str, folder: Path) -> None:
        """Load an adapter. Raises `ModelError`, and then the model is as it was."""
        model = self._base if self._adapted is None else self._adapted
        try:
            self._adapted = self._attach(model, folder, digest)
        finally:
            self._selected = None
            self._disable()

    def detach(self, digest: str) -> None:
        """Forget an adapter."""
        assert self._adapted is not None
        others = [name for name in self._adapted.peft_config if name != digest]
        if others:
            self._adapted.set_adapter(others[0])  # peft warns when the active one is deleted
            self._adapted.delete_adapter(digest)
        else:
            self._adapted.unload()
            self._adapted = None
        self._selected = None
        self._disable()

    def _select(self, adapter: str | None) -> None:
        if adapter == self._selected:
            return
        if adapter is None:
            self._disable()
        else:
            assert self._adapted is not None
            self._adapted.set_adapter(adapter)
            self._adapted.base_model.enable_adapter_layers()
        self._selected = adapter

    def _disable(self) -> None:
        if self._adapted is not None:
            self._adapted.base_model.disable_adapter_layers()


def _advance(sequences: list[Sequence], logits_BV: Tensor) -> list[Result]:
    return [(sequence, sequence.advance(logits_V)) for sequence, logits_V in zip(sequences, logits_BV, strict=True)]


def _check(model: PreTrainedModel) -> None:
    kind = model.config.model_type
    if absent := sorted(_INPUTS - set(inspect.signature(model.forward).parameters)):
        raise ModelError(f"The batched engine cannot run a {kind} model: it takes no {', '.join(absent)}. Serve another model.")
    kinds = set(cast(list[str], getattr(model.config.get_text_config(), "layer_types", None) or []))
    if getattr(model, "_is_stateful", False) or not kinds <= _ATTENTIONS:
        raise ModelError(
            f"The batched engine cannot run a {kind} model: not all of its layers are full or sliding attention, and it caches "
            "keys and values alone. Serve another model."
        )
