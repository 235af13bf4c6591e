"""LoRA adapters: a deterministic start, exports that plain peft loads, and no adapter on another base."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

from tests.models.conftest import CONFIGS
from tidepool.errors import BaseMismatchError, ModelError
from tidepool.models import ModelSource, add_lora, attach_adapter, build_model, export_adapter
from tidepool.specs import LoraSpec

TOKENS = torch.arange(3, 40)[None]
BASE = ModelSource("tides@3", "ab" * 32)
SPEC = LoraSpec(rank=4, alpha=8.0, dropout=0.1)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model.eval()(TOKENS).logits
    return result


def train(model: Any, seed: int) -> Any:
    """Move the adapter's weights away from their start, where it computes nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def make_adapter(base: Any, tokenizer: Any, folder: Path, seed: int = 0) -> Any:
    """Train an adapter on a copy of a base and export it; returns the trained model."""
    trained = train(add_lora(copy.deepcopy(base), SPEC, seed, BASE.ref), seed)
    export_adapter(trained, tokenizer, folder, BASE)
    return trained


def test_a_new_adapter_computes_nothing_and_only_it_is_trained(model: Any) -> None:
    expected = logits(model)
    adapted = add_lora(model, SPEC, seed=0, base_ref=BASE.ref)
    assert logits(adapted).equal(expected)
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert not any("lm_head" in name for name in trained)


def test_the_seed_decides_the_start_and_the_callers_random_state_is_untouched(llama: Any) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, same, other = (
        {name: value for name, value in add_lora(copy.deepcopy(llama), SPEC, seed, "b").state_dict().items() if "lora_A" in name}
        for seed in (1, 1, 2)
    )
    assert torch.random.get_rng_state().equal(before)
    assert all(one[name].equal(same[name]) for name in one)
    assert not any(one[name].equal(other[name]) for name in one)


def test_under_autocast_no_input_is_kept_as_a_copy_and_no_bit_differs(llama: Any) -> None:
    ours = train(add_lora(llama.to(torch.bfloat16), LoraSpec(rank=4), 0, "b"), 0)
    peft_alone = copy.deepcopy(ours)
    for module in peft_alone.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = True
    results = []
    for adapted in (ours, peft_alone):
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
            loss = adapted(TOKENS, labels=TOKENS).loss
        loss.backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in adapted.parameters() if parameter.grad is not None])
        results.append((loss, gradients, sum(kept.values())))
    (loss, gradients, num_bytes), (loss_there, gradients_there, num_bytes_there) = results
    assert loss.equal(loss_there)
    assert gradients.equal(gradients_there)
    assert num_bytes < num_bytes_there


