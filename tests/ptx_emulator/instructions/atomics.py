"""Atomic operations and fences."""

import numpy as np

from .. import shared_memory
from ..addresses import REMOTE
from ..errors import Unsupported
from ..formats import BITS, UINT, decode, encode
from ..operands import Immediate, address
from .modifiers import destinations, sources, space_of, strength, vector_length
from .registry import builds

# new value from the old one and the operands
ATOMIC = {
    "add": lambda old, x, y: old + x,
    "and": lambda old, x, y: old & x,
    "or": lambda old, x, y: old | x,
    "xor": lambda old, x, y: old ^ x,
    "min": lambda old, x, y: np.minimum(old, x),
    "max": lambda old, x, y: np.maximum(old, x),
    "exch": lambda old, x, y: x,
    "cas": lambda old, x, y: np.where(old == x, y, old),
    "inc": lambda old, x, y: np.where(old >= x, old.dtype.type(0), old + old.dtype.type(1)),
    "dec": lambda old, x, y: np.where((old == 0) | (old > x), x, old - old.dtype.type(1)),
}


@builds("atom", "red")
def build_atom(prog, ins, parts, args, ty):
    returns_old = parts[0] == "atom"
    if parts[1] == "async":
        raise Unsupported("red.async")
    f = ATOMIC[next(x for x in parts if x in ATOMIC)]
    space, count, width = space_of(parts), vector_length(parts), BITS[ty] // 8
    put = destinations(prog, args[0], ty) if returns_old else None
    memory_operand, first, *more = args[1:] if returns_old else args
    addr, values = address(prog, memory_operand), sources(prog, first, ty)
    second = sources(prog, more[0], ty) if more and not isinstance(more[0], Immediate) or "cas" in parts else None
    _, acquires, releases = strength(parts)
    ins.control = "yield"

    def fn(cta, mask):
        memory, x = cta.device.memory, addr(cta)
        t = cta.tid if mask is None else cta.tid[mask]
        t = cta.device.rng.permutation(t) if len(t) > 1 else t
        if space == "shared":
            i, view = shared_memory.index(cta, mask, x, width * count, "atomic"), cta.shared[width]
            if (i >= REMOTE).any():
                raise Unsupported(f"atomic on distributed shared memory, {cta.where()}")
        else:
            i = memory.index(cta, mask, x.astype(np.uint64), width * count, "atomic")
            view = memory.view[width]
            if releases:
                memory.release(cta, mask)
            if memory.weak and cta.pending:
                memory.publish(cta, (i if mask is None else i[mask]) // width, width, count)
        operand, operand2 = values(cta), (second(cta) if second else None)
        olds = []
        for j in range(count):
            k = i // width + j
            old = np.zeros(cta.n, UINT[8 * width])
            # all threads at once if they name different places, else one after the other
            batches = [t] if len(t) == 1 or len(np.unique(k[t])) == len(t) else t[:, None]
            for q in batches:
                o = view[k[q]]
                old[q] = o
                new = f(decode(o, ty), decode(operand[j][q], ty), decode(operand2[j][q], ty) if operand2 else None)
                new = encode(new, ty).reshape(o.shape)
                if (new != o).any():
                    view[k[q]] = new
                    cta.device.progress += 1
                    memory.version += 1
                if memory.weak and space != "shared":
                    cta.snap[width][k[q]] = new
            olds.append(old)
        if put:
            put(cta, mask, olds)
        if acquires and space != "shared":
            memory.acquire(cta, mask)
    return fn


@builds("fence", "membar")
def build_fence(prog, ins, parts, args, ty):
    if "proxy" in parts or "cta" in parts or "mbarrier_init" in parts:
        return lambda cta, mask: None
    ins.control = "yield"

    def fn(cta, mask):
        cta.device.memory.release(cta, mask)
        cta.device.memory.acquire(cta, mask)
    return fn
