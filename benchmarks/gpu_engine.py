"""Tokens a second of our engine on one GPU, against transformers' continuous batching and against what the GPU's memory can read.

    python benchmarks/gpu_engine.py [--json FILE] [--quick] [--device cuda|cpu] [--models NAME ...] [--bandwidth GB_PER_S]

It needs a GPU. `--quick --device cpu` runs tiny models for a minute, to see that the script works; those figures mean nothing.

The workload is nano-vllm's: 256 requests at once, each of 100 to 1,024 random prompt tokens and as many new ones, uniformly, end tokens
ignored; random weights in the configurations of Qwen3 0.6B and 8B, bfloat16, greedy. Ours makes the texts of all answers; transformers does
not. Each side is a process of its own with the whole GPU, one after the other; a first round, of other prompts, warms up.

The limit of memory bandwidth: to choose a token, each weight (but for a table of embeddings, of which one row is read) and each key and
value of its sequence is read once, and a weight serves all sequences of a step. If all run from the start there are as many steps as the
longest answer has tokens:

    bytes = steps x weights + sum over requests of sum over its new tokens t of (prompt + t) x bytes of keys and values a token

and the rate is all new tokens over bytes / bandwidth, the GPU's nominal one (double data rate x memory clock x bus width). Prompts are
counted as free.
"""

import argparse
import asyncio
import json
import multiprocessing as mp
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from turns import Row, head_row

from tidepool.models import train_tokenizer
from tidepool.models.scratch import new_config

_QWEN3 = {"model_type": "qwen3", "head_dim": 128, "num_key_value_heads": 8, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6}
_QWEN3 |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}
_06B = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "tie_word_embeddings": True}
_8B = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32, "tie_word_embeddings": False}
_TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
TIMES_PEER, SHARE_OF_LIMIT = 5.0, 0.5
TOKENS_PER_S = {"qwen3_0.6b": 15_000}  # the first bar, on an H200


@dataclass(frozen=True)
class Workload:
    """A model, and what is asked of it."""

    config: dict[str, Any]
    vocab_size: int = 151_936
    num_requests: int = 256
    lengths: tuple[int, int] = (100, 1024)
    num_blocks: int | None = None  # of transformers' cache; by itself it takes nearly all that a GPU has

    def requests(self, seed: int) -> list[tuple[list[int], int]]:
        """Prompts, and how many tokens each is answered with."""
        rng = random.Random(seed)
        return [
            (rng.choices(range(self.vocab_size), k=rng.randint(*self.lengths)), rng.randint(*self.lengths))
            for _ in range(self.num_requests)
        ]


WORKLOADS = {
    "cuda": {"qwen3_0.6b": Workload(_QWEN3 | _06B), "qwen3_8b": Workload(_QWEN3 | _8B)},
    "cpu": {"tiny": Workload(_QWEN3 | _TINY, 2000, 8, (5, 20), 64)},
}
Answer = Callable[[list[tuple[list[int], int]]], int]
"""Answers all requests; returns how many tokens came."""


def ours(model: PreTrainedModel, work: Workload) -> Answer:
    """Our engine, with a stream for each request."""
    from tidepool.inference import GenerationRequest, SamplingParameters
    from tidepool.inference.paged import PagedEngine
    from tidepool.specs import EngineSpec

    spec = EngineSpec(
        max_batch_size=work.num_requests,
        max_step_tokens=16_384,
        max_sequence_length=2 * work.lengths[1],
        max_queued_requests=2 * work.num_requests,
    )
    tokenizer = train_tokenizer([path.read_text() for path in sorted(Path(statistics.__file__).parent.glob("*.py"))[:20]], 2000)
    engine = PagedEngine(model, tokenizer, spec, lambda *_: sys.exit("no adapters here"))
    engine._end_tokens = frozenset()  # random weights end a text by chance alone
    loop = asyncio.new_event_loop()

    async def one(index: int, prompt: list[int], num_tokens: int) -> int:
        request = GenerationRequest(f"r{index}", tuple(prompt), SamplingParameters(num_tokens, 0.0))
        return sum([len(output.token_ids) async for output in engine.submit(request)])

    async def all_of_them(requests: list[tuple[list[int], int]]) -> int:
        return sum(await asyncio.gather(*(one(index, *request) for index, request in enumerate(requests))))

    return lambda requests: loop.run_until_complete(all_of_them(requests))


