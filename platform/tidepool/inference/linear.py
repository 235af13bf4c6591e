"""A model's linear layers, swapped when it is loaded for ones that this machine computes faster. Exact but for int8 and rounding.

- Layers that have the same input (query, key and value; gate and up) become one product, whose parts the model asks for one by one.
- `fp32` on a CPU with AVX-512, and `bf16` where such a one has no instruction to multiply it: in C of ours, each output a sum in one order.
  With bfloat16 oneDNN needs about five times as long there.
- `bf16` on other CPUs, and `fp32` on other ones of AMD's: weights in the layout that oneDNN multiplies fastest.
- `int8` on a CPU: weights with one scale for each output, inputs with one for each token, multiplied and summed exactly in integers:
  a token's result does not depend on the tokens beside it. All else is bfloat16 then.

All of them are `nn.Linear` for whoever looks, under the names that adapters were trained with; packed ones keep no readable weight.
GPT-2's `Conv1D` is one product already and stays as it is, but for int8.
"""

from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tidepool.errors import ModelError
from tidepool.inference import native

Weights = Literal["auto", "fp32", "bf16", "int8"]
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_TYPICAL_ROWS = 64  # oneDNN packs for a number of rows, and multiplies any


def weights_dtype(weights: Weights, device: str) -> torch.dtype:
    """The dtype to load a model in."""
    if weights == "int8" and device != "cpu":
        raise ModelError("engine.weights: int8 is for CPUs; leave it out on a GPU.")
    is_exact = weights == "fp32" or (weights == "auto" and device == "cpu")
    return torch.float32 if is_exact else torch.bfloat16


def swap_linear_layers(model: PreTrainedModel, weights: Weights, batch_invariant: bool = False) -> None:
    """Swap the layers of a model in place.

    With `batch_invariant` each product of a library has the same number of rows, filled up with zeros: what decides the order of a row's
    additions is the shape.
    """
    is_cpu = model.device.type == "cpu"
    if weights == "int8":
        _check_int8()

    def pack(layer: nn.Linear) -> nn.Linear:
        packed = _pack(layer, weights, is_cpu)
        return _Slabs(packed) if batch_invariant and not isinstance(packed, _Int8 | _Banded) else packed

    for module in list(model.modules()):
        for names in _SIBLINGS:
            parts = [getattr(module, name, None) for name in names]
            if all(type(part) is nn.Linear for part in parts):
                layers = cast(list[nn.Linear], parts)
                product = Product(pack(_joined(layers)), [layer.out_features for layer in layers])
                for index, (name, layer) in enumerate(zip(names, layers, strict=True)):
                    setattr(module, name, Part(layer, product, index))
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and not isinstance(module, Part):
                setattr(module, name, pack(child))
            elif isinstance(child, Conv1D) and (weights == "int8" or batch_invariant):
                setattr(module, name, pack(_from_conv1d(child)))


