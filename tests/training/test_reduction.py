"""The reductions on real process groups: the exact one has the same bits whoever computes which shards, the plain one its sum."""

import multiprocessing
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.training.conftest import make_run, train_here
from tidepool.training.group import LocalGroup
from tidepool.training.process_group import ProcessGroup
from tidepool.training.reduction import REDUCTIONS, FlatLayout

SHAPES = [torch.Size((37, 11)), torch.Size((5,))]


def make_parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]


def shard_gradient(shard: int, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(shard)
    return torch.randn(shape, generator=generator) * 10.0 ** (shard % 5)  # of many sizes, so that the order of addition shows


def add_to_grad(parameter: torch.nn.Parameter, gradient: torch.Tensor) -> None:
    """As a backward pass does."""
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad += gradient


def reduce_twice(
    group: LocalGroup | ProcessGroup, num_shards: int, name: str = "exact", adds_once: bool = False
) -> tuple[torch.Tensor, int]:
    """The reduced gradient, flat, and how many shards this worker computed."""
    parameters, computed = make_parameters(), []

    def compute(shard: int) -> None:
        computed.append(shard)
        for parameter in parameters:
            add_to_grad(parameter, shard_gradient(shard, parameter.shape))

    results = []
    for _ in range(2):
        gradients = REDUCTIONS[name](compute, num_shards, parameters, group, adds_once)
        assert [gradient.shape for gradient in gradients] == list(SHAPES)
        assert all(parameter.grad is None for parameter in parameters)
        results.append(torch.cat([gradient.flatten() for gradient in gradients]))
    assert torch.equal(*results)
    return results[0], len(computed) // 2


def member(rank: int, world_size: int, num_shards: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    assert dist.group.WORLD is not None
    group, saved = ProcessGroup(dist.group.WORLD, lambda: None), {}
    for name in REDUCTIONS:
        result, num_computed = reduce_twice(group, num_shards, name, adds_once=num_shards == 8)
        saved |= {name: result, f"{name} computed": torch.tensor(num_computed)}
    torch.save(saved, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def run_members(folder: Path, world_size: int, num_shards: int) -> list[dict[str, torch.Tensor]]:
    """What each member of a group of processes got by each reduction, and how many shards it computed for it."""
    context = multiprocessing.get_context("spawn")
    members = [context.Process(target=member, args=(rank, world_size, num_shards, str(folder))) for rank in range(world_size)]
    for process in members:
        process.start()
    for process in members:
        process.join(250)
        assert process.exitcode == 0
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


@pytest.mark.parametrize(
    ("world_size", "num_shards"), [(2, 7), (3, 8), pytest.param(2, 8, marks=pytest.mark.long), pytest.param(3, 7, marks=pytest.mark.long)]
)
def test_every_world_size_gives_the_bits_of_one_worker(tmp_path: Path, world_size: int, num_shards: int) -> None:
    saved = run_members(tmp_path, world_size, num_shards)
    alone, _ = reduce_twice(LocalGroup(), num_shards)
    plain_alone, _ = reduce_twice(LocalGroup(), num_shards, "fast")
    for one in saved:
        assert torch.equal(one["exact"], alone)
        assert torch.equal(one["fast"], saved[0]["fast"]), "the plain sum too is the same on every worker"
    assert not torch.equal(saved[0]["fast"], plain_alone), "the plain sum has other bits for another world size"
    torch.testing.assert_close(saved[0]["fast"], plain_alone, rtol=0, atol=0.02)  # of terms up to 30,000
    torch.testing.assert_close(alone, plain_alone, rtol=0, atol=0.02)
    for name in REDUCTIONS:
        assert sum(int(one[f"{name} computed"]) for one in saved) == num_shards


def test_the_order_of_addition_matters_for_these_gradients() -> None:
    """Without this, the test above could pass for any reduction."""
    flat = [torch.cat([shard_gradient(shard, shape).view(-1) for shape in SHAPES]) for shard in range(8)]
    one_by_one = flat[0].clone()
    for gradient in flat[1:]:
        one_by_one += gradient
    assert not torch.equal(one_by_one, reduce_twice(LocalGroup(), 8)[0])


@pytest.mark.parametrize("num_shards", range(1, 20))
def test_adding_in_place_changes_no_bit(num_shards: int) -> None:
    in_place, num_computed = reduce_twice(LocalGroup(), num_shards, adds_once=True)
    assert torch.equal(in_place, reduce_twice(LocalGroup(), num_shards)[0])
    assert num_computed == num_shards


@pytest.mark.parametrize(("name", "adds_once", "most"), [("exact", False, 7), ("exact", True, 6), ("fast", False, 1)])
def test_few_gradient_copies_are_held(name: str, adds_once: bool, most: int) -> None:
    """log2(64) + 1; one less where the last two levels of the tree share one; one in the plain reduction. None is left over."""
    parameters = make_parameters()
    held: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    counts = []

    def compute(_shard: int) -> None:
        for parameter in parameters:
            gradient = torch.ones(parameter.shape)
            if parameter.grad is None:
                held.add(gradient)
            add_to_grad(parameter, gradient)
            del gradient
        counts.append(len(held) // len(parameters))

    for _ in range(3):
        REDUCTIONS[name](compute, 64, parameters, LocalGroup(), adds_once)
        assert not held
    assert max(counts) == most


def test_a_parameter_that_nothing_depends_on_has_a_gradient_of_zeros() -> None:
    first, second = make_parameters()
    gradients = REDUCTIONS["exact"](lambda _shard: add_to_grad(second, torch.ones(5)), 4, [first, second], LocalGroup(), True)
    assert [gradient.unique().tolist() for gradient in gradients] == [[0.0], [4.0]]


@pytest.mark.parametrize("num_slices", [1, 2, 3, 7])
def test_gradients_are_found_again_in_a_flat_tensor(num_slices: int) -> None:
    parameters = make_parameters()
    layout = FlatLayout(parameters, num_slices)
    gradients = [torch.randn(shape) for shape in SHAPES]
    flat = layout.flatten(gradients)
    assert flat.numel() % num_slices == 0
    for view, gradient in zip(layout.views(flat), gradients, strict=True):
        assert torch.equal(view, gradient)
        assert (view.data_ptr() - flat.data_ptr()) % 256 == 0, "aligned as a tensor of its own, or a GPU's sums over it may have other bits"


def test_a_run_uses_the_reduction_of_its_spec(prepared: str, run_name: str) -> None:
    results = [train_here(make_run(prepared, f"{run_name}-{name}", training={"reduction": name})).result for name in REDUCTIONS]
    exact, fast = results
    assert exact is not None
    assert fast is not None
    assert exact["weights_sha256"] != fast["weights_sha256"], "they add in different orders"
    assert fast["last_loss"] == pytest.approx(exact["last_loss"], rel=1e-4)
