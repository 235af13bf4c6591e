"""/v1/completions: prompts as text or tokens, several at a time, with `echo` and log-probabilities."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field

from tidepool.inference.engine import Output, TokenLogprobs
from tidepool.inference.sampling_parameters import MAX_ANSWERS
from tidepool.serving.api.ask import Ask, Event, Head
from tidepool.serving.api.fields import INT64, Neutral, Prompts, parse, refuse
from tidepool.serving.api.logprobs import CompletionLogprobs, Vocabulary, joined
from tidepool.serving.api.sampling import NumTopLogprobs, SamplingRequest
from tidepool.serving.backend import Spelling, Started
from tidepool.serving.problem import Problem

COMPLETION_MAX_TOKENS = 16
"""OpenAI's default."""
_OBJECT = "text_completion"


class CompletionRequest(SamplingRequest):
    neutral: ClassVar[Neutral] = {"suffix": ("",)}

    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0, lt=INT64)] | None = COMPLETION_MAX_TOKENS
    echo: bool = False
    logprobs: NumTopLogprobs | None = None
    best_of: int | None = None


def parse_completion(body: bytes) -> Ask:
    """The body of POST /v1/completions. Raises `Refusal` (400)."""
    request = parse(body, CompletionRequest)
    request.check()
    if request.best_of not in (None, request.n):
        refuse("`best_of` other than `n` is not supported: ask for `n` answers, and choose among them.", "best_of", "unsupported_value")
    if len(request.prompt) * request.n > MAX_ANSWERS:
        refuse(f"At most {MAX_ANSWERS} answers can be asked for at once: give fewer prompts, or a lower `n`.", "prompt")
    is_prompt_alone = request.max_tokens == 0
    if is_prompt_alone and not request.echo:
        refuse("`max_tokens: 0` has a meaning only with `echo: true`.", "max_tokens")
    sampling = request.sampling(
        1 if is_prompt_alone else request.max_tokens, request.logprobs, prompt_logprobs=request.logprobs if request.echo else None
    )
    form = CompletionForm(len(request.prompt), request.n, request.echo, request.logprobs is not None, request.include_usage)
    return Ask(
        request.model,
        request.prompt,
        form,
        sampling,
        stream=request.stream,
        echo=request.echo,
        is_prompt_alone=is_prompt_alone,
    )


@dataclass(frozen=True)
class CompletionForm:
    """`num_prompts` times `n` choices, those of the first prompt first."""

    num_prompts: int = 1
    n: int = 1
    echo: bool = False
    has_logprobs: bool = False
    include_usage: bool = False
    prefix: ClassVar[str] = "cmpl"
    has_named_events: ClassVar[bool] = False

    def begin(self, head: Head) -> "CompletionAnswer":
        return CompletionAnswer(self, head)


class _Choice:
    def __init__(self, vocabulary: Vocabulary) -> None:
        self.logprobs = CompletionLogprobs(vocabulary)
        self.texts: list[str] = []
        self.tables: list[dict[str, Any]] = []
        self.is_echoed = False
        self.finish_reason: str | None = None


class CompletionAnswer:
    """See `Answer`."""

    def __init__(self, form: CompletionForm, head: Head) -> None:
        self._form, self._head = form, head
        self._chunk_head = head.of(_OBJECT) | ({"usage": None} if form.include_usage else {})
        self._vocabularies = [Vocabulary() for _ in range(form.num_prompts)]
        self._started: dict[int, Started] = {}
        self._of_prompts: dict[int, tuple[TokenLogprobs | None, ...]] = {}
        self._held: dict[int, list[Output]] = defaultdict(list)
        self._choices = [_Choice(self._vocabularies[index // form.n]) for index in range(form.num_prompts * form.n)]

    def opening(self) -> list[Event]:
        return []

    def take(self, prompt: int, frame: Started | Spelling | Output) -> list[Event]:
        if isinstance(frame, Started):
            self._started[prompt] = frame
            return []
        if isinstance(frame, Spelling):
            self._vocabularies[prompt].learn(frame)
            return []
        if self._form.echo and self._form.has_logprobs and prompt not in self._of_prompts:
            if frame.answer != 0:  # the prompt's come with answer 0, and are the others' too
                self._held[prompt].append(frame)
                return []
            self._of_prompts[prompt] = frame.prompt_logprobs
            return [event for one in (frame, *self._held[prompt]) for event in self._add(prompt, one)]
        return self._add(prompt, frame)

    def _add(self, prompt: int, output: Output) -> list[Event]:
        index = prompt * self._form.n + output.answer
        choice = self._choices[index]
        chunks = []
        if self._form.echo and not choice.is_echoed:
            choice.is_echoed = True
            started = self._started[prompt]
            has_table = self._form.has_logprobs
            table = choice.logprobs.prompt(started.prompt_tokens, self._of_prompts[prompt]) if has_table else None
            chunks.append((started.prompt_text, table))
        if output.text or output.logprobs:
            chunks.append((output.text, choice.logprobs.answer(output.logprobs) if output.logprobs else None))
        events = [self._chunk(index, text, table, None) for text, table in chunks]
        choice.texts += [text for text, _ in chunks]
        choice.tables += [table for _, table in chunks if table is not None]
        if output.finish_reason is not None:
            choice.finish_reason = output.finish_reason
            events.append(self._chunk(index, "", None, output.finish_reason))
        return events

    def _chunk(self, index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None) -> Event:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._chunk_head, "choices": [choice]}

    def ending(self, usage: Mapping[str, int]) -> list[Event]:
        return [{**self._chunk_head, "choices": [], "usage": usage}] if self._form.include_usage else []

    def failure(self, problem: Problem) -> Event:
        return problem.body

    def whole(self, usage: Mapping[str, int]) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "text": "".join(choice.texts),
                "logprobs": joined(choice.tables) if self._form.has_logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(self._choices)
        ]
        return self._head.of(_OBJECT) | {"choices": choices, "usage": usage}