def named_linear_layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear | Conv1D]]:
    """The linear layers of the model's own, by their names, swapped or not."""
    inside = {id(child) for module in model.modules() if isinstance(module, _Layer) for child in module.children()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and id(module) not in inside:
            yield name, module


class _Layer(nn.Linear):
    """A linear layer that multiplies with something else than its `weight`, which has shape, dtype and device but no memory."""

    def __init__(self, out_features: int, in_features: int, like: Tensor) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(like.new_zeros(()).expand(out_features, in_features), requires_grad=False)
        self.register_parameter("bias", None)


class Part(_Layer):
    """Part of a product of several layers."""

    def __init__(self, layer: nn.Linear, product: "Product", index: int) -> None:
        super().__init__(layer.out_features, layer.in_features, layer.weight)
        self._product, self._index = [product], index  # in a list, since it is no part of this one's state

    @property
    def product(self) -> "Product":
        return self._product[0]

    @property
    def first_column(self) -> int:
        """Of this part in the product."""
        return sum(self.product.sizes[: self._index])

    def forward(self, input: Tensor) -> Tensor:
        return self._product[0].part(input, self._index)


class Product:
    """Computes the layers at once when the first is asked for, and hands out the others for the same input."""

    def __init__(self, layer: nn.Module, sizes: list[int]) -> None:
        self.layer, self.sizes = layer, sizes
        self._input: Tensor | None = None
        self._parts: list[Tensor | None] = []

    def whole(self, input: Tensor) -> Tensor:
        """All parts, one after the other."""
        output: Tensor = self.layer(input)
        return output

    def part(self, input: Tensor, index: int) -> Tensor:
        if self._input is not input or self._parts[index] is None:
            self._input, self._parts = input, list(self.layer(input).split(self.sizes, dim=-1))
        part, self._parts[index] = self._parts[index], None
        if not any(one is not None for one in self._parts):
            self._input = None
        assert part is not None
        return part


class _Packed(_Layer):
    """bfloat16, or float32, in oneDNN's own layout."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.out_features, layer.in_features, layer.weight)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().clone(), _TYPICAL_ROWS)
        self._bias = None if layer.bias is None else layer.bias.detach()

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = torch.ops.mkldnn._linear_pointwise(input, self._packed, self._bias, "none", [], "")
        return output


class _Banded(_Layer):
    """float32 or bfloat16, between float32 inputs and sums: a token's result does not depend on the tokens beside it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.out_features, layer.in_features, layer.weight)
        self._bands = native.bands(layer.weight.detach())
        self._bias = None if layer.bias is None else layer.bias.detach().float()

    def forward(self, input: Tensor) -> Tensor:
        output_TN = native.multiply(input.flatten(0, -2), self._bands, self._bias, self.out_features)
        return output_TN.view(*input.shape[:-1], -1)


class _Slabs(_Layer):
    """Another layer, which only ever sees so many rows at a time."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.out_features, layer.in_features, layer.weight)
        self._layer = layer

    def forward(self, input: Tensor) -> Tensor:
        rows_TK = input.flatten(0, -2)
        slabs = torch.split(pad(rows_TK, (0, 0, 0, -len(rows_TK) % _TYPICAL_ROWS)), _TYPICAL_ROWS)
        output_TN = torch.cat([self._layer(slab) for slab in slabs])
        return output_TN[: len(rows_TK)].view(*input.shape[:-1], -1)


class _Int8(_Layer):
    """Weights from -127 to 127 with a scale for each output (round to nearest), inputs the same way for each token."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.out_features, layer.in_features, layer.weight)
        weight_NK = layer.weight.detach().float()
        self._scale_N = (weight_NK.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        numbers_NK = (weight_NK / self._scale_N[:, None]).round().to(torch.int8)
        self._packed = torch.ops.onednn.qlinear_prepack(numbers_NK, [_TYPICAL_ROWS, layer.in_features])
        self._zero_N = torch.zeros(layer.out_features, dtype=torch.int32)
        self._bias_N = torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach().float()

    def forward(self, input: Tensor) -> Tensor:
        numbers_TK, scale_T = native.quantize(input.flatten(0, -2))
        # oneDNN has one scale for all tokens: it is 1, and each token's own comes after.
        weights = self._packed, self._scale_N, self._zero_N
        sums_TN = torch.ops.onednn.qlinear_pointwise(numbers_TK, 1.0, 128, *weights, None, 1.0, 0, torch.float32, "none", [], "")
        return native.scale(sums_TN, scale_T, self._bias_N, input.dtype).view(*input.shape[:-1], -1)


def _pack(layer: nn.Linear, weights: Weights, is_cpu: bool) -> nn.Linear:
    if not is_cpu:
        return layer
    if weights == "int8":
        return _Int8(layer)
    is_bf16 = layer.weight.dtype == torch.bfloat16
    if _has_avx512() and not (is_bf16 and _multiplies_bf16()) and native.linear_library() is not None:
        return _Banded(layer)
    return _Packed(layer) if (torch.ops.mkldnn._is_mkldnn_bf16_supported() if is_bf16 else _is_amd()) else layer


def _has_avx512() -> bool:
    return bool(torch.backends.cpu.get_cpu_capability() == "AVX512")


def _multiplies_bf16() -> bool:
    """Whether the processor does, and not oneDNN in several steps."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@cache
def _is_amd() -> bool:
    """There MKL, with which torch multiplies float32, reaches about half of oneDNN's rate.

    By the maker and not by a measurement: replicas on machines of one kind must compute the same.
    """
    try:
        is_amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return is_amd and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def _check_int8() -> None:
    """Processors without VNNI add pairs of products in 16 bits, which is too few for the largest. Raises `ModelError`."""
    largest = nn.Linear(64, 16, bias=False)
    nn.init.ones_(largest.weight)
    if not torch.allclose(_Int8(largest)(torch.ones(1, 64)), torch.full((1, 16), 64.0)):
        raise ModelError("This processor does not multiply int8 exactly (it has no VNNI): leave engine.weights out, or say bf16.")


def _joined(layers: Iterable[nn.Linear]) -> nn.Linear:
    """One layer with the outputs of several, one after the other."""
    parts = list(layers)
    joined = nn.Linear(parts[0].in_features, sum(part.out_features for part in parts), parts[0].bias is not None, device="meta")
    joined.weight = nn.Parameter(torch.cat([part.weight.detach() for part in parts]), requires_grad=False)
    if parts[0].bias is not None:
        joined.bias = nn.Parameter(torch.cat([part.bias.detach() for part in parts]), requires_grad=False)
    return joined


def _from_conv1d(layer: Conv1D) -> nn.Linear:
    converted = nn.Linear(layer.nx, layer.nf, device="meta")
    converted.weight = nn.Parameter(layer.weight.detach().t().contiguous(), requires_grad=False)
    converted.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return converted
