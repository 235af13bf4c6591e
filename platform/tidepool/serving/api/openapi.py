"""The OpenAPI document of the gateway: what each endpoint takes is made from the models that parse it, so that the two cannot differ."""

from functools import cache
from typing import Any

from tidepool import __version__
from tidepool.serving.api.chat import ChatRequest
from tidepool.serving.api.completions import CompletionRequest
from tidepool.serving.api.embeddings import EmbeddingRequest
from tidepool.serving.api.fields import Request
from tidepool.serving.api.responses import ResponseRequest
from tidepool.serving.api.tokenization import TokenizeRequest

_POSTS: dict[str, tuple[type[Request], str]] = {
    "/v1/completions": (CompletionRequest, "Continue prompts"),
    "/v1/chat/completions": (ChatRequest, "Answer a chat"),
    "/v1/responses": (ResponseRequest, "Answer input, without a memory"),
    "/v1/embeddings": (EmbeddingRequest, "The mean of the last hidden states of inputs"),
    "/tokenize": (TokenizeRequest, "The tokens of a text or a chat"),
}
_GETS = {
    "/v1/models": "The models that this key may use",
    "/v1/models/{name}": "One of them, also by version (`name@3`) or alias (`name:canary`)",
    "/admin/keys": "All keys and their limits, for an admin's key",
    "/health": "Whether the gateway lives",
    "/ready": "Whether every model has a replica that answers",
    "/openapi.json": "This document",
}
_OPEN = ("/health", "/ready", "/openapi.json")
_NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
_NULLABLE_TEXT = {"type": ["string", "null"]}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"enum": ["invalid_request_error", "rate_limit_error", "server_error"]},
                "param": _NULLABLE_TEXT,
                "code": _NULLABLE_TEXT,
            },
        }
    },
}

_EVENT = {
    "type": "object",
    "description": "Each server-sent event; its data is JSON, or [DONE] at the end of those that have no names",
    "required": ["data"],
    "properties": {"data": {"type": "string"}, "event": {"type": "string"}},
}


@cache
def document() -> dict[str, Any]:
    """OpenAPI 3.1."""
    schemas: dict[str, Any] = {"Error": _ERROR}
    paths: dict[str, Any] = {path: {"get": _operation(path, summary)} for path, summary in _GETS.items()}
    paths["/v1/models/{name}"]["get"]["parameters"] = [_NAME]
    for path, (kind, summary) in _POSTS.items():
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[kind.__name__] = schema
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}
        paths[path] = {"post": _operation(path, summary) | {"requestBody": {"required": True, "content": content}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Tidepool", "version": __version__, "description": "One pool of GPUs that trains and serves: OpenAI's API."},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _operation(path: str, summary: str) -> dict[str, Any]:
    answered: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if path in ("/v1/completions", "/v1/chat/completions", "/v1/responses"):
        answered["text/event-stream"] = {"schema": _EVENT}
    return {
        "summary": summary,
        "security": [] if path in _OPEN else [{}, {"key": []}],
        "responses": {
            "200": {"description": "The answer", "content": answered},
            "default": {
                "description": "Refused or failed, in OpenAI's shape",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
            },
        },
    }
