"""Tokens a second of our step loop against bare PyTorch: what exactness, restarts and metrics cost a step. No Ray.

    python benchmarks/overhead.py [--json FILE] [--quick]

One worker against a plain loop, and two processes on gloo against DistributedDataParallel with `no_sync` over the micro-batches
before the last; LoRA and full training, with our exact reduction and with our plain one (suffix `_fast`). Both sides have
the same model, tokens, micro-batches, mask and positions (documents apart), fused AdamW, clipping and threads (one a worker);
their losses are compared at the end, so that a faster side has not done less. Ours reads and converts its samples as it goes
and records its metrics; the peer finds its batches ready in memory, and on a GPU it may use algorithms that are not deterministic.
Neither evaluates or commits.

Rows that end in `_against_causal` have no target: their peer ignores where documents end, which is less work, and wrong here.

Each side is processes of its own, all alive together; they take turns of a few steps, in an order that changes. `ratio` is the
median of the rounds' ratios. Processor time (of all workers of a side, `ratio_by_processor_time`) tells ours from the peer on a
machine that others use too.
"""

import argparse
import json
import os
import random
import signal
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel
from turns import Done, Row, Turn, Workers, check_losses, head_row, prepare_stdlib, take_turns, train_ours

from tidepool.data import Dataset, find_dataset
from tidepool.models import add_lora, build_model, packed_attention_mask, packed_positions
from tidepool.scratch import ScratchFolder
from tidepool.specs import LoraSpec, RunSpec, parse_spec
from tidepool.storage import open_store
from tidepool.training.batch import cut_batches, shard_samples
from tidepool.training.group import LocalGroup
from tidepool.training.numerics import prepare_process, resolve_dtype
from tidepool.training.objective import precision
from tidepool.training.optimizer import build_optimizer
from tidepool.training.process_group import ProcessGroup
from tidepool.training.sharding import owned_shards
from tidepool.training.state import trained_parameters


@dataclass(frozen=True)
class Setting:
    """What is trained on a kind of device."""

    config: dict[str, Any]
    sequence_length: int
    training: dict[str, Any]
    max_loss_difference: float


_LLAMA = {"model_type": "llama", "tie_word_embeddings": True}
_TRAINING = {"num_shards": 8, "evaluate_every_steps": 10**6}
SETTINGS = {
    "cpu": Setting(
        _LLAMA
        | {
            "hidden_size": 256,
            "intermediate_size": 688,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
        },
        256,
        _TRAINING | {"global_batch_size": 8, "micro_batch_size": 1, "precision": "fp32"},
        1e-3,
    ),
    "cuda": Setting(
        _LLAMA
        | {
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "max_position_embeddings": 1024,
        },
        1024,
        _TRAINING | {"global_batch_size": 64, "micro_batch_size": 8, "precision": "bf16"},
        2e-2,
    ),
}
VOCAB_SIZE = 2048
LORA = {"rank": 8, "alpha": 16.0}
TARGET = 0.97
OURS, PEERS = ("exact", "fast"), ("packed", "causal")
PEER_NAMES = {1: "plain PyTorch loop", 2: "DistributedDataParallel"}
_MAX_STEPS = 64


@dataclass(frozen=True)
class Side:
    """Who trains, and what: `how` is one of `OURS` or `PEERS`; `store_url` holds the dataset `stdlib`."""

    how: str
    kind: str
    num_workers: int
    store_url: str
    device: str

    @property
    def setting(self) -> Setting:
        return SETTINGS[self.device]

    def spec(self) -> RunSpec:
        reduction = self.how if self.how in OURS else "exact"
        optimizer = {"learning_rate": 1e-3, "schedule": "constant", "weight_decay": 0.1}
        training = self.setting.training | {"steps": 10**6, "reduction": reduction, "optimizer": optimizer}
        spec = {"store": self.store_url, "run": "overhead", "dataset": "stdlib", "seed": 1, "model": {"base": "base"}}
        return parse_spec(spec | {"training": training, "checkpoint": {"every_steps": 10**6}}, RunSpec)


def new_model(side: Side) -> PreTrainedModel:
    """The same weights on every side."""
    model = build_model(side.setting.config, VOCAB_SIZE, seed=1)
    if side.kind == "lora":
        model = add_lora(model.to(resolve_dtype(side.spec().training.precision, torch.device(side.device))), LoraSpec(**LORA), 1, "base")
    return model.to(side.device)


