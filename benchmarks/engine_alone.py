"""The bare engine, for `serve_trace.py`: a process that answers requests as they come, and says when each token was there.

Arguments: a model's folder, its weights, threads, answers at one time. It says "ready"; then each line that it reads is a list of
[seconds from now, prompt tokens, number of tokens], answered with a list of [asked at, [times of tokens]].
"""

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tidepool.inference import GenerationRequest, SamplingParameters
from tidepool.inference.linear import weights_dtype
from tidepool.inference.paged import PagedEngine
from tidepool.models import load_model, load_tokenizer
from tidepool.specs import EngineSpec


def main() -> None:
    """Answer until there is nothing more to read."""
    answers, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    os.dup2(2, 1)
    folder, weights, threads, max_batch_size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(threads)
    spec = EngineSpec.model_validate(
        {"weights": weights, "threads": threads, "max_batch_size": max_batch_size, "max_queued_requests": 4096}
    )
    model = load_model(folder, weights_dtype(spec.weights, "cpu"))
    loop = asyncio.new_event_loop()
    engine = PagedEngine(model, load_tokenizer(folder), spec, lambda *_: sys.exit("no adapters here"))

    async def one(index: int, begun: float, at_s: float, prompt: list[int], num_tokens: int) -> Any:
        await asyncio.sleep(max(0.0, begun + at_s - time.perf_counter()))
        asked_at, times = time.perf_counter(), []
        request = GenerationRequest(f"r{index}", tuple(prompt), SamplingParameters(num_tokens, 0.0))
        async for output in engine.submit(request):
            times += [time.perf_counter()] * bool(output.text)  # as over HTTP, where what brings no text brings no event
        return asked_at, times

    async def play(asks: list[Any]) -> list[Any]:
        begun = time.perf_counter()
        return await asyncio.gather(*(one(index, begun, *ask) for index, ask in enumerate(asks)))

    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(loop.run_until_complete(play(json.loads(line)))), file=answers, flush=True)


if __name__ == "__main__":
    main()
