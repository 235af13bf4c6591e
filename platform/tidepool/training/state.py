"""The state of a run after a number of steps, as named tensors: what a checkpoint holds, and nothing else is carried over.

    model.safetensors       the weights that are trained (all of them, or an adapter's)
    optimizer.safetensors   AdamW's moments and step counts
    history.safetensors     loss and gradient norm of each step, and the evaluations

No random state and no data position: both are functions of the step number.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel

from tidepool.errors import CorruptCheckpointError

Tensors = dict[str, Tensor]
_SLOTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class History:
    """One loss and gradient norm a step (float64), and (step, held-out loss) pairs; losses in nats per target."""

    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)

    def to_numbers(self) -> dict[str, list[float]]:
        """Everything as lists of float64, by name."""
        return {name: tensor.to(torch.float64).tolist() for name, tensor in self.to_tensors().items()}

    @classmethod
    def from_numbers(cls, numbers: Mapping[str, list[float]]) -> "History":
        steps = [int(step) for step in numbers["evaluation_step"]]
        pairs = list(zip(steps, numbers["evaluation_loss"], strict=True))
        return cls(list(numbers["loss"]), list(numbers["gradient_norm"]), pairs)

    def to_tensors(self) -> Tensors:
        steps = [step for step, _ in self.evaluations]
        losses = [loss for _, loss in self.evaluations]
        return {
            "loss": torch.tensor(self.losses, dtype=torch.float64),
            "gradient_norm": torch.tensor(self.gradient_norms, dtype=torch.float64),
            "evaluation_step": torch.tensor(steps, dtype=torch.int64),
            "evaluation_loss": torch.tensor(losses, dtype=torch.float64),
        }

    @classmethod
    def from_tensors(cls, tensors: Tensors) -> "History":
        pairs = zip(tensors["evaluation_step"].tolist(), tensors["evaluation_loss"].tolist(), strict=True)
        return cls(tensors["loss"].tolist(), tensors["gradient_norm"].tolist(), list(pairs))


def trained_parameters(model: PreTrainedModel) -> dict[str, Parameter]:
    """The parameters that training changes, by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def prepare_moments(parameters: Mapping[str, Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer the state that AdamW would make before its first step, so that there is one at every step."""
    for parameter in parameters.values():
        step_device = parameter.device if optimizer.defaults["fused"] else torch.device("cpu")
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=step_device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }


def capture(parameters: Mapping[str, Parameter], optimizer: torch.optim.Optimizer, history: History) -> dict[str, Tensors]:
    """Views of the state, one mapping for each object of a checkpoint."""
    moments = {f"{name}.{slot}": optimizer.state[p][slot] for name, p in parameters.items() for slot in _SLOTS}
    return {"model": {name: p.detach() for name, p in parameters.items()}, "optimizer": moments, "history": history.to_tensors()}


def install(parameters: Mapping[str, Parameter], optimizer: torch.optim.Optimizer, state: Mapping[str, Tensors]) -> History:
    """Put a captured state into a model and its new optimizer. Raises `CorruptCheckpointError` if it is not theirs."""
    model, moments = state["model"], state["optimizer"]
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    if {name: tuple(t.shape) for name, t in model.items()} != shapes:
        raise CorruptCheckpointError("The checkpoint holds the weights of another model than the one that the run's spec describes.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(model[name])
            on_device = {slot: moments[f"{name}.{slot}"].to(parameter.device) for slot in _SLOTS}
            if not optimizer.defaults["fused"]:
                on_device["step"] = on_device["step"].cpu()  # where the other kernels keep it
            optimizer.state[parameter] = on_device
    return History.from_tensors(state["history"])


def tensors_digest(tensors: Tensors) -> str:
    """sha256 (hex) over names, dtypes, shapes and bytes: equal if and only if every bit is."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