# --- The peer --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Micro:
    """A micro-batch as the model takes it."""

    inputs: dict[str, Tensor | None]
    targets: int


def train_peer(side: Side, rank: int, turn: Turn, losses: list[float]) -> None:
    """What one would write by hand. Losses are this worker's share of the mean over the global batch."""
    model, spec = new_model(side).train(), side.spec()
    device, dtype = torch.device(side.device), resolve_dtype(spec.training.precision, torch.device(side.device))
    batches = ready_batches(side, rank)
    assert spec.training.optimizer.clip_norm is not None
    parameters = list(trained_parameters(model).values())
    optimizer = build_optimizer(trained_parameters(model), spec.training.optimizer)
    trained = DistributedDataParallel(model, gradient_as_bucket_view=True) if side.num_workers > 1 else model
    for micros, num_targets in batches:
        turn()
        loss = torch.zeros((), device=device)
        for number, micro in enumerate(micros):
            with ExitStack() as stack:
                if isinstance(trained, DistributedDataParallel) and number < len(micros) - 1:
                    stack.enter_context(trained.no_sync())
                with precision(dtype, device):
                    part = trained(**micro.inputs, use_cache=False, num_items_in_batch=num_targets).loss
                (part * side.num_workers).backward()  # DistributedDataParallel divides by it
            loss += part.detach()
        clip_grad_norm_(parameters, spec.training.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))


def ready_batches(side: Side, rank: int) -> list[tuple[list[Micro], int]]:
    """This worker's micro-batches of each step, and the targets in its whole global batch."""
    store, spec = open_store(side.store_url), side.spec()
    training, dataset = spec.training, Dataset(store, find_dataset(store, "stdlib"), "train", 16)
    batches = []
    for step in range(_MAX_STEPS):
        micros: list[Micro] = []
        num_targets = 0
        for shard in range(training.num_shards):
            samples = dataset.read(shard_samples(step, shard, training, spec.seed, dataset.layout))
            cut = [micro_batch(side.how, batch) for batch in cut_batches(samples, training.micro_batch_size, torch.device(side.device))]
            num_targets += sum(micro.targets for micro in cut)
            micros += cut if shard in owned_shards(rank, side.num_workers, training.num_shards) else []
        batches.append((micros, num_targets))
    return batches


def micro_batch(how: str, batch: Any) -> Micro:
    """With documents apart (`packed`), or as plain causal rows."""
    labels = torch.where(batch.targets_NT, batch.tokens_NT, -100)
    inputs: dict[str, Tensor | None] = {"input_ids": batch.tokens_NT, "labels": labels}
    if how == "packed" and batch.documents_NT is not None:
        inputs |= {"attention_mask": packed_attention_mask(batch.documents_NT), "position_ids": packed_positions(batch.documents_NT)}
    return Micro(inputs, int((labels[:, 1:] != -100).sum()))


# --- Turns -----------------------------------------------------------------------------------------------------------


def worker(side: Side, rank: int, folder: str, pipe: Connection) -> None:
    """One process of a side."""
    device = torch.device(side.device)
    if side.how in OURS:
        prepare_process(device, 1)  # on a GPU: deterministic algorithms
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if side.num_workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/{side.how}-{side.kind}", rank=rank, world_size=side.num_workers)

    def train(turn: Turn, losses: list[float]) -> None:
        if side.how in OURS:
            group = ProcessGroup(dist.group.WORLD, lambda: None) if side.num_workers > 1 and dist.group.WORLD else LocalGroup()
            train_ours(side.spec(), new_model(side), group, turn, losses)
        else:
            train_peer(side, rank, turn, losses)

    def begin() -> None:
        if side.num_workers > 1:
            dist.barrier()

    take_turns(train, pipe, device, begin=begin)
    if side.num_workers > 1:
        dist.destroy_process_group()


def losses_of(how: str, told: list[Done]) -> list[float]:
    """Ours knows the mean over the global batch on every worker, the peer its own share of it."""
    return told[0].losses if how in OURS else [sum(shares) for shares in zip(*(one.losses for one in told), strict=True)]


@contextmanager
def all_sides(case: Side, folder: Path) -> Iterator[dict[str, Workers]]:
    """Everybody who takes part in a case, ready for the first step."""
    with ExitStack() as stack:
        sides = {}
        for how in (*OURS, *PEERS):
            side = replace(case, how=how)
            sides[how] = Workers(str(side), worker, [(side, rank, str(folder)) for rank in range(side.num_workers)])
            stack.callback(sides[how].kill)
        for workers in sides.values():
            workers.wait()
        yield sides


