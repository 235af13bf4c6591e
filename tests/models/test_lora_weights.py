"""What is read of an adapter's folder for an engine is what peft would compute with; what is more than LoRA is refused as at import."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch.nn import Linear
from transformers.pytorch_utils import Conv1D

from tidepool.errors import BaseMismatchError, ModelError
from tidepool.models import read_lora
from tidepool.models.adapter import check_adapter

pytestmark = pytest.mark.filterwarnings("ignore")  # peft has advice for configurations that one does not usually write


def sizes_of(model: Any) -> dict[str, tuple[int, int]]:
    linear = {name: module for name, module in model.named_modules() if isinstance(module, Linear | Conv1D)}
    return {name: (one.in_features, one.out_features) if isinstance(one, Linear) else (one.nx, one.nf) for name, one in linear.items()}


def write(model: Any, folder: Path, **config: Any) -> Path:
    is_conv = model.config.model_type == "gpt2"
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=is_conv, **config))
    for index, parameter in enumerate(one for one in adapted.parameters() if one.requires_grad):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(index))
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


CONFIGS: list[dict[str, Any]] = [
    {"target_modules": "all-linear", "r": 8},
    {"target_modules": "all-linear", "r": 16, "use_rslora": True, "lora_alpha": 3},
    {"target_modules": "all-linear", "rank_pattern": {r"layers\.1\..*": 3, "o_proj": 5, "c_proj": 5}, "alpha_pattern": {"0.*.up_proj": 30}},
    {"target_modules": r".*(0\.self_attn\.[qk]_proj|h\.1\.attn\.c_attn)", "lora_alpha": 12},
    {"target_modules": ["down_proj", "c_fc", "lm_head"], "exclude_modules": ["lm_head"], "layers_to_transform": [1]},
]


@pytest.mark.parametrize("config", CONFIGS)
def test_layers_ranks_and_scales_are_those_of_peft(model: Any, tmp_path: Path, config: dict[str, Any]) -> None:
    folder = write(model, tmp_path, **config)
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), folder)
    expected = {
        name.removeprefix("base_model.model."): (
            module.lora_A["default"].weight,
            module.lora_B["default"].weight,
            module.scaling["default"],
        )
        for name, module in loaded.named_modules()
        if isinstance(module, LoraLayer)
    }
    found = read_lora(folder, sizes_of(model), "lm_head", "any")
    assert found.keys() == expected.keys()
    assert found
    for name, (a, b, scale) in found.items():
        assert a.equal(expected[name][0])
        assert b.equal(expected[name][1])
        assert scale == pytest.approx(expected[name][2], rel=1e-12)


def test_a_configuration_that_says_all_linear_means_all_but_the_one_that_makes_logits(llama: Any, tmp_path: Path) -> None:
    write(llama, tmp_path, target_modules="all-linear")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": "all-linear"}))
    assert read_lora(tmp_path, sizes_of(llama), "lm_head", "any").keys() == sizes_of(llama).keys() - {"lm_head"}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"target_modules": ["q_proj"], "use_dora": True}, r"does more than LoRA \(use_dora: True\)"),
    ({"target_modules": ["q_proj"], "lora_bias": True}, r"does more than LoRA \(lora_bias: True\)"),
    ({"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, r"does more than LoRA \(modules_to_save"),
    ({"target_modules": ["q_proj", "embed_tokens"]}, r"changes more than linear layers \(.*embed_tokens.lora_embedding_A"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_what_no_engine_computes_is_refused_at_load_and_at_import_alike(
    llama: Any, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    write(llama, tmp_path, **config)
    with pytest.raises(ModelError, match=message) as at_load:
        read_lora(tmp_path, sizes_of(llama), "lm_head", "any")
    with pytest.raises(ModelError, match=message) as at_import:
        check_adapter(llama, tmp_path, "any")
    assert str(at_load.value) == str(at_import.value)


def test_an_adapter_of_another_base_or_with_other_weights_is_refused(llama: Any, tmp_path: Path) -> None:
    write(llama, tmp_path, target_modules=["q_proj", "v_proj"], r=4)
    path = tmp_path / "adapter_model.safetensors"
    weights = load_file(path)
    first = min(weights)
    for changed, message in (
        ({key: tensor for key, tensor in weights.items() if key != first}, "1 weights are missing, 0 belong nowhere"),
        ({**weights, "x.lora_A.weight": weights[first].clone()}, "0 weights are missing, 1 belong nowhere"),
        ({**weights, first: weights[first][:2].clone()}, "1 weights have another shape"),
    ):
        save_file(changed, path)
        with pytest.raises(ModelError, match=f"does not fit this model: {message}"):
            read_lora(tmp_path, sizes_of(llama), "lm_head", "any")
    path.write_bytes(b"x" * 64)
    with pytest.raises(ModelError, match="Cannot load the adapter"):
        read_lora(tmp_path, sizes_of(llama), "lm_head", "any")
    (tmp_path / "tidepool.json").write_text('{"base": "other@1", "base_digest": "cd"}')
    with pytest.raises(BaseMismatchError, match="was trained on other@1"):
        read_lora(tmp_path, sizes_of(llama), "lm_head", "ab" * 32)
