"""Our step loop against Hugging Face's Trainer on one GPU: tokens a second, model FLOPs utilization (MFU), peak memory. No Ray.

    python benchmarks/gpu_train.py [--json FILE] [--quick] [--only NAME ...] [--minutes M]

LoRA and full training of Llama 3 and Qwen 2.5 in their public shapes with random weights, made on the device. Both sides have the
same weights, samples, micro-batches, gradient accumulation, fused AdamW, clipping, SDPA attention and bf16 autocast over float32
(LoRA: over a frozen base in bf16); neither checkpoints activations, evaluates or saves. The Trainer is as its users start it,
but that it does not log or look for NaN in each loss, both of which would wait for the GPU. It may use algorithms that are not
deterministic; ours may not. Ours is measured with its exact reduction and its plain one (suffix `_fast`). Nothing counts as
reached whose losses are not the peer's (`loss_difference`), so that a faster side has not done less.

Every sample is a piece of one document, so that plain causal attention is right on both sides; in the settings that end in
`packed`, documents are packed, ours keeps them apart, and the Trainer gets their positions, from which transformers does.

MFU is the model's FLOPs a second over the device's dense bf16 peak. FLOPs per token are 6N + 12LHQT (PaLM, Chowdhery et al. 2022,
appendix B): N weights of linear layers, the head among them; L layers of H heads of size Q; T tokens a sample. With LoRA the
gradient of frozen weights is not computed: 4N for these, 6n for the n weights of the adapter, and the same for attention.

Each side is a process of its own. They take turns if the GPU has room for all; else each measures alone, one after the other.
"""

import argparse
import json
import random
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.nn import Linear
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler, SequentialSampler
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from turns import Done, Row, Turn, Workers, head_row, loss_difference, prepare_stdlib, take_turns, train_ours

from tidepool.data import Dataset, Samples, find_dataset
from tidepool.models import add_lora, packed_positions
from tidepool.models.scratch import new_config
from tidepool.scratch import ScratchFolder
from tidepool.specs import LoraSpec, RunSpec, parse_spec
from tidepool.storage import open_store
from tidepool.training.batch import shard_samples
from tidepool.training.group import LocalGroup
from tidepool.training.numerics import prepare_process, resolve_dtype

_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "max_position_embeddings": 131072}
_LLAMA |= {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
LLAMA_1B = _LLAMA | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
LLAMA_3B = LLAMA_1B | {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128}
LLAMA_8B = LLAMA_3B | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_8B |= {"tie_word_embeddings": False}
QWEN_05B = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "tie_word_embeddings": True,
}
TINY = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "tie_word_embeddings": True}


@dataclass(frozen=True)
class Setting:
    """What is trained. `together_gb`: room that all sides need to stay on the GPU side by side, one of them at work (an estimate)."""

    config: dict[str, Any]
    vocab_size: int
    kind: str
    micro_batch_size: int
    num_micro_batches: int
    together_gb: int
    sequence_length: int = 2048
    is_packed: bool = False
    precision: str = "bf16"


_L3, _Q25 = 128256, 151936
SETTINGS = {
    "cuda": {
        "llama-1b-lora": Setting(LLAMA_1B, _L3, "lora", 4, 8, 60),
        "llama-8b-lora": Setting(LLAMA_8B, _L3, "lora", 2, 4, 125),
        "qwen2-0.5b-full": Setting(QWEN_05B, _Q25, "full", 4, 8, 75),
        "llama-3b-full": Setting(LLAMA_3B, _L3, "full", 2, 4, 200),
        "llama-1b-full": Setting(LLAMA_1B, _L3, "full", 4, 8, 120),
        "llama-1b-lora-packed": Setting(LLAMA_1B, _L3, "lora", 4, 8, 60, is_packed=True),
    },
    "cpu": {
        "tiny-lora": Setting(TINY, 2048, "lora", 2, 4, 0, 128, precision="fp32"),
        "tiny-full": Setting(TINY, 2048, "full", 2, 4, 0, 128, precision="fp32"),
        "tiny-full-packed": Setting(TINY, 2048, "full", 2, 4, 0, 128, is_packed=True, precision="fp32"),
    },
}
LORA = {"rank": 16, "alpha": 32.0}
LEARNING_RATE = {"lora": 5e-4, "full": 2e-5}
OURS, PEER = ("exact", "fast"), "trainer"
PEER_NAME = "transformers.Trainer"
PEAK_FLOPS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}
"""Dense bf16, by the vendor's data sheets of the SXM modules."""
TOKENIZER_SIZE = 2048
MAX_STEPS, NUM_STEPS, MIN_ROUNDS, MAX_ROUNDS = 60, 2, 3, 15
MAX_LOSS_DIFFERENCE = {"bf16": 2e-2, "fp32": 1e-3}


