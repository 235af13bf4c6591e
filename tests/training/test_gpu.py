"""What only a GPU shows; skipped where there is none: bits that do not depend on who computed them, snapshots, groups, memory."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load

from tests.training.conftest import make_run, train_here
from tests.training.test_families import DROPOUT, GPT2, LLAMA, make_spec, train, train_together
from tests.training.test_objective import ONE, SEVERAL, make_batch
from tests.training.test_process_group import together
from tidepool.checkpoint.snapshot import Snapshot
from tidepool.errors import TidepoolError
from tidepool.models import add_lora, build_model, use_given_masks
from tidepool.specs import LoraSpec
from tidepool.training.group import LocalGroup
from tidepool.training.numerics import prepare_process
from tidepool.training.objective import loss_sum, precision
from tidepool.training.optimizer import gradient_norm
from tidepool.training.process_group import MeetingPoint, ProcessGroup, StagedGroup
from tidepool.training.reduction import FlatLayout

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    prepare_process(GPU, 1)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_bit_depends_on_the_world_size(prepared: str, family: str, kind: str, precision: str) -> None:
    config = {"llama": LLAMA, "gpt2": GPT2}[family] | DROPOUT[family]
    lora = LoraSpec(rank=4, alpha=8, dropout=0.3) if kind == "lora" else None
    spec = make_spec(prepared, precision=precision)
    alone = train(config, lora, spec, LocalGroup(), GPU)
    assert train(config, lora, spec, LocalGroup(), GPU) == alone, "it is not deterministic"
    for world_size in (2, 3, 5):
        assert train_together(config, lora, spec, world_size, GPU) == [alone] * world_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_columns", [320, 4096, 128_256])
def test_the_fused_cross_entropy_is_that_of_torch_and_has_the_same_bits_again(dtype: torch.dtype, num_columns: int) -> None:
    from tidepool.training.fused_cross_entropy import FusedCrossEntropy
    from tidepool.training.objective import IGNORED

    generator = torch.Generator(GPU).manual_seed(1)
    logits = (4 * torch.randn(65, num_columns, device=GPU, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(num_columns, (65,), device=GPU, generator=generator)
    labels[::7] = IGNORED
    found = []
    for _ in range(2):
        loss = FusedCrossEntropy.apply(logits, labels)  # type: ignore[no-untyped-call]
        (loss / 3).backward()
        assert logits.grad is not None
        found.append((loss.item(), logits.grad))
        logits.grad = None
    expected = torch.nn.functional.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    (expected / 3).backward()
    assert found[0][0] == found[1][0] == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][1], logits.grad)


def test_gpu_and_cpu_agree(prepared: str) -> None:
    """Not in their bits, nor in what dropout drops; the losses tell that the same was computed."""
    changes = {"training": {"precision": "fp32"}, "model": {"base": "base", "lora": {"rank": 4, "alpha": 8, "dropout": 0}}}
    on_cpu = train_here(make_run(prepared, "gpu-agrees", **changes)).result
    on_gpu = train_here(make_run(prepared, "gpu-agrees-there", **changes), device=GPU).result
    assert on_cpu is not None
    assert on_gpu is not None
    for name in ("first_loss", "last_loss", "held_out_loss_after"):
        assert on_gpu[name] == pytest.approx(on_cpu[name], rel=1e-3), name


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@pytest.mark.parametrize("documents", [ONE, SEVERAL])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_no_micro_batch_waits_for_the_gpu(documents: list[list[int]], kind: str) -> None:
    model = build_model(LLAMA, 320, seed=1)
    if kind == "lora":
        model = add_lora(model.to(torch.bfloat16), LoraSpec(rank=4), 0, "b")
    model = model.to(GPU).train()
    use_given_masks(model)
    try:
        for mode in ("default", "error"):  # the first time, libraries are loaded
            torch.cuda.set_sync_debug_mode(mode)
            with precision(torch.bfloat16, GPU):
                loss = loss_sum(model, make_batch(documents, GPU))
            loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


def test_a_norm_has_the_same_bits_wherever_the_gradients_lie() -> None:
    shapes = [(37, 11), (5,), (1000, 257), (3,), (513, 129)]
    gradients = [torch.randn(shape, device=GPU, generator=torch.Generator(GPU).manual_seed(1)) for shape in shapes]
    expected = gradient_norm(gradients)
    assert expected.item() == pytest.approx(float(torch.cat([gradient.double().flatten() for gradient in gradients]).norm()), rel=1e-6)
    for num_slices in (2, 3, 7):
        layout = FlatLayout([torch.nn.Parameter(gradient) for gradient in gradients], num_slices)
        assert gradient_norm(layout.views(layout.flatten(gradients))).equal(expected)


def test_a_snapshot_is_taken_while_the_next_step_computes() -> None:
    generator = torch.Generator(GPU).manual_seed(1)
    held = {name: torch.rand(64 * 2**20, device=GPU, generator=generator) for name in ("a", "b")}
    before = {name: tensor.cpu() for name, tensor in held.items()}
    snapshot = Snapshot()
    with ThreadPoolExecutor(1) as executor:
        for _ in range(3):
            snapshot.begin(held, executor)
            work = torch.rand(4096, 4096, device=GPU) @ torch.rand(4096, 4096, device=GPU)
            snapshot.settle()
            for tensor in held.values():
                tensor.add_(work[0, 0])  # comes after the copy, though nobody has waited
            found = load(bytes(snapshot.data()))
            assert all(torch.equal(found[name], before[name]) for name in held)
            before = {name: tensor.cpu() for name, tensor in held.items()}


def test_workers_that_share_a_gpu_meet_through_host_memory() -> None:
    points = [MeetingPoint("127.0.0.1", is_gpu_shared=True) for _ in range(3)]

    def exchange(rank: int) -> None:
        group = points[rank].connect("shared", points[0].address, rank, 3, GPU, lambda: None)
        assert isinstance(group, StagedGroup)
        values = torch.full((4,), float(rank), device=GPU)
        group.all_reduce(values)
        assert values.tolist() == [3.0] * 4
        group.broadcast(values.fill_(rank), 1)
        assert values.tolist() == [1.0] * 4
        received = group.all_to_all(torch.arange(3.0, device=GPU) + 10 * rank, [1, 1, 1], [1, 1, 1])
        assert received.tolist() == [rank, rank + 10, rank + 20]
        whole = torch.empty(6, device=GPU)
        group.all_gather(torch.full((2,), float(rank), device=GPU), whole)
        assert whole.tolist() == [0, 0, 1, 1, 2, 2]

    together(*(lambda rank=rank: exchange(rank) for rank in range(3)))  # type: ignore[misc]


def test_nccl_does_what_gloo_does_and_can_be_left() -> None:
    """With one member: two cannot share a GPU."""
    point = MeetingPoint("127.0.0.1")
    made = point._make("nccl", point.address, 0, 1, GPU)
    assert isinstance(made, dist.ProcessGroupNCCL)
    group = ProcessGroup(made, lambda: None)
    values = torch.arange(4.0, device=GPU)
    group.all_reduce(values)
    group.broadcast(values, 0)
    whole = torch.empty(4, device=GPU)
    group.all_gather(values, whole)
    assert whole.tolist() == group.all_to_all(values, [4], [4]).tolist() == [0, 1, 2, 3]
    group._leave(None, ())
    again = ProcessGroup(point._make("nccl again", point.address, 0, 1, GPU), lambda: None)
    again.all_reduce(values)
    assert values.tolist() == [0, 1, 2, 3]


def test_a_model_that_does_not_fit_says_what_to_do(prepared: str) -> None:
    config = LLAMA | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
    torch.cuda.set_per_process_memory_fraction(2**30 / torch.cuda.get_device_properties(GPU).total_memory)
    try:
        with pytest.raises(TidepoolError, match="memory"):
            train_here(make_run(prepared, "gpu-too-large", model={"config": config}), device=GPU)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
