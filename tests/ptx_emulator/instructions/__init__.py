"""What the instructions do, one module per family.

A builder makes the closure fn(cta, mask) of one parsed instruction.  Its arguments are always the same: the program,
the instruction, its opcode split at the dots (`ld.global.v4.b32` gives ["ld", "global", "v4", "b32"], and :: is
written :), its operands, and the last part of the opcode, which is usually the type.  To add an instruction, write a
builder and decorate it with `builds`.
"""

from . import (  # noqa: F401  (each registers its builders)
    arithmetic,
    async_copies,
    atomics,
    barriers,
    bits,
    comparisons,
    control,
    conversions,
    loads_stores,
    matrix,
    mbarriers,
    warp,
)
from .registry import build

__all__ = ["build"]