# --- Measuring -------------------------------------------------------------------------------------------------------


def measure(case: Side, folder: Path, num_rounds: int, num_steps: int) -> list[Row]:
    """The rows of one case: all sides take turns, and their losses are compared."""
    tokens = num_steps * case.spec().training.global_batch_size * case.setting.sequence_length
    rates: dict[str, list[tuple[float, float]]] = {how: [] for how in (*OURS, *PEERS)}
    with all_sides(case, folder) as sides:
        for number in range(-1, num_rounds):  # the first one warms up
            for how in random.Random(number).sample(list(sides), len(sides)):
                elapsed_s, cpu_s = sides[how].take(num_steps)
                if number >= 0:
                    rates[how].append((tokens / elapsed_s, tokens / cpu_s))
        losses = {how: losses_of(how, workers.finish()) for how, workers in sides.items()}
    for how in OURS:
        check_losses(losses[how], losses["packed"], case.setting.max_loss_difference)
    metric = f"tokens_per_s_{case.num_workers}_{'worker' if case.num_workers == 1 else 'groups'}_{case.kind}"
    name = PEER_NAMES[case.num_workers]
    return [
        row(metric, rates["exact"], name, rates["packed"], TARGET),
        row(f"{metric}_fast", rates["fast"], name, rates["packed"], TARGET),
        row(f"{metric}_against_causal", rates["exact"], f"{name}, documents not apart", rates["causal"], None),
    ]


def row(metric: str, ours: list[tuple[float, float]], peer_name: str, peer: list[tuple[float, float]], target: float | None) -> Row:
    """One line of the results, from tokens a second of the clock and of the processor."""
    (mine, _), (theirs, _) = ([statistics.median(kind) for kind in zip(*runs, strict=True)] for runs in (ours, peer))
    # Round by round: how fast the machine's cores are changes from minute to minute.
    ratio, ratio_cpu = (statistics.median(one[kind] / other[kind] for one, other in zip(ours, peer, strict=True)) for kind in (0, 1))
    return {
        "metric": metric,
        "unit": "tokens/s",
        "ours": round(mine, 1),
        "peer": round(theirs, 1),
        "peer_name": peer_name,
        "ratio": round(ratio, 3),
        "ratio_by_processor_time": round(ratio_cpu, 3),
        "target": target,
        "reached": None if target is None else ratio >= target,
        "ours_runs": [round(one, 1) for one, _ in ours],
        "peer_runs": [round(one, 1) for one, _ in peer],
    }


def show(rows: list[Row]) -> None:
    """Print the table."""
    for one in rows:
        mark = {True: "reached", False: "missed", None: ""}[one["reached"]]
        ratios = f"x{one['ratio']:<5} (x{one['ratio_by_processor_time']:<5} by processor time)"
        print(f"{one['metric']:<42} {one['ours']:>7} {one['unit']} {one['peer']:>7} {one['peer_name']:<43} {ratios} {mark}")


def main() -> int:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="three rounds of one step")
    parser.add_argument("--device", choices=list(SETTINGS), default="cpu", help="cuda: with one worker")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the ends of all `with`, so that nothing is left
    setting, is_gpu = SETTINGS[options.device], options.device == "cuda"
    model = build_model(setting.config, VOCAB_SIZE, seed=1)
    size = f"Llama of {sum(p.numel() for p in model.parameters()):,} parameters"
    head = head_row(options.device, f"{size}, {setting.sequence_length} tokens a sample, {setting.training}")
    num_rounds, num_steps = (3, 1) if options.quick else (15, 1)
    rows = []
    with ScratchFolder("overhead") as folder:
        store_url = prepare_stdlib(Path(folder), "stdlib", setting.sequence_length, VOCAB_SIZE)
        for num_workers in (1,) if is_gpu else (1, 2):
            for kind in ("lora", "full"):
                rows += measure(Side("", kind, num_workers, store_url, options.device), Path(folder), num_rounds, num_steps)
                show(rows[-3:])
                head["load_average_after"] = [round(one, 1) for one in os.getloadavg()]  # our own two workers are in it
                if options.json:
                    options.json.write_text(json.dumps([head, *rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
