"""Tokens a second with many adapters in one batch, against the same traffic on the base, against PEFT and vLLM.

    python benchmarks/adapters.py [--json FILE] [--quick] [--vllm PYTHON] [--models NAME ...] [--peers NAME ...]

The models of `engine.py` with random weights: 4 million parameters in float32, 88 million in bfloat16. 32 adapters of ranks 8, 16, 32
and 64, on q and v only, then on all linear layers; 64 requests, two for each adapter, of 16 to 128 prompt tokens and 64 new tokens, greedy,
two threads. `mixed_over_base` is our engine's rate with adapters over its rate with the same prompts on the base alone, in turns of one
process. `mixed_tokens_per_s` is compared with PEFT's `generate(adapter_names=...)` in static batches of 32, and with vLLM's LoRA on the CPU
where `--vllm` names an environment's interpreter (`vllm_environment.sh` makes one).

`zipf_over_base`: 1,000 adapters of rank 8 are registered and asked for by Zipf's law; host memory has room for about a third of them, the
others are read from disk when they are asked for, while the others' requests go on. `adapter_load_ms` is from a folder in the page cache to
usable, rank 64 on all linear layers; `adapter_place_ms` what the first answer of an adapter in host memory takes longer than its second.

Each side is a process of its own (`adapters_sides.py`), all alive together and standing still out of turn; after one turn that warms up
they take turns, in an order that changes from round to round. Ratios are medians of the rounds' ratios. Two answers of a base and an
adapter never share keys and values.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

import torch
from safetensors.torch import save_file

from benchmarks.engine import MODELS, VOCAB_SIZES, export, show
from benchmarks.sides import Answering
from tidepool.inference.linear import named_linear_layers
from tidepool.models import load_model
from tidepool.scratch import ScratchFolder

Row = dict[str, Any]
WEIGHTS = {"4m": "fp32", "88m": "bf16"}
PEERS = {"peft": "PEFT generate(adapter_names)", "vllm": "vLLM LoRA"}
RANKS = (8, 16, 32, 64)
TARGETS = {"qv": ["q_proj", "v_proj"], "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
BARS = {"qv": 0.75, "all": 0.5}
NUM_ADAPTERS, NUM_REQUESTS, NUM_TOKENS, LENGTHS = 32, 64, 64, (16, 128)
NUM_REGISTERED, NUM_ZIPF_REQUESTS, LOAD_TARGET_MS = 1000, 256, 100.0


class Side(Answering):
    """A process that answers; see `adapters_sides`."""

    def __init__(self, name: str, folder: Path, weights: str, adapters: list[Path], python: str) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        if name != "vllm":
            environment["PYTHONPATH"] = str(ROOT / "platform")
        super().__init__(name, [python, str(ROOT / "benchmarks" / "adapters_sides.py")], environment)
        self.ask({"side": name, "folder": str(folder), "weights": weights, "adapters": [str(one) for one in adapters]})

    def answer(self, prompts: list[list[int]], adapters: list[int | None]) -> tuple[float, int]:
        """Tokens a second, and how many adapters have been loaded since the start."""
        answered = self.ask({"prompts": prompts, "adapters": adapters, "num_tokens": NUM_TOKENS})
        if answered["num_tokens"] < 0.9 * NUM_TOKENS * len(prompts):  # an end token may come by chance, in few answers
            raise RuntimeError(f"{self.name} made {answered['num_tokens']} tokens in place of {NUM_TOKENS * len(prompts)}.")
        return answered["num_tokens"] / answered["elapsed_s"], answered["num_loads"]


def write_adapter(folder: Path, sizes: dict[str, tuple[int, int]], rank: int, targets: list[str], seed: int, dtype: torch.dtype) -> Path:
    """A random adapter in peft's files."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, (input_size, output_size) in sizes.items():
        if name.rpartition(".")[2] in targets:
            for matrix, shape in (("A", (rank, input_size)), ("B", (output_size, rank))):
                weights[f"base_model.model.{name}.lora_{matrix}.weight"] = (torch.randn(shape, generator=generator) * 0.02).to(dtype)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def prompts_of(model: str, seed: int, num: int) -> list[list[int]]:
    """Other tokens in each round, so that no prefix cache has seen them; the same ones for all sides."""
    rng = random.Random(seed)
    return [rng.choices(range(10, VOCAB_SIZES[model]), k=rng.randint(*LENGTHS)) for _ in range(num)]


def measure_mixed(model: str, what: str, folder: Path, adapters: list[Path], options: argparse.Namespace) -> list[Row]:
    """Ours mixed, ours on the base, and the peers mixed, in turns."""
    peers = [name for name in options.peers if name != "vllm" or options.vllm]
    turns = ["base", "ours", *peers]
    rates: dict[str, list[float]] = {name: [] for name in turns}
    mixed: list[int | None] = [index % NUM_ADAPTERS for index in range(NUM_REQUESTS)]
    with ExitStack() as stack:
        sides = {}
        for name in ["ours", *peers]:
            sides[name] = Side(name, folder, WEIGHTS[model], adapters, options.vllm if name == "vllm" else sys.executable)
            stack.callback(sides[name].close)
        for number in range(-1, options.num_rounds):
            for name in random.Random(number).sample(turns, len(turns)):
                side, chosen = (sides["ours"], [None] * NUM_REQUESTS) if name == "base" else (sides[name], mixed)
                rate, _ = side.answer(prompts_of(model, number, NUM_REQUESTS), chosen)
                if number >= 0:
                    rates[name].append(rate)
    suffix = "" if model == "88m" else f"_{model}"
    rows = [row(f"mixed_over_base_{what}{suffix}", "tokens/s", rates["ours"], rates["base"], "ours on the base", BARS[what])]
    for peer in options.peers:
        name = PEERS[peer] if peer in rates else f"{PEERS[peer]} (no environment: see --vllm)"
        rows.append(row(f"mixed_tokens_per_s_{what}{suffix}", "tokens/s", rates["ours"], rates.get(peer), name, 1.0))
    return rows


