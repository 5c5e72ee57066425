"""Comparisons and selection."""

import numpy as np

from ..formats import BITS, FLOATS, NUMPY
from ..operands import Pair, elementwise, reader, writer
from .registry import builds

COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
           "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def unordered(x, y):
    return np.isnan(x) | np.isnan(y)


def comparison(op, ty):
    if op in COMPARE:
        if ty in FLOATS and op == "ne":  # numpy's != is true for NaN, PTX's ne is not
            return lambda x, y: (x != y) & ~unordered(x, y)
        return COMPARE[op]
    if op in ("num", "nan"):
        return lambda x, y: unordered(x, y) ^ (op == "num")
    ordered = COMPARE[op[:-1]]  # ltu, equ, ...: true when unordered
    return lambda x, y: ordered(x, y) | unordered(x, y)


@builds("setp")
def build_setp(prog, ins, parts, args, ty):
    f, logic = comparison(parts[1], ty), next((LOGIC[x] for x in parts[2:-1] if x in LOGIC), None)
    x, y = reader(prog, args[1], ty), reader(prog, args[2], ty)
    z = reader(prog, args[3], "pred") if logic else None
    writes = [writer(prog, d, "pred") for d in (args[0] if isinstance(args[0], Pair) else [args[0]])]

    def fn(cta, mask):
        v = f(x(cta), y(cta))
        if v.ndim == 2:  # packed types give one predicate per half
            for j, write in enumerate(writes):
                write(cta, mask, v[:, j])
            return
        writes[0](cta, mask, logic(v, z(cta)) if logic else v)
        if len(writes) > 1:
            writes[1](cta, mask, logic(~v, z(cta)) if logic else ~v)
    return fn


@builds("set")
def build_set(prog, ins, parts, args, ty):
    f, dst_type = comparison(parts[1], ty), parts[-2]
    if dst_type == "f32":
        true = np.float32(1)
    else:
        true = NUMPY[dst_type](-1 & (2**BITS[dst_type] - 1) if dst_type[0] == "u" else -1)
    false = type(true)(0)
    return elementwise(prog, lambda x, y: np.where(f(x, y), true, false), args[0], args[1:], dst_type, [ty, ty])


@builds("selp")
def build_selp(prog, ins, parts, args, ty):
    ty = f"b{BITS[ty]}"
    write, x, y = writer(prog, args[0], ty), reader(prog, args[1], ty), reader(prog, args[2], ty)
    p = reader(prog, args[3], "pred")
    return lambda cta, mask: write(cta, mask, np.where(p(cta), x(cta), y(cta)))
