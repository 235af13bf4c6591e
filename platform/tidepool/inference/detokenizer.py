"""From tokens, one at a time, to text that is certain.

Invariants: the texts put together are what the tokenizer makes of all the tokens at once (special tokens skipped, no
clean-up of spaces); no text ends within a character whose bytes are spread over tokens. The work a token takes does not
grow with the answer.
"""

from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"


class Detokenizer:
    """Decodes a window at the end of the tokens: a few known ones, since a decoder may treat the first one differently."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._num_known = 0  # tokens of the window whose text is out
        self._known = ""

    def push(self, token: int) -> str:
        """The text that is certain with one more token."""
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT):  # perhaps the first bytes of a character: what comes next decides
            return ""
        new = text[len(self._known) :]
        latest = self._window[self._num_known :]
        if latest_text := self._decode(latest):  # else special tokens only, which would leave no context
            self._window, self._known = latest, latest_text
        else:
            self._known = text
        self._num_known = len(self._window)
        return new

    def finish(self) -> str:
        """The rest, in which bytes that make no character have become U+FFFD."""
        return self._decode(self._window)[len(self._known) :]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text
