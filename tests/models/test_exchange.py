"""Models that come from elsewhere, are merged, and leave: what plain `transformers` and `peft` compute is what we compute."""

import json
import os
import shutil
import subprocess
import sys
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.models.conftest import CONFIGS, TEXT
from tidepool.cli import main
from tidepool.models import build_model, export_adapter, export_model, find_model, load_tokenizer, open_model, train_tokenizer
from tidepool.models.adapter import add_lora
from tidepool.registry import ModelVersion, Registry
from tidepool.specs import LoraSpec
from tidepool.storage import open_store

# peft 0.21 on transformers 5.23
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TOKENS = torch.arange(3, 40)[None]
QWEN2 = {"model_type": "qwen2", "tie_word_embeddings": True} | {
    key: CONFIGS["llama"][key] for key in CONFIGS["llama"] if key != "model_type"
}
FAMILIES: dict[str, dict[str, Any]] = {**CONFIGS, "qwen2": QWEN2}
# What somebody without Tidepool runs on exported folders: (base, adapter or nothing) to logits.
_ELSEWHERE = """
import json, sys
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
logits = {}
with torch.no_grad():
    for name, (folder, adapter) in json.loads(sys.argv[1]).items():
        model = AutoModelForCausalLM.from_pretrained(folder)
        if adapter:
            model = PeftModel.from_pretrained(model, adapter)
        AutoTokenizer.from_pretrained(folder)
        logits[name] = model.eval()(torch.arange(3, 40)[None]).logits
save_file(logits, sys.argv[2])
assert not [name for name in sys.modules if name.startswith("tidepool")]
"""


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model.eval()(TOKENS).logits
    return result


def train(model: Any, seed: int = 7) -> Any:
    """Move the adapter's weights away from their start, where it computes nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TIDEPOOL_CACHE", str(tmp_path / "cache"))
    return (tmp_path / "store").as_uri()


@pytest.fixture
def tidepool(url: str, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `tidepool models ...` on the store; returns what it says, or its one message if it fails."""

    def run(*command: str, status: int = 0) -> str:
        capsys.readouterr()
        ended = main(["models", *command, "--store", url])
        out, err = capsys.readouterr()
        assert ended == status, out + err
        assert "Traceback" not in out + err
        assert err.count("error: ") == status, err
        return err.removeprefix("error: ") if status else out

    return run


def publish_base(url: str, folder: Path, tokenizer: Any, kind: str = "llama") -> ModelVersion:
    model = build_model(FAMILIES[kind], len(tokenizer), seed=1, tokenizer=tokenizer)
    export_model(model, tokenizer, folder / f"{kind}-base")
    return Registry(open_store(url)).publish(f"{kind}-base", "full", folder / f"{kind}-base", lineage={}, metrics={})


