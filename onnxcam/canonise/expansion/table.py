"""Where expansions are registered and found: by domain, op type and opset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from onnxcam.canonise.expansion.body import Body, Operand

Expand = Callable[[Body], Operand | Sequence[Operand]]

MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Expansion:
    """What an op expands into.

    Attributes:
        into: the ops that take its place, for the page of operators.
        write: writes them; gives back one tensor, or one for each output, None where there is none.
        until: the last opset of the op's domain that this is for; None for all.
    """

    into: str
    write: Expand
    until: int | None = None


EXPANSIONS: dict[tuple[str, str], Expansion] = {}


def expansion(
    *op_types: str, into: str, domain: str = MICROSOFT, until: int | None = None
) -> Callable[[Expand], Expand]:
    """Register how `op_types` are written in simpler ops."""

    def register(write: Expand) -> Expand:
        for op_type in op_types:
            if (domain, op_type) in EXPANSIONS:
                raise ValueError(f"two expansions of {op_type}")
            EXPANSIONS[domain, op_type] = Expansion(into, write, until)
        return write

    return register
