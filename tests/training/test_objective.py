"""The loss and its gradient are those of plain cross-entropy, however the logits are cut; documents are apart where there are several."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from tidepool.data import Samples
from tidepool.models import build_model, packed_attention_mask, packed_positions, use_given_masks
from tidepool.training import objective
from tidepool.training.batch import Batch, cut_batches
from tidepool.training.objective import loss_sum

CONFIG: dict[str, Any] = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
CONFIG |= {"num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.2}
CPU = torch.device("cpu")
ONE, SEVERAL = [[0] * 24, [0] * 20 + [-1] * 4], [[0] * 24, [0] * 10 + [1] * 12 + [-1] * 2]


def make_batch(documents: list[list[int]], device: torch.device = CPU) -> Batch:
    numbers, random = np.array(documents, np.int32), np.random.default_rng(1)
    targets = (random.random(numbers.shape) < 0.7) & (numbers >= 0)
    targets[:, 0] = False
    targets[:, 1:] &= numbers[:, 1:] == numbers[:, :-1]
    tokens = random.integers(3, 300, numbers.shape, np.int32)
    (batch,) = cut_batches(Samples(np.where(numbers < 0, 0, tokens), targets, numbers), len(numbers), device)
    return batch


def of_plain_transformers(model: Any, batch: Batch, documents: list[list[int]]) -> torch.Tensor:
    numbers = torch.tensor(documents)
    logits = model(batch.tokens_NT, attention_mask=packed_attention_mask(numbers), position_ids=packed_positions(numbers)).logits
    return cross_entropy(logits[:, :-1][batch.targets_NT[:, 1:]], batch.tokens_NT[:, 1:][batch.targets_NT[:, 1:]], reduction="sum")


@pytest.mark.parametrize("slice_size", [1, 320 * 7, 2**18])
@pytest.mark.parametrize("documents", [ONE, SEVERAL])
def test_loss_and_gradient_are_those_of_plain_transformers(
    documents: list[list[int]], slice_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective, "_SLICE_SIZE", slice_size)
    model, batch = build_model(CONFIG, 320, seed=1), make_batch(documents)
    found = loss_sum(model, batch)
    (found / 3).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    expected = of_plain_transformers(model, batch, documents)
    (expected / 3).backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert loss_sum(model, batch).item() == found.item()


def test_only_samples_of_several_documents_get_a_mask() -> None:
    assert make_batch(ONE).documents_NT is None
    assert make_batch(SEVERAL).documents_NT is not None


class Waits(TorchDispatchMode):
    """Notes the operations after which the host knows a number that the device computed."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal):
            self.noted.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "config",
    [CONFIG, CONFIG | {"model_type": "qwen2", "num_key_value_heads": 2}, {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2}],
)
@pytest.mark.parametrize("documents", [ONE, SEVERAL])
def test_no_batch_waits_for_the_device(documents: list[list[int]], config: dict[str, Any]) -> None:
    model, batch = build_model(config, 320, seed=1), make_batch(documents)
    expected = loss_sum(model, batch)
    use_given_masks(model)
    with Waits() as waits:
        loss = loss_sum(model, batch)
        loss.backward()
    assert waits.noted == []
    assert loss.equal(expected), "it is another attention"


@pytest.mark.parametrize("documents", [ONE, SEVERAL])
def test_a_model_with_a_window_keeps_its_window_in_each_document(documents: list[list[int]]) -> None:
    config = CONFIG | {"model_type": "mistral", "sliding_window": 8, "num_key_value_heads": 2}
    model, batch = build_model(config, 320, seed=1), make_batch(documents)
    use_given_masks(model)
    expected = 0.0
    for numbers, tokens, targets in zip(documents, batch.tokens_NT, batch.targets_NT, strict=True):
        for number in {*numbers} - {-1}:
            own = torch.tensor(numbers) == number
            logits = model(tokens[own][None]).logits[0]
            expected += cross_entropy(logits[:-1][targets[own][1:]], tokens[own][1:][targets[own][1:]], reduction="sum").item()
    assert loss_sum(model, batch).item() == pytest.approx(expected, rel=1e-5)


def test_a_second_backward_pass_is_refused() -> None:
    loss = loss_sum(build_model(CONFIG, 320, seed=1), make_batch(ONE))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_bf16_logits_lose_no_more_than_their_own_rounding() -> None:
    logits = torch.randn(50, 320, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    labels = torch.arange(50) * 3
    loss = objective._CrossEntropy.apply(logits, labels)
    loss.backward()
    found, logits.grad = logits.grad, None
    expected = cross_entropy(logits.float(), labels, reduction="sum")
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert found is not None
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, logits.grad) or (found - logits.grad).abs().max() < 2**-8  # type: ignore[operator]
