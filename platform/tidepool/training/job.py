"""The main of a training job: from a spec's file to an exit status and one last line. `jobs/train.py` and `tidepool runs resume` run it."""

import argparse
import sys

from tidepool.errors import TidepoolError
from tidepool.specs import RunSpec, load_spec
from tidepool.telemetry import configure_logging
from tidepool.training.driver import train
from tidepool.training.outcome import Outcome

STOPPED = 143


def main() -> int:
    """Run the job that the command line asks for; returns the exit status: 0 finished or paused, 1 an error, 143 stopped."""
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
    return tell(spec, outcome)


def tell(spec: RunSpec, outcome: Outcome) -> int:
    """Print how a run ended; returns the exit status."""
    print(last_line(spec, outcome))
    return 0 if outcome.finished or outcome.is_paused else STOPPED


def last_line(spec: RunSpec, outcome: Outcome) -> str:
    """What was published and how to call it, or how to continue."""
    if outcome.is_paused:
        return f"Run {spec.run} is paused after step {outcome.step}, which is committed. `tidepool runs resume {spec.run}` continues it."
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
