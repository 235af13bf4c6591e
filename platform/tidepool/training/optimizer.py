"""AdamW as the spec asks for it: which weights decay, the learning rate of each step, the clipping of the gradient.

The kernel (fused, foreach, single) is part of a run's numerics: they give different bits.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from tidepool.specs import OptimizerSpec

_NORM_SLICE = 2**14


def build_optimizer(parameters: Mapping[str, Parameter], spec: OptimizerSpec) -> torch.optim.AdamW:
    """AdamW over `parameters`; vectors (norms, biases) do not decay."""
    decayed = [p for p in parameters.values() if p.dim() > 1]
    others = [p for p in parameters.values() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": spec.weight_decay}, {"params": others, "weight_decay": 0.0}]
    kernel = {"fused": spec.kernel == "fused", "foreach": spec.kernel == "foreach"}
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=spec.learning_rate, betas=spec.betas, eps=spec.eps, **kernel)


def learning_rate(step: int, num_steps: int, spec: OptimizerSpec) -> float:
    """The rate of step `step` (from 0): linear warm-up, then the schedule down to the final ratio at the last step."""
    if step < spec.warmup_steps:
        return spec.learning_rate * (step + 1) / spec.warmup_steps
    progress = (step - spec.warmup_steps) / max(1, num_steps - 1 - spec.warmup_steps)
    final = spec.final_learning_rate_ratio
    factor = {
        "constant": 1.0,
        "linear": 1.0 - (1.0 - final) * progress,
        "cosine": final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[spec.schedule]
    return spec.learning_rate * factor


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` for every parameter from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip(gradient: Tensor, clip_norm: float | None) -> float:
    """Scale the flat gradient in place to a norm of at most `clip_norm`; returns the norm before."""
    norm = _norm(gradient)
    if clip_norm is not None and norm > clip_norm:
        gradient.mul_(clip_norm / norm)
    return norm


def _norm(gradient: Tensor) -> float:
    """Of fixed slices in float32, then of those in float64: as exact as float64 throughout, without a copy in float64."""
    start_of_rest = gradient.numel() // _NORM_SLICE * _NORM_SLICE
    slices = torch.linalg.vector_norm(gradient[:start_of_rest].view(-1, _NORM_SLICE), dim=1)
    rest = torch.linalg.vector_norm(gradient[start_of_rest:])
    return float(torch.linalg.vector_norm(torch.cat([slices, rest[None]]), dtype=torch.float64))
