"""The backward time loop in Gluon: by one CTA, or by a cluster whose CTAs share R by hidden units."""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .cell import round_tf32
from .gluon_cell import (chains, coalesced_layout, factor, in_registers, load, r_layout, share_layout, staging_layout, unit_layout)
from .gluon_cluster import add_shares, send_shares, shares_layout


@gluon.jit
def load_inputs(dy, k, inside, H: gl.constexpr, HAS_DY: gl.constexpr):
    """The six coefficients of some units, and dy."""
    inputs = ()
    for n in gl.static_range(6):
        inputs += (load(k + n * H, inside),)
    if HAS_DY:
        inputs += (load(dy, inside),)
    return inputs


@gluon.jit
def load_r(r_ptr, start, WIDTH: gl.constexpr, H: gl.constexpr, BLOCK_H: gl.constexpr):
    """The rows of R of WIDTH / 4 units of each CTA, gates innermost, for all units of the earlier h in the order of
    the accumulator's columns that ``by_unit`` expects, (CTAs, WIDTH, units)."""
    CTAS: gl.constexpr = gl.num_ctas()
    UNITS: gl.constexpr = CTAS * BLOCK_H
    layout: gl.constexpr = coalesced_layout(gl.num_warps(), CTAS)
    cta = gl.arange(0, CTAS, gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    k = start + gl.arange(0, WIDTH, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    target = gl.arange(0, UNITS, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    unit = cta * BLOCK_H + k // 4
    r = gl.load(r_ptr + (k % 4 * H + unit) * H + target, mask=(unit < H) & (target < H), other=0.)
    REP: gl.constexpr = max(UNITS // (4 * gl.num_warps()), 2)
    return r.reshape(CTAS, WIDTH, UNITS // REP, REP // 2, 2).permute(0, 1, 3, 2, 4).reshape(CTAS, WIDTH, UNITS)


@gluon.jit
def stage(staged, i, f, g, o, PRECISION: gl.constexpr):
    """The four da to shared memory (CTAs, BLOCK_B, 4 BLOCK_H), gates innermost."""
    if PRECISION != "native":
        i, f, g, o = round_tf32(i, False), round_tf32(f, False), round_tf32(g, False), round_tf32(o, False)
    CTAS: gl.constexpr = staged.shape[0]
    B: gl.constexpr = staged.shape[1]
    staged.store(gl.join(gl.join(i, g), gl.join(f, o)).reshape(B, CTAS, staged.shape[2]).permute(1, 0, 2))


@gluon.jit(do_not_specialize=["T", "S", "B", "first", "stride_dyt", "stride_dyb"])
def backward_gluon(dy_ptr, coef_ptr, r_ptr, da_ptr, dh_ptr, dc_ptr, T, S, B, first,
                   stride_dyt, stride_dyb, stride_dyh,
                   H: gl.constexpr, DIRECTIONS: gl.constexpr, BLOCK_H: gl.constexpr, BLOCK_B: gl.constexpr,
                   HELD: gl.constexpr, HAS_DY: gl.constexpr, DY_UNIT: gl.constexpr, PRECISION: gl.constexpr):
    tile, d = gl.program_id(0), gl.program_id(1)
    dtype: gl.constexpr = da_ptr.dtype.element_ty
    CTAS: gl.constexpr = gl.num_ctas()
    UPPER: gl.constexpr = 4 * gl.num_warps()
    UNITS: gl.constexpr = BLOCK_H * CTAS
    UNIT: gl.constexpr = unit_layout(BLOCK_B, BLOCK_H, gl.num_warps(), CTAS)
    ACC: gl.constexpr = share_layout(gl.num_warps(), CTAS)
    A: gl.constexpr = gl.DotOperandLayout(0, ACC, 2 if PRECISION == "native" else 1)
    R: gl.constexpr = gl.DotOperandLayout(1, ACC, 2 if PRECISION == "native" else 1)
    BITS: gl.constexpr = dtype.primitive_bitwidth
    WIDTH: gl.constexpr = 1024 // BITS      # of a product, along K
    PARTS: gl.constexpr = 4 * BLOCK_H // WIDTH
    CHAINS: gl.constexpr = chains(UNITS, gl.num_warps(), PARTS)
    IN_REGISTERS: gl.constexpr = in_registers([WIDTH] * PARTS, UNITS * BITS // 8, HELD)
    r_ptr += d * (4 * H * H)
    row = tile * BLOCK_B + gl.arange(0, BLOCK_B, gl.SliceLayout(1, UNIT))[:, None]
    unit = gl.arange(0, UNITS, gl.SliceLayout(0, UNIT))[None, :]
    mask, inside = row < B, None
    if UNITS > H:
        inside = unit < H
        mask = mask & inside
    row = gl.minimum(row, B - 1)        # rows past the end repeat the last one, and nothing of them is stored
    r = ()
    for k in gl.static_range(PARTS):
        r_k = load_r(r_ptr, k * WIDTH, WIDTH, H, BLOCK_H)
        if k < IN_REGISTERS:
            r_k = gl.convert_layout(r_k, R)
        else:
            r_k = gl.allocate_shared_memory(dtype, r_k.shape, r_layout(BITS, 3, CTAS, 0), r_k)
        r += (r_k,)
    at_state = (d * B + row).to(gl.int64) * H + unit
    dh = load(dh_ptr + at_state, inside)
    dc = load(dc_ptr + at_state, inside)
    dy_ptr += (row.to(gl.int64) * stride_dyb * DY_UNIT + (d * H + unit) * stride_dyh)
    staged = gl.allocate_shared_memory(dtype, [CTAS, BLOCK_B, 4 * BLOCK_H],
                                       staging_layout(BITS, WIDTH, CTAS))
    if CTAS > 1:
        shares = gl.allocate_shared_memory(gl.float32, [2, CTAS, BLOCK_B, UNITS], shares_layout(BLOCK_H, CTAS))
        bars = mbarrier.allocate_mbarrier(batch=2)
        for n in gl.static_range(2):
            mbarrier.init(bars.index(n), count=1)
        gl.barrier(cluster=True)
    s = S - 1
    time = gl.where(d == 0, first + s, T - 1 - first - s).to(gl.int64)
    at = (d * S + gl.where(d == 0, s, S - 1 - s)).to(gl.int64) * B
    inputs = load_inputs(dy_ptr + time * stride_dyt * DY_UNIT, coef_ptr + at * (6 * H) + (row * (6 * H) + unit),
                         inside, H, HAS_DY)
    while s >= 0:
        if HAS_DY:
            dh += inputs[6].to(gl.float32)
        dc += dh * inputs[1]
        i, f = (dc * inputs[2]).to(dtype), (dc * inputs[3]).to(dtype)
        g, o = (dc * inputs[4]).to(dtype), (dh * inputs[0]).to(dtype)
        dc *= inputs[5]
        stage(staged, i, f, g, o, PRECISION)
        da = da_ptr + at * (4 * H) + (row * (4 * H) + unit)
        gl.store(da, i, mask=mask)
        gl.store(da + H, f, mask=mask)
        gl.store(da + 2 * H, g, mask=mask)
        gl.store(da + 3 * H, o, mask=mask)
        s -= 1
        ahead = gl.maximum(s, 0)
        time = gl.where(d == 0, first + ahead, T - 1 - first - ahead).to(gl.int64)
        at = (d * S + gl.where(d == 0, ahead, S - 1 - ahead)).to(gl.int64) * B
        if CTAS == 1:
            inputs = load_inputs(dy_ptr + time * stride_dyt * DY_UNIT, coef_ptr + at * (6 * H) + (row * (6 * H) + unit),
                                 inside, H, HAS_DY)
        sums = ()
        for n in gl.static_range(CHAINS):
            part = gl.full((CTAS, BLOCK_B, UNITS), 0., gl.float32, ACC)
            for k in gl.static_range(n, PARTS, CHAINS):
                part = mma_v2(staged.slice(k * WIDTH, WIDTH, 2).load(A), factor(r[k], R), part, input_precision="tf32")
            sums += (part,)
        share = sums[0]
        for n in gl.static_range(1, CHAINS):
            share += sums[n]
        # columns in the order of ``load_r`` to units
        REP: gl.constexpr = max(UNITS // UPPER, 2)
        share = share.reshape(CTAS, BLOCK_B, REP // 2, UNITS // REP, 2).permute(0, 1, 3, 2, 4)
        share = share.reshape(CTAS, BLOCK_B, UNITS)
        if CTAS == 1:
            dh = gl.convert_layout(share.reshape(BLOCK_B, UNITS), UNIT)
        else:
            step = S - 2 - s
            send_shares(share, shares.index(step % 2), bars.index(step % 2), BLOCK_H)
            inputs = load_inputs(dy_ptr + time * stride_dyt * DY_UNIT, coef_ptr + at * (6 * H) + (row * (6 * H) + unit),
                                 inside, H, HAS_DY)
            mbarrier.wait(bars.index(step % 2), step // 2 % 2)
            dh = add_shares(shares.index(step % 2), BLOCK_H)
    gl.store(dh_ptr + at_state, dh, mask=mask)
    gl.store(dc_ptr + at_state, dc, mask=mask)
