"""Llama and GPT-2 (LayerNorm, transposed weights, dropouts of its own), whole and by LoRA: the same bits for every world size.

The members of a group are threads that take turns: one runs until its next collective, because torch's random state is
the process's. World sizes that do not divide the shards leave the members subtrees of many sizes.
"""

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.conftest import CONFIG, make_run
from tidepool.data import Dataset, find_dataset
from tidepool.models import add_lora, build_model
from tidepool.specs import LoraSpec, RunSpec
from tidepool.storage import open_store
from tidepool.telemetry import MemorySink
from tidepool.training.commits import BackgroundCommits
from tidepool.training.group import Group, LocalGroup
from tidepool.training.loop import Ending, StepLoop
from tidepool.training.member import Alone
from tidepool.training.numerics import resolve_dtype
from tidepool.training.state import tensors_digest

LLAMA: dict[str, Any] = CONFIG | {"initializer_range": 0.2}
GPT2: dict[str, Any] = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
NO_DROPOUT = {"llama": {"attention_dropout": 0.0}, "gpt2": {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}}
DROPOUT = {family: dict.fromkeys(keys, 0.2) for family, keys in NO_DROPOUT.items()}
VOCAB_SIZE, TIMEOUT_S = 320, 60
CPU = torch.device("cpu")


class Meeting:
    """Where the members of a group exchange what they have; one of them runs at a time."""

    def __init__(self, size: int) -> None:
        self.size, self.turn = size, threading.Lock()
        self._brought: list[Any] = [None] * size
        self._barrier = threading.Barrier(size, timeout=TIMEOUT_S)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """What the members brought, by rank."""
        self._brought[rank] = value
        self._wait()
        brought = list(self._brought)
        self._wait()
        return brought

    def leave(self) -> None:
        """Somebody failed: let nobody wait for it."""
        self._barrier.abort()

    def _wait(self) -> None:
        self.turn.release()
        try:
            self._barrier.wait()
        finally:
            self.turn.acquire()


class ThreadGroup:
    """A member of a group of threads."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.size, self._meeting = rank, meeting.size, meeting

    def all_reduce(self, values: Tensor) -> None:
        values.copy_(torch.stack(self._meeting.exchange(self.rank, values.clone())).sum(0))

    def all_to_all(self, sent: Tensor, num_sent: Sequence[int], num_received: Sequence[int]) -> Tensor:
        parts = [parts[self.rank] for parts in self._meeting.exchange(self.rank, sent.clone().split(list(num_sent)))]
        assert [part.numel() for part in parts] == list(num_received)
        return torch.cat(parts)

    def all_gather(self, part: Tensor, whole: Tensor) -> None:
        whole.copy_(torch.cat(self._meeting.exchange(self.rank, part.clone())))

    def broadcast(self, values: Tensor, source: int) -> None:
        values.copy_(self._meeting.exchange(self.rank, values.clone())[source])


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """LayerNorm's gradient depends on the number of threads, which is part of the numerics."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(config: dict[str, Any], lora: LoraSpec | None, spec: RunSpec, group: Group, device: torch.device = CPU) -> dict[str, str]:
    """The digests of weights, moments and history after the last step, on this member."""
    store = open_store(spec.store)
    train, held_out = (Dataset(store, find_dataset(store, "tides"), split, 4) for split in ("train", "held_out"))
    model = build_model(config, VOCAB_SIZE, seed=2)
    if lora:
        model = add_lora(model, lora, 2, "base")
    commits = BackgroundCommits(0, lambda *_: None, committed_step=lambda: sys.maxsize)  # so that none is due
    dtype = resolve_dtype(spec.training.precision, device)
    loop = StepLoop(spec, model.to(device), train, held_out, dtype, MemorySink(), Alone(1, None, 0), commits)
    loop.begin()
    with closing(commits), closing(loop):
        assert loop.run(group) is Ending.FINISHED
    return {name: tensors_digest(tensors) for name, tensors in loop.state().items()}


def train_together(
    config: dict[str, Any], lora: LoraSpec | None, spec: RunSpec, world_size: int, device: torch.device = CPU
) -> list[dict[str, str]]:
    """The digests of each member."""
    meeting = Meeting(world_size)
    digests: list[dict[str, str]] = [{}] * world_size

    def member(rank: int) -> None:
        with meeting.turn:
            try:
                digests[rank] = train(config, lora, spec, ThreadGroup(rank, meeting), device)
            except BaseException:
                meeting.leave()
                raise

    threads = [threading.Thread(target=member, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    return digests


def make_spec(store_url: str, **training: Any) -> RunSpec:
    """Four steps of 8 shards of two samples."""
    few = {"steps": 4, "global_batch_size": 16, "num_shards": 8, "evaluate_every_steps": 2}
    return make_run(store_url, "families", training=few | training)


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_bit_depends_on_the_world_size(prepared: str, family: str, kind: str) -> None:
    config = {"llama": LLAMA, "gpt2": GPT2}[family]
    lora = LoraSpec(rank=4, alpha=8, dropout=0.3) if kind == "lora" else None
    spec = make_spec(prepared, micro_batch_size=1 if kind == "lora" else 2)  # 2: a shard is one backward pass, added in place
    alone = train(config | DROPOUT[family], lora, spec, LocalGroup())
    for world_size in (2, 3, 5):
        assert train_together(config | DROPOUT[family], lora, spec, world_size) == [alone] * world_size
    assert not set(train(config | NO_DROPOUT[family], lora, spec, LocalGroup()).values()) & set(alone.values()), "dropout was off"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_plain_reduction_has_other_bits_for_each(prepared: str, family: str) -> None:
    """So the test above would see a difference in the order of addition."""
    config, spec = {"llama": LLAMA, "gpt2": GPT2}[family], make_spec(prepared, reduction="fast")
    alone, together = train(config, None, spec, LocalGroup()), train_together(config, None, spec, 3)
    assert together == [together[0]] * 3
    assert not set(together[0].values()) & set(alone.values())
