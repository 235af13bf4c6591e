"""A worker without enough memory: advice that is computed from the spec, and one message, from Python, torch and CUDA alike."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.training.conftest import CONFIG, Killed, killer, make_run, train_here
from tidepool.checkpoint import RunLog
from tidepool.errors import OutOfMemoryError
from tidepool.specs import TrainingSpec
from tidepool.storage import ObjectStore
from tidepool.training import worker
from tidepool.training.memory import Demand, ModelSize, advise, is_out_of_memory, state_bytes, step_bytes

GB = 10**9
# A Llama of 8 billion parameters in bfloat16 with an adapter, and one of 1 billion that is trained whole.
LORA_8B = ModelSize(16 * GB, 40_000_000, 4096, 32, 128_256, 2)
FULL_1B = ModelSize(4 * GB, 10**9, 2048, 16, 32_000, 2)


def training(**changes: Any) -> TrainingSpec:
    return TrainingSpec(**({"steps": 1, "global_batch_size": 64, "num_shards": 8, "micro_batch_size": 8} | changes))


@pytest.mark.parametrize(
    ("size", "demand", "capacity_gb", "advice"),
    [
        (LORA_8B, Demand(8, False, 1024), 80, "Lower training.micro_batch_size from 8 to 4. "),
        (LORA_8B, Demand(8, False, 2048), 40, "Lower training.micro_batch_size from 8 to 2. "),
        (
            LORA_8B,
            Demand(8, False, 8192),
            40,
            "Lower training.micro_batch_size from 8 to 2, and set training.gradient_checkpointing to true",
        ),
        (LORA_8B, Demand(1, False, 4096), 40, "Set training.gradient_checkpointing to true. "),
        (LORA_8B, Demand(1, True, 4096), 80, "Prepare the dataset with a sequence_length of 2048, not 4096. "),
        (LORA_8B, Demand(4, True, 4096), 80, "Lower training.micro_batch_size from 4 to 2. "),
        (FULL_1B, Demand(8, False, 1024), 16, "no batch is small enough: train a LoRA adapter (model.lora) in place of the whole model"),
        (LORA_8B, Demand(1, True, 512), 16, "no batch is small enough: use a smaller base or a device with more memory"),
    ],
)
def test_the_advice_says_what_to_lower_and_to_what(size: ModelSize, demand: Demand, capacity_gb: int, advice: str) -> None:
    assert advice in advise(size, demand, training(), capacity_gb * GB)


@given(
    micro_batch_size=st.sampled_from([1, 2, 4, 8]),
    checkpointing=st.booleans(),
    length_bits=st.integers(3, 17),
    capacity=st.integers(1, 200),
    size=st.sampled_from([LORA_8B, FULL_1B]),
)
def test_what_is_advised_needs_less_fits_and_can_be_written_in_a_spec(
    micro_batch_size: int, checkpointing: bool, length_bits: int, capacity: int, size: ModelSize
) -> None:
    demand, spec = Demand(micro_batch_size, checkpointing, 2**length_bits), training(micro_batch_size=micro_batch_size)
    advice = advise(size, demand, spec, capacity * GB)
    if "no batch is small enough" in advice:
        smallest = Demand(1, True, min(8, demand.sequence_length))
        room = capacity * GB - state_bytes(size, spec.num_shards)
        assert step_bytes(size, smallest) > min(room, 0.75 * step_bytes(size, demand))
        return
    proposed = _read_back(advice, demand)
    assert step_bytes(size, proposed) <= 0.75 * step_bytes(size, demand)
    assert step_bytes(size, proposed) + state_bytes(size, spec.num_shards) <= capacity * GB
    assert training(micro_batch_size=proposed.micro_batch_size).micro_batch_size < 9, "the spec takes it"


def _read_back(advice: str, demand: Demand) -> Demand:
    words = advice.split(". ", maxsplit=1)[0].replace(",", "").split()
    micro = int(words[words.index("to", words.index("from")) + 1]) if "from" in words else demand.micro_batch_size
    length = int(words[words.index("sequence_length") + 2]) if "sequence_length" in words else demand.sequence_length
    return Demand(micro, demand.gradient_checkpointing or "training.gradient_checkpointing" in words, length)


def _python(*_arguments: Any) -> None:
    raise MemoryError


def _torch_on_the_cpu(*_arguments: Any) -> None:
    torch.empty(2**60, dtype=torch.uint8)


def _cuda(*_arguments: Any) -> None:
    """A stand-in: not yet run on a GPU."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.10 GiB\nand more")


@pytest.mark.parametrize("exhaust", [_python, _torch_on_the_cpu, _cuda])
def test_a_step_that_runs_out_of_memory_is_told_with_advice_and_loses_nothing(
    exhaust: Callable[..., None], prepared: str, run_name: str, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_run(prepared, run_name, training={"micro_batch_size": 2})
    with pytest.raises(Killed):
        train_here(spec, killer(3))
    build = worker._build_parts

    def build_exhausting(*arguments: Any) -> Any:
        parts = build(*arguments)
        parts.model.register_forward_pre_hook(exhaust)
        return parts

    with monkeypatch.context() as patched:
        patched.setattr(worker, "_build_parts", build_exhausting)
        with pytest.raises(OutOfMemoryError) as told:
            train_here(spec)
    message = str(told.value)
    assert message.startswith(f"A worker of run {run_name} ran out of memory (cpu, ")
    assert "Lower training.micro_batch_size from 2 to 1. By our estimate a step then takes" in message
    assert "needs another `run` name to be changed; what was committed under this one is safe" in message
    assert "\n" not in message
    assert [commit.step for commit in RunLog(store, run_name).visible_commits()] == [2]
    assert train_here(spec).finished


def test_a_model_that_cannot_even_be_loaded_is_told(prepared: str, run_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "build_model", _torch_on_the_cpu)
    with pytest.raises(OutOfMemoryError, match=r"while it loaded the model.*a LoRA adapter .*raise workers\.cpus_per_worker"):
        train_here(make_run(prepared, run_name, model={"config": CONFIG}))


def test_other_errors_are_not_taken_for_it() -> None:
    assert not is_out_of_memory(RuntimeError("Connection closed by peer"))
    assert not is_out_of_memory(ValueError("memory"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
