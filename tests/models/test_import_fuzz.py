"""Whatever somebody uploads, the importers say no in a word of ours, soon and in little memory, and publish nothing; or it works.

Each example damages a good adapter or a good model in some way and imports it. What is published must open.
"""

import json
import os
import random
import resource
import shutil
import struct
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.models.conftest import CONFIGS
from tidepool.errors import TidepoolError
from tidepool.models import build_model, export_model, import_model, open_model
from tidepool.models.adapter_config import check_adapter_config, check_adapter_patterns
from tidepool.registry import Registry
from tidepool.storage import ObjectStore, open_store

# peft 0.21 on transformers 5.23
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.slow,
    pytest.mark.long,
]

MOST_S = 20.0
MOST_BYTES = 400 * 2**20
NASTY: list[Any] = [
    None,
    True,
    0,
    -1,
    1,
    7,
    2**31,
    2**63,
    10**30,
    -(10**30),
    1e308,
    0.5,
    "",
    "x",
    "../../x",
    "x" * 5000,
    [],
    [[]],
    ["a"],
    [0],
]
NASTY += [{}, {"a": {"b": 1}}, [{}], "\ud800", "a\x00b", "(((", "(a+)+$", {"x": 2**63}, {"q_proj": 0}, {"(": 4}, float("nan"), float("inf")]
Damage = Callable[[Path], object]


