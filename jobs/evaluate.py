"""Measure a model or an adapter on the held-out samples of a dataset.

    ray job submit --working-dir . -- python jobs/evaluate.py jobs/evaluate.yaml

It computes where the entrypoint runs; with `--entrypoint-num-gpus 1` that is a GPU. The last line is JSON.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

import torch

from tidepool.data import Dataset, fetch_tokenizer, find_dataset
from tidepool.errors import TidepoolError
from tidepool.models import cache_folder, check_length, check_same_tokens, load_tokenizer, open_model
from tidepool.specs import EvaluationSpec, load_spec
from tidepool.storage import open_store
from tidepool.telemetry import configure_logging
from tidepool.training.evaluation import evaluate
from tidepool.training.group import LocalGroup
from tidepool.training.memory import told_of_memory
from tidepool.training.numerics import resolve_dtype


def main() -> int:
    """Run the job that the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(description="Measure a model or an adapter on held-out samples.")
    parser.add_argument("spec", help="a YAML file, for example jobs/evaluate.yaml")
    arguments = parser.parse_args()
    configure_logging()
    try:
        spec = load_spec(arguments.spec, EvaluationSpec)
        print(json.dumps(measure(spec)))
    except TidepoolError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def measure(spec: EvaluationSpec) -> dict[str, Any]:
    """The loss in nats per target, its perplexity, and what exactly was measured."""
    store = open_store(spec.store)
    info = find_dataset(store, spec.dataset)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = resolve_dtype("auto", device)
    opened = open_model(spec.model, store, cache_folder(), dtype)
    check_same_tokens(opened.tokenizer, load_tokenizer(fetch_tokenizer(store, info, cache_folder())))
    check_length(opened.model.config, info.sequence_length)
    held_out = Dataset(store, info, "held_out", cache_row_groups=4)
    with told_of_memory("The evaluation", device, lambda _: memory_advice(spec)):
        loss = evaluate(opened.model.to(device), held_out, spec.num_samples, spec.batch_size, dtype, LocalGroup())
    return {
        "model": opened.source.ref,
        "base": opened.base.ref if opened.base else None,
        "dataset": info.ref,
        "num_samples": min(spec.num_samples, len(held_out)),
        "held_out_loss": loss,
        "perplexity": math.exp(loss),
    }


def memory_advice(spec: EvaluationSpec) -> str:
    """What to lower, and to what."""
    if spec.batch_size == 1:
        return "One sample at a time is too much already: use a device with more memory"
    return f"Lower batch_size from {spec.batch_size} to {spec.batch_size // 2}: the loss stays the same, but for rounding"


if __name__ == "__main__":
    sys.exit(main())
