"""The learning rate's schedule, the clipping, and which weights decay."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tidepool.specs import OptimizerSpec
from tidepool.training.optimizer import build_optimizer, gradient_norm, learning_rate, scale


@given(st.integers(1, 50), st.integers(0, 50), st.sampled_from(["constant", "linear", "cosine"]))
def test_rates_stay_between_zero_and_the_peak(num_steps: int, warmup: int, schedule: str) -> None:
    spec = OptimizerSpec(learning_rate=0.5, warmup_steps=min(warmup, num_steps), schedule=schedule)
    rates = [learning_rate(step, num_steps, spec) for step in range(num_steps)]
    assert all(0 < rate <= 0.5 for rate in rates)
    assert rates[: spec.warmup_steps] == sorted(rates[: spec.warmup_steps])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedules_end_at_the_final_ratio(schedule: str) -> None:
    spec = OptimizerSpec(learning_rate=1.0, warmup_steps=2, schedule=schedule, final_learning_rate_ratio=0.1)
    assert learning_rate(0, 12, spec) == 0.5
    assert learning_rate(1, 12, spec) == learning_rate(2, 12, spec) == 1.0
    assert learning_rate(11, 12, spec) == pytest.approx(0.1)


def test_halfway_down_a_cosine() -> None:
    spec = OptimizerSpec(learning_rate=1.0, schedule="cosine", final_learning_rate_ratio=0.0)
    assert learning_rate(5, 11, spec) == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))


def test_gradients_are_scaled_and_clipped_to_the_norm() -> None:
    gradients = [torch.tensor([6.0]), torch.tensor([[0.0, 8.0]])]
    assert gradient_norm(gradients).item() == 10.0
    scale(gradients, 0.5, 5.0, None)
    assert [gradient.tolist() for gradient in gradients] == [[3.0], [[0.0, 4.0]]]
    scale(gradients, 0.5, 2.5, 2.5)
    assert [gradient.tolist() for gradient in gradients] == [[1.5], [[0.0, 2.0]]]
    scale(gradients, 2.0, 5.0, 1.0)
    torch.testing.assert_close(torch.cat([gradient.flatten() for gradient in gradients]), torch.tensor([0.6, 0.0, 0.8]))


@pytest.mark.parametrize("size", [0, 1, 2**14, 3 * 2**14 + 5])
def test_the_norm_is_that_of_float64_whatever_the_length(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    gradients = [torch.randn(shape, generator=generator) * 1e-4 for shape in ((size,), (3, 7))]
    flat = torch.cat([gradient.double().flatten() for gradient in gradients])
    assert gradient_norm(gradients).item() == pytest.approx(float(flat.norm()), rel=1e-6)


def test_vectors_do_not_decay() -> None:
    parameters = {"weight": torch.nn.Parameter(torch.ones(2, 2)), "bias": torch.nn.Parameter(torch.ones(2))}
    optimizer = build_optimizer(parameters, OptimizerSpec(learning_rate=0.1, weight_decay=0.5))
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.all(parameters["weight"] < 1)
    assert torch.equal(parameters["bias"], torch.ones(2))
