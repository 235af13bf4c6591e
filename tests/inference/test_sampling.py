"""Choosing tokens: the right distribution, cut where it should be, and repeatable."""

import pytest
import torch

from tidepool.errors import ModelError
from tidepool.inference import SamplingParameters
from tidepool.inference.sampling import Sampler

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


def draw(num: int, logits: torch.Tensor = LOGITS, temperature: float = 1.0, top_p: float = 1.0, seed: int | None = 0) -> list[int]:
    sampler = Sampler(SamplingParameters(1, temperature, top_p, seed))
    return [sampler.choose(logits) for _ in range(num)]


def shares(tokens: list[int]) -> list[float]:
    return [tokens.count(token) / len(tokens) for token in range(4)]


def test_tokens_come_as_often_as_the_model_says() -> None:
    assert shares(draw(4000)) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)


def test_temperature_sharpens_and_flattens() -> None:
    assert shares(draw(4000, temperature=0.5)) == pytest.approx([0.685, 0.247, 0.062, 0.007], abs=0.03)
    assert shares(draw(4000, temperature=100)) == pytest.approx([0.25] * 4, abs=0.03)


@pytest.mark.parametrize("temperature", [0, 1e-300])
def test_at_no_temperature_the_likeliest_comes_always(temperature: float) -> None:
    assert draw(20, LOGITS.flip(0) * 100, temperature=temperature) == [3] * 20


@pytest.mark.parametrize(("top_p", "kept"), [(1e-9, {1}), (0.5, {1}), (0.51, {1, 3}), (0.8, {1, 3}), (0.9, {0, 1, 3}), (1, {0, 1, 2, 3})])
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, kept: set[int]) -> None:
    probabilities = torch.tensor([0.125, 0.5, 0.0625, 0.3125], dtype=torch.float64)
    assert set(draw(600, probabilities.log(), top_p=top_p)) == kept


def test_a_token_that_cannot_be_is_never_drawn() -> None:
    assert set(draw(300, torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]))) == {1, 3}


def test_the_seed_decides() -> None:
    assert draw(40, seed=7) == draw(40, seed=7) == draw(40, seed=2**63 + 7)
    assert draw(40, seed=7) != draw(40, seed=-8)
    assert draw(40, seed=None) != draw(40, seed=None)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(bad: float, temperature: float) -> None:
    with pytest.raises(ModelError, match="not finite"):
        draw(1, torch.tensor([0.0, bad, 1.0, 2.0]), temperature=temperature)
