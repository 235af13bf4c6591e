"""A request on its way: its tokens so far, how the next one is chosen, and what ends it.

Invariants: each token gives one output; the last one alone has a finish reason. The token that ends a text counts among
the tokens and is no part of the text.
"""

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tidepool.inference.detokenizer import Detokenizer
from tidepool.inference.engine import FinishReason, GenerationRequest, Output
from tidepool.inference.sampling import Sampler
from tidepool.inference.stop_strings import StopStrings

_END_OF_TURN = "<|im_end|>"


class Sequence:
    """`end_tokens` end the text; `context_length` bounds the prompt and the answer together."""

    def __init__(
        self, request: GenerationRequest, tokenizer: PreTrainedTokenizerBase, end_tokens: frozenset[int], context_length: int
    ) -> None:
        self.request = request
        self.last_token = request.prompt_tokens[-1]
        self._num_left = min(request.sampling.max_tokens, context_length - len(request.prompt_tokens))
        self._end_tokens = end_tokens
        self._sampler = Sampler(request.sampling)
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStrings(request.sampling.stop)

    def advance(self, logits_V: Tensor) -> Output:
        """Choose the next token and say what it brings."""
        token = self.last_token = self._sampler.choose(logits_V)
        self._num_left -= 1
        if token in self._end_tokens:
            return self._last(token, "", "stop")
        text, stopped = self._stops.push(self._detokenizer.push(token))
        if stopped:
            return Output((token,), text, "stop")
        return Output((token,), text) if self._num_left else self._last(token, text, "length")

    def _last(self, token: int, text: str, reason: FinishReason) -> Output:
        rest, stopped = self._stops.push(self._detokenizer.finish())
        return Output((token,), text + rest + self._stops.finish(), "stop" if stopped else reason)


def find_end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """What ends a text: the model's and the tokenizer's end of text, and ChatML's end of turn if the tokenizer has it."""
    of_model = getattr(model.generation_config, "eos_token_id", None)
    found = set(of_model if isinstance(of_model, list | tuple) else [of_model]) | {tokenizer.eos_token_id}
    if _END_OF_TURN in tokenizer.all_special_tokens:
        found.add(tokenizer.convert_tokens_to_ids(_END_OF_TURN))
    return frozenset(found - {None})
