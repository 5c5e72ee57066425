"""Moves and conversions, of values and of addresses."""

import numpy as np

from ..addresses import REMOTE, SHARED_GENERIC
from ..errors import Unsupported
from ..formats import BITS, FLOATS, NUMPY, encode, f32_to_bf16, f32_to_f16
from ..operands import elementwise, reader, writer
from .registry import builds

ROUNDINGS = ("rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi")
TO_INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
PACKED = ("f16x2", "bf16x2", "e4m3x2", "e5m2x2")


@builds("mov")
def build_mov(prog, ins, parts, args, ty):
    if ty != "pred" and ty != "b128":
        ty = f"b{BITS[ty]}"
    write, read = writer(prog, args[0], ty), reader(prog, args[1], ty)
    return lambda cta, mask: write(cta, mask, read(cta))


@builds("cvta")
def build_cvta(prog, ins, parts, args, ty):
    """Between generic addresses and those of one state space; only shared memory has a window of its own."""
    write, read = writer(prog, args[0], ty), reader(prog, args[1], ty)
    base = SHARED_GENERIC if any(x.startswith("shared") for x in parts) else 0
    if base and ty != "u64" and ty != "b64":
        raise Unsupported("cvta of 32 bits")
    base = np.uint64(base)
    if "to" in parts:
        return lambda cta, mask: write(cta, mask, read(cta) - base)
    return lambda cta, mask: write(cta, mask, read(cta) + base)


@builds("mapa")
def build_mapa(prog, ins, parts, args, ty):
    """The address of the same place in the shared memory of another CTA of the cluster."""
    if BITS[ty] != 32:
        raise Unsupported("mapa of generic addresses")
    write, addr, rank = writer(prog, args[0], ty), reader(prog, args[1], ty), reader(prog, args[2], "u32")

    def fn(cta, mask):
        window = (rank(cta) + np.uint32(1)) * np.uint32(REMOTE)
        write(cta, mask, addr(cta) % np.uint32(REMOTE) + window)
    return fn


@builds("cvt")
def build_cvt(prog, ins, parts, args, ty):
    dst_type, src_type = parts[-2], parts[-1]
    mode = next((x for x in parts[1:-2] if x in ROUNDINGS), None)
    if dst_type in PACKED and src_type == "f32":
        return pack_two(prog, args, dst_type, mode, "relu" in parts)
    if dst_type in PACKED:
        return elementwise(prog, lambda x: x, args[0], args[1:], dst_type, [src_type])
    if dst_type == "tf32":
        return elementwise(prog, round_to_tf32(mode), args[0], args[1:], "b32", ["b32"])
    if dst_type in FLOATS and src_type in FLOATS:
        if mode == "rz" and dst_type in ("f16", "bf16"):
            convert = f32_to_f16 if dst_type == "f16" else f32_to_bf16
            return elementwise(prog, lambda x: convert(x, "rz"), args[0], args[1:], "b16", [src_type])
        f = float_to_float(dst_type, src_type, mode, "sat" in parts, "relu" in parts)
    elif dst_type in FLOATS:
        target = np.float64 if dst_type == "f64" else np.float32

        def f(x):
            return x.astype(target)
    elif src_type in FLOATS:
        f = float_to_integer(dst_type, mode)
    else:
        f = integer_to_integer(dst_type, "sat" in parts)
    return elementwise(prog, f, args[0], args[1:], dst_type, [src_type])


def pack_two(prog, args, dst_type, mode, relu):
    """Two f32 into one register; the first source becomes the upper half."""
    high, low = reader(prog, args[1], "f32"), reader(prog, args[2], "f32")
    write = writer(prog, args[0], f"b{BITS[dst_type]}")

    def fn(cta, mask):
        v = np.stack([low(cta), high(cta)], 1)
        if relu:
            v = np.fmax(v, np.float32(0))
        if mode == "rz" and dst_type in ("f16x2", "bf16x2"):
            halves = (f32_to_bf16 if dst_type == "bf16x2" else f32_to_f16)(v, "rz")
            write(cta, mask, np.ascontiguousarray(halves).view(np.uint32)[:, 0])
        else:
            write(cta, mask, encode(v, dst_type))
    return fn


def round_to_tf32(mode):
    """From bits to bits: to nearest, ties away from zero (rna) or to even."""
    def ties_away(u):
        special = (u & np.uint32(0x7F800000)) == 0x7F800000
        return np.where(special, u, (u + np.uint32(0x1000)) & np.uint32(0xFFFFE000))

    def ties_to_even(u):
        return (u + np.uint32(0xFFF) + ((u >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)
    return ties_away if mode == "rna" else ties_to_even


def float_to_float(dst_type, src_type, mode, saturate, relu):
    whole = TO_INTEGRAL.get(mode)

    def f(x):
        if whole:
            x = whole(x)
        if dst_type == "f64":
            return x.astype(np.float64)
        if src_type == "f64" and dst_type in ("f16", "bf16"):
            x = x.astype(np.float32)
        if dst_type == "f32" and x.dtype != np.float32:
            x = x.astype(np.float32)
        if relu:
            x = np.fmax(x, x.dtype.type(0))
        return np.clip(x, 0, 1) if saturate else x
    return f


def float_to_integer(dst_type, mode):
    """Out of range gives the nearest integer that fits, NaN gives 0."""
    whole, info = TO_INTEGRAL.get(mode, np.trunc), np.iinfo(NUMPY[dst_type])

    def f(x):
        y = whole(x.astype(np.float64))
        y = np.where(np.isnan(y), 0, y)
        r = np.where(y >= info.max, info.max, np.where(y <= info.min, info.min, 0)).astype(NUMPY[dst_type])
        inside = (y < info.max) & (y > info.min)
        return np.where(inside, np.where(inside, y, 0).astype(NUMPY[dst_type]), r)
    return f


def integer_to_integer(dst_type, saturate):
    info = np.iinfo(NUMPY[dst_type])
    if saturate:
        return lambda x: np.clip(x.astype(object), info.min, info.max).astype(NUMPY[dst_type])
    return lambda x: x.astype(NUMPY[dst_type])
