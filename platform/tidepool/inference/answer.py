"""One answer of a request: what it adds to the scheduler's sequence is the text, and when it ends.

Invariants: each token gives one output; the last one alone has a finish reason. The token that ends a text counts among the
tokens and is no part of the text. `accept` is quick, since the next step waits for it; `tell` makes the text. All of an answer's state
is a function of its request and its tokens, so that `resume` makes it anew in another engine.
"""

from collections.abc import Iterable

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tidepool.inference.detokenizer import Detokenizer
from tidepool.inference.engine import FinishReason, GenerationRequest, Output, TokenLogprobs
from tidepool.inference.grammar import CompiledGrammar
from tidepool.inference.lookup import PromptLookup
from tidepool.inference.sampler import SamplingState
from tidepool.inference.scheduler import Chunk
from tidepool.inference.sequence import Sequence
from tidepool.inference.stop_strings import StopStrings

_END_OF_TURN = "<|im_end|>"


class Answer:
    """Answer `number` of a request. `end_tokens` end the text; `context_length` bounds the prompt and the answer together.

    `guesses`: its next tokens may be guessed, if their choice depends on nothing but logits.
    """

    def __init__(
        self,
        request: GenerationRequest,
        number: int,
        tokenizer: PreTrainedTokenizerBase,
        end_tokens: frozenset[int],
        context_length: int,
        grammar: CompiledGrammar | None,
        guesses: bool = False,
    ) -> None:
        sampling = request.sampling
        self.number = number
        self.sequence = Sequence(
            list(request.prompt_tokens),
            request.adapter,
            request.fairness_key,
            sampling.prompt_logprobs if number == 0 else None,
            state := None if request.is_embedding else SamplingState(sampling, request.prompt_tokens, number, grammar),
            request.is_embedding,
            context_length if sampling.max_tokens is None else min(len(request.prompt_tokens) + sampling.max_tokens, context_length),
            PromptLookup() if guesses and state is not None and state.can_look_ahead else None,
        )
        self.is_over = False
        self._num_left = self.sequence.max_length - len(request.prompt_tokens)
        self._end_tokens = end_tokens | sampling.stop_token_ids
        self._prompt_logprobs: list[TokenLogprobs | None] | None = [None] if self.sequence.prompt_logprobs is not None else None
        self._hidden_sum_H: Tensor | None = None
        self._detokenizer = Detokenizer(tokenizer, sampling.shown_token_ids)
        self._stops = StopStrings(sampling.stop)

    def keep_prompt_logprobs(self, start: int, logprobs: tuple[TokenLogprobs, ...]) -> None:
        """Those of the tokens after token `start` of the prompt; a prompt that is computed again brings them again."""
        if self._prompt_logprobs is not None:
            self._prompt_logprobs[start + 1 :] = logprobs

    def embed(self, chunk: Chunk, hidden_sum_H: Tensor) -> Output | None:
        """Take in the sum of a chunk's hidden states; returns the mean after the last chunk. A prompt that begins anew is summed anew."""
        before = self._hidden_sum_H if chunk.start else None
        self._hidden_sum_H = hidden_sum_H if before is None else before + hidden_sum_H
        if not chunk.is_last:
            return None
        return Output((), "", "stop", embedding=tuple((self._hidden_sum_H / chunk.end).tolist()))

    def accept(self, token: int) -> FinishReason | None:
        """The next token has been chosen; returns what ends the answer, unless its text does."""
        self.sequence.append(token)
        assert self.sequence.sampling is not None
        self.sequence.sampling.append(token)
        self._num_left -= 1
        if token in self._end_tokens:
            return "stop"
        return None if self._num_left else "length"

    def resume(self, tokens: Iterable[int]) -> FinishReason | None:
        """Take in the tokens that were told elsewhere; returns what ended the answer, if they did."""
        for token in tokens:
            if (reason := self.tell(token, self.accept(token), None).finish_reason) is not None:
                return reason
            self.sequence.prompt_logprobs = None  # they were told with the first token
        return None

    def tell(self, token: int, reason: FinishReason | None, logprobs: TokenLogprobs | None) -> Output:
        """What a token that was accepted brings."""
        text, is_stopped = "", False
        if reason != "stop":
            text, is_stopped = self._stops.push(self._detokenizer.push(token))
        if reason and not is_stopped:
            rest, is_stopped = self._stops.push(self._detokenizer.finish())
            text += rest + self._stops.finish()
        prompt, self._prompt_logprobs = tuple(self._prompt_logprobs or ()), None
        return Output((token,), text, "stop" if is_stopped else reason, self.number, (logprobs,) if logprobs else (), prompt)


def find_end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """What ends a text: the model's and the tokenizer's end of text, and ChatML's end of turn if the tokenizer has it."""
    of_model = getattr(model.generation_config, "eos_token_id", None)
    found = set(of_model if isinstance(of_model, list | tuple) else [of_model]) | {tokenizer.eos_token_id}
    if _END_OF_TURN in tokenizer.all_special_tokens:
        found.add(tokenizer.convert_tokens_to_ids(_END_OF_TURN))
    return frozenset(found - {None})
