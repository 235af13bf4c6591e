"""From documents to their tokens and the mask of those that a model learns to predict.

Invariants:
- Text: every token is a target; the tokenizer's own special tokens stand where it puts them, and the text ends in the
  end-of-text token.
- Prompt and completion: as text, with the targets in the completion and its end-of-text token. The prompt has the tokens that
  it has by itself, as when a model is asked with it, so that no token holds letters of both.
- Messages: rendered by the tokenizer's chat template; targets are the assistant's turns, each with its end token, but those of
  weight 0. A token belongs to a turn if one of its characters does.
- `loss: all` makes every token a target but those of messages of weight 0.
- The tokens are those of one document at a time, however documents are batched.
- What a special token's own words in a document become is the tokenizer's decision: text is data that its owner trusts.

The turns are found by the template's `{% generation %}` marks where it has them. Otherwise the conversation is rendered
turn by turn, and a template that renders earlier turns differently later on is refused, because no mask would be right.
"""

import re
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from tidepool.data.rows import Document
from tidepool.errors import DataError

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_BATCH_DOCUMENTS = 1024
_BATCH_CHARACTERS = 2**18
_BATCHES_AHEAD = 4
"""Enough to go on while a shard is written and synced."""

Span = tuple[int, int]
"""The characters `start` to `stop - 1` of a text."""


@dataclass(frozen=True)
class Encoded:
    """A document of T tokens."""

    tokens_T: NDArray[np.int32]
    targets_T: NDArray[np.bool_]


@dataclass(frozen=True)
class Unusable:
    """Stands for a document that the chat template refuses."""

    reason: str


@dataclass(frozen=True)
class _Chat:
    """A rendered conversation and what the assistant says in it, by message number."""

    text: str
    turns: dict[int, Span]