def continuous(model: PreTrainedModel, work: Workload) -> Answer:
    """Transformers' continuous batching, with its own choices on a GPU."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    def answer(requests: list[tuple[list[int], int]]) -> int:
        config = GenerationConfig(max_new_tokens=work.lengths[1], do_sample=False, eos_token_id=-1, pad_token_id=0)
        limits = ContinuousBatchingConfig(num_blocks=work.num_blocks)
        with model.continuous_batching_context_manager(config, continuous_batching_config=limits) as manager:
            for prompt, num_tokens in requests:
                manager.add_request(prompt, max_new_tokens=num_tokens, eos_token_id=-1)
            num_left, total = len(requests), 0
            while num_left:
                if (result := manager.get_result(timeout=600)) is None or result.error:
                    raise RuntimeError(f"Transformers' continuous batching ended early: {result and result.error}")
                num_left -= 1
                total += len(result.generated_tokens)
        return total

    return answer


SIDES: dict[str, Callable[[PreTrainedModel, Workload], Answer]] = {"ours": ours, "transformers": continuous}


def side(name: str, work: Workload, device: str, num_rounds: int, pipe: Connection) -> None:
    """The process of one side: tells (new tokens, seconds) of each round, and what a model weighs."""
    torch.manual_seed(1)
    with torch.device(device):  # an 8B is made in a second there, in minutes on a CPU
        config = new_config(work.config, work.vocab_size)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None
    embeddings = 0 if work.config.get("tie_word_embeddings") else model.get_input_embeddings().weight.nbytes
    pipe.send(sum(parameter.nbytes for parameter in model.parameters()) - embeddings)
    answer = SIDES[name](model, work)
    for number in range(-1, num_rounds):
        requests = work.requests(number)
        begun = time.perf_counter()
        num_tokens = answer(requests)
        elapsed_s = time.perf_counter() - begun
        print(f"{name}, round {number}: {num_tokens / elapsed_s:,.0f} tokens/s in {elapsed_s:.1f} s", file=sys.stderr, flush=True)
        if (wanted := sum(num for _, num in requests)) != num_tokens:
            raise RuntimeError(f"{name} made {num_tokens} tokens in place of {wanted}.")
        if number >= 0:
            pipe.send(num_tokens / elapsed_s)


def measure_side(name: str, work: Workload, device: str, num_rounds: int) -> tuple[int, list[float]]:
    """The bytes of weights that a step reads, and tokens a second of each round."""
    context = mp.get_context("spawn")
    mine, its = context.Pipe()
    process = context.Process(target=side, args=(name, work, device, num_rounds, its))
    process.start()
    its.close()
    try:
        return mine.recv(), [mine.recv() for _ in range(num_rounds)]
    except EOFError as error:
        process.join()
        raise RuntimeError(f"The side {name} ended with {process.exitcode}: what it said stands above.") from error
    finally:
        mine.close()
        process.join()


def bytes_read(work: Workload, weight_bytes: int, requests: list[tuple[list[int], int]]) -> int:
    """What must be read at least to answer these; see the top of the file."""
    config = work.config
    per_token = config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * 2 * torch.bfloat16.itemsize
    keys_and_values = sum(num * len(prompt) + num * (num + 1) // 2 for prompt, num in requests) * per_token
    return max(num for _, num in requests) * weight_bytes + keys_and_values


def bandwidth(device: str) -> float:
    """Bytes a second: a GPU's nominal ones, a CPU's as a copy reaches them."""
    if device == "cuda":
        found = torch.cuda.get_device_properties(0)
        return 2.0 * found.memory_clock_rate * 1e3 * found.memory_bus_width / 8
    source = torch.ones(32 * 2**20)
    begun = time.perf_counter()
    source.clone()
    return 2 * source.nbytes / (time.perf_counter() - begun)


def measure(name: str, work: Workload, device: str, num_rounds: int, bytes_per_s: float) -> list[Row]:
    """The rows of a model."""
    weight_bytes, mine = measure_side("ours", work, device, num_rounds)
    _, theirs = measure_side("transformers", work, device, num_rounds)
    rounds = [work.requests(number) for number in range(num_rounds)]
    limits = [sum(num for _, num in one) / (bytes_read(work, weight_bytes, one) / bytes_per_s) for one in rounds]
    metric = f"gpu_tokens_per_s_{name}"
    rows = [
        row(metric, mine, theirs, "transformers continuous batching", TIMES_PEER),
        row(f"{metric}_of_limit", mine, limits, f"memory bandwidth of {bytes_per_s / 1e9:,.0f} GB/s", SHARE_OF_LIMIT),
    ]
    if name in TOKENS_PER_S:
        target = TOKENS_PER_S[name]
        rows.append(row(f"{metric}_alone", mine, None, "none", None) | {"target": target, "reached": statistics.median(mine) >= target})
    return rows


def row(metric: str, mine: list[float], theirs: list[float] | None, peer: str, target: float | None) -> Row:
    """Tokens a second; `target` is for the ratio."""
    ratio = statistics.median(mine) / statistics.median(theirs) if theirs else None
    return {
        "metric": metric,
        "unit": "tokens/s",
        "ours": round(statistics.median(mine), 1),
        "peer": round(statistics.median(theirs), 1) if theirs else None,
        "peer_name": peer if theirs else None,
        "ratio": None if ratio is None else round(ratio, 3),
        "target": target,
        "reached": None if target is None or ratio is None else ratio >= target,
        "ours_runs": [round(one, 1) for one in mine],
        "peer_runs": [round(one, 1) for one in theirs or []],
    }


def main() -> int:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--models", nargs="+", metavar="NAME")
    parser.add_argument("--bandwidth", type=float, metavar="GB_PER_S", help="of the memory, where it is known better")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here, and this benchmark needs one; --quick --device cpu shows that the script works")
    if options.device == "cpu" and not options.quick:
        parser.error("figures of a CPU mean nothing here: add --quick to see that the script works, or run benchmarks/engine.py")
    workloads = WORKLOADS[options.device]
    if unknown := set(options.models or ()) - set(workloads):
        parser.error(f"no model {', '.join(sorted(unknown))}: there are {', '.join(workloads)}")
    bytes_per_s = options.bandwidth * 1e9 if options.bandwidth else bandwidth(options.device)
    rows: list[Row] = [head_row(options.device, ", ".join(options.models or workloads))]
    for name in options.models or workloads:
        found = measure(name, workloads[name], options.device, 1 if options.quick else 3, bytes_per_s)
        for one in found:
            figures = f"{one['ours']:>12,.1f} {one['peer'] or 0:>12,.1f} {one['peer_name']}"
            print(f"{one['metric']:<38} {figures}  x{one['ratio']}  {one['reached']}", flush=True)
        rows += found
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
