"""Loads and stores of all state spaces."""

import numpy as np

from .. import shared_memory
from ..addresses import PARAMETER_PAGE, SHARED_GENERIC
from ..errors import OutOfBounds, Unsupported
from ..formats import BITS, UINT
from ..operands import Register, Symbol, address, writer
from .async_copies import build_st_async
from .modifiers import access_type, destinations, sources, space_of, strength, vector_length
from .registry import builds


def local_index(cta, addr, mask, width, count):
    """(view of local memory, element index per thread)"""
    i = addr.astype(np.int64)
    if mask is not None:
        i = np.where(mask, i, 0)
    if (i + width * count > cta.local.shape[1]).any() or (i < 0).any():
        raise OutOfBounds(f"local memory, {cta.where()}")
    return cta.local.view(UINT[8 * width]), i // width


def is_shared(addr, mask):
    """The space of generic addresses; all threads of one instruction are taken to address the same one."""
    return (addr[0] if mask is None else addr[mask][0]) >= SHARED_GENERIC


def load_parameter(prog, args, ty):
    write, n = writer(prog, args[0], f"b{BITS[ty]}"), BITS[ty] // 8
    base = args[1].base
    if isinstance(base, Register):  # which holds the address of one parameter or of another
        addr = address(prog, args[1])

        def from_address(cta, mask):
            chosen = {int(x) for x in (addr(cta) if mask is None else addr(cta)[mask])}
            if len(chosen) != 1:
                raise Unsupported(f"threads of one instruction load several parameters, {cta.where()}")
            page, offset = divmod(chosen.pop(), PARAMETER_PAGE)
            value = int.from_bytes(cta.device.params[prog.params[page][0]][offset:offset + n], "little")
            write(cta, mask, np.full(cta.n, value, UINT[8 * n]))
        return from_address
    offset = args[1].offset + (base.offset if isinstance(base, Symbol) else 0)

    def fn(cta, mask):
        value = int.from_bytes(cta.device.params[base.name][offset:offset + n], "little")
        write(cta, mask, np.full(cta.n, value, UINT[8 * n]))
    return fn


@builds("ld", "ldu")
def build_ld(prog, ins, parts, args, ty):
    space = space_of(parts)
    if space == "param":
        return load_parameter(prog, args, ty)
    width, count = access_type(ty, vector_length(parts))
    put, addr = destinations(prog, args[0], ty), address(prog, args[1])
    strong, acquires, _ = strength(parts)

    def from_global(cta, mask, x):
        memory = cta.device.memory
        i = memory.index(cta, mask, x.astype(np.uint64), width * count, "load")
        cta.device.stats.global_load += cta.count_active(mask) * width * count
        put(cta, mask, memory.load(cta, i, width, count, strong))
        if acquires:
            memory.acquire(cta, mask)

    def from_shared(cta, mask, x):
        put(cta, mask, shared_memory.load(cta, mask, x, width, count))

    def from_local(cta, mask, x):
        view, k = local_index(cta, x, mask, width, count)
        put(cta, mask, [view[cta.tid, k + j] for j in range(count)])

    def from_generic(cta, mask, x):
        if is_shared(x, mask):
            from_shared(cta, mask, x - np.uint64(SHARED_GENERIC))
        else:
            from_global(cta, mask, x)

    if space in ("global", "const") and strong:
        ins.control = "yield"
    load = {"global": from_global, "const": from_global, "shared": from_shared, "local": from_local,
            "generic": from_generic}[space]
    return lambda cta, mask: load(cta, mask, addr(cta))


@builds("st")
def build_st(prog, ins, parts, args, ty):
    if "async" in parts:
        return build_st_async(prog, ins, parts, args, ty)
    space = space_of(parts)
    if space == "param":  # a parameter of a call; only calls of printf and assert are known
        return lambda cta, mask: None
    width, count = access_type(ty, vector_length(parts))
    addr, values = address(prog, args[0]), sources(prog, args[1], ty)
    strong, _, releases = strength(parts)

    def to_global(cta, mask, x):
        memory = cta.device.memory
        i = memory.index(cta, mask, x.astype(np.uint64), width * count, "store")
        cta.device.stats.global_store += cta.count_active(mask) * width * count
        if releases:
            memory.release(cta, mask)
        memory.store(cta, mask, i, width, values(cta))
        if strong and memory.weak:
            memory.publish_last(cta)

    def to_shared(cta, mask, x):
        shared_memory.store(cta, mask, x, width, values(cta))

    def to_local(cta, mask, x):
        view, k = local_index(cta, x, mask, width, count)
        t = cta.tid if mask is None else cta.tid[mask]
        for j, v in enumerate(values(cta)):
            view[t, (k if mask is None else k[mask]) + j] = v if mask is None else v[mask]

    def to_generic(cta, mask, x):
        if is_shared(x, mask):
            to_shared(cta, mask, x - np.uint64(SHARED_GENERIC))
        else:
            to_global(cta, mask, x)

    if space == "global" and strong:
        ins.control = "yield"
    store = {"global": to_global, "shared": to_shared, "local": to_local, "generic": to_generic,
             "const": to_generic}[space]
    return lambda cta, mask: store(cta, mask, addr(cta))