class Encoder:
    """Turns documents into tokens with a fast `transformers` tokenizer, which must have an end-of-text token."""

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.eos_token_id is None:
            raise DataError("The tokenizer has no end-of-text token (eos_token): add one to its tokenizer_config.json.")
        if not tokenizer.is_fast:
            raise DataError("The tokenizer is not a fast one: save it with a tokenizer.json (`AutoTokenizer` of transformers makes one).")
        self._tokenizer, self._backend = tokenizer, tokenizer.backend_tokenizer
        self._backend.no_padding()
        self._backend.no_truncation()
        self._end: int = tokenizer.eos_token_id
        self._template: str | None = None
        self._marked = False
        alone = self._backend.encode(["x", "x"], is_pretokenized=True, add_special_tokens=False).ids
        self._adds_nothing_between = tokenizer.decode(alone) == "xx"
        """False for a tokenizer that puts a space before each text: prompt and completion are then encoded as one."""

    def encode(self, documents: Sequence[Document]) -> list[Encoded | Unusable]:
        """The tokens of each document. Raises `DataError` if no document of a kind can be encoded."""
        kinds = (("text", self._encode_texts), ("completion", self._encode_completions), ("messages", self._encode_chats))
        result: dict[int, Encoded | Unusable] = {}
        for name, encode in kinds:
            chosen = [i for i, document in enumerate(documents) if getattr(document, name) is not None]
            if chosen:
                result |= zip(chosen, encode([documents[i] for i in chosen]), strict=True)
        return [result[i] for i in range(len(documents))]

    def _encode_texts(self, documents: list[Document]) -> Iterator[Encoded]:
        for encoding in self._backend.encode_batch_fast([document.text for document in documents]):
            yield self._ended(encoding.ids, np.ones(len(encoding.ids), np.bool_))

    def _encode_completions(self, documents: list[Document]) -> Iterator[Encoded]:
        if self._adds_nothing_between:
            parts = [[document.prompt, document.completion] for document in documents]
            encodings = self._backend.encode_batch(parts, is_pretokenized=True)
            targets = [np.array([word == 1 for word in encoding.word_ids], np.bool_) for encoding in encodings]
        else:
            encodings = self._backend.encode_batch([document.plain_text for document in documents])
            spans = [[(len(document.prompt or ""), len(document.plain_text))] for document in documents]
            targets = [_inside(encoding, span) for encoding, span in zip(encodings, spans, strict=True)]
        for document, encoding, targets_T in zip(documents, encodings, targets, strict=True):
            yield self._ended(encoding.ids, targets_T | (document.loss == "all"))

    def _ended(self, tokens: list[int], targets_T: NDArray[np.bool_]) -> Encoded:
        """With the end-of-text token as its last one and a target, whether the tokenizer puts it there or not."""
        if tokens[-1:] != [self._end]:
            tokens, targets_T = [*tokens, self._end], np.append(targets_T, True)
        targets_T[-1] = True
        return Encoded(np.asarray(tokens, dtype=np.int32), targets_T)

    def _encode_chats(self, documents: list[Document]) -> Iterator[Encoded | Unusable]:
        chats = [self._render_chat(document) for document in documents]
        texts = [chat.text for chat in chats if isinstance(chat, _Chat)]
        encodings = iter(self._backend.encode_batch(texts, add_special_tokens=False))
        for document, chat in zip(documents, chats, strict=True):
            if isinstance(chat, Unusable):
                yield chat
                continue
            encoding = next(encodings)
            if document.loss == "all":
                targets_T = ~_inside(encoding, [chat.turns[number] for number in document.muted])
            else:
                learned = sorted(chat.turns)[-1:] if document.loss == "completion" else sorted(chat.turns)
                targets_T = _inside(encoding, [chat.turns[number] for number in learned if number not in document.muted])
            yield Encoded(np.asarray(encoding.ids, dtype=np.int32), targets_T)

    def _render_chat(self, document: Document) -> _Chat | Unusable:
        if self._template is None:
            self._template = self._find_template(document)
            self._marked = bool(_GENERATION_MARK.search(self._template))
        try:
            return self._render_marked(document) if self._marked else self._render_by_turns(document)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"The chat template is not valid Jinja (line {error.lineno}: {error.message}): correct it.") from error
        except jinja2.TemplateError as error:
            return Unusable(f"the chat template refuses it: {error}")

    def _find_template(self, document: Document) -> str:
        try:
            template: str = self._tokenizer.get_chat_template()
        except ValueError as error:
            raise DataError(
                f"{document.place} holds messages, but the tokenizer has no chat template: take the tokenizer of a chat model, "
                "train one (`tokenizer: {train: ...}`), or give one (`tokenizer: {chat_template: FILE}`)."
            ) from error
        return template

    def _render_marked(self, document: Document) -> _Chat:
        messages = list(document.messages or ())
        text, spans = self._render(messages, return_assistant_tokens_mask=True)
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if len(spans) != len(answers):
            raise DataError(
                f"The chat template marks {len(spans)} passages as generated in {document.place}, which has {len(answers)} messages of the "
                "assistant: put {% generation %} ... {% endgeneration %} around each of them, and around nothing else."
            )
        return _Chat(text, dict(zip(answers, spans, strict=True)))

    def _render_by_turns(self, document: Document) -> _Chat:
        messages, turns = list(document.messages or ()), {}
        text, _ = self._render(messages)
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, _ = self._render(messages[:number], add_generation_prompt=True)
            after, _ = self._render(messages[: number + 1])
            if not after.startswith(before) or not text.startswith(after):
                raise DataError(
                    f"The tokenizer's chat template renders earlier turns differently once more follow (seen at {document.place}), so the "
                    "assistant's tokens cannot be told apart: mark them with {% generation %} ... {% endgeneration %} in the template."
                )
            turns[number] = (len(before), self._end_of_turn(after, len(before)))
        return _Chat(text, turns)

    def _render(self, messages: list[dict[str, str]], **options: bool) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template  # it brings torch, which text can do without

        variables = self._tokenizer.special_tokens_map | options
        texts, spans = render_jinja_template(conversations=[messages], chat_template=self._template, **variables)
        return texts[0], spans[0] if spans else []

    def _end_of_turn(self, text: str, start: int) -> int:
        """Just after the turn's end token: templates put a line break between turns that nobody generates."""
        ends = (place + len(token) for token in self._tokenizer.all_special_tokens if (place := text.rfind(token, start)) >= 0)
        return max(ends, default=len(text))


def encode_ahead(encoder: Encoder, documents: Iterable[Document]) -> Generator[tuple[Document, Encoded | Unusable], None, None]:
    """Every document with its tokens, in order; a thread encodes a few batches ahead while those before are used."""
    with ThreadPoolExecutor(1, thread_name_prefix="encode") as pool:
        ahead: deque[tuple[list[Document], Future[list[Encoded | Unusable]]]] = deque()
        for batch in _batches(documents):
            ahead.append((batch, pool.submit(encoder.encode, batch)))
            if len(ahead) > _BATCHES_AHEAD:
                used, encoded = ahead.popleft()
                yield from zip(used, encoded.result(), strict=True)
        for used, encoded in ahead:
            yield from zip(used, encoded.result(), strict=True)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Bounded by number and by characters, but for a document that is longer by itself."""
    batch: list[Document] = []
    num_characters = 0
    for document in documents:
        batch.append(document)
        num_characters += len(document.plain_text)
        if len(batch) == _BATCH_DOCUMENTS or num_characters >= _BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _inside(encoding: Any, spans: Sequence[Span]) -> NDArray[np.bool_]:
    """Which tokens have a character in one of the spans."""
    offsets_T2 = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    inside_T = np.zeros(len(offsets_T2), np.bool_)
    for start, stop in spans:
        inside_T |= (offsets_T2[:, 0] < stop) & (offsets_T2[:, 1] > start) & (offsets_T2[:, 0] < offsets_T2[:, 1])
    return inside_T
