"""Attention over a paged cache, behind transformers' attention interface: the model's own code computes everything else.

A forward pass computes one row of T tokens: those of many sequences, one after the other, without padding (`Ragged` says which are
whose). In each layer the keys and values of all T tokens are written into the cache first, then each sequence reads its own.

Supported is causal attention with any scaling and with sliding windows, for grouped heads. `check_attention` runs a model once and
refuses whatever else its attention asks for by name, so that nothing is silently left out.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from tidepool.errors import ModelError
from tidepool.inference import native
from tidepool.inference.scheduler import Chunk
from tidepool.inference.transfer import upload

IMPLEMENTATION = "tidepool_paged"
_KNOWN = {"scaling", "sliding_window", "dropout", "paged"}
_HARMLESS = {"position_ids", "use_cache", "is_causal", "position_embeddings", "cache_position", "output_attentions", "output_hidden_states"}


@dataclass(frozen=True)
class LayerShape:
    """The heads of a layer's keys and values."""

    num_heads: int
    key_size: int
    value_size: int

    @property
    def num_floats(self) -> int:
        """Numbers that a token takes in this layer."""
        return self.num_heads * (self.key_size + self.value_size)


class Cache:
    """Keys and values of each layer, (blocks x block size, heads, head size): a token's place is block x block size + offset."""

    def __init__(self, shapes: Items[LayerShape], num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.block_size = block_size
        num_places = num_blocks * block_size
        self.keys = [_zeros((num_places, one.num_heads, one.key_size), dtype, device) for one in shapes]
        self.values = [_zeros((num_places, one.num_heads, one.value_size), dtype, device) for one in shapes]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that take no memory of the host before they are written to, which torch's own do."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros((*shape, dtype.itemsize), np.uint8)).view(dtype).view(shape)


@dataclass(frozen=True)
class Piece:
    """Tokens `first` to `last` of the row are tokens `start` to `end` of a sequence, whose tokens lie at `places`."""

    first: int
    last: int
    start: int
    end: int
    places_T: Tensor


@dataclass
class Ragged:
    """What a forward pass computes, with tensors that all layers use: first D tokens of decoding sequences, then pieces of prompts."""

    cache: Cache
    tokens_1T: Tensor
    positions_1T: Tensor
    places_T: Tensor
    lengths_D: Tensor
    blocks_DN: Tensor
    pieces: list[Piece]
    _masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)
    _gathered: dict[int | None, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def num_decoding(self) -> int:
        return len(self.lengths_D)

    def to(self, device: torch.device) -> "Ragged":
        """The same on the device."""
        if device.type == "cpu":
            return self
        return Ragged(
            self.cache,
            upload(self.tokens_1T, device),
            upload(self.positions_1T, device),
            upload(self.places_T, device),
            upload(self.lengths_D, device),
            upload(self.blocks_DN, device),
            [replace(piece, places_T=upload(piece.places_T, device)) for piece in self.pieces],
        )

    def mask(self, start: int, end: int, window: int | None) -> Tensor:
        """Which of `end` keys each query from `start` on sees."""
        key = (start, end, window)
        if key not in self._masks:
            distance = torch.arange(start, end)[:, None] - torch.arange(end)[None]
            seen = distance >= 0
            self._masks[key] = upload(seen & (distance < window) if window else seen, self.places_T.device)
        return self._masks[key]

    def decoding(self, window: int | None) -> tuple[Tensor, Tensor]:
        """The places (D x L) of the keys of all decoding sequences, and which of them each one sees."""
        if window not in self._gathered:
            size = self.cache.block_size
            places_DL = (self.blocks_DN.long()[:, :, None] * size + torch.arange(size, device=self.blocks_DN.device)).flatten(1)
            index_1L = torch.arange(places_DL.shape[1], device=self.blocks_DN.device)[None]
            lengths_D1 = self.lengths_D[:, None]
            seen_DL = index_1L < lengths_D1
            if window:
                seen_DL &= index_1L >= lengths_D1 - window
            # What a row does not see may be another's and not finite, which a mask does not keep out of a sum: its own first token does.
            places_DL = torch.where(seen_DL, places_DL, places_DL[:, :1])
            self._gathered[window] = places_DL.flatten(), seen_DL[:, None, None]
        return self._gathered[window]


def pack(chunks: Items[Chunk], cache: Cache, all_alone: bool = False) -> Ragged:
    """Put the chunks into one row, in their order, in the host's memory: first those of one token and its draft, then the longer ones.

    `all_alone`: each token attends by itself as if it were decoded, so that its bits are the same however its prompt is cut. The
    tokens of a draft always do.
    """
    size = cache.block_size
    alone = [chunk for chunk in chunks if all_alone or chunk.end - chunk.start == 1]
    tokens: list[int] = []
    positions: list[int] = []
    table: list[list[int]] = []
    num_columns = max((-(-(chunk.end + len(chunk.draft)) // size) for chunk in alone), default=0)
    for chunk in alone:
        of_chunk = chunk.tokens
        tokens += of_chunk
        positions += range(chunk.start, chunk.start + len(of_chunk))
        table += [chunk.blocks[:num_columns] + [0] * (num_columns - len(chunk.blocks))] * len(of_chunk)
    blocks_DN = torch.tensor(table, dtype=torch.int32).reshape(len(table), num_columns)
    positions_D = torch.tensor(positions)
    places = [blocks_DN.gather(1, (positions_D // size)[:, None])[:, 0].long() * size + positions_D % size] if table else []
    pieces = []
    for chunk in chunks[len(alone) :]:
        blocks = torch.tensor(chunk.blocks[: -(-chunk.end // size)])
        all_places = (blocks[:, None] * size + torch.arange(size)).flatten()[: chunk.end]
        pieces.append(Piece(len(tokens), len(tokens) + chunk.end - chunk.start, chunk.start, chunk.end, all_places))
        tokens += chunk.tokens
        positions += range(chunk.start, chunk.end)
        places.append(all_places[chunk.start :])
    lengths_D = (positions_D + 1).int()
    return Ragged(cache, torch.tensor([tokens]), torch.tensor([positions]), torch.cat(places), lengths_D, blocks_DN, pieces)


def attend(
    module: Any,
    query_1HTK: Tensor,
    key_1GTK: Tensor,
    value_1GTV: Tensor,
    _mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    paged: Ragged | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer; returns (1, T, H, V)."""
    assert paged is not None, "this model belongs to an engine"
    keys, values = paged.cache.keys[module.layer_idx], paged.cache.values[module.layer_idx]
    keys.index_copy_(0, paged.places_T, key_1GTK[0].transpose(0, 1))
    values.index_copy_(0, paged.places_T, value_1GTV[0].transpose(0, 1))
    scale = query_1HTK.shape[-1] ** -0.5 if scaling is None else scaling
    parts = []
    if num := paged.num_decoding:
        parts.append(_decode(query_1HTK[0, :, :num].transpose(0, 1), keys, values, paged, scale, sliding_window))
    for piece in paged.pieces:
        query = query_1HTK[:, :, piece.first : piece.last]
        if piece.start:
            key, value = (one[piece.places_T].transpose(0, 1)[None] for one in (keys, values))
        else:
            key, value = key_1GTK[:, :, piece.first : piece.last], value_1GTV[:, :, piece.first : piece.last]
        parts.append(_prefill(query, key, value, paged, piece, scale, sliding_window))
    output_THV = parts[0] if len(parts) == 1 else torch.cat(parts)
    return output_THV[None], None


def _decode(query_DHK: Tensor, keys: Tensor, values: Tensor, paged: Ragged, scale: float, window: int | None) -> Tensor:
    """One query of each sequence (D, H, V)."""
    if query_DHK.is_cuda:
        from tidepool.inference import paged_attention  # Triton comes with torch where there are GPUs

        return paged_attention.attend(query_DHK, keys, values, paged.blocks_DN, paged.lengths_D, paged.cache.block_size, scale, window)
    if native.can_attend(query_DHK, keys):
        return native.attend(query_DHK, keys, values, paged.blocks_DN, paged.lengths_D, paged.cache.block_size, scale, window)
    places, seen_D11L = paged.decoding(window)
    num, num_heads, size = query_DHK.shape
    groups = keys.shape[1]
    key, value = (one[places].view(num, -1, *one.shape[1:]).transpose(1, 2) for one in (keys, values))
    # The queries of the heads that share a key stand as rows of one product.
    query = query_DHK.reshape(num, groups, num_heads // groups, size)
    return scaled_dot_product_attention(query, key, value, attn_mask=seen_D11L, scale=scale).flatten(1, 2)


def _prefill(query: Tensor, key: Tensor, value: Tensor, paged: Ragged, piece: Piece, scale: float, window: int | None) -> Tensor:
    """The queries of one piece (N, H, V)."""
    is_plain = not piece.start and (window is None or piece.end <= window)
    mask = None if is_plain else paged.mask(piece.start, piece.end, window)
    num_shared = query.shape[1] // key.shape[1]
    if num_shared > 1:
        key, value = key.repeat_interleave(num_shared, dim=1), value.repeat_interleave(num_shared, dim=1)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_plain, scale=scale)[0].transpose(0, 1)


@torch.inference_mode()
def check_attention(model: PreTrainedModel) -> list[LayerShape]:
    """Run the model on one token and see what its attention asks for; returns the shape of each layer. Raises `ModelError`."""
    shapes: dict[int, LayerShape] = {}
    kind = model.config.model_type

    def look(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **named: Any) -> tuple[Tensor, None]:
        unknown = sorted(
            name for name, given in named.items() if name not in _KNOWN | _HARMLESS and given is not None and given is not False
        )
        if mask is not None or not getattr(module, "is_causal", True):
            unknown.append("an attention mask of its own")
        if unknown:
            raise ModelError(f"The engine cannot run a {kind} model: its attention has {', '.join(unknown)}. Serve another model.")
        if module.layer_idx in shapes:
            raise ModelError(f"The engine cannot run a {kind} model: layer {module.layer_idx} has several attentions. Serve another model.")
        shapes[module.layer_idx] = LayerShape(key.shape[1], key.shape[3], value.shape[3])
        return torch.zeros_like(query[..., : value.shape[3]]).transpose(1, 2), None

    AttentionInterface.register(_LOOK, look)
    model.set_attn_implementation(_LOOK)
    zero = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    model.base_model(input_ids=zero, position_ids=zero, use_cache=False)
    if sorted(shapes) != list(range(model.config.get_text_config().num_hidden_layers)):
        raise ModelError(f"The engine cannot run a {kind} model: not all of its layers are attention. Serve another model.")
    model.set_attn_implementation(IMPLEMENTATION)
    return [shapes[layer] for layer in sorted(shapes)]


_LOOK = "tidepool_look"
AttentionInterface.register(IMPLEMENTATION, attend)
