"""Choosing the next token of each sequence of a batch from the model's logits.

In this order (vLLM's): the grammar's mask, logit bias, penalties, temperature, min_p, top_k, top_p, the draw. Temperature 0 takes
the highest logit after the penalties, of equals the lowest token.

Invariants:
- A row's token is a function of the bits of its logits, its parameters, the tokens of its sequence, and (seed, answer, index)
  alone: it is the same in any company, and again after a preemption or on another replica.
- What a sequence needs for this is rebuilt from its parameters and tokens alone.
- A row that cannot be sampled fails alone.
- Nobody pays for what no row asks for: a greedy batch costs one argmax. Tensors that depend on the batch's composition are kept
  for as long as it stays.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tidepool.errors import ModelError
from tidepool.inference.draw import BLOCK, draw, stream_key, uniforms, weigh
from tidepool.inference.engine import TokenLogprobs
from tidepool.inference.grammar import CompiledGrammar
from tidepool.inference.log_probabilities import token_logprobs
from tidepool.inference.penalties import Penalties, TokenCounts, penalise
from tidepool.inference.sampling_parameters import SamplingParameters
from tidepool.inference.transfer import Download
from tidepool.inference.truncation import Truncation, draw_truncated

_SMALLEST_TEMPERATURE = float(np.finfo(np.float32).tiny)


class SamplingState:
    """What the choice of a sequence's next token depends on beside the logits. `answer`: which of a request's n answers."""

    def __init__(
        self, parameters: SamplingParameters, prompt_tokens: Sequence[int], answer: int = 0, grammar: CompiledGrammar | None = None
    ) -> None:
        self.parameters = parameters
        self.seed = secrets.randbits(64) if parameters.seed is None else parameters.seed
        self.key = stream_key(self.seed, answer)
        self.num_tokens = 0
        """Tokens of the answer so far, which is the index of the next draw."""
        self.seen: TokenCounts | None = None
        if parameters.has_penalties:
            self.seen = TokenCounts(prompt_tokens if parameters.repetition_penalty != 1 else ())
        self.matcher = grammar.start() if grammar is not None else None

    @property
    def can_look_ahead(self) -> bool:
        """Whether a later token can be chosen before the ones before it have been appended."""
        return self.seen is None and self.matcher is None

    def append(self, token: int) -> None:
        """Take the next token of the answer in, whoever chose it."""
        self.num_tokens += 1
        if self.seen is not None:
            self.seen.add(token)
        if self.matcher is not None:
            self.matcher.append(token)


@dataclass(frozen=True)
class Sampled:
    """The next token of each row. A token of a row with an error means nothing; `logprobs` has the rows that ask for them."""

    tokens: list[int]
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    errors: dict[int, Exception] = field(default_factory=dict)


class Choice:
    """The next token of each row as the device chooses it now: `tokens_B` for whatever is launched there, `read` for the host."""

    def __init__(self, tokens_B: Tensor, is_valid_B: Tensor, logprobs: dict[int, TokenLogprobs], errors: dict[int, Exception]) -> None:
        self.tokens_B = tokens_B
        self._download = Download(tokens_B, is_valid_B)
        self._logprobs, self._errors = logprobs, errors

    def read(self) -> Sampled:
        """Wait for the tokens."""
        tokens_B, is_valid_B = self._download.wait()
        errors = {row: _broken() for row, is_valid in enumerate(is_valid_B.tolist()) if not is_valid} | self._errors
        return Sampled(tokens_B.tolist(), self._logprobs, errors)


class Sampler:
    """Samples one batch after another."""

    def __init__(self) -> None:
        self._states: list[SamplingState] = []
        self._plan: _Plan | None = None
        self._weights = torch.empty(0, 0)

    def sample(self, logits_BV: Tensor, states: list[SamplingState], ahead: Sequence[int] | None = None) -> Sampled:
        """Choose the next token of each row, and wait for them; see `choose`."""
        return self.choose(logits_BV, states, ahead).read()

    @torch.inference_mode()
    def choose(self, logits_BV: Tensor, states: list[SamplingState], ahead: Sequence[int] | None = None) -> Choice:
        """Choose the next token of each row, of logits in any float dtype on any device, which may be overwritten.

        With `ahead`, row i is for the token that follows so many that have not been appended to its state yet. A GPU is not waited for
        by a batch that is greedy, or drawn without cuts, without log-probabilities, penalties, bias and grammars.
        """
        plan = self._plan_for(states, logits_BV)
        own_LV = logits_BV[plan.logprob_rows] if plan.logprob_rows else None
        errors: dict[int, Exception] = {}
        logits_BV = plan.process(logits_BV, errors)
        found = []
        if plan.greedy_rows:
            found.append((plan.greedy_rows, *_likeliest(_rows(logits_BV, plan.greedy_rows))))
        if plan.drawn_rows:
            indices = np.array([state.num_tokens for state in states], np.uint64)[plan.drawn_rows]
            if ahead is not None:
                indices += np.array(ahead, np.uint64)[plan.drawn_rows]
            found.append((plan.drawn_rows, *self._draw(_rows(logits_BV, plan.drawn_rows), plan, indices)))
        tokens_B, is_valid_B = _gather(found, len(states))
        logprobs = [] if own_LV is None else token_logprobs(own_LV, tokens_B[plan.logprob_rows].tolist(), plan.nums_top)
        return Choice(tokens_B, is_valid_B, dict(zip(plan.logprob_rows, logprobs, strict=True)), errors)

    def _plan_for(self, states: list[SamplingState], logits_BV: Tensor) -> "_Plan":
        if self._plan is None or states != self._states or self._plan.device != logits_BV.device:
            self._states, self._plan = list(states), _Plan(states, logits_BV.shape[1], logits_BV.device)
        return self._plan

    def _draw(self, logits_DV: Tensor, plan: "_Plan", indices_D: np.ndarray) -> tuple[Tensor, Tensor]:
        num_rows, num_tokens = logits_DV.shape
        weights_DN = self._buffer(num_rows, num_tokens, logits_DV.device)
        weigh(logits_DV, plan.temperature_D1, weights_DN[:, :num_tokens])
        uniforms_D = uniforms(plan.keys_D, indices_D)
        found = []
        if plan.whole:
            found.append((plan.whole, *draw(_rows(weights_DN, plan.whole), uniforms_D[plan.whole])))
        if plan.cut:
            weights_RV = _rows(weights_DN, plan.cut)[:, :num_tokens]
            tokens, is_valid = draw_truncated(weights_RV, plan.cuts, uniforms_D[plan.cut])
            found.append((plan.cut, torch.tensor(tokens, device=logits_DV.device), torch.tensor(is_valid, device=logits_DV.device)))
        return _gather(found, num_rows)

    def _buffer(self, num_rows: int, size: int, device: torch.device) -> Tensor:
        """Memory for weights, reused, in which each row ends with zeros up to a whole block."""
        shape = (max(num_rows, len(self._weights)), -(-size // BLOCK) * BLOCK)
        if self._weights.shape != shape or self._weights.device != device:
            self._weights = torch.empty(shape, dtype=torch.float32, device=device)
        weights_DN = self._weights[:num_rows]
        weights_DN[:, size:] = 0
        return weights_DN


class _Plan:
    """What the parameters of a batch ask for, row by row."""

    def __init__(self, states: list[SamplingState], num_tokens: int, device: torch.device) -> None:
        self.device = device
        asked = [state.parameters for state in states]
        self.greedy_rows = [row for row, each in enumerate(asked) if each.temperature == 0]
        self.drawn_rows = [row for row, each in enumerate(asked) if each.temperature > 0]
        self.logprob_rows = [row for row, each in enumerate(asked) if each.logprobs is not None]
        self.nums_top = [asked[row].logprobs or 0 for row in self.logprob_rows]
        drawn = [asked[row] for row in self.drawn_rows]
        self.keys_D = np.array([states[row].key for row in self.drawn_rows], np.uint64)
        self.temperature_D1 = torch.tensor(
            [[max(each.temperature, _SMALLEST_TEMPERATURE)] for each in drawn], dtype=torch.float32, device=device
        )
        cuts = [Truncation(each.min_p, each.top_k, each.top_p) for each in drawn]
        self.whole = [index for index, cut in enumerate(cuts) if not cut.is_any]
        self.cut = [index for index, cut in enumerate(cuts) if cut.is_any]
        self.cuts = [cuts[index] for index in self.cut]
        biases = [(row, token, bias) for row, each in enumerate(asked) for token, bias in each.logit_bias]
        self._bias_rows = torch.tensor([row for row, _, _ in biases], dtype=torch.long, device=device)
        self._bias_tokens = torch.tensor([token for _, token, _ in biases], dtype=torch.long, device=device)
        self._biases = torch.tensor([bias for _, _, bias in biases], dtype=torch.float32, device=device)
        self._penalties = [Penalties(row, state.parameters, state.seen) for row, state in enumerate(states) if state.seen is not None]
        self._matchers = [(row, state.matcher) for row, state in enumerate(states) if state.matcher is not None]
        self._masks = np.empty((len(self._matchers), -(-num_tokens // 32)), np.int32)

    def process(self, logits_BV: Tensor, errors: dict[int, Exception]) -> Tensor:
        """The logits from which tokens are chosen, in place where possible. Adds the rows whose grammar cannot go on to the errors."""
        if not len(self._biases) and not self._penalties and not self._matchers:
            return logits_BV
        logits_BV = logits_BV.float().contiguous()
        if self._matchers:
            self._apply_grammars(logits_BV, errors)
        if len(self._biases):
            logits_BV[self._bias_rows, self._bias_tokens] += self._biases
        if self._penalties:
            penalise(logits_BV, self._penalties)
        return logits_BV

    def _apply_grammars(self, logits_BV: Tensor, errors: dict[int, Exception]) -> None:
        for (row, matcher), mask in zip(self._matchers, self._masks, strict=True):
            matcher.fill(mask)
            if error := matcher.error:
                errors[row] = error
        bits = np.unpackbits(self._masks.view(np.uint8), axis=1, count=logits_BV.shape[1], bitorder="little")
        is_allowed_GV = torch.from_numpy(bits.view(np.bool_)).to(logits_BV.device)
        rows = [row for row, _ in self._matchers]
        logits_BV[rows] = torch.where(is_allowed_GV, logits_BV[rows], -torch.inf)


def _rows(logits_BV: Tensor, rows: list[int]) -> Tensor:
    return logits_BV if len(rows) == len(logits_BV) else logits_BV[rows]


def _gather(found: list[tuple[list[int], Tensor, Tensor]], num_rows: int) -> tuple[Tensor, Tensor]:
    """Tokens, and whether they are any, of all rows, from those of some rows each."""
    (_, tokens, is_valid), *others = found
    if not others:
        return tokens, is_valid
    tokens_B, is_valid_B = tokens.new_empty(num_rows), is_valid.new_empty(num_rows)
    for rows, tokens, is_valid in found:
        tokens_B[rows], is_valid_B[rows] = tokens, is_valid
    return tokens_B, is_valid_B


def _likeliest(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """The first of the highest logits of each row, and whether it is a finite number."""
    if logits_BV.device.type == "cpu":  # NumPy finds it ten times faster than torch
        rows = logits_BV.float().numpy()
        tokens = rows.argmax(axis=1)
        return torch.from_numpy(tokens), torch.from_numpy(np.isfinite(rows[np.arange(len(rows)), tokens]))
    values_B, tokens_B = logits_BV.max(dim=1)
    return tokens_B, values_B.isfinite()


def _broken() -> ModelError:
    return ModelError("The model's logits are not finite: its weights are broken, or their values too large for their dtype.")
