"""A gateway before real engines in this process, and a real HTTP server before that."""

import socket
import threading
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette

from tests.serving.fakes import BASE_DIGEST, adapter, full
from tests.serving.models import CONFIG, TEXT
from tidepool.errors import RegistryError
from tidepool.inference.paged import PagedEngine
from tidepool.models import build_model, train_tokenizer
from tidepool.registry import ModelVersion, Registry
from tidepool.serving.backend import Backend, Call, Frame
from tidepool.serving.gateway import build_gateway
from tidepool.serving.replica import Replica
from tidepool.serving.resolver import Resolver
from tidepool.specs import EngineSpec, GatewaySpec
from tidepool.storage import open_store

TOOL_TEMPLATE = (
    "{%- if tools -%}{{- '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' -}}{%- endif -%}"
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\n' + message.content -}}"
    "{%- for call in message.tool_calls or [] -%}"
    "{{- '<tool_call>' + ({'name': call.function.name, 'arguments': call.function.arguments} | tojson) + '</tool_call>' -}}"
    "{%- endfor -%}{{- '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


class LocalModel:
    """A tiny model in an engine, as a backend. Its answers can be scripted: from a position on, its next tokens are these."""

    def __init__(self, tool_marker: str | None = None, **engine: Any) -> None:
        self.tokenizer: Any = train_tokenizer([TEXT] * 4, vocab_size=300)
        self.tokenizer.chat_template = TOOL_TEMPLATE
        if tool_marker is not None:
            self.tokenizer.add_special_tokens({"additional_special_tokens": [tool_marker]}, replace_extra_special_tokens=False)
        self.reference: Any = self._build()
        model: Any = self._build()
        model.register_forward_hook(self._say, with_kwargs=True)
        self.script: tuple[int, list[int]] = (0, [])
        self.engine = PagedEngine(model, self.tokenizer, EngineSpec(**engine), _no_adapters)
        registry = Registry(open_store("memory://local"))
        self.replica = Replica(self.engine, self.tokenizer, BASE_DIGEST, registry, Path("unused"), self.engine.context_length)

    def generate(self, call: Call) -> AsyncGenerator[Frame, None]:
        return self.replica.generate(call)

    def say(self, num_prompt_tokens: int, text: str) -> int:
        """Let the answers to prompts of this length be a text, and the end of the turn; returns how many tokens that is."""
        tokens = self.tokenizer(text + "<|im_end|>")["input_ids"]
        self.script = (num_prompt_tokens - 1, tokens)
        return len(tokens)

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """What transformers makes of tokens (T, V)."""
        with torch.no_grad():
            found: torch.Tensor = self.reference(torch.tensor([tokens])).logits[0]
        return found

    def _build(self) -> Any:
        return build_model(CONFIG | {"max_position_embeddings": 2048}, len(self.tokenizer), seed=1, tokenizer=self.tokenizer)

    def _say(self, _module: Any, _args: Any, given: Mapping[str, Any], output: Any) -> Any:
        start, tokens = self.script
        for row, position in enumerate(given["position_ids"][0, given["logits_to_keep"]].tolist()):
            if 0 <= position - start < len(tokens):
                output.logits[0, row, tokens[position - start]] = 1000.0
        return output


def _no_adapters(*given: Any) -> Any:
    raise AssertionError(given)


def lookup(ref: str) -> ModelVersion:
    raise RegistryError(f"No {ref}.")


def gateway_of(backend: Backend, spec: GatewaySpec | None = None) -> Starlette:
    """The base `tides` and an adapter `bot` by one backend."""
    return build_gateway(Resolver(lookup, {"tides": full(), "bot": adapter()}, {BASE_DIGEST}, ttl_s=60), backend, spec)


@contextmanager
def served(app: Starlette, **options: Any) -> Iterator[str]:
    """An application behind a real HTTP server on loopback."""
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", **options))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # from here on a client's connection waits until the server accepts it
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
