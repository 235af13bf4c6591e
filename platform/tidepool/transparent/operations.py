"""What PyTorch's schema says of an operation: does it compute, what does it write, does it draw random numbers, what does it give."""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tidepool.transparent.outline import tensors_in

_POINTS_ELSEWHERE = ("aten::set_", "aten::lift", "aten::lift_fresh", "aten::alias")
"""They move no numbers: what they give is the memory that they were given."""


class Operation:
    """The schema of one operation, read once."""

    def __init__(self, function: Any) -> None:
        schema = function._schema
        self.name = str(function)
        self._written = [(position, one.name) for position, one in enumerate(schema.arguments) if _is_written(one)]
        gives_memory = any(one.alias_info is not None and not one.alias_info.is_write for one in schema.returns)
        moves_nothing = schema.name in _POINTS_ELSEWHERE or torch.Tag.inplace_view in function.tags
        self.is_view = moves_nothing or (gives_memory and not self._written)
        self.is_random = torch.Tag.nondeterministic_seeded in function.tags
        self.gives_value = bool(schema.returns) and all("Tensor" not in str(one.type) for one in schema.returns)

    def written(self, arguments: Sequence[Any], options: Mapping[str, Any]) -> list[Tensor]:
        """The tensors among its arguments that it writes."""
        found: list[Tensor] = []
        for position, name in self._written:
            tensors_in(arguments[position] if position < len(arguments) else options.get(name), found)
        return found

    def generator_of(self, arguments: Sequence[Any], options: Mapping[str, Any]) -> torch.Generator | None:
        """The generator that it was given, None for the default one."""
        if not self.is_random:
            return None
        given = next((one for one in [*arguments, *options.values()] if isinstance(one, torch.Generator)), None)
        return None if given is torch.default_generator else given

    def encode(self, value: Any) -> bytes:
        """A number or several as bytes."""
        parts = [value.real, value.imag] if isinstance(value, complex) else value
        return json.dumps([isinstance(value, complex), parts]).encode()

    def decode(self, payload: bytes) -> Any:
        """The inverse of `encode`."""
        is_complex, value = json.loads(payload)
        return complex(*value) if is_complex else value


@functools.cache
def operation(function: Any) -> Operation:
    """What is known of an operation (an `OpOverload`)."""
    return Operation(function)


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write
