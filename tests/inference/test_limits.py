"""What an engine refuses to load, and how much cache it takes."""

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.inference.families import FAMILIES
from tests.inference.test_identity import cache_gb
from tidepool.errors import ModelError
from tidepool.inference.limits import BLOCK_SIZE, available_bytes, context_length, num_blocks
from tidepool.inference.paged import PagedEngine
from tidepool.specs import EngineSpec

SMALL = FAMILIES["llama"]


def model_of(config: dict[str, Any]) -> Any:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config, vocab_size=300)).eval()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}, "mamba model: it takes no position_ids"),
        (
            SMALL | {"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"], "num_experts": 0},
            "qwen3_next model: not all of its layers are full or sliding",
        ),
        (SMALL | {"model_type": "gemma2", "head_dim": 8, "attn_logit_softcapping": 50.0}, "gemma2 model: its attention has softcap"),
        (SMALL | {"model_type": "gpt_oss", "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}, "its attention has s_aux"),
        (
            SMALL | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}},
            "64",
        ),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(tokenizer: Any, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        PagedEngine(model_of(config), tokenizer, EngineSpec(max_sequence_length=100), lambda *_: pytest.fail("no adapter"))


def test_positions_that_depend_on_the_batch_are_run_up_to_where_they_do() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    assert context_length(model_of(SMALL | {"rope_parameters": rope}), EngineSpec(max_sequence_length=64)) == 64


def test_the_cache_has_what_all_places_can_use_or_what_it_may() -> None:
    block_bytes, cpu = 1000, torch.device("cpu")
    assert num_blocks(EngineSpec(max_batch_size=3), 5 * BLOCK_SIZE - 1, block_bytes, cpu) == 15
    assert num_blocks(EngineSpec(max_batch_size=3, cache_gb=9.5e-6), 5 * BLOCK_SIZE, block_bytes, cpu) == 9
    with pytest.raises(ModelError, match=r"takes 5e-06 GB of cache, and there are 4e-06 GB: raise engine.cache_gb"):
        num_blocks(EngineSpec(cache_gb=4e-6), 5 * BLOCK_SIZE, block_bytes, cpu)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_block_takes_what_the_heads_say(family: str, tokenizer: Any) -> None:
    model = model_of(FAMILIES[family])
    engine = PagedEngine(model, tokenizer, EngineSpec(cache_gb=cache_gb(model, 20)), lambda *_: pytest.fail("no adapter"))
    assert engine.stats().num_blocks == 20


def test_a_container_has_no_more_memory_than_its_limit_leaves(tmp_path: Path) -> None:
    machine = psutil.virtual_memory().available
    assert abs(available_bytes(tmp_path) - machine) < machine / 4, "there is no cgroup"
    (tmp_path / "memory.current").write_text("300\n")
    for limit, left in (("1000", 700), ("200", 0)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert available_bytes(tmp_path) == left
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(tmp_path) > 10**6
