"""What the Gluon kernels share: layouts, activations and products, for one CTA or a cluster of them.

A tile of BLOCK_B batch rows is one matrix product a step. A CTA has BLOCK_H hidden units and so 4 BLOCK_H columns, which
are ordered so that a thread ends up with all four gates of some adjacent units: from the highest bit of the column's
number to the lowest, in front of each how many values it takes,

    CTA | 2 gate's high bit | BLOCK_H / 4W unit's low bits | 4W unit's high bits | 2 gate's low bit     (W warps)

of which a thread of ``mma.sync`` holds the first of a CTA's, the second and the last.
"""
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .cell import round_tf32, sigmoid, tanh


@gluon.constexpr_function
def powers(n):
    """1, 2, 4, ... below n, a power of two."""
    return [1 << j for j in range(n.bit_length() - 1)]


@gluon.constexpr_function
def acc_layout(warps, ctas):
    """Accumulator of a product whose columns are split over CTAs, then over warps."""
    return gl.NVMMADistributedLayout([2, 0], [1, warps], [16, 8], [[0, n] for n in powers(ctas)])


@gluon.constexpr_function
def unit_layout(block_b, block_h, warps, ctas):
    """(BLOCK_B, units) as the accumulator's threads hold them: rows 8 apart, and adjacent units."""
    rep = block_h // (4 * warps)
    return gl.DistributedLinearLayout(
        reg_bases=[[0, n] for n in powers(rep)] + [[8 * n, 0] for n in powers(block_b // 8)],
        lane_bases=[[0, rep], [0, 2 * rep], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[0, 4 * rep * n] for n in powers(warps)],
        block_bases=[[0, block_h * n] for n in powers(ctas)],
        shape=[block_b, block_h * ctas])


@gluon.constexpr_function
def row_layout(bits, narrowest, ctas):
    """Shared memory of (rows, K) elements of ``bits``: 16 bytes swizzled, for ldmatrix; every CTA has all of it.

    It is read in slices, the smallest of ``narrowest`` elements, which must not cut the pattern.
    """
    return gl.SwizzledSharedLayout(128 // bits, 1, min(8, narrowest * bits // 128), [1, 0],
                                   [[0, 0]] * (ctas.bit_length() - 1))


@gluon.constexpr_function
def narrowest(chunks):
    return min(width for _, width in chunks)


@gluon.constexpr_function
def r_layout(bits, rank, ctas, split):
    """Shared memory for a part of R, K contiguous for ldmatrix; CTAs split the dimension ``split`` of (.., K, N)."""
    return gl.SwizzledSharedLayout(128 // bits, 1, 8, [rank - 2, rank - 1, 0][:rank],
                                   [[n if dim == split else 0 for dim in range(rank)] for n in powers(ctas)])


@gluon.constexpr_function
def in_registers(widths, column_bytes, held):
    """How many chunks of R, of these widths along K, registers for ``held`` bytes take; the rest is in shared memory."""
    taken = 0
    for n, width in enumerate(widths):
        taken += width * column_bytes
        if taken > held:
            return n
    return len(widths)


@gluon.jit
def factor(r, layout: gl.constexpr):
    """A chunk of R in registers, from wherever it is."""
    if isinstance(r, gl.tensor):
        return r
    else:
        return r.load(layout)


@gluon.constexpr_function
def chains(columns, warps, parts):
    """Into how many sums to split a product of ``parts`` along K, that a warp has 4 tiles to multiply independently."""
    return max(min(parts, 32 * warps // columns), 1)


@gluon.jit
def load(ptr, inside):
    """Zero outside of ``inside``, which is None where all is inside."""
    if inside is None:
        return gl.load(ptr)
    else:
        return gl.load(ptr, mask=inside, other=0.)


@gluon.jit
def fast_tanh(x):
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def fast_sigmoid(x):
    return fast_tanh(0.5 * x) * 0.5 + 0.5


@gluon.jit
def cell(i, f, g, o, c, FAST: gl.constexpr):
    """One LSTM step from pre-activations and the state c, all fp32: the new (h, c). FAST: good for 16-bit types."""
    if FAST:
        c = fast_sigmoid(f) * c + fast_sigmoid(i) * fast_tanh(g)
        return fast_sigmoid(o) * fast_tanh(c), c
    else:
        c = sigmoid(f) * c + sigmoid(i) * tanh(g)
        return sigmoid(o) * tanh(c), c


@gluon.jit
def split_gates(a, BLOCK_H: gl.constexpr):
    """The accumulator's columns as four gates, (BLOCK_B, units) each. Moves nothing."""
    CTAS: gl.constexpr = gl.num_ctas()
    UPPER: gl.constexpr = 4 * gl.num_warps()
    B: gl.constexpr = a.shape[0]
    layout: gl.constexpr = unit_layout(B, BLOCK_H, gl.num_warps(), CTAS)
    a = a.reshape(B, CTAS, 2, BLOCK_H // UPPER, UPPER, 2).permute(0, 1, 4, 3, 2, 5).reshape(B, CTAS * BLOCK_H, 2, 2)
    even, odd = a.split()
    i, g = even.split()
    f, o = odd.split()
    return (gl.convert_layout(i, layout, assert_trivial=True), gl.convert_layout(f, layout, assert_trivial=True),
            gl.convert_layout(g, layout, assert_trivial=True), gl.convert_layout(o, layout, assert_trivial=True))


@gluon.jit
def join_gates(i, f, g, o, BLOCK_H: gl.constexpr):
    """The reverse of ``split_gates``."""
    CTAS: gl.constexpr = gl.num_ctas()
    UPPER: gl.constexpr = 4 * gl.num_warps()
    B: gl.constexpr = i.shape[0]
    a = gl.join(gl.join(i, g), gl.join(f, o)).reshape(B, CTAS, UPPER, BLOCK_H // UPPER, 2, 2)
    a = a.permute(0, 1, 4, 3, 2, 5).reshape(B, 4 * CTAS * BLOCK_H)
    return gl.convert_layout(a, acc_layout(gl.num_warps(), CTAS), assert_trivial=True)


@gluon.constexpr_function
def share_layout(warps, ctas):
    """Accumulator of one product in each CTA, (CTAs, rows, columns): their sum over the CTAs is wanted."""
    return gl.NVMMADistributedLayout([2, 0], [1, 1, warps], [1, 16, 8], [[n, 0, 0] for n in powers(ctas)])


@gluon.constexpr_function
def coalesced_layout(warps, ctas):
    """(CTAs, rows, columns), each CTA its own, to load along the rows."""
    return gl.BlockedLayout([1, 1, 8], [1, 4, 8], [1, warps, 1], [2, 1, 0], [[n, 0, 0] for n in powers(ctas)])


@gluon.constexpr_function
def staging_layout(bits, width, ctas):
    """Shared memory of (CTAs, rows, K) elements of ``bits``, each CTA its own, read in slices of ``width`` elements."""
    return gl.SwizzledSharedLayout(128 // bits, 1, min(8, width * bits // 128), [2, 1, 0],
                                   [[n, 0, 0] for n in powers(ctas)])
