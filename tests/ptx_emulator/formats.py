"""Number formats: PTX types, how wide they are, and the way from register bits to numpy values and back.

Registers hold unsigned integers.  `decode` turns them into the format that arithmetic is done in (f16 and bf16 in
float32, packed types as an (n, 2) array), `encode` rounds back.
"""

import numpy as np

from .errors import Unsupported

UINT = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
PAIR128 = np.dtype("u8,u8")  # a 128-bit register

# Types whose bits are a numpy type as they stand.
NUMPY = {"pred": np.bool_, "f32": np.float32, "f64": np.float64}
BITS = {"pred": 1, "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "tf32": 32, "f16x2": 32, "bf16x2": 32, "f32x2": 64,
        "e4m3x2": 16, "e5m2x2": 16, "b128": 128}
for _bits in (8, 16, 32, 64):
    NUMPY[f"b{_bits}"] = NUMPY[f"u{_bits}"] = UINT[_bits]
    NUMPY[f"s{_bits}"] = np.dtype(f"int{_bits}").type
    for _kind in "bus":
        BITS[f"{_kind}{_bits}"] = _bits
FLOATS = {"f16", "bf16", "f32", "f64", "f16x2", "bf16x2", "f32x2", "tf32"}


def bf16_to_f32(u):
    return (u.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x, mode="rn"):
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    # nearest even: add just under half, and the last kept bit to break ties
    add = np.uint32(0) if mode == "rz" else np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))
    r = ((u + add) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), r)


def f32_to_f16(x, mode="rn"):
    h = x.astype(np.float16)
    if mode == "rz":
        over = np.abs(h.astype(np.float32)) > np.abs(x.astype(np.float32))
        h = np.where(over & np.isfinite(x), np.nextafter(h, np.float16(0)), h)
    return h.view(np.uint16)


def _fp8_table(mantissa_bits, e5m2):
    """The value of each of the 256 bit patterns."""
    u = np.arange(256)
    exponent, mantissa = (u & 0x7F) >> mantissa_bits, u & ((1 << mantissa_bits) - 1)
    sign = np.where(u & 0x80, -1.0, 1.0)
    bias = 15 if e5m2 else 7
    fraction = mantissa / 2**mantissa_bits
    v = sign * np.where(exponent > 0, (1 + fraction) * 2.0**(exponent - bias), fraction * 2.0**(1 - bias))
    if e5m2:
        v = np.where(exponent == 31, np.where(mantissa == 0, sign * np.inf, np.nan), v)
    else:  # e4m3 has no infinity and one NaN
        v = np.where((u & 0x7F) == 0x7F, np.nan, v)
    return v.astype(np.float32)


FP8 = {"e4m3": _fp8_table(3, False), "e5m2": _fp8_table(2, True)}


def f32_to_fp8(x, kind):
    """Round to nearest even, saturating to the largest finite value (satfinite)."""
    table = FP8[kind][:128]
    grid = table[np.isfinite(table)]
    a = np.minimum(np.abs(x), grid[-1]).astype(np.float64)
    hi = np.clip(np.searchsorted(grid, a), 1, len(grid) - 1)
    lo = hi - 1
    dl, dh = a - grid[lo], grid[hi] - a
    r = np.where((dl < dh) | ((dl == dh) & (lo % 2 == 0)), lo, hi)
    r = np.where(np.isnan(x), 0x7F, r)
    return (r | np.where(np.signbit(x), 0x80, 0)).astype(np.uint8)


def tf32(u):
    """What the tensor core reads of an f32 register: the low 13 bits are dropped."""
    return (u & np.uint32(0xFFFFE000)).view(np.float32)


def decode(u, ty):
    """Register bits to the format that arithmetic is done in."""
    if ty in NUMPY:
        return u.view(NUMPY[ty]) if ty != "pred" else u
    if ty == "bf16":
        return bf16_to_f32(u)
    if ty == "f16":
        return u.view(np.float16).astype(np.float32)
    if ty in ("f16x2", "bf16x2"):
        return decode(np.ascontiguousarray(u).view(np.uint16), ty[:-2]).reshape(-1, 2)
    if ty == "f32x2":
        return np.ascontiguousarray(u).view(np.float32).reshape(-1, 2)
    if ty == "tf32":
        return tf32(u)
    if ty in ("e4m3x2", "e5m2x2"):
        return FP8[ty[:4]][np.ascontiguousarray(u).view(np.uint8)].reshape(-1, 2)
    raise Unsupported(f"type {ty}")


def encode(v, ty):
    """The result of arithmetic to register bits."""
    if ty in NUMPY:
        dtype = NUMPY[ty]
        if v.dtype != dtype:
            same_width = v.dtype.itemsize == np.dtype(dtype).itemsize
            v = v.view(dtype) if v.dtype.kind in "iu" and same_width else v.astype(dtype)
        return v.view(UINT[BITS[ty]])
    if ty == "bf16":
        return f32_to_bf16(v)
    if ty == "f16":
        return f32_to_f16(v)
    if ty in ("f16x2", "bf16x2"):
        return np.ascontiguousarray(encode(v.reshape(-1), ty[:-2])).view(np.uint32)
    if ty == "f32x2":
        return np.ascontiguousarray(v.astype(np.float32)).reshape(-1).view(np.uint64)
    if ty in ("e4m3x2", "e5m2x2"):
        return f32_to_fp8(v.reshape(-1), ty[:4]).view(np.uint16)
    if ty == "tf32":
        return v.view(np.uint32)
    raise Unsupported(f"type {ty}")
