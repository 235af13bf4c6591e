"""From a document to its tokens and the mask of those that a model learns to predict.

Invariants:
- Text: every token is a target; the tokenizer's own special tokens stand where it puts them, and the text ends in the
  end-of-text token.
- Messages: rendered by the tokenizer's chat template; targets are the assistant turns alone, each with its end token.
- What a special token's own words in a document become is the tokenizer's decision: text is data that its owner trusts.

The turns are found by the template's `{% generation %}` marks where it has them. Otherwise the conversation is rendered
turn by turn, and a template that renders earlier turns differently later on is refused, because no mask would be right.
"""

import re
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from tidepool.data.sources import Document
from tidepool.errors import DataError

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class UnusableDocumentError(Exception):
    """A document that the chat template refuses; its message is the reason. Caught where documents are counted."""


@dataclass(frozen=True)
class Encoded:
    """A document of T tokens."""

    tokens_T: NDArray[np.int32]
    targets_T: NDArray[np.bool_]


class Encoder:
    """Turns documents into tokens with a `transformers` tokenizer, which must have an end-of-text token."""

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.eos_token_id is None:
            raise DataError("The tokenizer has no end-of-text token (eos_token): add one to its tokenizer_config.json.")
        self._tokenizer = tokenizer
        self._template: str | None = None

    def encode(self, document: Document) -> Encoded:
        """Raises `UnusableDocumentError` if the template refuses the document, `DataError` if no document can be encoded."""
        if document.messages is not None:
            tokens, targets = self._encode_messages(document)
        else:
            tokens = self._tokenizer(document.text, verbose=False)["input_ids"]
            if tokens[-1:] != [self._tokenizer.eos_token_id]:
                tokens.append(self._tokenizer.eos_token_id)
            targets = [True] * len(tokens)
        return Encoded(np.asarray(tokens, dtype=np.int32), np.asarray(targets, dtype=np.bool_))

    def _encode_messages(self, document: Document) -> tuple[list[int], list[bool]]:
        messages = list(document.messages or ())
        if self._template is None:
            self._template = self._find_template(document)
        try:
            if _GENERATION_MARK.search(self._template):
                rendered = self._tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
                return rendered["input_ids"], [bool(mark) for mark in rendered["assistant_masks"]]
            return self._encode_by_turns(messages, document.place)
        except jinja2.TemplateError as error:
            raise UnusableDocumentError(f"the chat template refuses it: {error}") from error

    def _find_template(self, document: Document) -> str:
        try:
            template: str = self._tokenizer.get_chat_template()
        except ValueError as error:
            raise DataError(
                f"{document.place} holds messages, but the tokenizer has no chat template: take the tokenizer of a chat model, "
                "train one (`tokenizer: {train: ...}`), or add chat_template.jinja to its folder."
            ) from error
        return template

    def _encode_by_turns(self, messages: list[dict[str, str]], place: str) -> tuple[list[int], list[bool]]:
        tokens = self._render(messages)
        targets = [False] * len(tokens)
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:number], add_generation_prompt=True)
            after = self._render(messages[: number + 1])
            if after[: len(before)] != before or tokens[: len(after)] != after:
                raise DataError(
                    f"The tokenizer's chat template renders earlier turns differently once more follow (seen at {place}), so the "
                    "assistant's tokens cannot be told apart: mark them with {% generation %} ... {% endgeneration %} in the template."
                )
            end = self._end_of_turn(after, len(before))
            targets[len(before) : end] = [True] * (end - len(before))
        return tokens, targets

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> list[int]:
        rendered = self._tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, add_generation_prompt=add_generation_prompt
        )
        return list(rendered["input_ids"])

    def _end_of_turn(self, tokens: list[int], start: int) -> int:
        """Just after the turn's end token: templates put a line break between turns that nobody generates."""
        special = set(self._tokenizer.all_special_ids)
        return next((i + 1 for i in range(len(tokens) - 1, start - 1, -1) if tokens[i] in special), len(tokens))