@dataclass(frozen=True)
class Side:
    """Who trains (one of `OURS`, or `PEER`), and what."""

    how: str
    setting: Setting
    store_url: str
    device: str

    def spec(self) -> RunSpec:
        """The same for all sides but for the reduction; a logical shard is a micro-batch."""
        setting = self.setting
        optimizer = {"learning_rate": LEARNING_RATE[setting.kind], "schedule": "constant", "weight_decay": 0.1}
        training = {"steps": 10**6, "precision": setting.precision, "evaluate_every_steps": 10**6, "optimizer": optimizer}
        training |= {"micro_batch_size": setting.micro_batch_size, "num_shards": setting.num_micro_batches}
        training |= {"global_batch_size": setting.micro_batch_size * setting.num_micro_batches}
        training |= {"reduction": self.how if self.how in OURS else "exact"}
        dataset = dataset_name(setting)
        spec = {"store": self.store_url, "run": "gpu-train", "dataset": dataset, "seed": 1, "model": {"base": "base"}}
        return parse_spec(spec | {"training": training, "checkpoint": {"every_steps": 10**6}}, RunSpec)


def dataset_name(setting: Setting) -> str:
    """Of the samples that a setting needs."""
    return f"{'packed' if setting.is_packed else 'whole'}-{setting.sequence_length}"


def new_model(side: Side) -> PreTrainedModel:
    """The same weights on every side, made on the device: an 8B takes a second there, minutes on a CPU."""
    setting, device = side.setting, torch.device(side.device)
    base_dtype = resolve_dtype(setting.precision, device) if setting.kind == "lora" else torch.float32
    torch.manual_seed(1)
    with device:
        config = new_config(setting.config, setting.vocab_size)
        model = AutoModelForCausalLM.from_config(config, dtype=base_dtype, attn_implementation="sdpa")
    if setting.kind == "full":
        return model
    adapted = add_lora(model, LoraSpec(**LORA), 1, "base").to(device)
    for module in adapted.modules():
        if side.how == PEER and isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = True  # as peft makes it; ours spares the copies
    return adapted


def flops_per_token(setting: Setting) -> float:
    """Of a step, forward and backward; see the head of this file."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(new_config(setting.config, setting.vocab_size))
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, Linear)]
    num_weights = sum(module.weight.numel() for module in linear)
    num_adapter = LORA["rank"] * sum(module.in_features + module.out_features for module in linear if module is not head)
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * head_dim * setting.sequence_length
    return attention + (4 * num_weights + 6 * num_adapter if setting.kind == "lora" else 6 * num_weights)


# --- The peer --------------------------------------------------------------------------------------------------------


class InOrder(TorchDataset[dict[str, Tensor]]):
    """The samples that ours reads, in its order, ready in memory."""

    def __init__(self, side: Side) -> None:
        store, spec = open_store(side.store_url), side.spec()
        dataset = Dataset(store, find_dataset(store, spec.dataset), "train", 16)
        numbers = [
            number
            for step in range(MAX_STEPS)
            for shard in range(spec.training.num_shards)
            for number in shard_samples(step, shard, spec.training, spec.seed, dataset.layout)
        ]
        self._examples = [as_example(dataset.read([number]), side.setting.is_packed) for number in numbers]

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self._examples[index]


def as_example(samples: Samples, is_packed: bool) -> dict[str, Tensor]:
    """One sample as the Trainer takes it. Unpacked ones are one document (and padding after it, which is no target)."""
    tokens_T, documents_NT = torch.from_numpy(samples.tokens_NT[0]).long(), torch.from_numpy(samples.documents_NT).long()
    example = {"input_ids": tokens_T, "labels": torch.where(torch.from_numpy(samples.loss_mask_NT[0]), tokens_T, -100)}
    if is_packed:
        return example | {"position_ids": packed_positions(documents_NT)[0]}
    assert documents_NT.max() == 0, "more than one document in a sample"
    return example


class InTurns(TrainerCallback):
    """Takes turns between steps, and begins each step's loss."""

    def __init__(self, turn: Turn, losses: list[Any]) -> None:
        self._turn, self._losses = turn, losses

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._turn()
        self._losses.append(0.0)


