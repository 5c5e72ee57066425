"""What the Gluon kernels share: layouts, activations, and R on chip, for one CTA or a cluster of them.

A CTA has BLOCK_H hidden units and BLOCK_B batch rows. Forward multiplies h (BLOCK_B, units) by all four gates of its
units at once, 4 BLOCK_H columns in such an order that a thread ends up with the four gates of some adjacent units. From
the highest bit of a column's number to the lowest, with the values that each part takes:

    CTA | gate's high bit, 2 | unit within a thread, BLOCK_H / 4W | thread's units, 4W | gate's low bit, 2     (W warps)

Backward multiplies da by the rows of R of its own units, which gives each CTA a share of dh for all units; columns are

    unit within a thread, high bits | thread's units, 4W | unit's lowest bit, 2

in each CTA. So elementwise work, loads from memory and both products agree on who has which unit, and nothing but the
first factor of a product ever moves.
"""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .cell import sigmoid, tanh


@gluon.constexpr_function
def powers(n):
    """1, 2, 4, ... below n, a power of two."""
    return [1 << j for j in range(n.bit_length() - 1)]


@gluon.constexpr_function
def unit_layout(block_b, block_h, warps, ctas):
    """(BLOCK_B, units): a thread has adjacent units, of rows 8 apart."""
    own = block_h // (4 * warps)
    return gl.DistributedLinearLayout(
        reg_bases=[[0, n] for n in powers(own)] + [[8 * n, 0] for n in powers(block_b // 8)],
        lane_bases=[[0, own], [0, 2 * own], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[0, 4 * own * n] for n in powers(warps)],
        block_bases=[[0, block_h * n] for n in powers(ctas)],
        shape=[block_b, block_h * ctas])


@gluon.constexpr_function
def gates_layout(warps, ctas):
    """Accumulator of (BLOCK_B, columns) whose columns are split over CTAs, then over warps."""
    return gl.NVMMADistributedLayout([2, 0], [1, warps], [16, 8], [[0, n] for n in powers(ctas)])


@gluon.constexpr_function
def shares_layout(warps, ctas):
    """Accumulator of (CTAs, BLOCK_B, columns): one product in each CTA."""
    return gl.NVMMADistributedLayout([2, 0], [1, 1, warps], [1, 16, 8], [[n, 0, 0] for n in powers(ctas)])


@gluon.constexpr_function
def coalesced_layout(warps, ctas):
    """(CTAs, rows, columns), each CTA its own, to load along the rows."""
    return gl.BlockedLayout([1, 1, 8], [1, 4, 8], [1, warps, 1], [2, 1, 0], [[n, 0, 0] for n in powers(ctas)])


@gluon.constexpr_function
def shared_layout(bits, width, order, split, ctas):
    """Shared memory for ldmatrix, which takes 16 bytes along the first dimension of ``order``, read in slices of
    ``width`` elements there. CTAs split the dimension ``split``; each has all of it where that is None."""
    bases = [[n if dim == split else 0 for dim in range(len(order))] for n in powers(ctas)]
    return gl.SwizzledSharedLayout(128 // bits, 1, min(8, width * bits // 128), order, bases)


@gluon.constexpr_function
def chains(columns, warps, parts):
    """Into how many sums to split a product of ``parts`` along K, for a warp to have 4 tiles in work at a time."""
    return max(min(parts, 32 * warps // columns), 1)


@gluon.constexpr_function
def buffers(ctas, marked):
    """How many buffers in shared memory the first factor of a step takes turns in, within a CTA.

    With one, a step has two barriers: before the buffer is read, and before the next step's factor is stored. With two
    it is stored past the slow readers of the other one, and only the first barrier is left. The compiler places them,
    and (Triton 3.9) tells buffers n % 2 and (n + 1) % 2 apart within a pass of the loop, not between two; so a pass
    reads one, then stores into the other. With marks that did not pay, and in a cluster the exchange sets the order.
    """
    return 2 if ctas == 1 and not marked else 1


@gluon.jit
def factor(r, layout: gl.constexpr):
    """A part of R in registers, from wherever it is."""
    if isinstance(r, gl.tensor):
        return r
    else:
        return r.load(layout)


@gluon.jit
def load(ptr, inside, other: gl.constexpr = 0.):
    """``other`` outside of ``inside``, which is None where all is inside."""
    if inside is None:
        return gl.load(ptr)
    else:
        return gl.load(ptr, mask=inside, other=other)


@gluon.jit
def there(offsets_ptr, row, count, inside):
    """``inside`` without the rows that a time of packed input has not."""
    if offsets_ptr is None:
        return inside
    elif inside is None:
        return row < count
    else:
        return inside & (row < count)


@gluon.jit
def load_there(ptr, offsets_ptr, row, count, inside, other: gl.constexpr = 0.):
    """``load`` where ``there`` says; Triton 3.6 lets no function return the None that ``inside`` may be."""
    if offsets_ptr is None:
        return load(ptr, inside, other)
    else:
        return load(ptr, there(offsets_ptr, row, count, inside), other)


@gluon.jit
def fast_tanh(x):
    """Relative error 2^-11: for results in 16-bit types."""
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def fast_sigmoid(x):
    return fast_tanh(0.5 * x) * 0.5 + 0.5


@gluon.jit
def cell(i, f, g, o, c, dtype: gl.constexpr):
    """One LSTM step from pre-activations and the state c, all fp32: the new (h, c), h to be rounded to ``dtype``."""
    if dtype == gl.float32:
        c = sigmoid(f) * c + sigmoid(i) * tanh(g)
        return sigmoid(o) * tanh(c), c
    else:
        c = fast_sigmoid(f) * c + fast_sigmoid(i) * fast_tanh(g)
        return fast_sigmoid(o) * fast_tanh(c), c


@gluon.jit
def split_gates(a, BLOCK_H: gl.constexpr, THREADS: gl.constexpr, UNIT: gl.constexpr):
    """The accumulator of forward (BLOCK_B, columns) as four gates (BLOCK_B, units) each, in the layout ``UNIT``, where
    THREADS threads have the units of a row and CTA. Moves nothing."""
    B: gl.constexpr = a.shape[0]
    CTAS: gl.constexpr = gl.num_ctas()
    a = a.reshape(B, CTAS, 2, BLOCK_H // THREADS, THREADS, 2).permute(0, 1, 4, 3, 2, 5)
    even, odd = a.reshape(B, CTAS * BLOCK_H, 2, 2).split()
    i, g = even.split()
    f, o = odd.split()
    return (gl.convert_layout(i, UNIT, assert_trivial=True), gl.convert_layout(f, UNIT, assert_trivial=True),
            gl.convert_layout(g, UNIT, assert_trivial=True), gl.convert_layout(o, UNIT, assert_trivial=True))


@gluon.jit
def join_gates(i, f, g, o, BLOCK_H: gl.constexpr, THREADS: gl.constexpr, ACC: gl.constexpr):
    """The reverse of ``split_gates``, in the accumulator's layout ``ACC``."""
    B: gl.constexpr = i.shape[0]
    CTAS: gl.constexpr = gl.num_ctas()
    a = gl.join(gl.join(i, g), gl.join(f, o)).reshape(B, CTAS, THREADS, BLOCK_H // THREADS, 2, 2)
    a = a.permute(0, 1, 4, 3, 2, 5).reshape(B, 4 * CTAS * BLOCK_H)
    return gl.convert_layout(a, ACC, assert_trivial=True)
