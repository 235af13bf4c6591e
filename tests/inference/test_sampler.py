"""Sampling: what each parameter does against plain references, the right distribution, and the same token in any company."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tidepool.errors import ModelError
from tidepool.inference.draw import BLOCK, NOTHING, block_edges, draw, stream_key, uniforms, weigh
from tidepool.inference.log_probabilities import prompt_logprobs
from tidepool.inference.penalties import Penalties, penalise
from tidepool.inference.sampler import Sampled, Sampler, SamplingState
from tidepool.inference.sampling_parameters import SamplingParameters
from tidepool.inference.truncation import Truncation, draw_truncated, draw_truncated_rows

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


def state(answer: tuple[int, ...] = (), prompt: tuple[int, ...] = (0,), answer_number: int = 0, **parameters: Any) -> SamplingState:
    made = SamplingState(SamplingParameters(**{"max_tokens": 1, "seed": 0, **parameters}), prompt, answer_number)
    for token in answer:
        made.append(token)
    return made


def sample(logits_BV: torch.Tensor, states: list[SamplingState], **rest: Any) -> Sampled:
    return Sampler().sample(logits_BV.clone(), states, **rest)


def draws(num: int, logits: torch.Tensor = LOGITS, **parameters: Any) -> list[int]:
    """The first token of so many requests with different seeds."""
    first = parameters.pop("seed", 0)
    sampled = sample(logits.expand(num, -1), [state(**{**parameters, "seed": first + index}) for index in range(num)])
    assert not sampled.errors
    return sampled.tokens


# --- The distribution ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "kept"),
    [
        ({}, range(300)),
        ({"temperature": 0.4}, range(300)),
        ({"temperature": 3.0}, range(300)),
        ({"top_k": 7}, range(7)),
        ({"top_p": 0.6}, None),
        ({"min_p": 0.2}, None),
        ({"temperature": 1.7, "min_p": 0.05, "top_k": 30, "top_p": 0.8}, None),
    ],
)
def test_tokens_come_as_often_as_they_should(parameters: dict[str, Any], kept: Any) -> None:
    """Pearson's chi-square over 10,000 draws, against probabilities that are worked out in order, one after the other."""
    logits = torch.linspace(3, -3, 300, dtype=torch.float64)
    expected = (logits / parameters.get("temperature", 1)).softmax(0).numpy()
    expected[expected < parameters.get("min_p", 0) * expected[0]] = 0
    expected[parameters.get("top_k", 300) :] = 0
    so_far, left = 0.0, expected.sum()
    for token in range(300):
        if so_far >= parameters.get("top_p", 2) * left:
            expected[token] = 0
        so_far += expected[token]
    expected /= expected.sum()
    if kept is not None:
        assert np.flatnonzero(expected).tolist() == list(kept)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))  # so that tokens do not stand in the order of their weights
    shuffled = torch.empty(300)
    shuffled[order] = logits.float()
    found = np.bincount(np.argsort(order.numpy())[draws(10_000, shuffled, **parameters)], minlength=300)
    assert found[expected == 0].sum() == 0
    big = expected * 10_000 >= 5
    observed = np.append(found[big], found[~big].sum())
    wanted = np.append(expected[big], expected[~big].sum()) * 10_000
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    degrees = len(wanted) - 1
    assert ((observed - wanted) ** 2 / wanted).sum() < degrees + 4 * np.sqrt(2 * degrees)