class NotedTrainer(Trainer):
    """Reads its samples in order, and notes each step's loss without waiting for the device."""

    losses: list[Any]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses[-1] = self.losses[-1] + loss
        return loss


def train_peer(side: Side, turn: Turn, losses: list[Any], folder: Path) -> None:
    """As a user of the Trainer would."""
    spec = side.spec().training
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=MAX_STEPS,
        per_device_train_batch_size=spec.micro_batch_size,
        gradient_accumulation_steps=spec.num_shards,
        bf16=spec.precision == "bf16",
        use_cpu=side.device == "cpu",
        optim="adamw_torch_fused",
        learning_rate=spec.optimizer.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=spec.optimizer.weight_decay,
        adam_beta1=spec.optimizer.betas[0],
        adam_beta2=spec.optimizer.betas[1],
        adam_epsilon=spec.optimizer.eps,
        max_grad_norm=spec.optimizer.clip_norm,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = NotedTrainer(new_model(side), arguments, train_dataset=InOrder(side), callbacks=[InTurns(turn, losses)])
    trainer.losses = losses
    trainer.train()


# --- Turns -----------------------------------------------------------------------------------------------------------


def worker(side: Side, folder: str, pipe: Connection) -> None:
    """The process of a side."""
    device = torch.device(side.device)
    if side.how in OURS:
        prepare_process(device, 1)  # on a GPU: deterministic algorithms
    torch.set_num_threads(1)

    def train(turn: Turn, losses: list[float]) -> None:
        if side.how in OURS:
            train_ours(side.spec(), new_model(side), LocalGroup(), turn, losses)
        else:
            train_peer(side, turn, losses, Path(folder))

    take_turns(train, pipe, device, num_warm_up=1)  # each turn begins without memory in reserve


@contextmanager
def started(sides: list[Side], folder: Path) -> Iterator[dict[str, Workers]]:
    """The processes of these sides, ready for their first turn."""
    with ExitStack() as stack:
        workers = {}
        for side in sides:
            workers[side.how] = Workers(f"the side {side.how}", worker, [(side, str(folder))])
            stack.callback(workers[side.how].kill)
        for one in workers.values():
            one.wait()
        yield workers


def measure_sides(sides: list[Side], folder: Path, num_rounds: int, until: float) -> tuple[dict[str, list[float]], dict[str, Done]]:
    """Seconds a step, round by round, of sides that are on the GPU together; and what each of them told at the end."""
    seconds: dict[str, list[float]] = {side.how: [] for side in sides}
    with started(sides, folder) as workers:
        for number in range(-1, num_rounds):  # the first one warms up
            if number >= MIN_ROUNDS and time.monotonic() > until:
                break
            for how in random.Random(number).sample(list(workers), len(workers)):
                elapsed_s, _ = workers[how].take(NUM_STEPS)
                if number >= 0:
                    seconds[how].append(elapsed_s / NUM_STEPS)
        return seconds, {how: one.finish()[0] for how, one in workers.items()}


def measure(case: Side, name: str, folder: Path, num_rounds: int, minutes: float) -> list[Row]:
    """The rows of one setting."""
    sides = [replace(case, how=how) for how in (*OURS, PEER)]
    has_room = case.device == "cpu" or torch.cuda.get_device_properties(0).total_memory >= case.setting.together_gb * 1e9
    seconds, told = {}, {}
    began = time.monotonic()
    for number, together in enumerate([sides] if has_room else [[side] for side in sides]):
        until = began + 60 * minutes * (number + 1) / (1 if has_room else len(sides))
        some_seconds, some_told = measure_sides(together, folder, num_rounds, until)
        seconds |= some_seconds
        told |= some_told
    rows = []
    for how in OURS:
        length = min(len(told[one].losses) for one in (how, PEER))
        losses = {one: told[one].losses[:length] for one in (how, PEER)}
        difference = loss_difference(losses[how], losses[PEER])
        is_same_work = difference <= MAX_LOSS_DIFFERENCE[case.setting.precision]  # NaN is not
        suffix = name if how == "exact" else f"{name}_fast"
        new = rows_of(suffix, case, (seconds[how], seconds[PEER]), (told[how].peak_bytes, told[PEER].peak_bytes))
        for one in new:
            one |= {"reached": one["reached"] and is_same_work, "loss_difference": difference, "in_turns": has_room}
            one |= {"ours_losses": losses[how][:: length - 1], "peer_losses": losses[PEER][:: length - 1]}
        rows += new
    return rows


