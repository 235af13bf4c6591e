"""Stock Ray Train at the work of `recovery`: the job that a user of `TorchTrainer` would write, with its elasticity.

    python benchmarks/recovery_stock.py SPEC.yaml FOLDER [--timeout-s SECONDS] [--monitor-s SECONDS] [--max-workers N]

The same model, samples, optimizer and checkpoint interval as Tidepool's run of that spec; DDP over gloo; a checkpoint through
`ray.train.report` into FOLDER, and on from `ray.train.get_checkpoint()` after a failure or a resize. Everything that is not
the run's own is left at Ray Train's default, unless it is given: `--timeout-s`, after which gloo gives a collective up, and
`--monitor-s`, how often Ray Train considers another size (from one worker to `--max-workers`).
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

import logging

import ray
import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from torch.nn.parallel import DistributedDataParallel

from tidepool.specs import RunSpec, load_spec

MAX_WORKERS = 3
_DEFAULT_TIMEOUT_S, _DEFAULT_MONITOR_S = 1800, 60.0
"""Those of `TorchConfig` and `ScalingConfig`."""
_logger = logging.getLogger("tidepool.recovery")


def main() -> None:
    """Train until the end or until somebody ends this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec")
    parser.add_argument("folder")
    parser.add_argument("--timeout-s", type=int, default=_DEFAULT_TIMEOUT_S)
    parser.add_argument("--monitor-s", type=float, default=_DEFAULT_MONITOR_S)
    parser.add_argument("--max-workers", type=int, default=MAX_WORKERS)
    options = parser.parse_args()
    spec = load_spec(options.spec, RunSpec)
    ray.init("auto", namespace="recovery")
    TorchTrainer(
        train,
        train_loop_config={"spec": spec},
        torch_config=TorchConfig(backend="gloo", timeout_s=options.timeout_s),
        scaling_config=ScalingConfig(
            num_workers=(1, options.max_workers),
            resources_per_worker={"CPU": 1},
            elastic_resize_monitor_interval_s=options.monitor_s,
        ),
        run_config=RunConfig(
            name=spec.run,
            storage_path=options.folder,
            failure_config=FailureConfig(max_failures=-1),
            checkpoint_config=CheckpointConfig(num_to_keep=spec.checkpoint.keep),
        ),
    ).fit()


def train(config: dict[str, Any]) -> None:
    """One worker."""
    from tidepool.telemetry import LogSink, configure_logging

    configure_logging()
    _logger.info("entered")
    from tidepool.data import Dataset, fetch_tokenizer, find_dataset
    from tidepool.models import build_model, load_tokenizer
    from tidepool.storage import open_store
    from tidepool.training.batch import cut_batches, shard_samples
    from tidepool.training.objective import loss_sum
    from tidepool.training.optimizer import build_optimizer, learning_rate, set_learning_rate
    from tidepool.training.sharding import owned_shards

    spec: RunSpec = config["spec"]
    training = spec.training
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(spec.workers.threads_per_worker)
    store = open_store(spec.store)
    info = find_dataset(store, spec.dataset)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = load_tokenizer(fetch_tokenizer(store, info, Path(folder)))
    assert spec.model.config is not None
    model = build_model(spec.model.config, len(tokenizer), spec.seed, tokenizer).train()
    optimizer = build_optimizer(dict(model.named_parameters()), training.optimizer)
    step = restore(model, optimizer)
    parallel = DistributedDataParallel(model)
    data, sink = Dataset(store, info, "train", 1024), LogSink()
    shards = owned_shards(rank, size, training.num_shards)
    _logger.info("ready", extra={"fields": {"rank": rank, "world_size": size, "pid": os.getpid(), "step": step}})
    while step < training.steps:
        samples = data.read([number for shard in shards for number in shard_samples(step, shard, training, spec.seed, data.layout)])
        [batch] = cut_batches(samples, len(samples.tokens_NT), torch.device("cpu"))
        loss = loss_sum(parallel, batch) / batch.targets_NT[:, 1:].sum()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.optimizer.clip_norm or float("inf"))
        set_learning_rate(optimizer, learning_rate(step, training.steps, training.optimizer))
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if rank == 0:
            sink.record(step, {"loss": float(loss)})
        if step % spec.checkpoint.every_steps == 0:
            report(step, float(loss), model, optimizer)


def restore(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Go on from the newest checkpoint, if there is one; returns the steps that it holds."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        state = torch.load(Path(folder) / "state.pt", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def report(step: int, loss: float, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Hand a checkpoint to Ray Train; every worker has to call it, the one of rank 0 has the files."""
    if ray.train.get_context().get_world_rank() != 0:
        ray.train.report({"step": step, "loss": loss})
        return
    with tempfile.TemporaryDirectory() as folder:
        state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, Path(folder) / "state.pt")
        ray.train.report({"step": step, "loss": loss}, checkpoint=Checkpoint.from_directory(folder))


if __name__ == "__main__":
    main()