def test_target_modules_can_be_named(llama: Any) -> None:
    adapted = add_lora(llama, LoraSpec(target_modules=["q_proj", "v_proj"]), 0, "b")
    trained = {name.split(".")[-4] for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained == {"q_proj", "v_proj"}


def test_an_unknown_target_module_is_an_error_even_beside_a_known_one(llama: Any) -> None:
    with pytest.raises(ModelError, match=r"no linear layer c_attn; it has .*down_proj.*q_proj"):
        add_lora(llama, LoraSpec(target_modules=["q_proj", "c_attn"]), 0, "b")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21 on transformers 5.23
def test_an_export_has_the_same_logits_attached_and_in_plain_peft(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    expected = logits(make_adapter(model, tokenizer, tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tidepool.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert not expected.equal(logits(model))
    assert logits(PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)).equal(expected)
    assert logits(attach_adapter(model, tmp_path, "mine", BASE.digest)).equal(expected)


def test_an_export_says_what_it_was_trained_on(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    make_adapter(llama, tokenizer, tmp_path)
    assert json.loads((tmp_path / "tidepool.json").read_text()) == {"base": "tides@3", "base_digest": BASE.digest}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tides@3"
    assert config["target_modules"] == sorted(config["target_modules"])


def test_an_export_of_a_hub_base_is_found_by_plain_peft(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    export_adapter(add_lora(llama, SPEC, 0, "org/base"), tokenizer, tmp_path, ModelSource("org/base@0a1b2c", "cd" * 32))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "0a1b2c")
    assert json.loads((tmp_path / "tidepool.json").read_text())["base"] == "org/base@0a1b2c"


def test_the_same_adapter_gives_the_same_bytes(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_adapter(llama, tokenizer, tmp_path / name)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


def test_several_adapters_live_on_one_base(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    expected = {name: logits(make_adapter(model, tokenizer, tmp_path / name, seed)) for seed, name in enumerate(("v1", "v2", "v3"))}
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    attached = model
    for name in expected:
        attached = attach_adapter(attached, tmp_path / name, name, BASE.digest)
    assert torch.random.get_rng_state().equal(before)
    assert not any(parameter.requires_grad for parameter in attached.parameters())
    for name, expectation in expected.items():
        attached.set_adapter(name)
        assert logits(attached).equal(expectation)


def test_an_adapter_of_another_base_is_refused(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    make_adapter(llama, tokenizer, tmp_path)
    with pytest.raises(BaseMismatchError, match=r"was trained on tides@3 \(files abababababab\), not on this base \(files cdcdcdcdcdcd\)"):
        attach_adapter(llama, tmp_path, "mine", "cd" * 32)


def _change_weights(folder: Path, change: Any) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    first = sorted(weights)[0]
    change(weights, first)
    save_file(weights, folder / "adapter_model.safetensors")


def _change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGES = [
    (lambda folder: _change_weights(folder, lambda weights, key: weights.pop(key)), "1 weights are missing, 0 belong nowhere"),
    (
        lambda folder: _change_weights(folder, lambda weights, key: weights.update({"x.lora_A.weight": weights[key].clone()})),
        "1 belong nowhere",
    ),
    (
        lambda folder: _change_weights(folder, lambda weights, key: weights.update({key: weights[key][:2].clone()})),
        "does not fit this model",
    ),
    (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 64), "Cannot load the adapter"),
    (lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"), "pickled weights only"),
    (lambda folder: (folder / "adapter_model.safetensors").rename(folder / "other.safetensors"), "is no LoRA adapter"),
    (lambda folder: (folder / "adapter_config.json").unlink(), "has neither config.json"),
    (lambda folder: _change_json(folder / "adapter_config.json", peft_type="IA3"), "is of the kind IA3"),
    (lambda folder: _change_json(folder / "adapter_config.json", target_modules=["nothing"]), "does not fit this model"),
    (lambda folder: (folder / "tidepool.json").write_text("{"), r"Cannot read .*tidepool\.json"),
]


@pytest.mark.parametrize("case", DAMAGES, ids=[message for _, message in DAMAGES])
@pytest.mark.parametrize("num_before", [0, 1])
def test_a_damaged_adapter_is_an_error_and_leaves_the_model_as_it_was(
    llama: Any, tokenizer: Any, tmp_path: Path, case: tuple[Any, str], num_before: int
) -> None:
    damage, message = case
    expected = logits(make_adapter(llama, tokenizer, tmp_path / "good"))
    make_adapter(llama, tokenizer, tmp_path / "bad", seed=1)
    damage(tmp_path / "bad")
    model = attach_adapter(llama, tmp_path / "good", "good", BASE.digest) if num_before else llama
    before, modules = logits(model), [name for name, _ in model.named_modules()]
    with pytest.raises(ModelError, match=message):
        attach_adapter(model, tmp_path / "bad", "bad", BASE.digest)
    assert logits(model).equal(before)
    assert [name for name, _ in model.named_modules()] == modules
    if not num_before:
        model = attach_adapter(model, tmp_path / "good", "good", BASE.digest)
    assert logits(model).equal(expected)


def test_an_adapter_of_plain_peft_is_checked_by_its_weights(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    expected = logits(make_adapter(llama, tokenizer, tmp_path))
    (tmp_path / "tidepool.json").unlink()
    larger = build_model({**CONFIGS["llama"], "hidden_size": 64}, 300, seed=0)
    with pytest.raises(ModelError, match="does not fit this model"):
        attach_adapter(larger, tmp_path, "mine", "any")
    assert logits(attach_adapter(llama, tmp_path, "mine", "any")).equal(expected)
