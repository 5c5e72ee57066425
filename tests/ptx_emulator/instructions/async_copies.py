"""Asynchronous copies: cp.async and st.async."""

import numpy as np

from .. import shared_memory
from ..errors import Unsupported
from ..formats import BITS, UINT
from ..operands import address, reader
from . import mbarriers
from .modifiers import sources, vector_length
from .registry import builds


@builds("cp")
def build_cp(prog, ins, parts, args, ty):
    if parts[1] == "async" and "bulk" in parts:
        raise Unsupported("bulk copies (TMA)")
    if "commit_group" in parts:
        return lambda cta, mask: cta.commit_copies()
    if "wait_group" in parts:
        keep = args[0].value
        return lambda cta, mask: cta.finish_copies(keep)
    if "wait_all" in parts:
        def wait_all(cta, mask):
            cta.commit_copies()
            cta.finish_copies(0)
        return wait_all
    if "mbarrier" in parts:
        return build_arrive_after_copies(prog, parts, args)
    return build_copy(prog, args)


def build_arrive_after_copies(prog, parts, args):
    """cp.async.mbarrier.arrive: the thread's earlier copies, then its arrival, at some later time."""
    addr, counted = address(prog, args[0]), "noinc" in parts

    def fn(cta, mask):
        cta.commit_copies()
        groups, keys = list(cta.copy_groups), mbarriers.named(cta, mask, addr(cta))

        def complete():
            for group in groups:
                while group:
                    group.pop(0)()
            for key in keys:
                barrier = cta.cluster.mbarriers[key]
                if not counted:  # the arrival comes on top of those that the barrier's count foresees
                    barrier.pending += 1
                barrier.update(arrivals=1)
        cta.device.async_ops.append(complete)
    return fn


def build_copy(prog, args):
    """cp.async of 4, 8 or 16 bytes.  The optional last operand says how many of them to read; the rest is zero."""
    dst, src, size = address(prog, args[0]), address(prog, args[1]), args[2].value
    source_size = reader(prog, args[3], "u32") if len(args) > 3 else None
    unit = min(size, 8)
    count = size // unit
    uint = UINT[8 * unit]

    def keep_first(v, nbytes):
        """Zero all but the first `nbytes`, which may be negative, of each element."""
        field = (uint(1) << np.clip(8 * nbytes, 0, 8 * unit - 1).astype(uint)) - uint(1)
        return np.where(nbytes >= unit, v, v & field)

    def fn(cta, mask):
        memory = cta.device.memory
        to = shared_memory.index(cta, mask, dst(cta), size, "cp.async")
        n = source_size(cta).astype(np.int64) if source_size else np.full(cta.n, size)
        active = cta.active(mask) & (n > 0)
        start = np.zeros(cta.n, np.int64)
        if active.any():
            start = memory.index(cta, None if active.all() else active, src(cta), size, "cp.async load")
            start = np.where(active, start, 0)
        # poison: a read before the wait for the copy must not give the right value
        shared_memory.store(cta, mask, to, unit, [np.full(cta.n, 2**(8 * unit) - 1, uint)] * count)
        cta.device.stats.global_load += int(active.sum()) * size

        def land():
            values = memory.load(cta, start, unit, count)
            values = [keep_first(v, n - j * unit) for j, v in enumerate(values)]
            shared_memory.store(cta, mask, to, unit, values)
        cta.open_copies.append(land)
    return fn


def build_st_async(prog, ins, parts, args, ty):
    """A store to a CTA of the cluster that reports its bytes to an mbarrier there."""
    count, width = vector_length(parts), BITS[ty] // 8
    addr, values, barrier = address(prog, args[0]), sources(prog, args[1], ty), address(prog, args[2])

    def fn(cta, mask):
        to = shared_memory.index(cta, mask, addr(cta), width * count, "st.async")
        stored, keys = values(cta), mbarriers.named(cta, mask, barrier(cta))

        def land():
            cta.device.stores_under_way -= 1
            shared_memory.store(cta, mask, to, width, stored, any_thread=True)
            for key in keys:
                mbarriers.find(cta, key).update(nbytes=-width * count)
        cta.device.stores_under_way += 1
        cta.device.async_ops.append(land)
    return fn
