"""OpenAI's answers: the exact shapes of both endpoints, whole and as chunks. Pure."""

from dataclasses import dataclass
from typing import Any

from tidepool.registry import ModelVersion


@dataclass(frozen=True)
class Answer:
    """What the parts of one answer have in common. `model` is the name asked for, `fingerprint` the version that answers."""

    is_chat: bool
    request_id: str
    created: int
    model: str
    fingerprint: str

    def whole(self, text: str, finish_reason: str, usage: dict[str, int]) -> dict[str, Any]:
        """The answer in one piece."""
        content = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.is_chat else {"text": text}
        kind = "chat.completion" if self.is_chat else "text_completion"
        return self._head(kind) | {"choices": [self._choice(content, finish_reason)], "usage": usage}

    def opening(self) -> list[dict[str, Any]]:
        """The chunks before the first text: a chat's says who speaks."""
        return [self._chunk({"delta": {"role": "assistant", "content": ""}}, None)] if self.is_chat else []

    def piece(self, text: str) -> dict[str, Any]:
        """A chunk with some text."""
        return self._chunk({"delta": {"content": text}} if self.is_chat else {"text": text}, None)

    def ending(self, finish_reason: str) -> dict[str, Any]:
        """The chunk that says why the answer ends."""
        return self._chunk({"delta": {}} if self.is_chat else {"text": ""}, finish_reason)

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """The chunk after the last one, for those who asked for it."""
        return self._head(self._chunk_kind) | {"choices": [], "usage": usage}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def _chunk(self, content: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        return self._head(self._chunk_kind) | {"choices": [self._choice(content, finish_reason)]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.request_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    @staticmethod
    def _choice(content: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        return {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}


def usage_of(num_prompt_tokens: int, num_completion_tokens: int) -> dict[str, int]:
    """OpenAI's count of tokens."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
    }


def fingerprint(version: ModelVersion) -> str:
    """Which version answered: `name@3-0123456789ab`."""
    return f"{version.ref}-{version.digest[:12]}"
