"""Bit fields, permutations and counts."""

import numpy as np

from ..errors import Unsupported
from ..formats import BITS, UINT
from ..operands import elementwise, reader, writer
from .registry import builds


def bfe(a, position, length, ty):
    """Extract a bit field."""
    bits = BITS[ty]
    p, n = (position & np.uint32(255)).astype(np.int64), (length & np.uint32(255)).astype(np.int64)
    field = (np.uint64(1) << np.minimum(n, 63).astype(np.uint64)) - np.uint64(1)
    u = a.view(UINT[bits]).astype(np.uint64)
    r = np.where(p < 64, u >> np.minimum(p, 63).astype(np.uint64), 0)
    r = np.where(n < 64, r & field, r)
    if ty[0] == "s":
        top = np.minimum(p + n - 1, bits - 1)
        sign = ((u >> np.maximum(top, 0).astype(np.uint64)) & np.uint64(1)) == 1
        r = np.where(sign & (n > 0) & (n < 64), r | ~field, r)
    return r.astype(UINT[bits]).view(a.dtype)


def bfi(a, b, position, length, ty):
    """Insert the low bits of a into b."""
    bits = BITS[ty]
    p, n = (position & np.uint32(255)).astype(np.uint64), (length & np.uint32(255)).astype(np.uint64)
    field = np.where(n < 64, (np.uint64(1) << np.minimum(n, 63)) - np.uint64(1), np.uint64(2**64 - 1))
    field = np.where(p < bits, field << np.minimum(p, 63), np.uint64(0))
    x = np.where(p < bits, a.astype(np.uint64) << np.minimum(p, 63), np.uint64(0))
    return ((b.astype(np.uint64) & ~field) | (x & field)).astype(UINT[bits])


def prmt(a, b, selector):
    """Pick four of the eight bytes of (a, b)."""
    src = np.stack([a, b], 1).view(np.uint8)
    rows = np.arange(len(a))
    out = np.zeros((len(a), 4), np.uint8)
    for j in range(4):
        s = (selector >> np.uint32(4 * j)) & np.uint32(15)
        byte = src[rows, s & np.uint32(7)]
        out[:, j] = np.where(s & np.uint32(8), np.where(byte & 0x80, 0xFF, 0), byte)  # bit 3: replicate the sign
    return out.view(np.uint32)[:, 0]


def lop3(a, b, c, table):
    """Any logic function of three inputs, by its truth table."""
    r = np.zeros_like(a)
    for k in range(8):
        if table >> k & 1:
            r |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
    return r


def funnel_shift(left, wrap):
    def f(a, b, c):
        k = (c & np.uint32(31)) if wrap else np.minimum(c, np.uint32(32))
        v = (b.astype(np.uint64) << np.uint64(32)) | a.astype(np.uint64)
        k = k.astype(np.uint64)
        return ((v << k) >> np.uint64(32)).astype(np.uint32) if left else (v >> k).astype(np.uint32)
    return f


def popc(x):
    return np.bitwise_count(x).astype(np.uint32)


def clz(x):
    bits = 8 * x.dtype.itemsize
    n = np.full(x.shape, bits, np.uint32)
    for k in range(bits):
        n = np.where((x >> x.dtype.type(k)) & x.dtype.type(1), np.uint32(bits - 1 - k), n)
    return n


def bfind(x):
    return (np.uint32(8 * x.dtype.itemsize - 1) - clz(x)).astype(np.uint32)


def brev(x):
    b = np.unpackbits(np.ascontiguousarray(x).view(np.uint8).reshape(len(x), -1), axis=1, bitorder="little")
    return np.packbits(b[:, ::-1], axis=1, bitorder="little").view(x.dtype)[:, 0]


@builds("popc", "clz", "brev", "bfind")
def build_count(prog, ins, parts, args, ty):
    f = {"popc": popc, "clz": clz, "brev": brev, "bfind": bfind}[parts[0]]
    unsigned = ty.replace("s", "u")
    return elementwise(prog, f, args[0], args[1:], unsigned if parts[0] == "brev" else "b32", [unsigned])


@builds("bfe", "bfi", "prmt", "lop3", "shf")
def build_field(prog, ins, parts, args, ty):
    name, dst, srcs = parts[0], args[0], args[1:]
    if name == "bfe":
        return elementwise(prog, lambda x, p, n: bfe(x, p, n, ty), dst, srcs, ty, [ty, "u32", "u32"])
    if name == "prmt":
        if len(parts) > 2:
            raise Unsupported("prmt mode")
        return elementwise(prog, prmt, dst, srcs, "b32", ["b32"] * 3)
    if name == "shf":
        return elementwise(prog, funnel_shift(parts[1] == "l", parts[2] == "wrap"), dst, srcs, "b32", ["b32"] * 3)
    if name == "lop3":
        table = args[4].value
        return elementwise(prog, lambda x, y, z: lop3(x, y, z, table), dst, srcs[:3], ty, [ty] * 3)
    write = writer(prog, dst, ty)
    a, b, position, length = (reader(prog, x, t) for x, t in zip(srcs, [ty, ty, "u32", "u32"]))
    return lambda cta, mask: write(cta, mask, bfi(a(cta), b(cta), position(cta), length(cta), ty))
