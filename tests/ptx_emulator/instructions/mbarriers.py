"""Mbarriers: barriers in shared memory that count arrivals and transferred bytes.

They are objects beside shared memory and not bits in it: a kernel that reads or overwrites one as data is not noticed.
"""

import numpy as np

from ..addresses import REMOTE
from ..errors import EmulatorError, Unsupported
from ..operands import Memory, address, reader, writer
from .registry import builds


class Mbarrier:
    """A phase completes when all expected arrivals have come and no announced bytes are outstanding."""

    def __init__(self, count):
        self.count = self.pending = count
        self.bytes = self.phase = 0

    def update(self, arrivals=0, nbytes=0):
        self.pending -= arrivals
        self.bytes += nbytes
        if self.pending < 0:
            raise EmulatorError("mbarrier: more arrivals than its count")
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count


def named(cta, mask, addr):
    """[(rank, offset)] of the mbarriers that the active threads name."""
    x = addr if mask is None else addr[mask]
    return [((int(v) // REMOTE - 1) if v >= REMOTE else cta.rank, int(v) % REMOTE) for v in x]


def find(cta, key):
    if key not in cta.cluster.mbarriers:
        raise EmulatorError(f"mbarrier at shared byte {key[1]} of rank {key[0]} is not initialised, {cta.where()}")
    return cta.cluster.mbarriers[key]


@builds("mbarrier")
def build_mbarrier(prog, ins, parts, args, ty):
    kind = parts[1]
    if kind in ("init", "inval"):
        return build_init(prog, args, kind)
    if kind in ("try_wait", "test_wait"):
        return build_wait(prog, ins, parts, args)
    if kind in ("arrive", "expect_tx", "complete_tx", "arrive_drop"):
        return build_arrive(prog, ins, parts, args)
    raise Unsupported(ins.op)


def build_init(prog, args, kind):
    addr, count = address(prog, args[0]), (reader(prog, args[1], "u32") if kind == "init" else None)

    def fn(cta, mask):
        n = count(cta) if count else None
        for t, key in zip(np.flatnonzero(cta.active(mask)), named(cta, mask, addr(cta))):
            if kind == "init":
                cta.cluster.mbarriers[key] = Mbarrier(int(n[t]))
            else:
                cta.cluster.mbarriers.pop(key, None)
    return fn


def build_wait(prog, ins, parts, args):
    if "parity" not in parts:
        raise Unsupported(ins.op)
    write, addr, parity = writer(prog, args[0], "pred"), address(prog, args[1]), reader(prog, args[2], "u32")
    acquires = "relaxed" not in parts

    def fn(cta, mask):
        keys, result = named(cta, mask, addr(cta)), np.zeros(cta.n, bool)
        wanted = parity(cta)
        for t, key in zip(np.flatnonzero(cta.active(mask)), keys):
            result[t] = (find(cta, key).phase & 1) != (int(wanted[t]) & 1)
        write(cta, mask, result)
        done = result & cta.active(mask)
        if done.any():
            cta.synced(done if not done.all() else None)
            cta.cluster.acquire_time[cta.rank] = cta.mbarrier_wait_time = cta.cluster.time
            if acquires:
                cta.device.memory.acquire(cta, done)
    ins.control = "poll"
    return fn


def build_arrive(prog, ins, parts, args):
    kind = parts[1]
    arrives = kind.startswith("arrive")
    k = 1 if arrives and not isinstance(args[0], Memory) else 0  # the first operand may be the returned state
    addr = address(prog, args[k])
    extra = reader(prog, args[k + 1], "u32") if len(args) > k + 1 else None  # a number of bytes or of arrivals
    counts_bytes = "expect_tx" in parts or kind == "complete_tx"
    ins.control = "yield"

    def fn(cta, mask):
        e = extra(cta) if extra else None
        if arrives:
            cta.device.memory.release(cta, mask)
            cta.synced(mask)
            cta.cluster.release_time[cta.rank] = cta.cluster.time
        for t, key in zip(np.flatnonzero(cta.active(mask)), named(cta, mask, addr(cta))):
            barrier = find(cta, key)
            n = int(e[t]) if e is not None else (0 if counts_bytes else 1)
            if counts_bytes:
                barrier.bytes += n if kind != "complete_tx" else -n
                n = 1 if arrives else 0
            barrier.update(arrivals=n if arrives else 0)
            cta.device.progress += 1
    return fn
