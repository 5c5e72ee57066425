"""Exchanges between the threads of a warp."""

import numpy as np

from ..operands import Pair, Sink, reader, writer
from .registry import builds

REDUCE = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
          "xor": np.bitwise_xor}


def by_warp(cta, v):
    """(warps, 32) view; the last warp of a CTA with a partial warp is padded."""
    missing = cta.warps * 32 - cta.n
    return (np.concatenate([v, np.zeros(missing, v.dtype)]) if missing else v).reshape(cta.warps, 32)


def to_threads(cta, v):
    """One value per warp to one per thread."""
    return np.repeat(v, 32)[:cta.n]


def pack_bits(b):
    """Booleans along the last axis to an integer, lane 0 lowest."""
    return (b.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(-1).astype(np.uint32)


def ballot(cta, b):
    return pack_bits(by_warp(cta, b))


def value_and_predicate(prog, dst):
    """Writers for `%r|%p`; the second is None where there is no predicate."""
    if isinstance(dst, Pair):
        return writer(prog, dst.first, "b32"), writer(prog, dst.second, "pred")
    return writer(prog, dst, "b32"), None


@builds("shfl")
def build_shfl(prog, ins, parts, args, ty):
    kind = parts[2] if parts[1] == "sync" else parts[1]
    write, write_ok = value_and_predicate(prog, args[0])
    x, b, c = (reader(prog, operand, "b32") for operand in args[1:4])
    lane, base = prog.lane.astype(np.int64), (np.arange(prog.threads) & ~31)

    def fn(cta, mask):
        bv, cv = b(cta).astype(np.int64) & 31, c(cta).astype(np.int64)
        segment = (cv >> 8) & 31
        low = lane & segment
        limit = low | (cv & 31 & ~segment)
        if kind == "up":
            j = lane - bv
            ok = j >= limit
        else:
            j = lane + bv if kind == "down" else lane ^ bv if kind == "bfly" else low | (bv & ~segment)
            ok = j <= limit
        write(cta, mask, x(cta)[base + np.where(ok, j, lane)])
        if write_ok:
            write_ok(cta, mask, ok)
    return fn


@builds("activemask")
def build_activemask(prog, ins, parts, args, ty):
    write = writer(prog, args[0], "b32")
    return lambda cta, mask: write(cta, mask, to_threads(cta, ballot(cta, cta.active(mask))))


@builds("elect")
def build_elect(prog, ins, parts, args, ty):
    dst = args[0] if isinstance(args[0], Pair) else Pair(Sink(), args[0])
    write, write_elected = value_and_predicate(prog, dst)

    def fn(cta, mask):
        leader = by_warp(cta, cta.active(mask)).argmax(1)
        write(cta, mask, to_threads(cta, leader.astype(np.uint32)))
        write_elected(cta, mask, prog.lane == to_threads(cta, leader))
    return fn


@builds("match")
def build_match(prog, ins, parts, args, ty):
    write, write_same = value_and_predicate(prog, args[0])
    x = reader(prog, args[1], ty)

    def match_all(cta, mask):
        v, active = by_warp(cta, x(cta)), by_warp(cta, cta.active(mask))
        everyone = to_threads(cta, pack_bits(active))
        same = to_threads(cta, np.array([len(np.unique(r[k])) <= 1 for r, k in zip(v, active)]))
        write(cta, mask, np.where(same, everyone, np.uint32(0)))
        if write_same:
            write_same(cta, mask, same)

    def match_any(cta, mask):
        v, active = by_warp(cta, x(cta)), by_warp(cta, cta.active(mask))
        equal = (v[:, :, None] == v[:, None, :]) & active[:, None, :]
        write(cta, mask, pack_bits(equal).reshape(-1)[:cta.n])
    return match_all if "all" in parts else match_any


@builds("vote")
def build_vote(prog, ins, parts, args, ty):
    kind = parts[2]
    x, write = reader(prog, args[1], "pred"), writer(prog, args[0], "b32" if kind == "ballot" else "pred")

    def fn(cta, mask):
        active = cta.active(mask)
        yes, every = ballot(cta, x(cta) & active), ballot(cta, active)
        r = {"ballot": yes, "any": yes != 0, "all": yes == every, "uni": (yes == every) | (yes == 0)}[kind]
        write(cta, mask, to_threads(cta, r))
    return fn


@builds("redux")
def build_redux(prog, ins, parts, args, ty):
    write, x, op = writer(prog, args[0], ty), reader(prog, args[1], ty), REDUCE[parts[2]]

    def fn(cta, mask):
        v, active = x(cta), cta.active(mask)
        r = v.copy()
        for k in range(cta.warps):
            warp = slice(32 * k, 32 * k + 32)
            if active[warp].any():
                r[warp] = op.reduce(v[warp][active[warp]])
        write(cta, mask, r)
    return fn