def test_the_tokens_of_one_answer_and_of_its_siblings_are_independent() -> None:
    """Pairs of neighbours in the index, and in the number of the answer, are as frequent as the products of their shares."""
    uniform = torch.zeros(1, 8).expand(4096, -1)
    states = [state(seed=index // 64) for index in range(4096)]
    in_time = np.array(sample(uniform, states, ahead=[index % 64 for index in range(4096)]).tokens).reshape(64, 64)
    siblings = [state(seed=index // 64, answer_number=index % 64) for index in range(4096)]
    across = np.array(sample(uniform, siblings).tokens).reshape(64, 64)
    for tokens in (in_time, across, in_time.T):
        pairs = np.bincount((tokens[:, :-1] * 8 + tokens[:, 1:]).ravel(), minlength=64)
        wanted = pairs.sum() / 64
        assert ((pairs - wanted) ** 2 / wanted).sum() < 63 + 4 * np.sqrt(2 * 63)
    assert (in_time[:, 0] == across[:, 0]).all()
    assert not (in_time == across).all()


# --- Against transformers --------------------------------------------------------------------------------------------


class _Plain(LogitsProcessor):
    """OpenAI's definitions of the penalties and of the bias, token by token."""

    def __init__(self, parameters: SamplingParameters, answer: tuple[int, ...], is_bias: bool) -> None:
        self._parameters, self._answer, self._is_bias = parameters, answer, is_bias

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        if self._is_bias:
            for token, bias in self._parameters.logit_bias:
                scores[0, token] += bias
            return scores
        for token in range(scores.shape[1]):
            count = self._answer.count(token)
            scores[0, token] -= count * self._parameters.frequency_penalty + (count > 0) * self._parameters.presence_penalty
        return scores


def reference(logits: torch.Tensor, parameters: SamplingParameters, prompt: tuple[int, ...], answer: tuple[int, ...]) -> torch.Tensor:
    """The logits as transformers would process them in float64."""
    steps: list[Any] = [
        _Plain(parameters, answer, is_bias=True),
        RepetitionPenaltyLogitsProcessor(parameters.repetition_penalty),
        _Plain(parameters, answer, is_bias=False),
    ]
    if parameters.temperature > 0:
        steps.append(TemperatureLogitsWarper(parameters.temperature))
    if parameters.min_p > 0:
        steps.append(MinPLogitsWarper(parameters.min_p))
    if parameters.top_k > 0:
        steps.append(TopKLogitsWarper(min(parameters.top_k, len(logits))))
    if parameters.top_p < 1:
        steps.append(TopPLogitsWarper(parameters.top_p))
    return LogitsProcessorList(steps)(torch.tensor([[*prompt, *answer]]), logits.double()[None])[0]


@st.composite
def requests(draw: Any, num_tokens: int) -> SamplingParameters:
    token = st.integers(0, num_tokens - 1)
    bias = st.floats(-5, 5, width=32)
    return SamplingParameters(
        max_tokens=1,
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 2.5])),
        top_p=draw(st.sampled_from([1.0, 0.95, 0.5, 0.01])),
        seed=draw(st.integers(-5, 2**70)),
        top_k=draw(st.sampled_from([0, 0, 1, 3, 40, 10_000])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.1, 1.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.7])),
        presence_penalty=draw(st.sampled_from([0.0, 1.5, -0.5])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.5, -2.0])),
        logit_bias=tuple(draw(st.dictionaries(token, bias, max_size=3)).items()),
        logprobs=draw(st.sampled_from([None, 0, 2])),
    )


def uniform(seed: int, answer: int, index: int) -> float:
    """SplitMix64, in Python's integers."""
    mask, golden = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(word: int) -> int:
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & mask
        word = (word ^ word >> 27) * 0x94D049BB133111EB & mask
        return word ^ word >> 31

    key = mix(mix(seed & mask) + answer * golden & mask)
    return ((mix(key + (index + 1) * golden & mask) >> 12) + 0.5) / 2**52


def test_random_numbers_are_those_of_splitmix64() -> None:
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    found = uniforms(np.full(5, 1234567, np.uint64), np.arange(5, dtype=np.uint64))
    assert (found == np.array([(word >> 12) + 0.5 for word in published]) * 2.0**-52).all()
    for seed, answer, index in [(0, 0, 0), (-1, 0, 5), (2**64 + 3, 127, 100_000), (7, 1, 0)]:
        key = np.array([stream_key(seed, answer)], np.uint64)
        assert uniforms(key, np.array([index], np.uint64))[0] == uniform(seed, answer, index)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), num_tokens=st.sampled_from([5, 130, 1500]), num_rows=st.integers(1, 5))
