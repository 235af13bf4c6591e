"""Building, exporting and loading models: the same logits everywhere, and nothing but safetensors."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.models.conftest import CONFIGS
from tidepool.errors import ModelError
from tidepool.models import build_model, export_model, load_model, load_tokenizer, train_tokenizer

TOKENS = torch.arange(3, 40)[None]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model.eval()(TOKENS).logits
    return result


@pytest.fixture
def exported(llama: Any, tokenizer: Any, tmp_path: Path) -> Path:
    export_model(llama, tokenizer, tmp_path / "export")
    return tmp_path / "export"


def test_the_seed_decides_the_weights_and_the_callers_random_state_is_untouched() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, same, other = (build_model(CONFIGS["llama"], 300, seed).state_dict() for seed in (1, 1, 2))
    assert torch.random.get_rng_state().equal(before)
    assert all(one[key].equal(same[key]) for key in one)
    assert not one["model.embed_tokens.weight"].equal(other["model.embed_tokens.weight"])
    assert all(tensor.dtype == torch.float32 for tensor in one.values())


def test_a_built_model_knows_its_tokenizers_special_tokens(model: Any, tokenizer: Any) -> None:
    assert model.config.vocab_size == len(tokenizer)
    assert (model.config.eos_token_id, model.config.bos_token_id, model.config.pad_token_id) == (0, 0, 0)
    assert model.generation_config.eos_token_id == [0, 2], "the end of a turn ends an answer too"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "lama"}, r"config\.model_type: lama is no causal .* did you mean `llama`"),
        ({"model_type": "t5"}, "t5 is no causal language model"),
        ({"model_type": "llama", "hidden_sice": 32}, r"config\.hidden_sice: a llama model has no such key; did you mean `hidden_size`"),
        ({"model_type": "gpt2", "zzz": 32}, r"config\.zzz: a gpt2 model has no such key; it can be .*n_embd"),
        ({"model_type": "llama", "vocab_size": 7}, r"config\.vocab_size: it is 300"),
        ({"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}, "Cannot build a llama model"),
        ({"model_type": "llama", "hidden_size": "big"}, "Cannot build a llama model"),
        ({"model_type": "llama", "num_attention_heads": 0}, "Cannot build a llama model"),
    ],
)
def test_a_config_that_cannot_be_built_is_an_error_that_says_why(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_model(config, 300, seed=0)


def test_an_export_has_the_same_logits_here_and_in_plain_transformers(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    export_model(model, tokenizer, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    loaded = load_model(tmp_path, torch.float32)
    assert logits(loaded).equal(logits(model))
    assert loaded.config._attn_implementation == "sdpa"
    assert loaded.generation_config.eos_token_id == [0, 2]
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path)).equal(logits(model))
    assert load_tokenizer(tmp_path)("the tide")["input_ids"] == tokenizer("the tide")["input_ids"]


def test_a_model_is_loaded_in_the_dtype_asked_for(exported: Path) -> None:
    assert {parameter.dtype for parameter in load_model(exported, torch.bfloat16).parameters()} == {torch.bfloat16}


def test_a_tokenizer_that_is_too_large_for_the_model_is_refused(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    larger = train_tokenizer([f"{number} tides" for number in range(500)], vocab_size=350)
    with pytest.raises(ModelError, match="tokens and the model embeddings for 300: they do not belong together"):
        export_model(llama, larger, tmp_path)
    with pytest.raises(ModelError, match="do not belong together"):
        build_model(CONFIGS["llama"], 290, seed=0, tokenizer=tokenizer)


def test_pickled_weights_are_refused(exported: Path) -> None:
    torch.save(load_file(exported / "model.safetensors"), exported / "pytorch_model.bin")
    (exported / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"pickled weights only \(pytorch_model\.bin\).*Convert them to safetensors"):
        load_model(exported, torch.float32)


def test_a_model_that_brings_its_own_code_is_refused_and_the_code_is_not_run(exported: Path, tmp_path: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (exported / "config.json").write_text(json.dumps(config))
    (exported / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelError, match="needs Python code of its own, which Tidepool never runs"):
        load_model(exported, torch.float32)
    assert not (tmp_path / "ran").exists()


def test_a_known_architecture_is_loaded_without_the_code_beside_it(exported: Path, tmp_path: Path, llama: Any) -> None:
    config = json.loads((exported / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (exported / "config.json").write_text(json.dumps(config))
    (exported / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert logits(load_model(exported, torch.float32)).equal(logits(llama))
    assert not (tmp_path / "ran").exists()


def _break_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def _drop_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "No model folder"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
        (lambda folder: (folder / "config.json").unlink(), "has neither config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "Cannot read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "does not hold a JSON object"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100), "Cannot load the model"),
        (lambda folder: _break_config(folder, model_type="llamma"), "unknown type 'llamma'. Did you mean llama?"),
        (lambda folder: _break_config(folder, hidden_size=64), "Cannot load the model"),
        (_drop_weight, r"1 weights are missing from its files, model\.norm\.weight"),
    ],
)
def test_a_folder_that_is_no_whole_model_is_an_error_that_says_why(exported: Path, damage: Any, message: str) -> None:
    damage(exported)
    with pytest.raises(ModelError, match=message):
        load_model(exported, torch.float32)


def test_an_adapter_is_no_model(exported: Path) -> None:
    (exported / "config.json").rename(exported / "adapter_config.json")
    with pytest.raises(ModelError, match="holds an adapter, not a model"):
        load_model(exported, torch.float32)
