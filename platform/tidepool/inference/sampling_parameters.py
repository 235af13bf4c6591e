"""What a request asks of the choice of its tokens, and which values of that make sense.

The names and the ranges are those of OpenAI's API, and vLLM's where that has none (top_k, min_p, repetition_penalty,
prompt_logprobs). What they do stands where it is done: `sampler`, `truncation`, `penalties`, `log_probabilities`, `grammar`.
"""

import math
from dataclasses import dataclass

from tidepool.errors import RequestError

MAX_ANSWERS = 128
MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParameters:
    """How tokens are chosen. `temperature` 0 takes the most likely one; `seed` makes the draws of a request repeatable.

    The defaults leave the model's distribution as it is. `logprobs` and `prompt_logprobs` are numbers of alternatives to tell
    beside each token, 0 for none, None for no log-probability at all. `json_schema` is the text of a JSON schema, `grammar` that of a
    grammar in llguidance's form of Lark. `max_tokens` None: as
    many as the context has room for. Special tokens are no part of a text, but for `shown_token_ids`.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    json_schema: str | None = None
    regex: str | None = None
    grammar: str | None = None
    shown_token_ids: frozenset[int] = frozenset()

    @property
    def has_grammar(self) -> bool:
        return any(form is not None for form in (self.json_schema, self.regex, self.grammar))

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    def check(self, num_tokens: int) -> None:
        """Raises `RequestError` for a value out of range, of a model that has the tokens 0 to `num_tokens` - 1.

        What `json_schema`, `regex` and `grammar` say is checked when they are compiled.
        """
        self._check_ranges()
        self._check_tokens(num_tokens)
        if "" in self.stop:
            raise RequestError("A stop string is empty: leave it out.")
        if sum(form is not None for form in (self.json_schema, self.regex, self.grammar)) > 1:
            raise RequestError("A request asks for more than one of a JSON schema, a regular expression and a grammar: give one of them.")

    def _check_ranges(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise RequestError(f"max_tokens is {self.max_tokens}: ask for at least one.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise RequestError(f"temperature is {self.temperature}: give a number that is not negative.")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p is {self.top_p}: give a number above 0, and 1 at most.")
        if self.top_k < 0:
            raise RequestError(f"top_k is {self.top_k}: give a number of tokens, or 0 for all.")
        if not 0 <= self.min_p <= 1:
            raise RequestError(f"min_p is {self.min_p}: give a number from 0 to 1.")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise RequestError(f"repetition_penalty is {self.repetition_penalty}: give a number above 0.")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise RequestError(f"{name} is {getattr(self, name)}: give a number from -2 to 2.")
        if not 1 <= self.n <= MAX_ANSWERS:
            raise RequestError(f"n is {self.n}: ask for 1 to {MAX_ANSWERS} answers.")
        for name in ("logprobs", "prompt_logprobs"):
            if (num := getattr(self, name)) is not None and not 0 <= num <= MAX_TOP_LOGPROBS:
                raise RequestError(f"{name} is {num}: ask for 0 to {MAX_TOP_LOGPROBS} alternatives.")

    def _check_tokens(self, num_tokens: int) -> None:
        biased = [token for token, _ in self.logit_bias]
        for name, tokens in (("logit_bias", biased), ("stop_token_ids", sorted(self.stop_token_ids))):
            if unknown := [token for token in tokens if not 0 <= token < num_tokens]:
                raise RequestError(f"{name} has the token {unknown[0]}, and the model's tokens are 0 to {num_tokens - 1}.")
        if twice := [token for token in biased if biased.count(token) > 1]:
            raise RequestError(f"logit_bias has the token {twice[0]} twice: give each token once.")
        if wrong := [bias for _, bias in self.logit_bias if not -100 <= bias <= 100]:
            raise RequestError(f"logit_bias has the value {wrong[0]}: give numbers from -100 to 100.")
