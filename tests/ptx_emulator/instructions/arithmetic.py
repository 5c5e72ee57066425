"""Integer and floating-point arithmetic, logic and shifts."""

import numpy as np

from ..errors import Unsupported
from ..formats import BITS, FLOATS
from ..operands import elementwise, reader, writer
from .registry import builds

UNARY = {"neg": np.negative, "abs": np.abs, "not": np.invert, "ex2": np.exp2, "lg2": np.log2, "sqrt": np.sqrt,
         "rcp": lambda x: (1 / x).astype(x.dtype), "rsqrt": lambda x: (1 / np.sqrt(x)).astype(x.dtype),
         "tanh": np.tanh, "sin": np.sin, "cos": np.cos, "cnot": lambda x: (x == 0).astype(x.dtype)}
BINARY = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "and": np.bitwise_and, "or": np.bitwise_or,
          "xor": np.bitwise_xor}


def round_to_11_bits(x):
    u = x.view(np.uint32)
    u = (u + np.uint32(0xFFF) + ((u >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)
    return u.view(np.float32)


def divide_integers(a, b, remainder):
    """Quotient (rounded towards zero) or remainder.  Division by zero gives all ones and the dividend, as on GPUs."""
    zero = b == 0
    b = np.where(zero, np.ones_like(b), b)
    if a.dtype.kind == "u":
        q = a // b
        all_ones = 2**(8 * q.dtype.itemsize) - 1
    else:
        with np.errstate(all="ignore"):
            q = (np.abs(a) // np.abs(b)) * np.sign(a) * np.sign(b)
        all_ones = -1
    if remainder:
        return np.where(zero, a, a - q * b).astype(a.dtype)
    return np.where(zero, np.full_like(q, all_ones), q).astype(a.dtype)


def multiply_high(a, b):
    if a.dtype.itemsize < 8:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return ((a.astype(wide) * b.astype(wide)) >> wide(8 * a.dtype.itemsize)).astype(a.dtype)
    return np.array([(int(x) * int(y) >> 64) & (2**64 - 1) for x, y in zip(a, b)], np.uint64).view(a.dtype)


def widen(x):
    return x.astype(np.dtype(f"{x.dtype.kind}{2 * x.dtype.itemsize}"))


def multiply_add(x, y, z):
    return x * y + z


def fused_multiply_add(x, y, z):
    """The exact product in f64, then one rounding.  (For operands in f64 it would not be fused.)"""
    return multiply_add(x.astype(np.float64), y.astype(np.float64), z.astype(np.float64)).astype(x.dtype)


def shift(x, k, left, arithmetic):
    """Shifts by the width or more give 0, or the sign."""
    uint, bits = x.dtype.type, 8 * x.dtype.itemsize
    big = k >= np.uint32(bits)
    k = np.where(big, np.uint32(0), k).astype(x.dtype)
    r = (x << k) if left else (x >> k)
    if big.any():
        r = np.where(big, (x >> uint(bits - 1)) if arithmetic and not left else uint(0), r)
    return r


def mixed(parts, ty):
    """Whether an instruction on f32 takes its factors, or the first of its summands, from 16-bit floats of type ``ty``
    (sm_100 and later). An instruction with two types that is not of this kind is unsupported: taken for one of its last
    type it would compute something else."""
    types = [part for part in parts[1:] if part in BITS]
    if len(types) < 2:
        return False
    if parts[0] in ("add", "sub", "fma") and types[0] == "f32" and ty in ("f16", "bf16") and "sat" not in parts:
        return True
    raise Unsupported(f"{'.'.join(parts)}, which has two types")


@builds("neg", "abs", "not", "ex2", "lg2", "sqrt", "rcp", "rsqrt", "tanh", "sin", "cos", "cnot")
def build_unary(prog, ins, parts, args, ty):
    f = np.logical_not if ty == "pred" else UNARY[parts[0]]
    if parts[0] == "tanh" and ty == "f32":  # tanh.approx: its documented error is 2**-11, relative
        def f(x):
            return round_to_11_bits(np.tanh(x))
    return elementwise(prog, f, args[0], args[1:2], ty, [ty])


@builds("add", "sub", "mul", "div", "rem", "min", "max", "and", "or", "xor", "shl", "shr", "copysign", "addc", "subc")
def build_binary(prog, ins, parts, args, ty):
    name, dst, srcs = parts[0], args[0], args[1:]
    if mixed(parts, ty):
        return elementwise(prog, BINARY[name], dst, srcs, "f32", [ty, "f32"])
    if "cc" in parts or name in ("addc", "subc"):
        return build_carry(prog, ins, parts, args, ty)
    if name == "mul" and "wide" in parts:
        return elementwise(prog, lambda x, y: widen(x) * widen(y), dst, srcs, f"{ty[0]}{2 * BITS[ty]}", [ty, ty])
    if name == "mul" and "hi" in parts:
        return elementwise(prog, multiply_high, dst, srcs, ty, [ty, ty])
    if name in ("shl", "shr"):
        left, arithmetic = name == "shl", ty[0] == "s"
        return elementwise(prog, lambda x, k: shift(x, k, left, arithmetic), dst, srcs, ty, [ty, "b32"])
    if name == "copysign":
        return elementwise(prog, lambda x, y: np.copysign(y, x), dst, srcs, ty, [ty, ty])
    if name in ("min", "max"):
        numbers_win, nan_wins = {"min": (np.fmin, np.minimum), "max": (np.fmax, np.maximum)}[name]
        f = nan_wins if "NaN" in parts or ty not in FLOATS else numbers_win
        if len(args) == 4:
            return elementwise(prog, lambda x, y, z: f(f(x, y), z), dst, srcs, ty, [ty] * 3)
    elif name in ("div", "rem"):
        if ty in FLOATS:
            f = np.divide
        else:
            def f(x, y):
                return divide_integers(x, y, name == "rem")
    else:
        f = BINARY[name]
    if "sat" in parts and ty in FLOATS:
        def saturated(x, y):
            return np.fmin(np.fmax(f(x, y), x.dtype.type(0)), x.dtype.type(1))
        return elementwise(prog, saturated, dst, srcs, ty, [ty, ty])
    return elementwise(prog, f, dst, srcs, ty, [ty, ty])


@builds("mad", "fma", "madc")
def build_multiply_add(prog, ins, parts, args, ty):
    name, dst, srcs = parts[0], args[0], args[1:]
    if mixed(parts, ty):
        return elementwise(prog, fused_multiply_add, dst, srcs, "f32", [ty, ty, "f32"])
    if "cc" in parts or name == "madc":
        return build_carry(prog, ins, parts, args, ty)
    if name == "mad" and "wide" in parts:
        wide = f"{ty[0]}{2 * BITS[ty]}"
        return elementwise(prog, lambda x, y, z: widen(x) * widen(y) + z, dst, srcs, wide, [ty, ty, wide])
    if name == "mad" and "hi" in parts:
        return elementwise(prog, lambda x, y, z: multiply_high(x, y) + z, dst, srcs, ty, [ty] * 3)
    f = fused_multiply_add if ty in FLOATS and ty != "f64" else multiply_add
    if ty in FLOATS and "relu" in parts:
        return elementwise(prog, lambda x, y, z: np.maximum(f(x, y, z), x.dtype.type(0)), dst, srcs, ty, [ty] * 3)
    return elementwise(prog, f, dst, srcs, ty, [ty] * 3)


def build_carry(prog, ins, parts, args, ty):
    """add, addc, sub, subc, mad and madc with the condition code, on 32-bit operands."""
    if BITS[ty] != 32:
        raise Unsupported("carry arithmetic on 64 bits")
    name = parts[0]
    write, reads = writer(prog, args[0], "u32"), [reader(prog, x, "u32") for x in args[1:]]
    takes, gives, subtract = name in ("addc", "subc", "madc"), "cc" in parts, name in ("sub", "subc")

    def fn(cta, mask):
        v = [read(cta).astype(np.uint64) for read in reads]
        if len(v) == 3:
            product = v[0] * v[1]
            v = [(product >> np.uint64(32)) if "hi" in parts else product & np.uint64(0xFFFFFFFF), v[2]]
        carry = cta.carry if takes else np.zeros(cta.n, np.uint64)
        t = v[0] - v[1] - carry if subtract else v[0] + v[1] + carry
        write(cta, mask, t.astype(np.uint32))
        if gives:
            carry = (t >> np.uint64(32)) & np.uint64(1)
            cta.carry = carry if mask is None else np.where(mask, carry, cta.carry)
    return fn
