"""Operands: their syntax, and the closures that read and write them.

`reader(prog, operand, type)` gives a function cta -> array in the type's computing format (see formats), `writer` a
function (cta, mask, values) -> None, `address` a function cta -> array of addresses.  All decisions about types are
taken when these are made, once per instruction, and not when they run.
"""

import re
import struct
from typing import NamedTuple

import numpy as np

from .errors import Unsupported
from .formats import BITS, NUMPY, PAIR128, UINT, decode, encode


class Sink(NamedTuple):
    """`_`: the result is not wanted."""


class Register(NamedTuple):
    index: int
    bits: int


class Immediate(NamedTuple):
    value: int  # for floating-point literals, their bits
    kind: str | None  # f32 or f64 for floating-point literals


class Symbol(NamedTuple):
    """A variable, parameter or label."""
    name: str
    offset: int


class Special(NamedTuple):
    """A special register, as %tid.x."""
    name: str


class Negated(NamedTuple):
    """`!p`, a negated predicate."""
    operand: tuple


class Vector(NamedTuple):
    """`{a, b, ...}`"""
    elements: list


class Pair(NamedTuple):
    """`a|b`, two destinations."""
    first: tuple
    second: tuple


class Memory(NamedTuple):
    """`[base + offset]`"""
    base: tuple
    offset: int


class TensorCoordinates(NamedTuple):
    """`[map, coordinates]` of a bulk copy."""
    elements: list


NAME = r"[%$A-Za-z_][\w$.]*"


def split_operands(text):
    """Split at top-level commas."""
    out, depth, current = [], 0, ""
    for ch in text:
        depth += (ch in "{[(") - (ch in "}])")
        if ch == "," and depth == 0:
            out.append(current)
            current = ""
        else:
            current += ch
    if current.strip():
        out.append(current)
    return [x.strip() for x in out]


