"""Matrix instructions: ldmatrix and stmatrix, mma, wgmma."""

import re

import numpy as np

from ..errors import Misaligned, OutOfBounds, Unsupported
from ..formats import BITS, FP8, NUMPY, decode, encode, tf32
from ..operands import Vector, address, reader, writer
from .registry import builds


# ------------------------------------------------------------------------------------------------ tiles and memory
@builds("ldmatrix", "stmatrix")
def build_matrix_copy(prog, ins, parts, args, ty):
    """Tiles of 8x8 16-bit elements; thread 8 j + r gives the address of row r of tile j."""
    if "m8n8" not in parts or ty != "b16":
        raise Unsupported(ins.op)
    num = int(next(x for x in parts if re.fullmatch(r"x\d", x))[1:])
    transposed, is_load = "trans" in parts, parts[0] == "ldmatrix"
    memory, regs = (args[1], args[0]) if is_load else (args[0], args[1])
    addr, regs = address(prog, memory), regs.elements if isinstance(regs, Vector) else [regs]
    warps = prog.threads // 32
    row_thread = (np.arange(warps)[:, None] * 32 + np.arange(8 * num)).reshape(-1)

    def rows(cta, mask):
        x = addr(cta)[row_thread].astype(np.int64)
        if mask is not None:
            x = np.where(mask[row_thread], x, 0)
        if (x & 15).any():
            raise Misaligned(f"{parts[0]} row address, {cta.where()}")
        if (x + 16 > cta.device.shared_bytes).any():
            raise OutOfBounds(f"{parts[0]} row at shared byte {int(x.max())} of {cta.device.shared_bytes}, "
                              f"{cta.where()}")
        return x

    if is_load:
        writes = [writer(prog, r, "b32") for r in regs]

        def load(cta, mask):
            x = rows(cta, mask)
            cta.device.stats.shared_load += len(x) * 16
            if cta.races:
                # every thread of the warp receives data of every row: the warp is the reader
                keep = slice(None) if mask is None else mask[row_thread]
                cta.races.read(cta, x[keep], 16, row_thread[keep] + cta.first)
            tile = cta.shared[2][(x >> 1)[:, None] + np.arange(8)].reshape(warps, num, 8, 8)
            if transposed:
                tile = tile.transpose(0, 1, 3, 2)
            out = np.ascontiguousarray(tile).view(np.uint32).reshape(warps, num, 32)
            for j, write in enumerate(writes):
                write(cta, mask, out[:, j].reshape(-1))
        return load
    reads = [reader(prog, r, "b32") for r in regs]

    def store(cta, mask):
        x = rows(cta, mask)
        cta.device.stats.shared_store += len(x) * 16
        v = np.stack([read(cta).reshape(warps, 32) for read in reads], 1)
        tile = np.ascontiguousarray(v).view(np.uint16).reshape(warps, num, 8, 8)
        if transposed:
            tile = tile.transpose(0, 1, 3, 2)
        tile = tile.reshape(-1, 8)
        threads = row_thread + cta.first
        if mask is not None:
            keep = mask[row_thread]
            x, tile, threads = x[keep], tile[keep], threads[keep]
        if cta.races:
            cta.races.write(cta, x, 16, threads)
        cta.shared[2][(x >> 1)[:, None] + np.arange(8)] = tile
    return store


# ------------------------------------------------------------------------------------------------ products
def elements(u, ty):
    """(..., n) registers to (..., n, E) values in the accumulator's computing type."""
    u = np.ascontiguousarray(u)
    if ty == "tf32":
        return tf32(u)[..., None]
    if ty in ("f16", "bf16"):
        return decode(u.view(np.uint16), ty).reshape(*u.shape, 2)
    if ty in ("s8", "u8"):
        return u.view(NUMPY[ty]).reshape(*u.shape, 4).astype(np.int32)
    if ty in ("e4m3", "e5m2"):
        return FP8[ty][u.view(np.uint8)].reshape(*u.shape, 4)
    raise Unsupported(f"matrix operand type {ty}")


