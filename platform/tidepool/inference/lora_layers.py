"""The linear layers of a model, to which each row of a step gets its own adapter's part added.

Invariants:
- The base's rows are what they are without any adapter: nothing is added to them, and nothing else is computed otherwise.
- A row's bits do not depend on the adapters of other rows, nor on how many there are.
- A layer that no adapter of a step changes is computed as if there were none; before the first adapter nothing is patched at all.
- Everything here happens between two steps or in one, in the compute thread. What a slot holds stays in memory as long as it does.

What is computed for an adapter is what peft computes: `output + scale * (input A') B'`, in float32, rounded once at the end.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tidepool.errors import ModelError
from tidepool.inference import native
from tidepool.inference.linear import Part, named_linear_layers
from tidepool.inference.lora import PackedAdapter

_ROWS = 4  # of a group, as in lora.c
NO_SLOT = -1
Run = tuple[int, int]
"""A slot (`NO_SLOT`: the base alone), and how many rows in succession it has."""


def runs_of(slots: Items[int]) -> list[Run]:
    """The slots of rows in their order, as runs."""
    return [(slot, sum(1 for _ in rows)) for slot, rows in groupby(slots)]


@dataclass(frozen=True)
class Rows:
    """Whose the rows of a product are. `groups_G3`: first row, number of rows (4 at most), slot; `slots_T`: the slot of each row."""

    runs: Items[Run]
    slots: frozenset[int]
    groups_G3: Tensor
    slots_T: Tensor

    @staticmethod
    def of(runs: Items[Run], device: torch.device) -> "Rows | None":
        """None if all of them are the base's."""
        slots = frozenset(slot for slot, _ in runs) - {NO_SLOT}
        if not slots:
            return None
        groups, first = [], 0
        for slot, num_rows in runs:
            if slot != NO_SLOT:
                groups += [(row, min(_ROWS, first + num_rows - row), slot) for row in range(first, first + num_rows, _ROWS)]
            first += num_rows
        slots_T = torch.tensor(
            [slot for slot, num_rows in runs for _ in range(num_rows)] if device.type != "cpu" else [], dtype=torch.int32
        )
        return Rows(runs, slots, torch.tensor(groups, dtype=torch.int32), slots_T.to(device))


@dataclass(frozen=True)
class LayerPart:
    """A linear layer of the model's own: its name, and its columns in the output that it is computed in."""

    name: str
    first: int
    size: int


@dataclass(eq=False)
class AdaptedLayer:
    """One product with all of its parts; `number` is its place in the tables. `slots`: those whose adapters change it."""

    number: int
    module: nn.Module
    is_output: bool
    parts: list[LayerPart] = field(default_factory=list)
    slots: set[int] = field(default_factory=set)
    is_patched: bool = False


