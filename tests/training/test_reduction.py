"""The exact reduction on real process groups: the same bits whoever computes which shards."""

import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tidepool.training.group import LocalGroup
from tidepool.training.process_group import ProcessGroup
from tidepool.training.reduction import GradientBuffers, reduce_gradients

SHAPES = {"matrix": (37, 11), "vector": (5,)}


def make_parameters() -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}


def shard_gradient(shard: int, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(shard)
    return torch.randn(shape, generator=generator) * 10.0 ** (shard % 5)  # of many sizes, so that the order of addition shows


def reduce_twice(group: LocalGroup | ProcessGroup, num_shards: int) -> tuple[torch.Tensor, int]:
    """The reduced gradient without padding, and how many shards this worker computed."""
    parameters, computed = make_parameters(), []

    def compute(shard: int) -> None:
        computed.append(shard)
        for parameter in parameters.values():
            assert parameter.grad is not None
            parameter.grad += shard_gradient(shard, parameter.shape)

    buffers = GradientBuffers(parameters, group.size)
    results = []
    for _ in range(2):
        whole = reduce_gradients(compute, num_shards, buffers, group)
        results.append(whole[: sum(p.numel() for p in parameters.values())].clone())
        buffers.give_back(whole)
    assert torch.equal(*results)
    return results[0], len(computed) // 2


def member(rank: int, world_size: int, num_shards: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    assert dist.group.WORLD is not None
    result, num_computed = reduce_twice(ProcessGroup(dist.group.WORLD, lambda: None), num_shards)
    torch.save({"result": result, "num_computed": torch.tensor(num_computed)}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("num_shards", [8, 7])
@pytest.mark.parametrize("world_size", [2, 3])
def test_every_world_size_gives_the_bits_of_one_worker(tmp_path: Path, world_size: int, num_shards: int) -> None:
    context = multiprocessing.get_context("spawn")
    members = [context.Process(target=member, args=(rank, world_size, num_shards, str(tmp_path))) for rank in range(world_size)]
    for process in members:
        process.start()
    for process in members:
        process.join(120)
        assert process.exitcode == 0
    alone, _ = reduce_twice(LocalGroup(), num_shards)
    saved = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world_size)]
    for one in saved:
        assert torch.equal(one["result"], alone)
    assert sum(int(one["num_computed"]) for one in saved) == num_shards


def test_the_order_of_addition_matters_for_these_gradients() -> None:
    """Without this, the test above could pass for any reduction."""
    flat = [torch.cat([shard_gradient(shard, shape).view(-1) for shape in SHAPES.values()]) for shard in range(8)]
    one_by_one = flat[0].clone()
    for gradient in flat[1:]:
        one_by_one += gradient
    assert not torch.equal(one_by_one, reduce_twice(LocalGroup(), 8)[0])


def test_few_gradient_copies_are_held() -> None:
    parameters = make_parameters()
    buffers = GradientBuffers(parameters, 1)
    taken: list[torch.Tensor] = []
    original = buffers.take

    def counting_take() -> torch.Tensor:
        buffer = original()
        if all(buffer is not one for one in taken):
            taken.append(buffer)
        return buffer

    buffers.take = counting_take  # type: ignore[method-assign]
    for _ in range(3):
        buffers.give_back(reduce_gradients(lambda _shard: None, 64, buffers, LocalGroup()))
    assert len(taken) <= 7  # log2(64) + 1
