"""How the CTAs of a cluster exchange tiles: stores into each other's shared memory, counted by an mbarrier there."""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .gluon_cell import powers, unit_layout


@gluon.constexpr_function
def pair_layout(block_b, block_h, warps, ctas):
    """``unit_layout`` but where a thread has one unit of two rows: there two units of one row."""
    if block_h > 4 * warps:
        return unit_layout(block_b, block_h, warps, ctas)
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1]] + [[16 * n, 0] for n in powers(block_b // 16)],
        lane_bases=[[8, 0], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[0, 4 * n] for n in powers(warps)],
        block_bases=[[0, block_h * n] for n in powers(ctas)],
        shape=[block_b, block_h * ctas])


@gluon.constexpr_function
def copies_layout(one, ctas):
    """(CTAs, rows, units): a copy of the tile in layout ``one`` for each CTA."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0] + v for v in one.reg_bases] + [[n, 0, 0] for n in powers(ctas)],
        lane_bases=[[0] + v for v in one.lane_bases],
        warp_bases=[[0] + v for v in one.warp_bases],
        block_bases=[[0] + v for v in one.block_bases],
        shape=[ctas] + one.shape)


@gluon.jit
def send_to_all(h, rows, bar, BLOCK_H: gl.constexpr):
    """Every CTA's units of h (BLOCK_B, units) to every CTA's ``rows`` (CTAs, BLOCK_B, units), where ``bar`` counts."""
    B: gl.constexpr = h.shape[0]
    CTAS: gl.constexpr = gl.num_ctas()
    PAIRS: gl.constexpr = pair_layout(B, BLOCK_H, gl.num_warps(), CTAS) if h.dtype.primitive_bitwidth == 16 else unit_layout(B, BLOCK_H, gl.num_warps(), CTAS)
    COPIES: gl.constexpr = copies_layout(PAIRS, CTAS)
    mbarrier.expect(bar, B * CTAS * BLOCK_H * h.dtype.primitive_bitwidth // 8)
    h = gl.convert_layout(h, PAIRS)
    h = gl.convert_layout(h, gl.SliceLayout(0, COPIES), assert_trivial=True)[None, :, :]
    hopper.async_store(rows, gl.broadcast(h, gl.full((CTAS, B, CTAS * BLOCK_H), 0, h.dtype, COPIES))[0], bar)


@gluon.constexpr_function
def shares_layout(block_h, ctas):
    """Shared memory of fp32 (CTAs, rows, units): a CTA has its own units' shares from all."""
    return gl.SwizzledSharedLayout(4, 1, min(8, block_h // 4), [2, 1, 0], [[0, 0, n] for n in powers(ctas)])


@gluon.jit
def send_shares(share, shares, bar, BLOCK_H: gl.constexpr):
    """Every CTA's ``share`` (CTAs, BLOCK_B, units), by units to their owners, where ``bar`` counts."""
    mbarrier.expect(bar, share.shape[1] * gl.num_ctas() * BLOCK_H * 4)
    hopper.async_store(shares, share, bar)


@gluon.jit
def add_shares(shares, BLOCK_H: gl.constexpr):
    """The sum of all CTAs' shares for the own units, (BLOCK_B, units)."""
    UNIT: gl.constexpr = unit_layout(shares.shape[1], BLOCK_H, gl.num_warps(), gl.num_ctas())
    return gl.convert_layout(gl.sum(shares.load(copies_layout(UNIT, gl.num_ctas())), 0), UNIT, assert_trivial=True)