def rows_of(name: str, case: Side, seconds: tuple[list[float], list[float]], peaks: tuple[int, int]) -> list[Row]:
    """Tokens a second, MFU and memory of ours and the peer."""
    setting = case.setting
    tokens = case.spec().training.global_batch_size * setting.sequence_length
    rates = [[tokens / one for one in side] for side in seconds]
    ratio = statistics.median(one / other for one, other in zip(*rates, strict=False))  # alone, they may differ in how many rounds they had
    rows = [row(f"tokens_per_s_{name}", "tokens/s", *rates, ratio, ratio >= 1)]
    if case.device == "cpu":
        return rows
    peak = PEAK_FLOPS.get(torch.cuda.get_device_name())
    used = [[rate * flops_per_token(setting) / peak if peak else None for rate in side] for side in rates]
    rows.append(row(f"mfu_{name}", "of the device's peak", *used, ratio, ratio >= 1))
    in_gb = [[one / 1e9] for one in peaks]
    return [*rows, row(f"peak_memory_{name}", "GB", *in_gb, peaks[0] / peaks[1], peaks[0] <= peaks[1])]


def row(metric: str, unit: str, ours: list[Any], peer: list[Any], ratio: float, is_reached: bool) -> Row:
    """One line of the results; values with four digits."""
    ours, peer = ([None if one is None else float(f"{one:.4g}") for one in side] for side in (ours, peer))
    mine, theirs = (None if None in side else statistics.median(side) for side in (ours, peer))
    values = {"metric": metric, "unit": unit, "ours": mine, "peer": theirs, "peer_name": PEER_NAME, "ratio": round(ratio, 3)}
    return values | {"target": 1.0, "reached": is_reached, "ours_runs": ours, "peer_runs": peer}


def show(rows: list[Row]) -> None:
    """Print the table."""
    for one in rows:
        mark = f"{'reached' if one['reached'] else 'missed'} (losses differ by {one['loss_difference']:.2%})"
        print(f"{one['metric']:<42} {one['ours']!s:>9} {one['peer']!s:>9} {one['unit']:<22} x{one['ratio']:<6} {mark}", flush=True)


def main() -> int:
    """Measure, print, and write the JSON."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = SETTINGS[device]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help=f"{MIN_ROUNDS} rounds")
    parser.add_argument("--only", nargs="+", choices=list(settings), default=list(settings), metavar="NAME", help=", ".join(settings))
    parser.add_argument("--minutes", type=float, default=10.0, help=f"for all settings; each has {MIN_ROUNDS} rounds at least")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the ends of all `with`, so that nothing is left
    ends = time.monotonic() + 60 * options.minutes
    head = head_row(device, "LoRA of rank 16 on all linear layers, or full training; see each row")
    rows: list[Row] = []
    failed: dict[str, str] = {}
    with ScratchFolder("gpu-train") as folder:
        for number, name in enumerate(options.only):
            setting = settings[name]
            store_url = (Path(folder) / "store").as_uri()
            if not (Path(folder) / f"{dataset_name(setting)} texts").exists():
                prepare_stdlib(Path(folder), dataset_name(setting), setting.sequence_length, TOKENIZER_SIZE, not setting.is_packed)
            minutes = (ends - time.monotonic()) / 60 / (len(options.only) - number)
            num_rounds = MIN_ROUNDS if options.quick else MAX_ROUNDS
            try:
                rows += (new := measure(Side("", setting, store_url, device), name, Path(folder), num_rounds, minutes))
                show(new)
            except (ChildProcessError, RuntimeError) as error:  # out of memory, say: the other settings have their turn all the same
                failed[name] = str(error)
                print(f"{name} has no figures: {error}", flush=True)
            if options.json:
                options.json.write_text(json.dumps([head | {"failed": failed}, *rows], indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
