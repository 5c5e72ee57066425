"""Which thread has what in the Gluon kernels: layouts, and loads and reshapes that follow them.

Of one CTA or a cluster of them: a CTA has BLOCK_H hidden units and BLOCK_B batch rows. The forward loop multiplies h
(BLOCK_B, units) by all four gates of its units at once. These are 4 BLOCK_H columns, in such an order that a thread
gets the four gates of some adjacent units. The bits of a column's number are, from the highest to the lowest, with how
many values each part takes (W warps):

    CTA | gate's high bit, 2 | unit within a thread, BLOCK_H / 4W | thread's units, 4W | gate's low bit, 2

The backward loop multiplies da by the rows of R of its own units, which gives each CTA a share of dh of all units. Its
columns are, in each CTA:

    unit within a thread, high bits | thread's units, 4W | unit's lowest bit, 2

So elementwise work, loads from memory and both products give each thread the same units, and only the first operand of
a product moves between threads.
"""

from .language import gl, gluon
from .precision import round_tf32


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
    """Shared memory from which ldmatrix reads 16 bytes at a time along the first dimension of ``order``, in slices of
    ``width`` elements. CTAs split the dimension ``split``; None: each has all of it."""
    bases = [[n if dim == split else 0 for dim in range(len(order))] for n in powers(ctas)]
    return gl.SwizzledSharedLayout(128 // bits, 1, min(8, width * bits // 128), order, bases)


@gluon.constexpr_function
def chains(columns, warps, parts):
    """Into how many sums to split a product of ``parts`` slices along K, for a warp to work on 4 tiles at a time."""
    return max(min(parts, 32 * warps // columns), 1)


@gluon.constexpr_function
def buffers(ctas, flagged):
    """How many buffers in shared memory take turns for the first operand of a step's product, within a CTA.

    With one buffer a step has two barriers: one before it is read, one before the next operand is stored. With two,
    slow warps may still read one while the other is written, and only the first barrier remains. The compiler places
    the barriers. Triton 3.9 tells buffers n % 2 and (n + 1) % 2 apart within a pass of the loop, but not between
    passes, so a pass reads one and then stores into the other. Where there are step flags two buffers gained nothing
    (bench/NOTES.md), and in a cluster the exchange sets the order.
    """
    return 2 if ctas == 1 and not flagged else 1


@gluon.jit
def load_r(ptr, mask):
    """Elements of R as products read them, in fp32 rounded to TF32; 0 outside of ``mask``."""
    r = gl.load(ptr, mask=mask, other=0.)
    if r.dtype == gl.float32:
        return round_tf32(r, False)
    else:
        return r


@gluon.jit
def in_registers(r, layout: gl.constexpr):
    """A slice of R in registers, from wherever it is."""
    if isinstance(r, gl.tensor):
        return r
    else:
        return r.load(layout)


@gluon.jit
def load(ptr, inside, other: gl.constexpr = 0.):
    """``other`` outside of ``inside``; None: all is inside."""
    if inside is None:
        return gl.load(ptr)
    else:
        return gl.load(ptr, mask=inside, other=other)


@gluon.jit
def there(offsets_ptr, row, count, inside):
    """``inside``, without the rows that a time of packed input does not have."""
    if offsets_ptr is None:
        return inside
    elif inside is None:
        return row < count
    else:
        return inside & (row < count)


@gluon.jit
def load_there(ptr, offsets_ptr, row, count, inside, other: gl.constexpr = 0.):
    """``load`` where ``there`` says. In one function, because in Triton 3.6 none can return the None of ``inside``."""
    if offsets_ptr is None:
        return load(ptr, inside, other)
    else:
        return load(ptr, there(offsets_ptr, row, count, inside), other)


@gluon.jit
def split_gates(a, BLOCK_H: gl.constexpr, THREADS: gl.constexpr, UNIT: gl.constexpr):
    """The accumulator (BLOCK_B, columns) of the forward loop as i, f, g, o of (BLOCK_B, units) each, in the layout
    ``UNIT``. THREADS threads have the units of a row and CTA. Moves nothing."""
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


@gluon.jit
def store_gates(x, mask, i, f, g, o, H: gl.constexpr):
    """The pre-activations of the four gates of some units, fp32 (rows, units) each, to where those of the input are."""
    dtype: gl.constexpr = x.dtype.element_ty
    gl.store(x, i.to(dtype), mask=mask)
    gl.store(x + H, f.to(dtype), mask=mask)
    gl.store(x + 2 * H, g.to(dtype), mask=mask)
    gl.store(x + 3 * H, o.to(dtype), mask=mask)


# -- where programs share R and exchange h through the second-level cache ---------------------------------------------

@gluon.constexpr_function
def split_unit_layout(units, warps):
    """(16 rows, units) of the split kernels: a thread has adjacent units of one row."""
    own = units // (2 * warps)
    return gl.DistributedLinearLayout(
        reg_bases=[[0, n] for n in powers(own)], lane_bases=[[0, own * n] for n in powers(16)] + [[1, 0]],
        warp_bases=[[2 * n, 0] for n in powers(warps)], block_bases=[], shape=[16, units])


@gluon.jit
def unit_of(k, BITS: gl.constexpr):
    """The unit that is the ``k``-th of a product's sum where each of four threads has 16 adjacent bytes of h: what a
    thread reads of h is then what it multiplies."""
    if BITS == 16:
        return k // 32 * 32 + k // 2 % 4 * 8 + k // 16 % 2 * 4 + k // 8 % 2 * 2 + k % 2
    else:
        return k // 16 * 16 + k % 4 * 4 + k // 8 % 2 * 2 + k // 4 % 2


@gluon.jit
def load_gates(x, inside, H: gl.constexpr):
    """The pre-activations x W^T + b of the four gates of some units, (rows, units) each."""
    return load(x, inside), load(x + H, inside), load(x + 2 * H, inside), load(x + 3 * H, inside)