@pytest.fixture(scope="module")
def made(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with `llama-base`, and beside it a LoRA adapter that plain peft wrote, with the logits that it had there."""
    folder = tmp_path_factory.mktemp("made")
    publish_base((folder / "store").as_uri(), folder, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(folder / "llama-base")
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], use_rslora=True)
    with warnings.catch_warnings():  # peft 0.21 on transformers 5.23
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        trained = train(get_peft_model(model, config))
    trained.save_pretrained(folder / "plain")
    save_file({"logits": logits(trained)}, folder / "expected.safetensors")
    (folder / "plain" / "training_args.bin").write_bytes(b"a pickle, as trainers leave it")
    return folder


@pytest.fixture
def plain_adapter(made: Path, tmp_path: Path) -> Path:
    """The adapter's folder, of the test's own, with the store of `url` beside it."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "plain"


@pytest.mark.slow
def test_every_export_of_every_family_has_the_same_logits_without_tidepool(
    url: str, tmp_path: Path, tokenizer: Any, tidepool: Callable[..., str]
) -> None:
    expected: dict[str, torch.Tensor] = {}
    folders: dict[str, tuple[str, str | None]] = {}
    for kind in FAMILIES:
        base = publish_base(url, tmp_path, tokenizer, kind)
        source = find_model(base.ref, open_store(url))
        adapted = train(add_lora(open_model(base.ref, open_store(url), tmp_path / "cache", "auto").model, LoraSpec(rank=4), 0, base.ref))
        export_adapter(adapted, tokenizer, tmp_path / f"{kind}-adapter", source)
        Registry(open_store(url)).publish(
            f"{kind}-bot", "adapter", tmp_path / f"{kind}-adapter", base=base.ref, base_digest=base.digest, lineage={}, metrics={}
        )
        assert f"Merged {kind}-bot@1 and {kind}-base@1 into {kind}-whole@1" in tidepool("merge", f"{kind}-bot", "--name", f"{kind}-whole")
        for name in ("base", "bot", "whole"):
            tidepool("export", f"{kind}-{name}", str(tmp_path / "out" / f"{kind}-{name}"))
            expected[f"{kind}-{name}"] = logits(open_model(f"{kind}-{name}", open_store(url), tmp_path / "cache", "auto").model)
            base_folder, folder = (str(tmp_path / "out" / f"{kind}-{one}") for one in ("base", name))
            folders[f"{kind}-{name}"] = (base_folder, folder) if name == "bot" else (folder, None)
        assert not expected[f"{kind}-bot"].equal(expected[f"{kind}-base"]), "an adapter that does nothing would show nothing"
        torch.testing.assert_close(expected[f"{kind}-whole"], expected[f"{kind}-bot"], rtol=1e-4, atol=1e-4)
    elsewhere = compute_elsewhere(folders, tmp_path)
    assert {name: elsewhere[name].equal(tensor) for name, tensor in expected.items()} == dict.fromkeys(expected, True)


def compute_elsewhere(folders: dict[str, tuple[str, str | None]], tmp_path: Path) -> dict[str, torch.Tensor]:
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    command = [sys.executable, "-W", "ignore", "-c", _ELSEWHERE, json.dumps(folders), str(tmp_path / "logits.safetensors")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return load_file(tmp_path / "logits.safetensors")


# --- Import ----------------------------------------------------------------------------------------------------------


def test_an_adapter_of_plain_peft_is_imported_with_the_digest_of_its_base(
    url: str, plain_adapter: Path, tmp_path: Path, tidepool: Callable[..., str]
) -> None:
    before = {path.name: path.read_bytes() for path in plain_adapter.iterdir()}
    said = tidepool("import", str(plain_adapter), "--name", "bot", "--base", "llama-base", "--alias", "canary")
    assert said == f"Imported bot@1 (an adapter on llama-base@1) from {plain_adapter}; bot:canary is bot@1 now.\n"
    store = open_store(url)
    version, base = Registry(store).resolve("bot:canary"), Registry(store).resolve("llama-base")
    assert (version.kind, version.base, version.base_digest) == ("adapter", "llama-base@1", base.digest)
    assert version.lineage == {"imported_from": str(plain_adapter)}
    assert {file.path for file in version.files} == {"adapter_config.json", "adapter_model.safetensors", "tidepool.json"}
    expected = load_file(tmp_path / "expected.safetensors")["logits"]
    assert logits(open_model("bot", store, tmp_path / "cache", "auto").model).equal(expected)
    tidepool("export", "bot", str(tmp_path / "out"))
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "llama-base"), tmp_path / "out")
    assert logits(again).equal(expected)
    assert {path.name: path.read_bytes() for path in plain_adapter.iterdir()} == before, "what was given is as it was"
    tidepool("import", str(plain_adapter), "--name", "bot", "--base", "llama-base")
    assert len(Registry(store).versions("bot")) == 1, "the same import twice is one version"


def test_an_adapter_in_a_store_is_imported(url: str, plain_adapter: Path, tidepool: Callable[..., str]) -> None:
    assert f"from {plain_adapter.as_uri()};" in tidepool("import", plain_adapter.as_uri(), "--name", "bot", "--base", "llama-base@1")
    assert Registry(open_store(url)).resolve("bot").base == "llama-base@1"


def test_a_whole_sharded_model_is_imported(url: str, tmp_path: Path, tokenizer: Any, llama: Any, tidepool: Callable[..., str]) -> None:
    llama.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    tokenizer.save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    tidepool("import", str(tmp_path / "sharded"), "--name", "whole")
    version = Registry(open_store(url)).resolve("whole")
    assert (version.kind, version.base) == ("full", None)
    assert logits(open_model("whole", open_store(url), tmp_path / "cache", "auto").model).equal(logits(llama))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor], str], object]) -> None:
    path = next(iter(folder.glob("*.safetensors")))
    weights = load_file(path)
    change(weights, sorted(weights)[0])
    save_file(weights, path, metadata={"format": "pt"})


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def add_foreign_tokenizer(folder: Path) -> None:
    train_tokenizer(["other words make other tokens, as it goes " * 9], vocab_size=290).save_pretrained(folder)