def a_fragment(regs, ty, warps):
    """Registers of A, 2 or 4 arrays over the threads, to (warps, 16, K)."""
    e = elements(np.stack(regs), ty)  # (regs, threads, E)
    k_halves = len(regs) // 2
    # k half, row half, warp, row, thread of the row, element
    e = e.reshape(k_halves, 2, warps, 8, 4, e.shape[-1]).transpose(2, 1, 3, 0, 4, 5)
    return e.reshape(warps, 16, -1)


def product(x, y):
    """Batched matrix product, accumulated in f64 (integers exactly)."""
    dtype = np.int64 if x.dtype.kind in "iu" else np.float64
    return np.matmul(x.astype(dtype), y.astype(dtype))


@builds("mma")
def build_mma(prog, ins, parts, args, ty):
    shape = next((x for x in parts if re.fullmatch(r"m\d+n\d+k\d+", x)), "")
    i = parts.index(shape) if shape else 0
    if not shape.startswith("m16n8") or parts[i + 1:i + 3] != ["row", "col"]:
        raise Unsupported(ins.op)
    d_type, a_type, b_type, c_type = [x for x in parts[i + 3:] if x in BITS or x in FP8]
    warps = prog.threads // 32
    a_regs, b_regs, c_regs = ([reader(prog, x, "b32") for x in operand.elements] for operand in args[1:4])
    writes = [writer(prog, x, "b32") for x in args[0].elements]

    def fn(cta, mask):
        a = a_fragment([r(cta) for r in a_regs], a_type, warps)
        b = elements(np.stack([r(cta) for r in b_regs]), b_type)
        b = b.reshape(len(b_regs), warps, 8, 4, -1).transpose(1, 0, 3, 4, 2).reshape(warps, -1, 8)
        c = np.stack([r(cta) for r in c_regs])
        # row half, warp, row, thread of the row, column of its pair
        if c_type == "f16":
            c = decode(c.view(np.uint16), "f16").reshape(2, warps, 8, 4, 2).transpose(1, 0, 2, 3, 4)
        else:
            c = c.view(NUMPY[c_type]).reshape(2, 2, warps, 8, 4).transpose(2, 0, 3, 4, 1)
        d = product(a, b) + c.reshape(warps, 16, 8)
        if d_type == "f16":
            half = encode(d.astype(np.float32), "f16").reshape(warps, 2, 8, 4, 2).transpose(1, 0, 2, 3, 4)
            out = np.ascontiguousarray(half).view(np.uint32).reshape(2, -1)
        else:
            out = d.astype(NUMPY[d_type]).view(np.uint32).reshape(warps, 2, 8, 4, 2)
            out = out.transpose(1, 4, 0, 2, 3).reshape(4, -1)
        for write, x in zip(writes, out):
            write(cta, mask, x)
    return fn