def measure_zipf(model: str, folder: Path, adapters: list[Path], options: argparse.Namespace) -> list[Row]:
    """Many registered adapters, some of them hot, against the same prompts on the base."""
    side = Side("ours", folder, WEIGHTS[model], adapters, sys.executable)
    rates: dict[str, list[float]] = {"base": [], "ours": []}
    loads = []
    try:
        num_loads = 0
        for number in range(-1, options.num_rounds):
            rng = random.Random(number)
            chosen = rng.choices(range(len(adapters)), [1 / (place + 1) for place in range(len(adapters))], k=NUM_ZIPF_REQUESTS)
            for name in rng.sample(["base", "ours"], 2):
                prompts = prompts_of(model, number, NUM_ZIPF_REQUESTS)
                rate, total = side.answer(prompts, list(chosen) if name == "ours" else [None] * NUM_ZIPF_REQUESTS)
                if number >= 0:
                    rates[name].append(rate)
                    if name == "ours":
                        loads.append(float(total - num_loads))
                num_loads = total
    finally:
        side.close()
    return [
        row("zipf_over_base", "tokens/s", rates["ours"], rates["base"], "ours on the base", None),
        row("zipf_loads", "loads", loads, None, f"of {NUM_ZIPF_REQUESTS} requests", None),
    ]


def measure_loads(model: str, folder: Path, adapters: list[Path]) -> list[Row]:
    """What it takes until an adapter can be used."""
    side = Side("ours", folder, WEIGHTS[model], adapters[:1], sys.executable)
    try:
        side.answer(prompts_of(model, 0, 8), [None] * 8)
        times = side.ask({"load": [str(one) for one in adapters]})["load_ms"][1:]
    finally:
        side.close()
    loading, first, second = zip(*times, strict=True)
    places = [max(one - other, 0.0) for one, other in zip(first, second, strict=True)]
    rows = [row("adapter_load_ms", "ms", list(loading), None, "", None), row("adapter_place_ms", "ms", places, None, "", None)]
    for one in rows:
        one |= {"target": LOAD_TARGET_MS, "reached": one["ours"] <= LOAD_TARGET_MS}
    return rows


def row(metric: str, unit: str, ours: list[float], theirs: list[float] | None, peer: str, target: float | None) -> Row:
    """One comparison; the target is of the ratio."""
    ratio = statistics.median(one / other for one, other in zip(ours, theirs, strict=True)) if theirs else None
    return {
        "metric": metric,
        "unit": unit,
        "ours": round(statistics.median(ours), 2),
        "peer": round(statistics.median(theirs), 2) if theirs else None,
        "peer_name": peer,
        "ratio": None if ratio is None else round(ratio, 3),
        "target": target,
        "reached": None if target is None or ratio is None else ratio >= target,
        "ours_runs": [round(one, 2) for one in ours],
        "peer_runs": [round(one, 2) for one in theirs or []],
    }


def main() -> int:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="one round, a tenth of the registered adapters")
    parser.add_argument("--vllm", metavar="PYTHON", help="the interpreter of an environment with vLLM")
    parser.add_argument("--models", nargs="+", choices=list(WEIGHTS), default=["88m", "4m"])
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    options = parser.parse_args()
    options.num_rounds = 1 if options.quick else 5
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    head = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Linux, torch {torch.__version__}",
        "date": datetime.now(UTC).isoformat("T", "seconds"),
        "commit": commit,
        "load_average": [round(one, 1) for one in os.getloadavg()],
        "models": MODELS,
    }
    rows: list[Row] = []

    def keep(found: list[Row]) -> None:
        show(found)
        rows.extend(found)
        if options.json:
            options.json.write_text(json.dumps([head, *rows], indent=1) + "\n")

    with ScratchFolder("adapters") as scratch:
        for model in options.models:
            folder = export(model, Path(scratch))
            plain = load_model(folder, torch.float32)
            sizes = {name: (layer.in_features, layer.out_features) for name, layer in named_linear_layers(plain)}
            del plain
            for what, targets in TARGETS.items():
                adapters = [
                    write_adapter(Path(scratch) / f"{model}-{what}-{index}", sizes, RANKS[index % 4], targets, index, torch.float32)
                    for index in range(NUM_ADAPTERS)
                ]
                keep(measure_mixed(model, what, folder, adapters, options))
            if model == options.models[0]:
                keep(measure_loads(model, folder, adapters[3::4]))
                num = NUM_REGISTERED // 10 if options.quick else NUM_REGISTERED
                many = [write_adapter(Path(scratch) / f"many-{i}", sizes, 8, TARGETS["qv"], i, torch.bfloat16) for i in range(num)]
                keep(measure_zipf(model, folder, many, options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