def link_out(folder: Path) -> None:
    (folder.parent / "secret").write_text("{}")
    (folder / "tokenizer_config.json").symlink_to(folder.parent / "secret")


ADAPTERS = {
    "a weight less": (lambda f: change_weights(f, lambda w, key: w.pop(key)), "does not fit this base: 1 weights are missing, 0 belong"),
    "a weight more": (
        lambda f: change_weights(f, lambda w, key: w.update(x=w[key].clone())),
        "0 weights are missing, 1 belong nowhere (x)",
    ),
    "a shape": (lambda f: change_weights(f, lambda w, key: w.update({key: w[key][:2].clone()})), "1 weights have another shape"),
    "a rank": (lambda f: change_json(f / "adapter_config.json", r=8), "another shape"),
    "modules": (lambda f: change_json(f / "adapter_config.json", target_modules=["nothing"]), "does not fit this base"),
    "half a file": (lambda f: os.truncate(f / "adapter_model.safetensors", 3000), "is no whole safetensors file"),
    "pickles": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        "pickled weights only (adapter_model.bin, training_args.bin)",
    ),
    "a kind": (lambda f: change_json(f / "adapter_config.json", peft_type="IA3"), "is of the kind IA3; only LORA"),
    "more than LoRA": (
        lambda f: change_json(f / "adapter_config.json", modules_to_save=["lm_head"]),
        "does more than LoRA (modules_to_save",
    ),
    "a base that it changes": (lambda f: change_json(f / "adapter_config.json", init_lora_weights="pissa"), "(init_lora_weights: pissa)"),
    "another base": (
        lambda f: (f / "tidepool.json").write_text(json.dumps({"base": "other@1", "base_digest": "0f" * 32})),
        "was trained on other@1",
    ),
    "another tokenizer": (add_foreign_tokenizer, "brings a tokenizer of "),
    "a link out of the folder": (link_out, "leads out of its folder"),
    "a name": (lambda f: (f / "a b.json").write_text("{}"), "'a b.json' is not a valid object key"),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_that_is_not_what_it_should_be_is_refused(
    case: str, url: str, plain_adapter: Path, tidepool: Callable[..., str]
) -> None:
    damage, message = ADAPTERS[case]
    damage(plain_adapter)
    before = content(url)
    assert message in tidepool("import", str(plain_adapter), "--name", "bot", "--base", "llama-base", status=1)
    assert content(url) == before


def test_an_adapter_needs_a_base_that_is_one(plain_adapter: Path, tidepool: Callable[..., str]) -> None:
    message = tidepool("import", str(plain_adapter), "--name", "bot", status=1)
    assert "holds an adapter: give the base it was trained on (it says" in message
    assert "No model nothing in the registry" in tidepool("import", str(plain_adapter), "--name", "bot", "--base", "nothing", status=1)
    tidepool("import", str(plain_adapter), "--name", "bot", "--base", "llama-base")
    message = tidepool("import", str(plain_adapter), "--name", "bot2", "--base", "bot", status=1)
    assert "bot@1 is an adapter: give the base it was trained on (llama-base@1) as --base" in message


