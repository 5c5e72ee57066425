"""How the CTAs of a cluster exchange tiles: they store into each other's shared memory, and an mbarrier there counts.

Two buffers, each with an mbarrier, take turns. No CTA stores into a buffer that is still being read: what it stores
depends on the exchange in between, and each warp takes part in that one only after it has read the buffer.
"""

from .language import gl, gluon, mbarrier
from .layouts import powers, unit_layout

try:
    from triton.experimental.gluon.language.nvidia.hopper import async_store
    from triton.experimental.gluon.language.nvidia.hopper.mbarrier import allocate_mbarrier
except ImportError:         # Triton before 3.9, which compiles the kernels for one CTA only
    async_store = allocate_mbarrier = None


@gluon.constexpr_function
def sent_layout(bits, block_b, block_h, warps, ctas):
    """``unit_layout``; but where a thread has one unit of 16 bits in each of two rows, two units of one row. A store to
    another CTA has 32 bits at least."""
    if bits == 32 or block_h > 4 * warps:
        return unit_layout(block_b, block_h, warps, ctas)
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1]] + [[16 * n, 0] for n in powers(block_b // 16)],
        lane_bases=[[8, 0], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[0, 4 * n] for n in powers(warps)],
        block_bases=[[0, block_h * n] for n in powers(ctas)],
        shape=[block_b, block_h * ctas])


@gluon.constexpr_function
def copies_layout(one, ctas):
    """(CTAs, rows, units): a tile in the layout ``one`` for every CTA. A thread has the same elements of all."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0] + base for base in one.reg_bases] + [[n, 0, 0] for n in powers(ctas)],
        lane_bases=[[0] + base for base in one.lane_bases],
        warp_bases=[[0] + base for base in one.warp_bases],
        block_bases=[[0] + base for base in one.block_bases],
        shape=[ctas] + one.shape)


@gluon.jit
def allocate_mbarriers():
    """Two mbarriers in each CTA, ready before any CTA goes on."""
    bars = allocate_mbarrier(batch=2)
    for n in gl.static_range(2):
        mbarrier.init(bars.index(n), count=1)
    gl.barrier(cluster=True)
    return bars


@gluon.jit
def send_to_all(h, rows, bar, BLOCK_H: gl.constexpr):
    """Each CTA's units of h (BLOCK_B, units) into every CTA's ``rows`` (CTAs, BLOCK_B, units), counted by ``bar``."""
    B: gl.constexpr = h.shape[0]
    CTAS: gl.constexpr = gl.num_ctas()
    SENT: gl.constexpr = sent_layout(h.dtype.primitive_bitwidth, B, BLOCK_H, gl.num_warps(), CTAS)
    COPIES: gl.constexpr = copies_layout(SENT, CTAS)
    mbarrier.expect(bar, B * CTAS * BLOCK_H * h.dtype.primitive_bitwidth // 8)
    h = gl.convert_layout(gl.convert_layout(h, SENT), gl.SliceLayout(0, COPIES), assert_trivial=True)
    copies, _ = gl.broadcast(h[None, :, :], gl.full((CTAS, B, CTAS * BLOCK_H), 0, h.dtype, COPIES))
    async_store(rows, copies, bar)


@gluon.jit
def send_shares(share, shares, bar, BLOCK_H: gl.constexpr):
    """Each CTA's ``share`` (CTAs, BLOCK_B, units) to the ``shares`` of the CTAs that have the units, counted by
    ``bar``."""
    mbarrier.expect(bar, share.shape[1] * gl.num_ctas() * BLOCK_H * 4)
    async_store(shares, share, bar)


@gluon.jit
def add_shares(shares, BLOCK_H: gl.constexpr):
    """The sum of all CTAs' shares for the own units, (BLOCK_B, units)."""
    UNIT: gl.constexpr = unit_layout(shares.shape[1], BLOCK_H, gl.num_warps(), gl.num_ctas())
    return gl.convert_layout(gl.sum(shares.load(copies_layout(UNIT, gl.num_ctas())), 0), UNIT, assert_trivial=True)