def wgmma_addresses(cta, descriptor, rows, k, size, mn_major):
    """Shared-memory addresses of the (rows, k) elements, `size` bytes each, of a wgmma matrix descriptor."""
    d = int(descriptor)
    start, leading, stride = ((d >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    swizzle = d >> 62 & 3
    width = {0: 16, 1: 128, 2: 64, 3: 32}[swizzle]
    r, q = np.arange(rows)[:, None], np.arange(k)[None, :]
    if mn_major:
        per = width // size  # rows that lie side by side
        if swizzle:
            off = (r % per) * size + (r // per) * leading + (q % 8) * width + (q // 8) * stride
        else:
            off = (r % per) * size + (r // per) * stride + (q % 8) * width + (q // 8) * leading
    elif swizzle:
        off = (r % 8) * width + (r // 8) * stride + q * size
    else:
        off = (r % 8) * 16 + (r // 8) * stride + (q * size // 16) * leading + q * size % 16
    x = start + off
    x = x ^ (((x >> 7) & (width // 16 - 1)) << 4)  # the swizzle acts on address bits
    if x.max() + size > cta.device.shared_bytes:
        raise OutOfBounds(f"wgmma operand at shared byte {int(x.max())}, {cta.where()}")
    return x


@builds("wgmma")
def build_wgmma(prog, ins, parts, args, ty):
    if parts[1] in ("fence", "commit_group", "wait_group"):
        return lambda cta, mask: None
    shape = re.fullmatch(r"m64n(\d+)k(\d+)", next(x for x in parts if x.startswith("m64")))
    n, k = int(shape.group(1)), int(shape.group(2))
    d_type, a_type, b_type = [x for x in parts if x in BITS or x in FP8][-3:]
    if d_type not in ("f32", "s32", "f16"):
        raise Unsupported(ins.op)
    size = 32 // k  # bytes per element: all shapes read 32 bytes of a row
    regs = args[0].elements
    writes, c_regs = [writer(prog, x, "b32") for x in regs], [reader(prog, x, "b32") for x in regs]
    a_in_regs = isinstance(args[1], Vector)
    a_regs = [reader(prog, x, "b32") for x in args[1].elements] if a_in_regs else None
    a_descriptor = None if a_in_regs else reader(prog, args[1], "b64")
    b_descriptor = reader(prog, args[2], "b64")
    scale_d = reader(prog, args[3], "pred")
    flags = [x.value for x in args[4:]]  # the scales of A and B, then the transposition bits
    scale_a, scale_b = (flags + [1, 1])[:2] if d_type != "s32" else (1, 1)
    transposed = flags[2:]
    if a_in_regs:
        a_transposed, b_transposed = 0, transposed[0] if transposed else 0
    else:
        a_transposed, b_transposed = (transposed + [0, 0])[:2]
    groups = prog.threads // 128

    def tile(cta, group, descriptor, rows, ty, mn_major):
        x = wgmma_addresses(cta, descriptor, rows, k, size, mn_major)
        if cta.races:
            cta.races.read(cta, x.reshape(-1) // 4 * 4, 4, np.full(x.size, cta.first + 128 * group))
        cta.device.stats.shared_load += x.size * size
        raw = np.ascontiguousarray(cta.shared[size][x // size])
        return elements(raw.view(np.uint32).reshape(rows, -1), ty).reshape(rows, k)

    def fn(cta, mask):
        acc = np.stack([r(cta) for r in c_regs])
        out = np.array([r.copy() for r in acc])
        for group in range(groups):
            t = slice(128 * group, 128 * group + 128)
            if mask is not None and not mask[t].any():
                continue
            if a_in_regs:
                a = a_fragment([r(cta)[t] for r in a_regs], a_type, 4).reshape(64, k)
            else:
                a = tile(cta, group, a_descriptor(cta)[128 * group], 64, a_type, a_transposed)
            b = tile(cta, group, b_descriptor(cta)[128 * group], n, b_type, b_transposed)
            d = product(a, b.T) * (scale_a * scale_b)
            accumulate = bool(scale_d(cta)[128 * group])
            if d_type == "f16":
                if accumulate:
                    half = decode(np.ascontiguousarray(acc[:, t]).view(np.uint16), "f16")
                    d = d + half.reshape(n // 8, 2, 4, 8, 4, 2).transpose(2, 1, 3, 0, 4, 5).reshape(64, n)
                half = encode(d.astype(np.float32), "f16").reshape(4, 2, 8, n // 8, 4, 2).transpose(3, 1, 0, 2, 4, 5)
                out[:, t] = np.ascontiguousarray(half).view(np.uint32).reshape(n // 4, 128)
                continue
            if accumulate:
                # 8 columns, row half, column of the pair, warp, row, thread of the row
                c = acc[:, t].view(NUMPY[d_type]).reshape(n // 8, 2, 2, 4, 8, 4)
                d = d + c.transpose(3, 1, 4, 0, 5, 2).reshape(64, n)
            o = d.astype(NUMPY[d_type]).reshape(4, 2, 8, n // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4)
            out[:, t] = np.ascontiguousarray(o).view(np.uint32).reshape(n // 2, 128)
        for write, x in zip(writes, out):
            write(cta, mask, x)
    return fn