MODELS = {
    "a weight less": (lambda f: change_weights(f, lambda w, _: w.pop("model.norm.weight")), "1 weights are missing from its files"),
    "a shape": (
        lambda f: change_weights(f, lambda w, _: w.update({"model.norm.weight": torch.zeros(3)})),
        "1 weights have another shape than its config.json says, model.norm.weight for one ((3,), not (32,))",
    ),
    "half a file": (lambda f: os.truncate(f / "model.safetensors", 9000), "is no whole safetensors file"),
    "code": (lambda f: change_json(f / "config.json", model_type="mine", auto_map={"AutoConfig": "code.Config"}), "needs Python code"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "Cannot load the tokenizer"),
    "a larger tokenizer": (
        lambda f: train_tokenizer([f"{number} {TEXT}" for number in range(300)], vocab_size=330).save_pretrained(f),
        "they do not belong together",
    ),
    "an index of other files": (
        lambda f: (f / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../../secret.safetensors"}})),
        "names files that are not in its folder",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_is_not_what_it_should_be_is_refused(
    case: str, url: str, tmp_path: Path, tokenizer: Any, llama: Any, tidepool: Callable[..., str]
) -> None:
    export_model(llama, tokenizer, tmp_path / "model")
    damage, message = MODELS[case]
    damage(tmp_path / "model")
    assert message in tidepool("import", str(tmp_path / "model"), "--name", "whole", status=1)
    assert content(url) == []


@pytest.mark.parametrize("ref", ["nowhere", "./nowhere", "/nowhere/model"])
def test_what_is_not_there_cannot_be_imported(ref: str, tidepool: Callable[..., str]) -> None:
    assert "No model folder" in tidepool("import", ref, "--name", "whole", status=1)


def content(url: str) -> list[tuple[str, int]]:
    return [(info.key, info.size_bytes) for info in open_store(url).list("")]


# --- Merge and export ------------------------------------------------------------------------------------------------


def test_a_merged_model_says_where_it_came_from_and_its_base_is_as_it_was(
    url: str, plain_adapter: Path, tmp_path: Path, tidepool: Callable[..., str]
) -> None:
    tidepool("import", str(plain_adapter), "--name", "bot", "--base", "llama-base")
    tidepool("merge", "bot", "--name", "whole", "--alias", "canary")
    store = open_store(url)
    bot, base, whole = (Registry(store).resolve(name) for name in ("bot", "llama-base", "whole:canary"))
    assert (whole.kind, whole.base, whole.base_digest) == ("full", "llama-base@1", base.digest)
    assert whole.lineage == {"merged": "bot@1", "adapter_digest": bot.digest}
    assert load_tokenizer(Registry(store).fetch(whole, tmp_path / "cache")).get_vocab()
    cached = Registry(store).fetch(base, tmp_path / "cache")
    Registry(store).download(base, new_folder(tmp_path))
    assert (cached / "model.safetensors").read_bytes() == (tmp_path / "new" / "model.safetensors").read_bytes(), "it was merged in memory"
    assert "whole@1 is a whole model already" in tidepool("merge", "whole:canary", "--name", "again", status=1)


def new_folder(tmp_path: Path) -> Path:
    (tmp_path / "new").mkdir()
    return tmp_path / "new"


def test_an_adapter_on_tied_weights_is_not_merged(url: str, tmp_path: Path, tokenizer: Any, tidepool: Callable[..., str]) -> None:
    base = publish_base(url, tmp_path, tokenizer, "qwen2")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen2-base")
    with pytest.warns(UserWarning, match="tie_word_embeddings"):  # peft knows of it too
        adapted = train(get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["lm_head", "q_proj"])))
    adapted.save_pretrained(tmp_path / "tied", save_embedding_layers=False)
    tidepool("import", str(tmp_path / "tied"), "--name", "tied", "--base", base.ref)
    assert "tied@1 changes lm_head, whose weights are those of another layer too" in tidepool("merge", "tied", "--name", "w", status=1)
    assert Registry(open_store(url)).versions("w") == []


def test_an_export_is_whole_or_not_there(url: str, tmp_path: Path, tokenizer: Any, tidepool: Callable[..., str]) -> None:
    version = publish_base(url, tmp_path, tokenizer)
    said = tidepool("export", "llama-base", str(tmp_path / "out"))
    assert f'transformers.AutoModelForCausalLM.from_pretrained("{tmp_path / "out"}")' in said
    assert "is there already: give a folder that is not there yet" in tidepool("export", "llama-base", str(tmp_path / "out"), status=1)
    open_store(url).delete(f"blobs/{version.files[-1].sha256}")
    assert "is missing from the store" in tidepool("export", "llama-base", str(tmp_path / "second"), status=1)
    assert [path.name for path in tmp_path.iterdir() if "second" in path.name or path.name.startswith(".filling")] == []


def test_an_export_to_a_full_disk_is_told_and_leaves_nothing(
    tmp_path: Path, tokenizer: Any, small_disk: Path, tidepool: Callable[..., str]
) -> None:
    shutil.copytree(export_of_three_megabytes(tmp_path, tokenizer), tmp_path / "large")
    tidepool("import", str(tmp_path / "large"), "--name", "large")
    message = tidepool("export", "large", str(small_disk / "out"), status=1)
    assert f"The disk of {small_disk} on this machine is full" in message
    assert "or export to a folder on a larger disk" in message
    assert list(small_disk.iterdir()) == []


def export_of_three_megabytes(tmp_path: Path, tokenizer: Any) -> Path:
    model = build_model({**CONFIGS["llama"], "hidden_size": 256, "intermediate_size": 256}, len(tokenizer), seed=0, tokenizer=tokenizer)
    folder = tmp_path / f"model-{uuid.uuid4().hex[:8]}"
    export_model(model, tokenizer, folder)
    return folder
