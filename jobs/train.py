"""Train a model or an adapter: LoRA or full, on the workers of one Ray Train worker group.

    ray job submit --working-dir . -- python jobs/train.py jobs/lora.yaml

Submitting the same run again continues it from its newest commit, or says what it published. Exit status: 0 finished,
1 an error (one message says what to do), 143 stopped on request after a commit.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from tidepool.errors import TidepoolError
from tidepool.specs import RunSpec, load_spec
from tidepool.telemetry import configure_logging
from tidepool.training.driver import train
from tidepool.training.outcome import Outcome

STOPPED = 143


def main() -> int:
    """Run the job that the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(description="Train a model or an adapter; the same run name continues it.")
    parser.add_argument("spec", help="a YAML file, for example jobs/lora.yaml")
    arguments = parser.parse_args()
    configure_logging()
    try:
        spec = load_spec(arguments.spec, RunSpec)
        outcome = train(spec)
    except TidepoolError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(last_line(spec, outcome))
    return 0 if outcome.finished else STOPPED


def last_line(spec: RunSpec, outcome: Outcome) -> str:
    """What was published and how to call it, or how to continue."""
    if outcome.result is None and outcome.step == 0:
        return f"Run {spec.run} stopped before its first step. Submit the same spec again to begin it."
    if outcome.result is None:
        return f"Run {spec.run} stopped after step {outcome.step}, which is committed. Submit the same spec again to continue it."
    result = outcome.result
    losses = f"held-out loss {result['held_out_loss_before']:.3f} -> {result['held_out_loss_after']:.3f}"
    if result["published"] is None:
        return f"Run {spec.run} finished {result['steps']} steps ({losses}); nothing was published, as its spec has no `publish`."
    name = result["published"].partition("@")[0]
    return (
        f"Run {spec.run} finished {result['steps']} steps ({losses}) and published {result['published']}. Once it is served "
        f'(serve/serve.yaml): curl -s http://127.0.0.1:8000/v1/completions -d \'{{"model": "{name}", "prompt": "def "}}\' '
        "-H 'content-type: application/json'"
    )


if __name__ == "__main__":
    sys.exit(main())
