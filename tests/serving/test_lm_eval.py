"""lm-evaluation-harness against `/v1/completions`, as a person runs it: its log-likelihoods are those that transformers computes."""

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.serving.local import LocalModel, gateway_of, served

PYTHON = Path(__file__).resolve().parents[2] / ".tidepool" / "lm-eval" / "bin" / "python"
DOCS = [
    {"question": "the tide", "choices": [" comes in", " goes out", " holds"], "answer": 0, "text": "the pool keeps what it holds. 🌊"},
    {"question": "and the pool", "choices": [" fills", " empties"], "answer": 1, "text": "the tide goes out and the tide comes in"},
    {"question": "Grüße,", "choices": [" 🌊", " Ebbe"], "answer": 0, "text": "x"},
]
TASKS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["\n", "a.", "b.", "c.", "d."], "max_gen_toks": 8},
        "metric_list": [{"metric": "bypass"}],
    },
}


def loglikelihood(model: LocalModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """By transformers: the sum of the continuation's log-probabilities, and whether each of its tokens is the likeliest."""
    rows = model.logits([*context, *continuation])[len(context) - 1 : -1].double().log_softmax(-1)
    told = [float(row[token]) for row, token in zip(rows, continuation, strict=True)]
    return sum(told), all(int(row.argmax()) == token for row, token in zip(rows, continuation, strict=True))


def evaluate(folder: Path, url: str, batch_size: int) -> dict[str, list[Any]]:
    """The samples of each task, in the order of the documents."""
    output = folder / f"output-{batch_size}"
    where = f"model=tides,base_url={url}/v1/completions,tokenizer={folder / 'tokenizer'},tokenizer_backend=huggingface,max_length=512"
    command = [str(PYTHON), "-m", "lm_eval", "--model", "local-completions", "--model_args", where]
    command += ["--tasks", ",".join(f"tidepool_{name}" for name in TASKS), "--include_path", str(folder), "--batch_size", str(batch_size)]
    command += ["--output_path", str(output), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=os.environ | offline, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    samples = {}
    for name in TASKS:
        (path,) = output.rglob(f"samples_tidepool_{name}_*.jsonl")
        samples[name] = sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    return samples


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.skipif(not PYTHON.is_file(), reason="lm_eval has an environment of its own: make test-slow makes it")
@pytest.mark.parametrize("batch_size", [1, 3])
def test_its_log_likelihoods_are_those_of_transformers(tmp_path: Path, batch_size: int) -> None:
    model = LocalModel()
    tokenizer = model.tokenizer
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    for name, task in TASKS.items():
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "docs.jsonl")}}, "test_split": "test"}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"task": f"tidepool_{name}", **data, **task}))
    with served(gateway_of(model), log_level="error") as url:
        samples = evaluate(tmp_path, url, batch_size)

    for doc, sample in zip(DOCS, samples["choice"], strict=True):
        context = tokenizer(doc["question"])["input_ids"]
        answers = [response[0] for response in sample["resps"]]
        assert len(answers) == len(doc["choices"])  # type: ignore[arg-type]
        for choice, (told, is_greedy) in zip(doc["choices"], answers, strict=True):  # type: ignore[call-overload]
            whole = tokenizer(doc["question"] + choice)["input_ids"]
            expected, is_likeliest = loglikelihood(model, context, whole[len(context) :])
            assert math.isclose(float(told), expected, abs_tol=1e-3), choice
            assert str(is_greedy) == str(is_likeliest)
    for doc, sample in zip(DOCS, samples["rolling"], strict=True):
        expected, _ = loglikelihood(model, [tokenizer.eos_token_id], tokenizer(doc["text"])["input_ids"])
        told = sample["resps"][0][0]
        assert math.isclose(float(told[0] if isinstance(told, list) else told), expected, abs_tol=1e-3), doc["text"]
    assert all(isinstance(sample["resps"][0][0], str) for sample in samples["answer"])
