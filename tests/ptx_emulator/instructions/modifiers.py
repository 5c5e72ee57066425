"""Opcodes of memory instructions (space, strength, vector length) and their data operands."""

import numpy as np

from ..formats import BITS, PAIR128
from ..operands import Vector, reader, writer


def space_of(parts):
    for x in parts[1:]:
        if x in ("global", "local", "const", "param") or x.startswith("shared"):
            return x.split(":")[0]
    return "generic"


def strength(parts):
    """(strong access, acquires, releases), the last two at a scope wider than the CTA."""
    wide = "cta" not in parts
    strong = any(x in ("volatile", "relaxed", "acquire", "release", "acq_rel", "mmio") for x in parts)
    both = "acq_rel" in parts
    return strong, wide and ("acquire" in parts or both), wide and ("release" in parts or both)


def vector_length(parts):
    return next((int(x[1:]) for x in parts[1:] if x in ("v2", "v4", "v8")), 1)


def access_type(ty, count):
    """Element width in bytes and number of elements, of at most 8 bytes each."""
    return (8, 2 * count) if ty == "b128" else (BITS[ty] // 8, count)


def destinations(prog, dst, ty):
    """put(cta, mask, arrays): write unsigned arrays to the destination operand or operands."""
    if ty == "b128":
        write = writer(prog, dst, "b128")

        def put128(cta, mask, values):
            pair = np.zeros(cta.n, PAIR128)
            pair["f0"], pair["f1"] = values
            write(cta, mask, pair)
        return put128
    element_type = ty if ty[0] == "s" else f"b{BITS[ty]}"  # signed elements are extended to wider registers
    writes = [writer(prog, d, element_type) for d in (dst.elements if isinstance(dst, Vector) else [dst])]

    def put(cta, mask, values):
        for write, x in zip(writes, values):
            write(cta, mask, x)
    return put


def sources(prog, src, ty):
    """cta -> unsigned arrays of the source operand or operands."""
    if ty == "b128":
        read = reader(prog, src, "b128")
        return lambda cta: [np.ascontiguousarray(read(cta)["f0"]), np.ascontiguousarray(read(cta)["f1"])]
    reads = [reader(prog, s, f"b{BITS[ty]}") for s in (src.elements if isinstance(src, Vector) else [src])]
    return lambda cta: [read(cta) for read in reads]