def parse(text, scopes):
    """One operand; `scopes` are the register declarations of the open blocks, name -> Register."""
    text = text.strip()
    if text == "_":
        return Sink()
    if text[0] == "{":
        return Vector([parse(x, scopes) for x in split_operands(text[1:-1])])
    if text[0] == "[":
        elements = split_operands(text[1:-1])
        if len(elements) > 1:
            return Memory(TensorCoordinates([parse(x, scopes) for x in elements]), 0)
        m = re.match(r"(.+?)\s*(?:\+\s*(-?\s*\w+))?$", elements[0])
        return Memory(parse(m.group(1), scopes), int((m.group(2) or "0").replace(" ", ""), 0))
    if text[0] == "!":
        return Negated(parse(text[1:], scopes))
    if "|" in text:
        return Pair(*[parse(x, scopes) for x in text.split("|")])
    for scope in reversed(scopes):
        if text in scope:
            return scope[text]
    m = re.match(r"0([fFdD])([0-9a-fA-F]+)$", text)
    if m and not text.lower().startswith("0x"):
        return Immediate(int(m.group(2), 16), "f32" if m.group(1) in "fF" else "f64")
    if re.match(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$", text):
        digits = text.rstrip("U")
        return Immediate(int(digits, 8) if re.match(r"-?0\d", text) else int(digits, 0), None)
    if text[0] == "%":
        return Special(text)
    m = re.match(r"([\w$.]+)\s*\+\s*(\d+)$", text)
    return Symbol(m.group(1), int(m.group(2))) if m else Symbol(text, 0)


# ------------------------------------------------------------------------------------------------ reading
def constant(prog, operand, ty):
    """An immediate as a read-only array, made once per program."""
    key = (operand.value, operand.kind, ty)
    if key not in prog.constants:
        value = operand.value
        if operand.kind == "f64" and ty == "f32":
            value = int(np.float32(struct.unpack("<d", struct.pack("<Q", value))[0]).view(np.uint32))
        if ty == "pred":
            array = np.full(prog.threads, value != 0, bool)
        else:
            bits = max(BITS[ty], 8)
            array = decode(np.full(prog.threads, value & (2**bits - 1), UINT[bits]), ty)
        array.flags.writeable = False
        prog.constants[key] = array
    return prog.constants[key]


def reader(prog, operand, ty):
    if isinstance(operand, Immediate):
        array = constant(prog, operand, ty)
        return lambda cta: array
    if isinstance(operand, Negated):
        positive = reader(prog, operand.operand, "pred")
        return lambda cta: ~positive(cta)
    if isinstance(operand, Register):
        return register_reader(operand, ty)
    if isinstance(operand, Special):
        f = special_register(prog, operand.name)
        uint = UINT[BITS[ty]] if ty in NUMPY else np.uint32
        return lambda cta: decode(np.broadcast_to(np.asarray(f(cta)).astype(uint), (prog.threads,)), ty)
    if isinstance(operand, Symbol):
        uint = UINT[max(32, BITS[ty])]

        def symbol_address(cta):
            space, offset = prog.symbols[operand.name]
            if space in ("global", "const"):
                offset = cta.device.globals[operand.name]
            return np.full(prog.threads, offset + operand.offset, uint)
        return symbol_address
    if isinstance(operand, Vector):
        return packed_reader(prog, operand, ty)
    raise Unsupported(f"operand {operand}")


def register_reader(register, ty):
    index, width = register
    bits = BITS[ty]
    if ty == "pred" or bits == 128:
        return lambda cta: cta.registers[index]
    if width == bits:
        if ty[0] in "bu" and ty in NUMPY:
            return lambda cta: cta.registers[index]
        if ty in NUMPY:
            dtype = NUMPY[ty]
            return lambda cta: cta.registers[index].view(dtype)
        return lambda cta: decode(cta.registers[index], ty)
    uint = UINT[bits]
    return lambda cta: decode(cta.registers[index].astype(uint), ty)


def packed_reader(prog, vector, ty):
    """mov.b64 %rd, {%r1, %r2}: the lowest element first."""
    total = BITS[ty]
    each = total // len(vector.elements)
    reads = [reader(prog, x, f"b{each}") for x in vector.elements]
    if total == 128:
        def pack128(cta):
            out = np.zeros(prog.threads, PAIR128)
            out["f0"], out["f1"] = reads[0](cta), reads[1](cta)
            return out
        return pack128

    def pack(cta):
        return np.ascontiguousarray(np.stack([f(cta) for f in reads], 1)).view(UINT[total])[:, 0]
    return lambda cta: decode(pack(cta), ty)


def address(prog, memory):
    """cta -> address array of a memory operand: uint64 for registers of 64 bits, else uint32."""
    base, offset = memory
    if isinstance(base, Register):
        index, width = base
        if offset == 0:
            return lambda cta: cta.registers[index]
        k = np.full(prog.threads, offset & (2**width - 1), UINT[width])
        return lambda cta: cta.registers[index] + k
    if isinstance(base, Immediate):
        fixed = np.full(prog.threads, base.value + offset, np.uint64)
        return lambda cta: fixed
    f = reader(prog, base, "b64")
    return lambda cta: f(cta) + np.uint64(offset)


def special_register(prog, name):
    """A function cta -> value or array of values."""
    base, _, dim = name.lstrip("%").partition(".")
    d = {"": 0, "x": 0, "y": 1, "z": 2}.get(dim, 0)
    lane = prog.lane
    table = {
        "tid": lambda c: c.tid if d == 0 else 0,
        "ntid": lambda c: prog.threads if d == 0 else 1,
        "ctaid": lambda c: c.ctaid[d],
        "nctaid": lambda c: c.device.grid[d],
        "laneid": lambda c: lane,
        "warpid": lambda c: c.warp,
        "nwarpid": lambda c: c.warps,
        "clusterid": lambda c: c.ctaid[0] // c.device.cluster_size if d == 0 else c.ctaid[d],
        "nclusterid": lambda c: c.device.grid[0] // c.device.cluster_size if d == 0 else c.device.grid[d],
        "cluster_ctaid": lambda c: c.rank if d == 0 else 0,
        "cluster_nctaid": lambda c: c.device.cluster_size if d == 0 else 1,
        "cluster_ctarank": lambda c: c.rank,
        "cluster_nctarank": lambda c: c.device.cluster_size,
        "is_explicit_cluster": lambda c: c.device.cluster_size > 1,
        "smid": lambda c: 0,
        "nsmid": lambda c: 1,
        "gridid": lambda c: 0,
        "clock": lambda c: c.clock & 0xFFFFFFFF,
        "clock_hi": lambda c: c.clock >> 32,
        "clock64": lambda c: c.clock,
        "globaltimer": lambda c: c.device.ns,
        "globaltimer_lo": lambda c: c.device.ns & 0xFFFFFFFF,
        "globaltimer_hi": lambda c: c.device.ns >> 32,
        "dynamic_smem_size": lambda c: c.device.shared_bytes,
        "total_smem_size": lambda c: c.device.shared_bytes,
        "lanemask_eq": lambda c: 1 << lane,
        "lanemask_lt": lambda c: (1 << lane) - 1,
        "lanemask_le": lambda c: (2 << lane) - 1,
        "lanemask_gt": lambda c: 0xFFFFFFFF & ~((2 << lane) - 1),
        "lanemask_ge": lambda c: 0xFFFFFFFF & ~((1 << lane) - 1),
    }
    if base not in table:
        raise Unsupported(f"special register {name}")
    return table[base]


# ------------------------------------------------------------------------------------------------ writing
def writer(prog, operand, ty):
    if isinstance(operand, Sink):
        return lambda cta, mask, values: None
    if isinstance(operand, Vector):
        return unpacked_writer(prog, operand, ty)
    if not isinstance(operand, Register):
        raise Unsupported(f"destination {operand}")
    index, width = operand
    if ty == "pred" or width in (1, 128):
        convert = None
    elif ty in NUMPY and NUMPY[ty] not in (np.float32, np.float64):
        dtype, uint = NUMPY[ty], UINT[width]
        same = BITS[ty] == width

        def convert(v):
            if v.dtype == uint and same:
                return v
            if v.dtype != dtype:
                v = v.view(dtype) if v.dtype.itemsize * 8 == BITS[ty] and v.dtype.kind in "iu" else v.astype(dtype)
            return v.view(uint) if same else v.astype(uint)
    else:
        uint = UINT[width]
        same = BITS[ty] == width

        def convert(v):
            v = encode(v, ty)
            return v if same else v.astype(uint)

    def put(cta, mask, v):
        if convert is not None:
            v = convert(v)
        cta.registers[index] = v if mask is None else np.where(mask, v, cta.registers[index])
    return put


def unpacked_writer(prog, vector, ty):
    """mov.b64 {%r1, %r2}, %rd: the lowest element first."""
    total = BITS[ty]
    if total == 128:
        low, high = (writer(prog, x, "b64") for x in vector.elements)

        def unpack128(cta, mask, v):
            low(cta, mask, v["f0"])
            high(cta, mask, v["f1"])
        return unpack128
    each = total // len(vector.elements)
    writes = [writer(prog, x, f"b{each}") for x in vector.elements]

    def unpack(cta, mask, v):
        elements = np.ascontiguousarray(encode(v, ty)).view(UINT[each]).reshape(prog.threads, -1)
        for j, write in enumerate(writes):
            write(cta, mask, elements[:, j])
    return unpack


def elementwise(prog, f, dst, srcs, dst_type, src_types):
    """The closure of an instruction that applies f to one to three operands."""
    write = writer(prog, dst, dst_type)
    reads = [reader(prog, src, ty) for src, ty in zip(srcs, src_types)]
    if len(reads) == 1:
        a, = reads
        return lambda cta, mask: write(cta, mask, f(a(cta)))
    if len(reads) == 2:
        a, b = reads
        return lambda cta, mask: write(cta, mask, f(a(cta), b(cta)))
    a, b, c = reads
    return lambda cta, mask: write(cta, mask, f(a(cta), b(cta), c(cta)))
