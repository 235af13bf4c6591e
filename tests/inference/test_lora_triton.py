"""The Triton kernels in Triton's interpreter, without a GPU: they add what a product in float64 says, the same bits in any company.

`test_kernels` runs these in a process of its own, since Triton reads `TRITON_INTERPRET` when it is imported.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("set TRITON_INTERPRET=1", allow_module_level=True)

from triton.runtime import interpreter

from tests.inference.families import FAMILIES
from tests.inference.test_lora import layers_with
from tidepool.inference.linear import swap_linear_layers
from tidepool.inference.lora_layers import NO_SLOT, AdaptedLayer, LoraLayers
from tidepool.inference.lora_triton import add
from tidepool.models import build_model

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # the interpreter's loops

SLOTS = [2, NO_SLOT, NO_SLOT, 0, 0, 2, 3, 3, 3, 1, 3, NO_SLOT, *[1] * 25, 0, 2]


def added(layers: LoraLayers, layer: AdaptedLayer, slots: Sequence[int], inputs: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    output = base.clone()
    tables = layers._tables.of(layer)
    add(inputs, output, torch.tensor(slots, dtype=torch.int32), *tables, most_ranks=layers._most_ranks)
    return output


@pytest.fixture
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums in one order for every row, as a GPU's tiles have: NumPy rounds a row by its place (seen on an AMD processor).

    The interpreter also multiplies the bits of bfloat16 as if they were integers: it gets float32.
    """

    def widened(handle: Any) -> np.ndarray:
        if handle.dtype.scalar.name != "bf16":
            return np.asarray(handle.data, dtype=np.float32)
        return (handle.data.astype(np.uint32) << 16).view(np.float32)

    def dot(_: Any, a: Any, b: Any, d: Any, *_precision: Any) -> Any:
        products = widened(a)[:, :, None] * widened(b)[None]
        return interpreter.TensorHandle(products.sum(axis=1, dtype=np.float32) + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_each_row_gets_what_its_adapter_has_for_it(dtype: torch.dtype) -> None:
    config: dict[str, Any] = {
        "hidden_size": 36,
        "intermediate_size": 70,
        "num_attention_heads": 2,
        "head_dim": 18,
        "num_key_value_heads": 1,
    }
    model = build_model(FAMILIES["llama"] | config | {"num_hidden_layers": 1}, 300, 1).to(dtype)
    swap_linear_layers(model, "fp32")
    layers, made = layers_with(model, [1, 5, 8, 33], dtype)
    for layer in layers._layers:
        size = layers.sizes[layer.parts[0].name][0]
        inputs = torch.randn(len(SLOTS), size, generator=torch.Generator().manual_seed(2)).to(dtype)
        base = layer.module(inputs)
        found = added(layers, layer, SLOTS, inputs, base)
        for row, slot in enumerate(SLOTS):
            expected = base[row].double()
            for part in layer.parts:
                a_b_scale = made[slot].get(part.name) if slot != NO_SLOT else None
                if a_b_scale is not None:
                    a, b, scale = a_b_scale
                    expected[part.first : part.first + part.size] += scale * (b.double() @ (a.double() @ inputs[row].double()))
            error = (found[row].double() - expected).abs().max() / expected.abs().max()
            assert error < (1e-6 if dtype == torch.float32 else 1e-2), (layer.parts[0].name, row, slot)
            if slot == NO_SLOT:
                assert found[row].equal(base[row])
            else:
                assert found[row].equal(added(layers, layer, [slot], inputs[row : row + 1], base[row : row + 1])[0])