class Door:
    """A store with a base, and good folders to damage."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.folder, self.cache = folder, folder / "cache"
        self.store: ObjectStore = open_store(f"memory://{uuid.uuid4().hex}")
        model = build_model(CONFIGS["llama"], len(tokenizer), seed=1, tokenizer=tokenizer)
        export_model(model, tokenizer, folder / "model")
        Registry(self.store).publish("base", "full", folder / "model", lineage={}, metrics={})
        config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "model"), config)
        adapted.save_pretrained(folder / "adapter")
        (folder / "adapter" / "README.md").unlink()

    def keys(self) -> list[str]:
        return [info.key for info in self.store.list("")]

    def try_import(self, kind: str, damage: Damage) -> str:
        """Damage a copy and import it; returns what was said, or nothing if it was published and opens."""
        before, began_s, peak = self.keys(), time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            given = Path(folder) / "given"
            shutil.copytree(self.folder / kind, given)
            damage(given)
            said, name = "", f"m{uuid.uuid4().hex}"
            try:
                import_model(str(given), name, "base" if kind == "adapter" else None, "production", self.store, self.cache)
            except TidepoolError as error:
                said = str(error)
                assert said
                assert len(said) < 2000, "a message for a person"
                assert self.keys() == before, "nothing is published"
            else:
                open_model(name, self.store, self.cache, "auto")
        assert time.monotonic() - began_s < MOST_S
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < MOST_BYTES
        return said


@pytest.fixture(scope="module")
def door(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield Door(tmp_path_factory.mktemp("door"), tokenizer)


def weights_of(folder: Path) -> Path:
    return next(iter(sorted(folder.glob("*.safetensors"))))


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_what_is_good_is_published(kind: str, door: Door) -> None:
    assert door.try_import(kind, lambda _: None) == ""


# --- Weights ---------------------------------------------------------------------------------------------------------


def rewrite_header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = weights_of(folder)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    written = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(written)) + written + content[8 + length :])


def mutate_header(header: dict[str, Any], seed: int, value: Any) -> None:
    dice = random.Random(seed)
    name = dice.choice(sorted(key for key in header if key != "__metadata__"))
    match dice.randrange(8):
        case 0:
            header[name]["shape"] = [2**62, 2**62]
        case 1:
            header[name]["shape"] = value
        case 2:
            header[name]["dtype"] = dice.choice(["F64", "F8_E5M2", "BOOL", "Q9", "", value])
        case 3:
            header[name]["data_offsets"] = dice.choice([[0, 2**63], [-1, 4], [8, 0], [0], value])
        case 4:
            header[dice.choice(["../../etc/passwd", "a\x00", "x" * 9000, "", "é"])] = header.pop(name)
        case 5:
            header["__metadata__"] = value
        case 6:
            del header[name]
        case _:
            header[name] = value


@pytest.mark.parametrize("kind", ["adapter", "model"])
@given(seed=st.integers(0, 2**32), value=st.sampled_from(NASTY))
@settings(max_examples=120)
def test_mutated_headers(kind: str, door: Door, seed: int, value: Any) -> None:
    door.try_import(kind, lambda folder: rewrite_header(folder, lambda header: mutate_header(header, seed, value)))


@pytest.mark.parametrize("kind", ["adapter", "model"])
@given(data=st.data())
@settings(max_examples=60)
def test_bytes_changed_and_files_cut(kind: str, door: Door, data: st.DataObject) -> None:
    def damage(folder: Path) -> None:
        path = data.draw(st.sampled_from(sorted(folder.iterdir())))
        content = bytearray(path.read_bytes())
        where = data.draw(st.integers(0, min(len(content) - 1, 2000)))
        if data.draw(st.booleans()):
            path.write_bytes(content[:where])
        else:
            content[where : where + 1] = data.draw(st.binary(min_size=0, max_size=20))
            path.write_bytes(content)

    door.try_import(kind, damage)


@pytest.mark.parametrize("length", [0, 7, 8, 2**40, 2**63 - 1, 2**64 - 1, 100_000_001])
@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_headers_that_lie_about_their_length(kind: str, length: int, door: Door) -> None:
    def damage(folder: Path) -> None:
        content = weights_of(folder).read_bytes()
        weights_of(folder).write_bytes(struct.pack("<Q", length) + content[8:])

    assert "is no whole safetensors file" in door.try_import(kind, damage)


# --- JSON ------------------------------------------------------------------------------------------------------------

DEEP = "[" * 200_000
TEXTS = ["", "{", "[]", "null", '"x"', "NaN", DEEP, '{"a":' * 100_000, '{"r": 1' + "0" * 5000 + "}", "\ufeff{}", "\x00"]


def change_json(path: Path, key: str, value: Any) -> None:
    changed = json.loads(path.read_text())
    changed[key] = value
    path.write_text(json.dumps(changed))


FILES = {
    "adapter": ["adapter_config.json", "tidepool.json", "tokenizer_config.json", "tokenizer.json"],
    "model": [
        *("config.json", "model.safetensors.index.json", "generation_config.json", "chat_template.jinja"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json"),
    ],
}


@pytest.mark.parametrize(("kind", "file"), [(kind, file) for kind, files in FILES.items() for file in files])
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_files_that_are_no_json(kind: str, file: str, text: str, door: Door) -> None:
    door.try_import(kind, lambda folder: (folder / file).write_text(text))


@given(data=st.data())
@settings(max_examples=200)
def test_an_adapters_configuration_with_odd_values(door: Door, data: st.DataObject) -> None:
    def damage(folder: Path) -> None:
        path = folder / "adapter_config.json"
        for _ in range(data.draw(st.integers(1, 2))):
            keys = [*sorted(json.loads(path.read_text())), "runtime_config", "a_new_key", "layers_pattern", "base_model_name_or_path"]
            change_json(path, data.draw(st.sampled_from(keys)), data.draw(st.sampled_from(NASTY)))

    door.try_import("adapter", damage)


@given(data=st.data())
@settings(max_examples=200)
def test_a_models_configuration_with_odd_values(door: Door, data: st.DataObject) -> None:
    def damage(folder: Path) -> None:
        file = data.draw(st.sampled_from(["config.json", "config.json", "tokenizer_config.json", "generation_config.json"]))
        extra = [
            "quantization_config",
            "auto_map",
            "layer_types",
            "rope_scaling",
            "text_config",
            "dtype",
            "tokenizer_class",
            "chat_template",
        ]
        keys = [*sorted(json.loads((folder / file).read_text())), *extra]
        change_json(folder / file, data.draw(st.sampled_from(keys)), data.draw(st.sampled_from(NASTY)))

    door.try_import("model", damage)


def nested(folder: Path, key: str, value: Any) -> None:
    """Change something within `tokenizer.json`."""
    document = json.loads((folder / "tokenizer.json").read_text())
    document[key] = value
    (folder / "tokenizer.json").write_text(json.dumps(document))


@pytest.mark.parametrize("kind", ["adapter", "model"])
@given(
    key=st.sampled_from(["model", "added_tokens", "pre_tokenizer", "decoder", "normalizer", "post_processor"]), value=st.sampled_from(NASTY)
)
@settings(max_examples=40)
def test_a_tokenizer_with_odd_parts(kind: str, door: Door, key: str, value: Any) -> None:
    def damage(folder: Path) -> None:
        if kind == "adapter":
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copyfile(door.folder / "model" / name, folder / name)
        nested(folder, key, value)

    door.try_import(kind, damage)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(.*)*(.*)*(.*)*x", "(_|_|[a-z.0-9])*!", "(.|.)" * 40])
@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"])
def test_patterns_that_take_for_ever(pattern: str, key: str, door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidepool.models.adapter_config._PATTERN_TIMEOUT_S", 2.0)
    value: Any = {pattern: 4} if key.endswith("_pattern") and key != "layers_pattern" else pattern
    said = door.try_import("adapter", lambda folder: change_json(folder / "adapter_config.json", key, value))
    assert said or pattern == "(a+)+$"


def test_a_module_is_not_imported_because_a_configuration_says_so(door: Door) -> None:
    def damage(folder: Path) -> None:
        change_json(folder / "adapter_config.json", "megatron_config", {"tensor_model_parallel_size": 1})
        change_json(folder / "adapter_config.json", "megatron_core", "antigravity")

    assert "does more than LoRA (megatron_config" in door.try_import("adapter", damage)


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_experts", "head_dim", "hidden_size"])
def test_a_model_of_more_than_its_files_hold_is_not_built(key: str, door: Door) -> None:
    said = door.try_import("model", lambda folder: change_json(folder / "config.json", key, 10**9))
    assert f"config.json says {key}: 1000000000, which its files cannot hold" in said


def test_plain_patterns_are_taken() -> None:
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    value = {
        "r": 4,
        "target_modules": r".*\.(q_proj|down_proj)",
        "rank_pattern": {"layers.0.self_attn.q_proj": 8},
        "layers_pattern": "layers",
    }
    lora = check_adapter_config(value, Path("folder"))
    check_adapter_patterns(lora, names, Path("folder"))


# --- Names and links -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adapter", "model"])
@given(name=st.text(st.characters(exclude_characters="/\x00", exclude_categories=["Cs"]), min_size=1, max_size=60))
@example(name="..json")
@example(name=".json")
@example(name="-rf.json")
@example(name="a\nb")
@settings(max_examples=40)
def test_odd_names(kind: str, door: Door, name: str) -> None:
    def damage(folder: Path) -> None:
        for suffix in (".json", ".safetensors"):
            if len(f"{name}{suffix}".encode()) <= 255:
                shutil.copyfile(weights_of(door.folder / kind), folder / f"{name}{suffix}")

    door.try_import(kind, damage)


LINKS: dict[str, Damage] = {
    "a file outside": lambda folder: relink(folder, folder.parent / "outside"),
    "a path upwards": lambda folder: relink(folder, Path("../outside")),
    "a system file": lambda folder: relink(folder, Path("/etc/passwd")),
    "an endless device": lambda folder: relink(folder, Path("/dev/zero")),
    "itself": lambda folder: relink(folder, Path(weights_of(folder).name)),
    "nothing": lambda folder: relink(folder, Path("nowhere")),
    "a folder": lambda folder: relink(folder, Path(".")),
    "a link to a file outside": lambda folder: ((folder / "hop").symlink_to("../outside"), relink(folder, Path("hop"))),
}


def relink(folder: Path, target: Path) -> None:
    path = weights_of(folder)
    (folder.parent / "outside").write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(target)


@pytest.mark.parametrize("kind", ["adapter", "model"])
@pytest.mark.parametrize("link", LINKS)
def test_links(link: str, kind: str, door: Door) -> None:
    assert door.try_import(kind, LINKS[link])


def test_a_pipe_is_not_waited_for(door: Door) -> None:
    def damage(folder: Path) -> None:
        weights_of(folder).unlink()
        os.mkfifo(folder / "adapter_model.safetensors")

    assert door.try_import("adapter", damage)


def test_a_great_many_files(door: Door) -> None:
    def damage(folder: Path) -> None:
        for number in range(5000):
            (folder / f"{number}.json").write_text("{}")

    assert "files, and at most 4096 are taken" in door.try_import("model", damage)


@pytest.mark.parametrize(("kind", "file"), [("adapter", "adapter_config.json"), ("model", "config.json"), ("model", "tokenizer.json")])
def test_a_large_file_of_json_is_not_read(kind: str, file: str, door: Door) -> None:
    def damage(folder: Path) -> None:
        os.truncate(folder / file, 2**40)  # a file of holes, which takes no room

    assert "too many for a file of this kind" in door.try_import(kind, damage)
