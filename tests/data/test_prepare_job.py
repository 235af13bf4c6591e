"""jobs/prepare.py end to end: the example runs as it stands, and each mistake is one clear message."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import prepare as job
from tidepool.data import Dataset, fetch_tokenizer, find_dataset
from tidepool.models import build_model, export_model, load_tokenizer
from tidepool.storage import open_store

ROOT = Path(__file__).parents[2]


@pytest.fixture
def url(tmp_path: Path) -> str:
    (tmp_path / "store").mkdir()
    return f"file://{tmp_path}/store"


def run(spec: Path | dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> int:
    if isinstance(spec, dict):
        (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
        spec = tmp_path / "spec.yaml"
    monkeypatch.setattr(sys, "argv", ["prepare.py", str(spec)])
    return job.main()


def make_spec(url: str, path: str, **changes: Any) -> dict[str, Any]:
    spec = {
        "store": url,
        "dataset": "tides",
        "inputs": [{"path": path}],
        "tokenizer": {"train": {"vocab_size": 300}},
        "sequence_length": 16,
    }
    return spec | changes


def test_the_example_runs_from_the_root_and_says_what_it_prepared(url: str) -> None:
    environment = os.environ | {"TIDEPOOL_STORE": url, "PYTHONPATH": str(ROOT / "platform")}
    command = [sys.executable, "jobs/prepare.py", "jobs/prepare.yaml"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    info = find_dataset(open_store(url), "tidepool-source")
    train = info.splits["train"]
    assert done.stdout.splitlines()[-1] == (
        f"Dataset {info.ref} is in {url}: {train.num_samples} samples of 256 tokens to train on ({train.num_target_tokens} targets), "
        f"{info.num_samples['held_out']} held out."
    )
    assert train.num_samples > 20


def test_the_tokenizer_is_trained_the_same_again(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("the tide comes in and the tide goes out " * 20)
    monkeypatch.chdir(tmp_path)
    lines = []
    for _ in range(2):
        assert run(make_spec(url, "texts", held_out_fraction=0), monkeypatch, tmp_path) == 0
        lines.append(capsys.readouterr().out.splitlines())
    assert lines[0][-1] == lines[1][-1]
    assert any("1 documents" in line for line in lines[0])
    assert not any("1 documents" in line for line in lines[1]), "the second time there is nothing to do"


def test_the_tokenizer_of_a_model_is_its_own(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any, tokenizer_folder: Path
) -> None:
    tiny = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1}
    export_model(build_model(tiny, len(tokenizer), 0, tokenizer), tokenizer, tmp_path / "model")
    (tmp_path / "a.txt").write_text("the tide comes in and the tide goes out " * 20)
    spec = make_spec(url, str(tmp_path / "a.txt"), tokenizer={"of": str(tmp_path / "model")}, held_out_fraction=0)
    assert run(spec, monkeypatch, tmp_path) == 0
    store = open_store(url)
    fetched = fetch_tokenizer(store, find_dataset(store, "tides"), tmp_path / "fetched")
    files = {path.name: path.read_bytes() for path in fetched.iterdir()}
    assert files == {path.name: path.read_bytes() for path in tokenizer_folder.iterdir()}


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: "
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}"
    "{% endfor %}"
)


def test_a_chat_template_of_the_spec_takes_the_place_of_the_tokenizers_own(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = {"messages": [{"role": "user", "content": "what? "}, {"role": "assistant", "content": "the tide"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(chat))
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    store, digests = open_store(url), []
    for template in (None, TEMPLATE, str(tmp_path / "template.jinja")):
        inputs = [{"path": str(tmp_path / "a.jsonl"), "format": "jsonl"}]
        tokenizer = {"train": {"vocab_size": 300}, "chat_template": template}
        assert (
            run(make_spec(url, "", inputs=inputs, tokenizer=tokenizer, held_out_fraction=0, sequence_length=64), monkeypatch, tmp_path) == 0
        )
        digests.append(find_dataset(store, "tides").digest)
    assert digests[0] != digests[1] == digests[2]
    info = find_dataset(store, "tides")
    made = load_tokenizer(fetch_tokenizer(store, info, tmp_path / "fetched"))
    assert made.get_chat_template() == TEMPLATE, "what is trained on the dataset is asked in the same way"
    sample = Dataset(store, info, "train", 1).read([0])
    assert made.decode(sample.tokens_NT[0][sample.documents_NT[0] == 0]) == "user: what? assistant: the tide<|endoftext|>"
    assert made.decode(sample.tokens_NT[0][sample.loss_mask_NT[0]]).strip() == "the tide<|endoftext|>"


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"inputs": [{"path": "nowhere"}]}, "There is no file or folder nowhere"),
    ({"tokenizer": {"train": {"vocab_size": 300}, "chat_template": "no/such.jinja"}}, "Cannot read the chat template no/such.jinja"),
    ({"inputs": [{"path": "s3://key:planted@bucket/x"}]}, "`path` holds a user or a password"),
    ({"inputs": [{"path": "a.txt", "loss": "completions"}]}, "'assistant', 'completion' or 'all'"),
    ({"sequence_lenght": 16}, "did you mean `sequence_length`"),
    ({"tokenizer": {"of": "/nowhere"}}, "No model folder /nowhere"),
    ({"tokenizer": {"of": "nobody"}}, "No model nobody in the registry"),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=[message for _, message in MISTAKES])
def test_a_mistake_is_one_clear_message_and_exit_1(
    mistake: tuple[dict[str, Any], str], url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = mistake
    (tmp_path / "a.txt").write_text("the tide")
    monkeypatch.chdir(tmp_path)
    assert run(make_spec(url, "a.txt") | change, monkeypatch, tmp_path) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert message in errors
    assert "Traceback" not in errors
    assert "planted" not in errors