@dataclass(frozen=True)
class Tables:
    """What kernels read: for each layer, slot and part the addresses of A and B, the filled up rank (0: nothing) and the scale."""

    addresses_LSP2: Tensor
    ranks_LSP: Tensor
    scales_LSP: Tensor
    columns_LP2: Tensor

    @staticmethod
    def empty(layers: Items[AdaptedLayer], num_slots: int, device: torch.device) -> "Tables":
        """Those of empty slots."""
        num_parts = max((len(layer.parts) for layer in layers), default=1)
        shape = len(layers), num_slots, num_parts
        columns_LP2 = torch.zeros(len(layers), num_parts, 2, dtype=torch.int64)
        for layer in layers:
            for index, part in enumerate(layer.parts):
                columns_LP2[layer.number, index] = torch.tensor([part.first, part.size])
        return Tables(
            torch.zeros(*shape, 2, dtype=torch.int64, device=device),
            torch.zeros(shape, dtype=torch.int32, device=device),
            torch.zeros(shape, dtype=torch.float32, device=device),
            columns_LP2.to(device),
        )

    def of(self, layer: AdaptedLayer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A layer's own: addresses, ranks, scales, columns."""
        number = layer.number
        return self.addresses_LSP2[number], self.ranks_LSP[number], self.scales_LSP[number], self.columns_LP2[number]


class LoraLayers:
    """The layers of a model whose linear layers have been swapped, and what each of `num_slots` slots adds to them."""

    def __init__(self, model: PreTrainedModel, num_slots: int) -> None:
        self._device = model.device
        self.sizes: dict[str, tuple[int, int]] = {}
        """Input and output size of each linear layer that an adapter may change, by its name."""
        self.output_layer: str | None = None
        """The name of the one that makes logits."""
        self._layers = self._find(model)
        self._layer_of = {part.name: (layer, index) for layer in self._layers for index, part in enumerate(layer.parts)}
        self._tables = Tables.empty(self._layers, num_slots, self._device)
        self._held: dict[int, PackedAdapter] = {}
        self._most_ranks = 0
        self._rows: Rows | None = None
        self._output_rows: Rows | None = None

    def put(self, slot: int, adapter: PackedAdapter | None) -> None:
        """From now on a slot holds this adapter, or none."""
        for layer in self._layers:
            layer.slots.discard(slot)
        self._held.pop(slot, None)
        held = None
        if adapter is not None:
            held = self._held[slot] = adapter.on(self._device)
            for name in adapter.places:
                layer, _ = self._layer_of[name]
                layer.slots.add(slot)
                self._patch(layer)
        self._most_ranks = max((place.rank for one in self._held.values() for place in one.places.values()), default=0)
        self._write(slot, held)

    @contextmanager
    def rows(self, runs: Items[Run], output_runs: Items[Run]) -> Iterator[None]:
        """Within it the rows of each product belong to the slots of `runs`, and those of the logits to the slots of `output_runs`."""
        self._rows, self._output_rows = Rows.of(runs, self._device), Rows.of(output_runs, self._device)
        try:
            yield
        finally:
            self._rows = self._output_rows = None

    # --- The model's layers ------------------------------------------------------------------------------------------

    def _find(self, model: PreTrainedModel) -> list[AdaptedLayer]:
        layers: dict[nn.Module, AdaptedLayer] = {}
        output = model.get_output_embeddings()
        for name, module in named_linear_layers(model):
            sizes = (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)
            self.sizes[name] = int(sizes[0]), int(sizes[1])
            if module is output:
                self.output_layer = name
            computed, first = (module.product.layer, module.first_column) if isinstance(module, Part) else (module, 0)
            layer = layers.setdefault(computed, AdaptedLayer(len(layers), computed, module is output))
            layer.parts.append(LayerPart(name, first, self.sizes[name][1]))
        return list(layers.values())

    def _patch(self, layer: AdaptedLayer) -> None:
        """Let a layer's module add what its rows' adapters have for it."""
        if layer.is_patched:
            return
        own = layer.module.forward

        def forward(input: Tensor, *rest: Any) -> Tensor:
            output: Tensor = own(input, *rest)
            rows = self._output_rows if layer.is_output else self._rows
            if rows is not None and not layer.slots.isdisjoint(rows.slots):
                self._add(layer, rows, input, output)
            return output

        layer.module.forward = forward
        layer.is_patched = True

    # --- Kernels -----------------------------------------------------------------------------------------------------

    def _write(self, slot: int, held: PackedAdapter | None) -> None:
        """Write down what a slot holds, for kernels."""
        entries = [(*self._layer_of[name], name, place) for name, place in (held.places if held else {}).items()]
        where = torch.tensor([layer.number for layer, *_ in entries]).long(), torch.tensor([index for _, index, *_ in entries]).long()
        for table_LSP, of_entry in (
            (self._tables.addresses_LSP2, [held.addresses(name) for _, _, name, _ in entries] if held else []),
            (self._tables.ranks_LSP, [place.rank for *_, place in entries]),
            (self._tables.scales_LSP, [place.scale for *_, place in entries]),
        ):
            of_slot_LP = torch.zeros_like(table_LSP[:, slot], device="cpu")
            if entries:
                of_slot_LP[where] = torch.tensor(of_entry, dtype=table_LSP.dtype)
            table_LSP[:, slot] = of_slot_LP.to(self._device)

    def _add(self, layer: AdaptedLayer, rows: Rows, input: Tensor, output: Tensor) -> None:
        input_TK, output_TN = input.contiguous().view(-1, input.shape[-1]), output.view(-1, output.shape[-1])
        if len(input_TK) != sum(num_rows for _, num_rows in rows.runs):
            name = layer.parts[0].name
            raise ModelError(f"An adapter changes {name}, which the model does not compute for each token once: train it on other layers.")
        tables = self._tables.of(layer)
        if self._device.type == "cuda":
            from tidepool.inference.lora_triton import add  # which comes with torch for CUDA alone

            add(input_TK, output_TN, rows.slots_T, *tables, self._most_ranks)
        elif native.lora_library() is not None and input.dtype in native.DTYPES:
            native.lora(input_TK, output_TN, rows.groups_G3, *tables, len(layer.parts), self._most_ranks)
        else:
            self._add_by_torch(layer, rows, input_TK, output_TN)

    def _add_by_torch(self, layer: AdaptedLayer, rows: Rows, input_TK: Tensor, output_TN: Tensor) -> None:
        first = 0
        for slot, num_rows in rows.runs:
            if slot in layer.slots:
                held, own = self._held[slot], slice(first, first + num_rows)
                for part in layer.parts:
                    if (place := held.places.get(part.name)) is not None:
                        a_RK, b_NR = (matrix.float() for matrix in held.plain(part.name))
                        shrunk = linear(input_TK[own].float(), a_RK[:, : input_TK.shape[1]]) * place.scale
                        columns = output_TN[own, part.first : part.first + part.size]
                        columns.copy_(columns + linear(shrunk, b_NR[: part.size]))
            first += num_rows
