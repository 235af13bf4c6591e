"""/tokenize: the tokens of a text or of a chat, as the model would read them. The shape is vLLM's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field

from tidepool.inference.engine import Output
from tidepool.serving.api.ask import Ask, Event, Head
from tidepool.serving.api.fields import Request, parse, refuse
from tidepool.serving.api.logprobs import Vocabulary
from tidepool.serving.api.messages import Messages
from tidepool.serving.api.tools import Tools
from tidepool.serving.backend import Chat, Spelling, Started
from tidepool.serving.problem import Problem


class TokenizeRequest(Request):
    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools = Field(default_factory=list)
    return_token_strs: bool = False


def parse_tokenize(body: bytes) -> Ask:
    """The body of POST /tokenize. Raises `Refusal` (400)."""
    request = parse(body, TokenizeRequest)
    if (request.prompt is None) == (request.messages is None):
        refuse("Give `prompt` or `messages`, one of them.", "prompt")
    form = TokenizeForm(request.return_token_strs)
    if request.messages is None:
        if request.tools:
            refuse("`tools` have a meaning only with `messages`.", "tools")
        assert request.prompt is not None
        return Ask(request.model, (request.prompt,), form, task="tokenize")
    tools = tuple(tool.model_dump(exclude_none=True) for tool in request.tools)
    return Ask(request.model, (Chat(tuple(message.message() for message in request.messages), tools),), form, task="tokenize")


@dataclass(frozen=True)
class TokenizeForm:
    has_strings: bool = False
    prefix: ClassVar[str] = "tok"
    has_named_events: ClassVar[bool] = False

    def begin(self, head: Head) -> "TokenizeAnswer":
        return TokenizeAnswer(self)


class TokenizeAnswer:
    """See `Answer`; it is not streamed."""

    def __init__(self, form: TokenizeForm) -> None:
        self._form = form
        self._vocabulary = Vocabulary()
        self._tokens: tuple[int, ...] = ()

    def opening(self) -> list[Event]:
        return []

    def take(self, prompt: int, frame: Started | Spelling | Output) -> list[Event]:
        if isinstance(frame, Started):
            self._tokens = frame.prompt_tokens
        elif isinstance(frame, Spelling):
            self._vocabulary.learn(frame)
        return []

    def ending(self, usage: Mapping[str, int]) -> list[Event]:
        return []

    def failure(self, problem: Problem) -> Event:
        return problem.body

    def whole(self, usage: Mapping[str, int]) -> dict[str, Any]:
        strings = [self._vocabulary.name(token) for token in self._tokens] if self._form.has_strings else None
        return {"count": len(self._tokens), "tokens": self._tokens, "token_strs": strings}
