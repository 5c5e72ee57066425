"""Checked accesses to shared memory, the CTA's own and that of its cluster."""

import numpy as np

from .addresses import REMOTE
from .errors import Misaligned, OutOfBounds, SharedRace


def owners(cta, addr):
    """[(owning CTA, threads that address it or None for all, offsets)] of shared-window addresses."""
    if not (addr >= REMOTE).any():
        return [(cta, None, addr)]
    rank = (addr // REMOTE) - 1
    out = []
    for r in np.unique(rank):
        if r >= len(cta.cluster.ctas):
            raise OutOfBounds(f"shared::cluster address of rank {r} in a cluster of {len(cta.cluster.ctas)}, "
                              f"{cta.where()}")
        owner = cta if r < 0 else cta.cluster.ctas[r]
        if owner.done and owner is not cta:
            raise OutOfBounds(f"access to the shared memory of CTA {owner.ctaid}, which has exited, {cta.where()}")
        out.append((owner, rank == r, np.where(rank == r, addr % REMOTE, 0)))
    return out


def index(cta, mask, addr, nbytes, what):
    """Checked shared-window addresses; inactive threads get 0."""
    size = cta.device.shared_bytes
    i = addr.astype(np.int64)
    if mask is not None:
        i = np.where(mask, i, 0)
    if (i & (min(nbytes, 16) - 1)).any():
        raise Misaligned(f"{what} of {nbytes} bytes in shared memory, {cta.where()}")
    off = i % REMOTE if (i >= REMOTE).any() else i
    if (off + nbytes > size).any() or (off < 0).any():
        t = int((off + nbytes > size).argmax())
        raise OutOfBounds(f"{what} of {nbytes} bytes at shared byte {int(off[t])} of {size}, thread {t}, "
                          f"{cta.where()}")
    return i


def both(mask, part):
    """The conjunction of two masks, where None stands for all threads."""
    return mask if part is None else part if mask is None else part & mask


def load(cta, mask, addr, width, count):
    """`count` arrays of `width`-byte elements, one element per thread each."""
    i = index(cta, mask, addr, width * count, "load")
    cta.device.stats.shared_load += cta.count_active(mask) * width * count
    out = None
    for owner, part, off in owners(cta, i):
        active = both(mask, part)
        if owner.races and (active is None or active.any()):
            threads = cta.cluster_tid if active is None else cta.cluster_tid[active]
            owner.races.read(cta, off if active is None else off[active], width * count, threads)
        k = off >> (width.bit_length() - 1)
        got = [owner.shared[width][k + j] for j in range(count)]
        out = got if out is None else [np.where(part, a, b) for a, b in zip(got, out)]
    return out


def store(cta, mask, addr, width, values, any_thread=False):
    """Store one `width`-byte element per thread of each array in `values`, side by side."""
    nbytes = width * len(values)
    i = index(cta, mask, addr, nbytes, "store")
    cta.device.stats.shared_store += cta.count_active(mask) * nbytes
    for owner, part, off in owners(cta, i):
        active = both(mask, part)
        k, threads, xs = off, cta.cluster_tid, values
        if active is not None:
            if not active.any():
                continue
            k, threads, xs = off[active], threads[active], [x[active] for x in values]
        b = k >> (width.bit_length() - 1)
        memory = owner.shared[width]
        if owner.races:
            same = lambda: np.logical_and.reduce([memory[b + j] == x for j, x in enumerate(xs)])  # noqa: B023
            duplicate = owner.races.write(cta, k, nbytes, threads, same, any_thread)
        for j, x in enumerate(xs):
            memory[b + j] = x
        if owner.races and duplicate.any():
            for j, x in enumerate(xs):
                differs = memory[b + j] != x
                if differs.any():
                    p = int(differs.argmax())
                    raise SharedRace(f"threads write different values to shared byte {int(k[p])} "
                                     f"(thread {int(threads[p])}), {cta.where()}")