def test_whatever_is_asked_the_draw_falls_on_the_token_of_its_random_number(data: Any, num_tokens: int, num_rows: int) -> None:
    """Processed by transformers in float64, put in the order of the draw, summed up, and looked up."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    logits_BV = torch.randn(num_rows, num_tokens, generator=generator) * 4
    tokens = st.lists(st.integers(0, num_tokens - 1), max_size=8).map(tuple)
    asked = [(data.draw(requests(num_tokens)), data.draw(tokens), data.draw(tokens)) for _ in range(num_rows)]
    states = [SamplingState(parameters, prompt, answer=row) for row, (parameters, prompt, _) in enumerate(asked)]
    for made, (_, _, answer) in zip(states, asked, strict=True):
        for token in answer:
            made.append(token)
    sampled = sample(logits_BV, states)
    assert not sampled.errors
    for row, (parameters, prompt, answer) in enumerate(asked):
        processed = reference(logits_BV[row], parameters, prompt, answer).numpy()
        token = sampled.tokens[row]
        if parameters.temperature == 0:
            assert processed[token] == pytest.approx(processed.max(), rel=1e-5, abs=1e-5)
            continue
        is_cut = (parameters.top_p, parameters.min_p, parameters.top_k) != (1, 0, 0)
        order = np.argsort(-processed, kind="stable") if is_cut else np.arange(num_tokens)
        weights = np.exp(processed - processed.max())[order]
        edges = np.cumsum(weights) / weights.sum()
        place = order.tolist().index(token)
        point = uniform(parameters.seed or 0, row, len(answer))
        assert edges[place] - weights[place] / weights.sum() - 1e-5 <= point <= edges[place] + 1e-5


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [
        ({"repetition_penalty": 2.0}, [1.0, 1.0, 1.0, 3.0, -2.0]),
        ({"frequency_penalty": 0.5}, [2.0, 1.0, 1.5, 3.0, -1.0]),
        ({"presence_penalty": 0.5}, [2.0, 1.5, 1.5, 3.0, -1.0]),
        ({"repetition_penalty": 2.0, "frequency_penalty": -1.0, "presence_penalty": 0.25}, [1.0, 2.75, 1.75, 3.0, -2.0]),
    ],
)
def test_penalties_change_these_logits_of_the_prompt_and_of_the_answer(penalty: dict[str, float], expected: list[float]) -> None:
    """Tokens 0 and 4 are in the prompt, 1 twice in the answer, 2 in both, 3 in neither."""
    seen = state((1, 2, 1), (0, 2, 4, 0), temperature=0, **penalty)
    assert seen.seen is not None
    logits = torch.tensor([[9.0] * 5, [2.0, 2.0, 2.0, 3.0, -1.0]])
    penalise(logits, [Penalties(1, seen.parameters, seen.seen)])
    assert logits.tolist() == [[9.0] * 5, expected]


# --- Log-probabilities -----------------------------------------------------------------------------------------------


def test_log_probabilities_are_the_models_own_whatever_else_is_asked() -> None:
    generator = torch.Generator().manual_seed(3)
    logits_BV = torch.randn(4, 50, generator=generator)
    asked = [
        {"logprobs": 3, "temperature": 0},
        {"logprobs": 0, "temperature": 5.0},
        {},
        {"logprobs": 20, "logit_bias": ((7, 100.0),), "top_k": 1},
    ]
    sampled = sample(logits_BV, [state(prompt=(7, 8), repetition_penalty=2.0, **each) for each in asked])
    assert set(sampled.logprobs) == {0, 1, 3}
    for row, found in sampled.logprobs.items():
        expected = [float(value) for value in logits_BV[row].double() - logits_BV[row].double().exp().sum().log()]
        assert found.token_id == sampled.tokens[row]
        assert found.logprob == pytest.approx(expected[found.token_id], abs=1e-5)
        best = sorted(range(50), key=lambda token: (-expected[token], token))[: asked[row]["logprobs"]]
        assert [token for token, _ in found.top] == best
        assert [value for _, value in found.top] == pytest.approx([expected[token] for token in best], abs=1e-5)
    assert sampled.logprobs[3].token_id == 7


def test_of_equally_likely_alternatives_the_lower_numbers_come_first() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0, 1.0, 1.0]])
    found = sample(logits, [state(temperature=0, logprobs=4)])
    assert found.tokens == [1]
    assert [token for token, _ in found.logprobs[0].top] == [1, 3, 2, 4]


def test_prompt_log_probabilities_are_told_for_each_token_that_follows() -> None:
    logits_NV = torch.randn(3, 9, generator=torch.Generator().manual_seed(5)).bfloat16()
    found = prompt_logprobs(logits_NV, [4, 4, 8], 1)
    for row, token in enumerate([4, 4, 8]):
        expected = logits_NV[row].double().log_softmax(0)
        assert found[row].token_id == token
        assert found[row].logprob == pytest.approx(float(expected[token]), abs=1e-5)
        assert found[row].top == (pytest.approx((int(expected.argmax()), float(expected.max())), abs=1e-5),)


# --- Company ---------------------------------------------------------------------------------------------------------

SIZES = [1, 7, 128, 1001, 5003]


def company(num_tokens: int) -> list[dict[str, Any]]:
    """Requests of every kind."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {},
        {"temperature": 0.6},
        {"top_k": 3},
        {"top_p": 0.9, "temperature": 1.4},
        {"min_p": 0.1},
        {"top_k": 40, "top_p": 0.8, "min_p": 0.01, "logprobs": 2},
        {"repetition_penalty": 1.2, "frequency_penalty": 0.4, "logprobs": 0},
        {"logit_bias": ((num_tokens - 1, 3.0),), "presence_penalty": 1.0},
    ]
    return [{**kinds[index % len(kinds)], "seed": index} for index in range(32)]


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", SIZES)
def test_a_row_is_the_same_alone_and_in_any_company(num_tokens: int, dtype: torch.dtype, num_threads: int) -> None:
    logits_BV = (torch.randn(32, num_tokens, generator=torch.Generator().manual_seed(num_tokens)) * 3).to(dtype)
    asked = company(num_tokens)

    def states(rows: list[int]) -> list[SamplingState]:
        used = range(min(num_tokens, 6))
        return [state(tuple(used)[row % 3 :], tuple(used), answer_number=row % 2, **asked[row]) for row in rows]

    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        together = sample(logits_BV, states(list(range(32))))
        orders = [[row] for row in range(0, 32, 3)] + [list(range(31, -1, -1)), list(range(1, 32, 2)), list(range(5))]
        for rows in orders:
            found = sample(logits_BV[rows], states(rows))
            assert found.tokens == [together.tokens[row] for row in rows]
            assert found.logprobs == {rows.index(row): logprobs for row, logprobs in together.logprobs.items() if row in rows}
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("num_tokens", SIZES)
def test_weights_and_their_sums_have_the_same_bits_in_any_batch(num_tokens: int, num_threads: int) -> None:
    """Tokens alone would hide a difference in the last bit nearly always."""
    logits_BV = torch.randn(32, num_tokens, generator=torch.Generator().manual_seed(num_tokens)) * 3
    temperature_B1 = torch.linspace(0.2, 3, 32)[:, None]
    width = -(-num_tokens // BLOCK) * BLOCK

    def weights(rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        weights_BN = torch.zeros(len(rows), width)
        weigh(logits_BV[rows], temperature_B1[rows], weights_BN[:, :num_tokens])
        return weights_BN, block_edges(weights_BN)

    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        together, edges = weights(list(range(32)))
        for rows in [[row] for row in range(32)] + [list(range(31, -1, -1)), [3, 9, 10]]:
            alone, alone_edges = weights(rows)
            assert alone.equal(together[rows])
            assert alone_edges.equal(edges[rows])
    finally:
        torch.set_num_threads(before)


def test_no_weight_is_a_number_that_processors_are_slow_with() -> None:
    """Neither a denormal one, nor what comes of the exponential of an infinity."""
    logits = torch.tensor([[0.0, -50.0, -90.0, -100.0, -1e30, -torch.inf]])
    weights_BN = torch.zeros(2, 6)
    weigh(logits.expand(2, -1), torch.tensor([[1.0], [1e-30]]), weights_BN)
    assert (weights_BN >= torch.finfo(torch.float32).tiny).all()
    assert (weights_BN[:, 2:] < NOTHING).all()


def test_one_sampler_serves_batches_that_change_as_new_samplers_would() -> None:
    generator = torch.Generator().manual_seed(8)
    asked = company(200)
    states = [state(prompt=(1, 2), **each) for each in asked]
    copies = [state(prompt=(1, 2), **each) for each in asked]
    sampler = Sampler()
    for step in range(12):
        rows = sorted({(step // 2 * 7 + index * (step // 2 + 1)) % 32 for index in range(20)})
        logits_BV = torch.randn(len(rows), 200, generator=generator)
        found = sampler.sample(logits_BV.clone(), [states[row] for row in rows])
        fresh = sample(logits_BV, [copies[row] for row in rows])
        assert found == fresh
        for row, token in zip(rows, found.tokens, strict=True):
            states[row].append(token)
            copies[row].append(token)


def test_a_state_made_again_from_its_tokens_goes_on_with_the_same_tokens() -> None:
    steps = torch.randn(30, 32, 100, generator=torch.Generator().manual_seed(9))
    asked = company(100)
    whole = [state(prompt=(5, 6), **each) for each in asked]
    answers: list[list[int]] = [[] for _ in asked]
    sampler = Sampler()
    for step in range(30):
        if step == 13:
            whole = [state(tuple(answer), (5, 6), **each) for answer, each in zip(answers, asked, strict=True)]
        for row, token in enumerate(sampler.sample(steps[step].clone(), whole).tokens):
            whole[row].append(token)
            answers[row].append(token)
    unbroken = [state(prompt=(5, 6), **each) for each in asked]
    for step in range(30):
        tokens = sampler.sample(steps[step].clone(), unbroken).tokens
        assert tokens == [answer[step] for answer in answers]
        for row, token in enumerate(tokens):
            unbroken[row].append(token)


def test_a_look_ahead_draws_what_comes_when_the_tokens_are_there() -> None:
    logits_BV = torch.randn(6, 80, generator=torch.Generator().manual_seed(4))
    ahead = state(seed=11, top_p=0.9)
    assert ahead.can_look_ahead
    assert not state(frequency_penalty=1.0).can_look_ahead
    at_once = sample(logits_BV, [ahead] * 6, ahead=range(6)).tokens
    one_by_one = []
    for row in range(6):
        one_by_one += sample(logits_BV[row : row + 1], [ahead]).tokens
        ahead.append(one_by_one[-1])
    assert at_once == one_by_one
    assert len(set(at_once)) > 1


# --- Edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0, 1e-300, 1e-6])
@pytest.mark.parametrize("cuts", [{}, {"top_p": 0.9}, {"top_k": 3}])
def test_at_no_temperature_the_likeliest_comes_always(temperature: float, cuts: dict[str, Any]) -> None:
    assert draws(20, LOGITS.flip(0) * 100, temperature=temperature, **cuts) == [3] * 20


@pytest.mark.parametrize(("top_p", "kept"), [(1e-9, {1}), (0.5, {1}), (0.51, {1, 3}), (0.8, {1, 3}), (0.9, {0, 1, 3}), (1, {0, 1, 2, 3})])
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, kept: set[int]) -> None:
    probabilities = torch.tensor([0.125, 0.5, 0.0625, 0.3125], dtype=torch.float64)
    assert set(draws(600, probabilities.log(), top_p=top_p)) == kept


@pytest.mark.parametrize(
    ("cuts", "kept"), [({"top_k": 2}, {0, 1}), ({"top_p": 0.4}, {0, 1}), ({"min_p": 1.0}, {0, 1, 2, 3, 4}), ({"top_k": 9}, {0, 1, 2, 3, 4})]
)
def test_of_equally_likely_tokens_the_lower_numbers_are_kept(cuts: dict[str, Any], kept: set[int]) -> None:
    assert set(draws(300, torch.zeros(5), **cuts)) == kept


@pytest.mark.parametrize("cuts", [{}, {"top_p": 0.99}, {"top_k": 4}, {"min_p": 0.5}])
def test_a_token_that_cannot_be_is_never_drawn(cuts: dict[str, Any]) -> None:
    assert set(draws(300, torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]), **cuts)) == {1, 3}


@pytest.mark.parametrize("size", [3, 128, 300])
def test_random_numbers_at_the_edge_draw_tokens_that_can_be(size: int) -> None:
    """Weights that stand for impossible tokens are all around the two others."""
    weights_BN = torch.full((4, -(-size // BLOCK) * BLOCK), NOTHING)
    weights_BN[:, 1], weights_BN[:, size - 2] = 1, 1 / 3
    tokens, is_valid = draw(weights_BN, np.array([2.0**-53, 0.7499999, 0.7500001, 1 - 2.0**-53]))
    assert all(is_valid)
    assert set(tokens.tolist()) == {1, size - 2}
    assert (tokens[0], tokens[3]) == (1, size - 2)


def test_the_seed_and_the_answer_decide() -> None:
    even = torch.zeros(1, 1000)

    def first(**parameters: Any) -> int:
        return sample(even, [state(**parameters)]).tokens[0]

    assert first(seed=7) == first(seed=7) == first(seed=2**64 + 7)
    assert len({first(seed=seed) for seed in range(-20, 20)}) > 30
    assert len({first(seed=7, answer_number=number) for number in range(40)}) > 30
    assert len({first(seed=None) for _ in range(40)}) > 30
    unseeded = state(seed=None)
    assert first(seed=unseeded.seed) == sample(even, [unseeded]).tokens[0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_whose_logits_are_no_numbers_fails_alone(bad: float) -> None:
    asked: list[dict[str, Any]] = [{"temperature": 0}, {}, {"top_p": 0.5}, {"top_k": 2, "logprobs": 1}, {"repetition_penalty": 2.0}]
    logits_BV = LOGITS.expand(10, 4).clone()
    logits_BV[:5, slice(None) if bad == -torch.inf else 1] = bad
    sampled = sample(logits_BV, [state(**each) for each in asked * 2])
    assert set(sampled.errors) == {0, 1, 2, 3, 4}
    assert all(isinstance(error, ModelError) and "not finite" in str(error) for error in sampled.errors.values())
    assert sampled.tokens[5:] == sample(LOGITS.expand(5, 4), [state(**each) for each in asked]).tokens


@pytest.mark.parametrize(("name", "row"), list(itertools.product(["top_k", "top_p", "min_p", "all"], [0, 1, 2])))
def test_rows_are_cut_on_a_gpu_as_they_are_on_the_cpu(name: str, row: int) -> None:
    """The vectorised way that a GPU takes, on the CPU: flat rows, peaked ones, and rows full of equal weights."""
    generator = torch.Generator().manual_seed(row)
    logits = [
        torch.randn(64, 3000, generator=generator),
        torch.randn(64, 3000, generator=generator) * 8,
        torch.randint(0, 9, (64, 3000), generator=generator),
    ]
    weights_RV = (logits[row] - logits[row].amax(dim=1, keepdim=True)).float().exp()
    numbers = np.random.default_rng(row).random(64)
    cuts = []
    for index in range(64):
        top_k = [0, 1, 5, 500, 1024, 2000, 2999, 5000][index % 8] if name in ("top_k", "all") else 0
        top_p = [0.1, 0.5, 0.9, 0.999][index // 8 % 4] if name in ("top_p", "all") else 1.0
        min_p = [0.0, 0.01, 0.5, 1.0][index // 16] if name in ("min_p", "all") else 0.0
        cuts.append(Truncation(min_p, top_k, top_p))
    expected = draw_truncated(weights_RV, cuts, numbers)
    assert draw_truncated_rows(weights_RV, cuts, torch.from_numpy(numbers)[:, None]) == expected
    alone = [
        draw_truncated_rows(weights_RV[index : index + 1], [cuts[index]], torch.full((1, 1), number, dtype=torch.float64))
        for index, number in enumerate(numbers)
    ]
    assert [tokens[0] for tokens, _ in alone] == expected[0]
