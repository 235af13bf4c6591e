"""Tokens a second of our engine on CPUs, against transformers and vLLM.

    python benchmarks/engine.py [--json FILE] [--quick] [--vllm PYTHON] [--cases NAME ...] [--peers NAME ...]

Random-weight Llamas of 4 million (float32) and 88 million parameters (bfloat16; ours also with int8 weights): 64 requests of 16 to 128
prompt tokens and 64 new tokens each, greedy, two threads. Then 8 prompts of 2,000 tokens, 16 requests that begin with the same 1,000,
and what `batch_invariant` costs in bfloat16. Peers are `transformers.generate` in static batches of 32, transformers' continuous
batching, and vLLM for CPUs where `--vllm` names an environment's interpreter (`benchmarks/vllm_environment.sh` makes one).

Each side is a process of its own (`engine_sides.py`), all alive together and standing still out of turn; after one turn that warms up
they take turns, in an order that changes from round to round. `ratio` is the median of the rounds' ratios. `start_s` is from a model's
folder to the first token, without imports; vLLM's has them, and its compilation. Ours makes the texts of all answers and so does vLLM;
transformers does not.
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
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

import torch

from benchmarks.sides import Answering
from tidepool.models import build_model, export_model, train_tokenizer
from tidepool.scratch import ScratchFolder

Row = dict[str, Any]
_LLAMA = {"model_type": "llama", "max_position_embeddings": 4096}
MODELS = {
    "4m": _LLAMA
    | {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    | {"tie_word_embeddings": True},
    "88m": _LLAMA
    | {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4},
}
VOCAB_SIZES = {"4m": 4096, "88m": 8192}
PEERS = {"vllm": "vLLM", "generate": "transformers.generate", "continuous": "transformers continuous batching"}
OFF = "ours without batch_invariant"
INVARIANCE, IN_BF16 = "batch_invariant_over_off", "tokens_per_s_88m_bf16"


@dataclass(frozen=True)
class Case:
    """What is asked, of which model; `ours` and `theirs` are the weights; `target` is against vLLM."""

    metric: str
    model: str
    ours: str
    theirs: str
    target: float | None
    num_requests: int = 64
    lengths: tuple[int, int] = (16, 128)
    num_common: int = 0
    num_tokens: int = 64

    def prompts(self, seed: int) -> list[list[int]]:
        """Other tokens in each round, so that no prefix cache has seen them; the same ones for all sides."""
        rng = random.Random(seed)
        vocab = range(10, VOCAB_SIZES[self.model])
        common = rng.choices(vocab, k=self.num_common)
        return [common + rng.choices(vocab, k=rng.randint(*self.lengths)) for _ in range(self.num_requests)]


CASES = [
    Case("tokens_per_s_4m_fp32", "4m", "fp32", "fp32", 1.5),
    Case("tokens_per_s_88m_bf16", "88m", "bf16", "bf16", 1.2),
    Case("tokens_per_s_88m_int8", "88m", "int8", "bf16", 2.5),
    Case("tokens_per_s_88m_bf16_long_prompts", "88m", "bf16", "bf16", None, num_requests=8, lengths=(2000, 2000), num_tokens=32),
    Case(
        "tokens_per_s_88m_bf16_shared_prefix",
        "88m",
        "bf16",
        "bf16",
        None,
        num_requests=16,
        lengths=(16, 32),
        num_common=1000,
        num_tokens=32,
    ),
]


class Side(Answering):
    """A process that answers; see `engine_sides`."""

    def __init__(self, name: str, folder: Path, weights: str, python: str) -> None:
        environment = dict(os.environ)
        if name not in ("ours", "invariant"):
            environment.pop("PYTHONPATH", None)
        super().__init__(name, [python, str(ROOT / "benchmarks" / "engine_sides.py")], environment)
        self.start_s = self.ask({"side": name, "folder": str(folder), "weights": weights})["start_s"]
        self.peak_memory_bytes = 0

    def answer(self, prompts: list[list[int]], num_tokens: int) -> float:
        """Tokens a second."""
        answered = self.ask({"prompts": prompts, "num_tokens": num_tokens})
        if answered["num_tokens"] < 0.9 * num_tokens * len(prompts):  # an end token may come by chance, in few answers
            raise RuntimeError(f"{self.name} made {answered['num_tokens']} tokens in place of {num_tokens * len(prompts)}.")
        self.peak_memory_bytes = answered["peak_memory_bytes"]
        rate: float = answered["num_tokens"] / answered["elapsed_s"]
        return rate


def export(name: str, folder: Path) -> Path:
    """A model with random weights and its tokenizer, as a folder."""
    texts = [path.read_text() for path in sorted(Path(statistics.__file__).parent.glob("*.py"))[:100]]
    tokenizer = train_tokenizer(texts, VOCAB_SIZES[name])
    model = build_model(MODELS[name] | {"initializer_range": 0.05}, VOCAB_SIZES[name], 1)
    path = folder / name
    path.mkdir()
    export_model(model, tokenizer, path)
    return path


def measure(case: Case, folder: Path, num_rounds: int, peers: list[str], vllm: str | None) -> list[Row]:
    """The rows of a case: all sides take turns."""
    names = ["ours", *(name for name in peers if name != "vllm" or vllm)]
    rates: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        sides = {}
        for name in names:
            weights = case.ours if name == "ours" else case.theirs
            sides[name] = Side(name, folder, weights, vllm if name == "vllm" and vllm else sys.executable)
            stack.callback(sides[name].close)
        for number in range(-1, num_rounds):
            for name in random.Random(number).sample(names, len(names)):
                rate = sides[name].answer(case.prompts(number), case.num_tokens)
                if number >= 0:
                    rates[name].append(rate)
        ours = sides["ours"]
        rows = [row(case, name, rates["ours"], rates[name]) for name in names[1:]]
        if "vllm" in peers and not vllm:
            rows.insert(0, row(case, "vllm", rates["ours"], None))
        for metric, mine, of_peer, unit in (
            ("start_s", ours.start_s, {name: side.start_s for name, side in sides.items()}, "s"),
            ("peak_memory_bytes", ours.peak_memory_bytes, {name: side.peak_memory_bytes for name, side in sides.items()}, "bytes"),
        ):
            target = 5.0 if metric == "start_s" else None
            rows += [cost_row(case, metric, unit, mine, name, of_peer[name], target) for name in names[1:]]
    return rows


def measure_invariance(case: Case, folder: Path, num_rounds: int) -> Row:
    """What `batch_invariant` costs: with it (ours) against without it (the peer)."""
    rates: dict[str, list[float]] = {"invariant": [], "ours": []}
    with ExitStack() as stack:
        sides = {name: Side(name, folder, case.ours, sys.executable) for name in rates}
        for side in sides.values():
            stack.callback(side.close)
        for number in range(-1, num_rounds):
            for name in random.Random(number).sample(sorted(rates), 2):
                rate = sides[name].answer(case.prompts(number), case.num_tokens)
                if number >= 0:
                    rates[name].append(rate)
    return row(case, "off", rates["invariant"], rates["ours"]) | {"metric": INVARIANCE}


def row(case: Case, peer: str, ours: list[float], theirs: list[float] | None) -> Row:
    """Tokens a second against one peer."""
    ratio = statistics.median(one / other for one, other in zip(ours, theirs, strict=True)) if theirs else None
    target = case.target if peer == "vllm" else None
    return {
        "metric": case.metric,
        "unit": "tokens/s",
        "ours": round(statistics.median(ours), 1),
        "peer": round(statistics.median(theirs), 1) if theirs else None,
        "peer_name": PEERS.get(peer, OFF) if theirs else f"{PEERS[peer]} (no environment: see --vllm)",
        "ratio": None if ratio is None else round(ratio, 3),
        "target": target,
        "reached": None if target is None or ratio is None else ratio >= target,
        "ours_runs": [round(one, 1) for one in ours],
        "peer_runs": [round(one, 1) for one in theirs or []],
    }


def cost_row(case: Case, metric: str, unit: str, ours: float, peer: str, theirs: float, target: float | None) -> Row:
    """What a side takes to start, or of memory: the less the better; the target is ours alone."""
    return {
        "metric": f"{metric}_{case.metric.removeprefix('tokens_per_s_')}",
        "unit": unit,
        "ours": round(ours, 2),
        "peer": round(theirs, 2),
        "peer_name": PEERS[peer],
        "ratio": round(ours / theirs, 3),
        "target": target,
        "reached": None if target is None else ours <= target,
    }


def show(rows: list[Row]) -> None:
    """Print the table."""
    for one in rows:
        mark = {True: "reached", False: "missed", None: ""}[one["reached"]]
        ours, peer = (f"{one[side]:,.1f}" if one[side] is not None else "-" for side in ("ours", "peer"))
        ratio = "-" if one["ratio"] is None else f"x{one['ratio']}"
        print(f"{one['metric']:<46} {ours:>15} {one['unit']:<9} {peer:>15} {one['peer_name']:<34} {ratio:<8} {mark}", flush=True)


def main() -> int:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--vllm", metavar="PYTHON", help="the interpreter of an environment with vLLM")
    names = [*(case.metric for case in CASES), INVARIANCE]
    parser.add_argument("--cases", nargs="+", choices=names, default=names)
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    head = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Linux, torch {torch.__version__}",
        "date": datetime.now(UTC).isoformat("T", "seconds"),
        "commit": commit,
        "load_average": [round(one, 1) for one in os.getloadavg()],
        "models": MODELS,
    }
    rows: list[Row] = []
    with ScratchFolder("engine") as scratch:
        folders = {name: export(name, Path(scratch)) for name in MODELS}
        num_rounds = 1 if options.quick else 5
        for name in names:
            if name not in options.cases:
                continue
            case = next(case for case in CASES if case.metric == (IN_BF16 if name == INVARIANCE else name))
            if name == INVARIANCE:
                found = [measure_invariance(case, folders[case.model], num_rounds)]
            else:
                found = measure(case, folders[case.model], num_rounds, options.peers, options.vllm)
            show(found)
            rows += found
            if options.json:
                options.json.write_text(json.dumps([head, *rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
