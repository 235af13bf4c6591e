"""One side of `adapters.py`, a process of its own: it loads a model and adapters from folders and answers prompts with them.

It reads and writes a JSON object a line: {"side", "folder", "weights", "adapters"} first, answered with {}; then {"prompts", "adapters",
"num_tokens"}, where each prompt has the index of an adapter or null, answered with the seconds until the last token; or {"load": folders},
answered by our side with the milliseconds that loading each took, and then its first and its second answer of one token. Greedy. What it
logs goes to stderr. Needs nothing of Tidepool unless the side is ours: the interpreter may be another environment's.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from engine_sides import CONTEXT, MAX_BATCH_SIZE, STATIC_BATCH_SIZE, THREADS, _transformers

Prompts = list[list[int]]
Chosen = list[int | None]
Answer = Callable[[Prompts, Chosen, int], int]
"""Answers all prompts, each with its adapter, with so many tokens each; returns how many tokens came."""
HOST_GB = 0.2
"""What our engine may hold of adapters in the case of many: a part of them."""


class Ours:
    """Our engine, with a stream for each prompt; adapters are loaded when they are asked for, as a replica does."""

    def __init__(self, folder: str, weights: str, adapters: list[str]) -> None:
        import asyncio
        from functools import partial
        from pathlib import Path

        import torch

        from tidepool.inference.linear import weights_dtype
        from tidepool.inference.paged import PagedEngine
        from tidepool.models import load_model, load_tokenizer, read_lora
        from tidepool.specs import EngineSpec

        torch.set_num_threads(THREADS)
        limit = HOST_GB if len(adapters) > 32 else 4.0
        limits: dict[str, Any] = {"max_batch_size": MAX_BATCH_SIZE, "max_adapters": MAX_BATCH_SIZE, "adapters_gb": limit}
        spec = EngineSpec(threads=THREADS, weights=weights, **limits)
        model = load_model(Path(folder), weights_dtype(spec.weights, "cpu"))
        self._loop = asyncio.new_event_loop()
        self._engine = PagedEngine(model, load_tokenizer(Path(folder)), spec, partial(read_lora, base_digest=""))
        self._adapters = [Path(one) for one in adapters]
        self.num_loads = 0

    def __call__(self, prompts: Prompts, chosen: Chosen, num_tokens: int) -> int:
        import asyncio

        async def all_of_them() -> int:
            places = asyncio.Semaphore(MAX_BATCH_SIZE)

            async def one(index: int) -> int:
                async with places:
                    return await self._one(str(index), prompts[index], chosen[index], num_tokens)

            return sum(await asyncio.gather(*(one(index) for index in range(len(prompts)))))

        return self._loop.run_until_complete(all_of_them())

    def load(self, folders: list[str]) -> list[list[float]]:
        """Milliseconds to load each, to its first token, and to another first token when it has its slot."""
        return [self._loop.run_until_complete(self._load(index, folder)) for index, folder in enumerate(folders)]

    async def _one(self, name: str, prompt: list[int], adapter: int | None, num_tokens: int) -> int:
        digest = None if adapter is None else f"{adapter:064x}"
        while digest is not None and digest not in self._engine.stats().adapters:
            self.num_loads += 1
            await self._engine.load_adapter(digest, self._adapters[int(digest, 16)])
        return await self._ask(name, prompt, digest, num_tokens)

    async def _ask(self, name: str, prompt: list[int], digest: str | None, num_tokens: int) -> int:
        from tidepool.inference import GenerationRequest, SamplingParameters

        request = GenerationRequest(name, tuple(prompt), SamplingParameters(num_tokens, 0.0), digest)
        return sum([len(output.token_ids) async for output in self._engine.submit(request)])

    async def _load(self, index: int, folder: str) -> list[float]:
        from pathlib import Path

        digest, times = f"load{index}", [time.perf_counter()]
        await self._engine.load_adapter(digest, Path(folder))
        times.append(time.perf_counter())
        for number in range(2):
            await self._ask(digest, [index + 5, number + 5], digest, 1)
            times.append(time.perf_counter())
        return [1000 * (later - earlier) for earlier, later in pairwise(times)]


def peft(folder: str, weights: str, adapters: list[str]) -> Answer:
    """PEFT's mixed batches: `generate(adapter_names=...)` in static batches of 32, padded on the left."""
    import torch
    from peft import PeftModel

    model = PeftModel.from_pretrained(_transformers(folder, weights), adapters[0], adapter_name="0")
    for index, path in enumerate(adapters[1:], start=1):
        model.load_adapter(path, adapter_name=str(index))
    model.eval()

    @torch.inference_mode()
    def answer(prompts: Prompts, chosen: Chosen, num_tokens: int) -> int:
        total = 0
        for first in range(0, len(prompts), STATIC_BATCH_SIZE):
            batch, own = prompts[first : first + STATIC_BATCH_SIZE], chosen[first : first + STATIC_BATCH_SIZE]
            longest = max(len(prompt) for prompt in batch)
            ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in batch])
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
            limits = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "do_sample": False, "pad_token_id": 0}
            names = ["__base__" if one is None else str(one) for one in own]
            out = model.generate(input_ids=ids, attention_mask=mask, adapter_names=names, **limits)
            total += (out.shape[1] - longest) * len(batch)
        return total

    return answer


def vllm(folder: str, weights: str, adapters: list[str]) -> Answer:
    """vLLM on the CPU with all adapters in its slots."""
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": "0-1"}
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    dtype = "float32" if weights == "fp32" else "bfloat16"
    limits = {"max_model_len": CONTEXT, "max_num_seqs": MAX_BATCH_SIZE}
    slots = {"max_loras": len(adapters), "max_cpu_loras": len(adapters), "max_lora_rank": 64}
    engine = LLM(folder, dtype=dtype, enable_prefix_caching=True, disable_log_stats=True, enable_lora=True, **slots, **limits)
    requests = [LoRARequest(str(index), index + 1, path) for index, path in enumerate(adapters)]

    def answer(prompts: Prompts, chosen: Chosen, num_tokens: int) -> int:
        sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        own = [None if one is None else requests[one] for one in chosen]
        found = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False, lora_request=own)
        return sum(len(one.outputs[0].token_ids) for one in found)

    return answer


SIDES: dict[str, Callable[[str, str, list[str]], Answer]] = {"ours": Ours, "peft": peft, "vllm": vllm}


def main() -> None:
    """Start, then answer until there is nothing more to read."""
    answers, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    os.dup2(2, 1)  # so that what libraries print does not get between the answers
    first = json.loads(sys.stdin.readline())
    answer = SIDES[first["side"]](first["folder"], first["weights"], first["adapters"])
    print(json.dumps({}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        told: dict[str, Any]
        if isinstance(answer, Ours) and "load" in asked:
            told = {"load_ms": answer.load(asked["load"])}
        else:
            begun = time.perf_counter()
            num_tokens = answer(asked["prompts"], asked["adapters"], asked["num_tokens"])
            told = {"num_tokens": num_tokens, "elapsed_s": time.perf_counter() - begun, "num_loads": getattr(answer, "num_loads", 0)}
        print(json.dumps(told), file=answers, flush=True)


if __name__ == "__main__":
    main()
