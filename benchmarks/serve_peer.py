"""The peer of `serve_trace.py`: two deployments of Serve, of which the first streams events token by token from the second.

The usual way to put a model behind Serve: an ingress of FastAPI, and a handle with `stream=True` to the deployment that has the
engine. The engine and what an event holds are ours.
"""

import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.responses import StreamingResponse

app = FastAPI()


@serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 1})
class Model:
    """Our engine, without our serving."""

    def __init__(self, folder: str, weights: str, threads: int, max_batch_size: int) -> None:
        import torch

        from tidepool.inference.linear import weights_dtype
        from tidepool.inference.paged import PagedEngine
        from tidepool.models import load_model, load_tokenizer
        from tidepool.specs import EngineSpec

        torch.set_num_threads(threads)
        spec = EngineSpec.model_validate({"weights": weights, "threads": threads, "max_batch_size": max_batch_size})
        model = load_model(Path(folder), weights_dtype(spec.weights, "cpu"))
        self._engine = PagedEngine(model, load_tokenizer(Path(folder)), spec, lambda *_: None)  # type: ignore[arg-type, return-value]
        self._num = 0

    async def generate(self, prompt: list[int], num_tokens: int) -> AsyncGenerator[str, None]:
        """The text of each token."""
        from tidepool.inference import GenerationRequest, SamplingParameters

        self._num += 1
        async for output in self._engine.submit(GenerationRequest(f"r{self._num}", tuple(prompt), SamplingParameters(num_tokens, 0.0))):
            yield output.text


@serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})
@serve.ingress(app)
class Ingress:
    """Server-sent events of what the model says."""

    def __init__(self, model: DeploymentHandle) -> None:
        self._model = model.options(stream=True)

    @app.post("/completions")
    async def completions(self, request: Request) -> StreamingResponse:
        """As much of OpenAI's completions as the benchmark asks for."""
        body: dict[str, Any] = await request.json()

        async def events() -> AsyncGenerator[str, None]:
            async for text in self._model.generate.remote(body["prompt"], body["max_tokens"]):
                if text:
                    event = {"id": "cmpl", "object": "text_completion", "model": body["model"], "choices": [{"index": 0, "text": text}]}
                    yield f"data: {json.dumps(event)}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")


def deploy(folder: str, weights: str, threads: int, max_batch_size: int) -> None:
    """Serve it under /peer beside what is served."""
    model = Model.bind(folder, weights, threads, max_batch_size)  # type: ignore[attr-defined]
    serve.run(Ingress.bind(model), name="peer", route_prefix="/peer")  # type: ignore[attr-defined]
