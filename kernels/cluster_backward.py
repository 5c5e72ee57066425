"""The backward time loop in Gluon: by one CTA, or by a cluster whose CTAs share R by hidden units."""

from .cell import coefficients_from, near_sigmoid, near_tanh
from .cluster_exchange import add_shares, allocate_mbarriers, send_shares
from .language import gl, gluon, mbarrier, mma_v2
from .layouts import (
    buffers,
    chains,
    coalesced_layout,
    in_registers,
    load,
    load_r,
    load_there,
    shared_layout,
    shares_layout,
    there,
    unit_layout,
)
from .precision import round_tf32
from .rows import FRESH, LIVE, chunk_shift, of_live_steps, padded_or_packed, rows_at


@gluon.jit
def load_inputs(coef_ptr, kept_ptr, dy_ptr, flags_ptr, offsets_ptr, s, time, base, at, row, count, inside, B,
                stride_dyt, H: gl.constexpr, DIRECTIONS: gl.constexpr, DY_UNIT: gl.constexpr):
    """The six coefficients of some units at one time, then dy and the step flags of the rows, whose pointers are those
    of the first time. In the place of dy or flags that are None stands something else. Coefficients that are not
    ``there`` pass dc on and have no da. With ``kept_ptr`` four pre-activations and c before step s stand in the place
    of the coefficients."""
    if dy_ptr is not None:
        dy_ptr += padded_or_packed(offsets_ptr, time, base) * stride_dyt * DY_UNIT
    if flags_ptr is not None:
        flags_ptr += time * B
    inputs = ()
    if kept_ptr is not None:
        coef_ptr += at * (4 * H)
        for n in gl.static_range(4):
            inputs += (load_there(coef_ptr + n * H, offsets_ptr, row, count, inside),)
        c = load(kept_ptr + s.to(gl.int64) * DIRECTIONS * B * H, inside)
        inputs += (c, c)
    else:
        coef_ptr += at * (6 * H)
        for n in gl.static_range(6):
            inputs += (load_there(coef_ptr + n * H, offsets_ptr, row, count, inside, 1. if n == 5 else 0.),)
    if dy_ptr is not None:
        inputs += (load_there(dy_ptr, offsets_ptr, row, count, inside),)
    else:
        inputs += (inputs[0],)
    if flags_ptr is not None:
        inputs += (gl.load(flags_ptr),)
    else:
        inputs += (inputs[0],)
    return inputs


@gluon.jit
def load_r_rows(r_ptr, start, WIDTH: gl.constexpr, H: gl.constexpr, BLOCK_H: gl.constexpr):
    """The rows of R of WIDTH / 4 units of each CTA, gates innermost, (CTAs, WIDTH, columns)."""
    CTAS: gl.constexpr = gl.num_ctas()
    UNITS: gl.constexpr = CTAS * BLOCK_H
    OWN: gl.constexpr = max(UNITS // (4 * gl.num_warps()), 2)
    layout: gl.constexpr = coalesced_layout(gl.num_warps(), CTAS)
    cta = gl.arange(0, CTAS, gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    k = start + gl.arange(0, WIDTH, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    target = gl.arange(0, UNITS, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    unit = cta * BLOCK_H + k // 4
    r = load_r(r_ptr + (k % 4 * H + unit) * H + target, (unit < H) & (target < H))
    return r.reshape(CTAS, WIDTH, UNITS // OWN, OWN // 2, 2).permute(0, 1, 3, 2, 4).reshape(CTAS, WIDTH, UNITS)


@gluon.jit
def by_units(share):
    """The accumulator (CTAs, BLOCK_B, columns) in the order of units, as ``load_r_rows`` has permuted them."""
    CTAS: gl.constexpr = share.shape[0]
    B: gl.constexpr = share.shape[1]
    UNITS: gl.constexpr = share.shape[2]
    OWN: gl.constexpr = max(UNITS // (4 * gl.num_warps()), 2)
    return share.reshape(CTAS, B, OWN // 2, UNITS // OWN, 2).permute(0, 1, 3, 2, 4).reshape(CTAS, B, UNITS)


@gluon.jit
def stage(staged, i, f, g, o, PRECISION: gl.constexpr):
    """The four da, (BLOCK_B, units) each, into shared memory as first operand (CTAs, BLOCK_B, 4 BLOCK_H)."""
    if PRECISION != "native":
        i, f, g, o = round_tf32(i, False), round_tf32(f, False), round_tf32(g, False), round_tf32(o, False)
    CTAS: gl.constexpr = staged.shape[0]
    B: gl.constexpr = staged.shape[1]
    staged.store(gl.join(gl.join(i, g), gl.join(f, o)).reshape(B, CTAS, staged.shape[2]).permute(1, 0, 2))


@gluon.jit
def locate_step(offsets_ptr, shift, s, d, T, S, B, first):
    """Of step s of the chunk: its time, the first of its rows and how many, and where its coefficients begin."""
    time = gl.where(d == 0, first + s, T - 1 - first - s).to(gl.int64)
    base, count = rows_at(offsets_ptr, time, B)
    at = padded_or_packed(offsets_ptr, (d * S + gl.where(d == 0, s, S - 1 - s)).to(gl.int64) * B, shift + base)
    return time, base, count, at


@gluon.jit
def coefficients_of(inputs, flags_ptr):
    """The six coefficients, from pre-activations and c before the step: see ``portable_backward.coefficients``."""
    i, f = near_sigmoid(inputs[0].to(gl.float32)), near_sigmoid(inputs[1].to(gl.float32))
    g, o = near_tanh(inputs[2].to(gl.float32)), near_sigmoid(inputs[3].to(gl.float32))
    c = inputs[4]
    if flags_ptr is not None:
        c = gl.where((inputs[7] & FRESH) == 0, c, 0.)
    k = coefficients_from(i, f, g, o, near_tanh(f * c + i * g), c)
    if flags_ptr is not None:
        k = of_live_steps(k, inputs[7])
    return k


@gluon.jit
def step(inputs, dh, dc, db, staged, da, here, kept_ptr, dy_ptr, flags_ptr, H: gl.constexpr, PRECISION: gl.constexpr):
    """Stage the four da of a step and store them. Returns dh with dy added, dc before the step, and ``db``, one tensor
    for each gate or none, with da added."""
    dtype: gl.constexpr = staged.dtype
    if kept_ptr is not None:
        k = coefficients_of(inputs, flags_ptr)
    else:
        k = inputs
    ko, kh, ki = k[0], k[1], k[2]
    kf, kg, f = k[3], k[4], k[5]
    dy, flags = inputs[6], inputs[7]
    if dy_ptr is not None:
        if flags_ptr is not None:
            dy = gl.where((flags & LIVE) != 0, dy, 0.)
        dh += dy.to(gl.float32)
    dc += dh * kh
    da_i, da_f, da_g, da_o = (dc * ki).to(dtype), (dc * kf).to(dtype), (dc * kg).to(dtype), (dh * ko).to(dtype)
    stage(staged, da_i, da_f, da_g, da_o, PRECISION)
    gl.store(da, da_i, mask=here)
    gl.store(da + H, da_f, mask=here)
    gl.store(da + 2 * H, da_g, mask=here)
    gl.store(da + 3 * H, da_o, mask=here)
    if len(db) > 0:
        db = (db[0] + da_i.to(gl.float32), db[1] + da_f.to(gl.float32), db[2] + da_g.to(gl.float32),
              db[3] + da_o.to(gl.float32))
    return dh, dc * f, db


@gluon.jit(do_not_specialize=["T", "S", "B", "first", "stride_dyt", "stride_dyb"])
def backward_cluster(coef_ptr, r_ptr, da_ptr, dh_ptr, dc_ptr, T, S, B, first, stride_dyt, stride_dyb, stride_dyh,
                     H: gl.constexpr, DIRECTIONS: gl.constexpr, BLOCK_H: gl.constexpr, BLOCK_B: gl.constexpr,
                     HELD: gl.constexpr, DY_UNIT: gl.constexpr, PRECISION: gl.constexpr,
                     dy_ptr=None, flags_ptr=None, offsets_ptr=None, kept_ptr=None, db_ptr=None):
    """As ``portable_backward.backward_resident``, but the CTAs of a cluster together have all of R, and each the rows
    of its own units.

    kept   (S, D, B, H) fp32, c before each of the steps, or None. If it is given, ``coef`` is not the coefficients but
           the pre-activations of the gates, (D, S, B, 4H) of da's type, packed (rows, 4H), and may be da itself. The
           coefficients are then computed here
    db     (batch tiles, D, 4H) fp32, the sums of da over the steps and the rows of each tile; or None

    grid (batch tiles, D), of CTAs in clusters. R is cut into slices along K. As many as fit HELD bytes are in
    registers, the others in shared memory.
    """
    tile, d = gl.program_id(0), gl.program_id(1)
    dtype: gl.constexpr = da_ptr.dtype.element_ty
    BITS: gl.constexpr = dtype.primitive_bitwidth
    CTAS: gl.constexpr = gl.num_ctas()
    UNITS: gl.constexpr = BLOCK_H * CTAS
    UNIT: gl.constexpr = unit_layout(BLOCK_B, BLOCK_H, gl.num_warps(), CTAS)
    ACC: gl.constexpr = shares_layout(gl.num_warps(), CTAS)
    A: gl.constexpr = gl.DotOperandLayout(0, ACC, 32 // BITS)
    R: gl.constexpr = gl.DotOperandLayout(1, ACC, 32 // BITS)
    WIDTH: gl.constexpr = 1024 // BITS      # of a slice, whose rows of 128 bytes fill the banks once
    PARTS: gl.constexpr = 4 * BLOCK_H // WIDTH
    IN_REGISTERS: gl.constexpr = HELD // (WIDTH * UNITS * BITS // 8)
    CHAINS: gl.constexpr = chains(UNITS, gl.num_warps(), PARTS)
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
        part = load_r_rows(r_ptr, k * WIDTH, WIDTH, H, BLOCK_H)
        if k < IN_REGISTERS:
            part = gl.convert_layout(part, R)
        else:
            part = gl.allocate_shared_memory(dtype, part.shape, shared_layout(BITS, WIDTH, [1, 2, 0], 0, CTAS), part)
        r += (part,)
    at_state = (d * B + row).to(gl.int64) * H + unit
    dh = load(dh_ptr + at_state, inside)
    dc = load(dc_ptr + at_state, inside)
    if dy_ptr is not None:
        dy_ptr += row.to(gl.int64) * stride_dyb * DY_UNIT + (d * H + unit) * stride_dyh
    if flags_ptr is not None:
        flags_ptr += d.to(gl.int64) * T * B + row
    shift = chunk_shift(offsets_ptr, d, T, S, B, first)
    if kept_ptr is not None:
        coef_ptr += row * (4 * H) + unit
        kept_ptr += (d * B + row).to(gl.int64) * H + unit
    else:
        coef_ptr += row * (6 * H) + unit
    da_ptr += row * (4 * H) + unit
    # With two buffers for da a step ends with da of the next step: see ``layouts.buffers``.
    BUFFERS: gl.constexpr = buffers(CTAS, flags_ptr is not None)
    staged = gl.allocate_shared_memory(dtype, [BUFFERS, CTAS, BLOCK_B, 4 * BLOCK_H],
                                       shared_layout(BITS, WIDTH, [2, 1, 0], 0, CTAS))
    if CTAS > 1:
        shares = gl.allocate_shared_memory(gl.float32, [2, CTAS, BLOCK_B, UNITS],
                                           shared_layout(32, BLOCK_H, [2, 1, 0], 2, CTAS))
        bars = allocate_mbarriers()
    db = ()
    if db_ptr is not None:
        zero = gl.full((BLOCK_B, UNITS), 0., gl.float32, UNIT)
        db = (zero, zero, zero, zero)
    n = 0
    time, base, count, at = locate_step(offsets_ptr, shift, S - 1, d, T, S, B, first)
    inputs = load_inputs(coef_ptr, kept_ptr, dy_ptr, flags_ptr, offsets_ptr, S - 1, time, base, at, row, count,
                         inside, B, stride_dyt, H, DIRECTIONS, DY_UNIT)
    if BUFFERS == 2:
        dh, dc, db = step(inputs, dh, dc, db, staged.index(0), da_ptr + at * (4 * H),
                          there(offsets_ptr, row, count, mask), kept_ptr, dy_ptr, flags_ptr, H, PRECISION)
    while n < S:
        if BUFFERS == 1:
            dh, dc, db = step(inputs, dh, dc, db, staged.index(0), da_ptr + at * (4 * H),
                          there(offsets_ptr, row, count, mask), kept_ptr, dy_ptr, flags_ptr, H, PRECISION)
        flags = inputs[7]
        # The next inputs arrive during the products; in a cluster, which has few registers left, during the exchange.
        upcoming = gl.maximum(S - 2 - n, 0)
        time, base, count, at = locate_step(offsets_ptr, shift, upcoming, d, T, S, B, first)
        if CTAS == 1:
            inputs = load_inputs(coef_ptr, kept_ptr, dy_ptr, flags_ptr, offsets_ptr, upcoming, time, base, at,
                                 row, count, inside, B, stride_dyt, H, DIRECTIONS, DY_UNIT)
        da = staged.index(n % BUFFERS)
        sums = ()
        for chain in gl.static_range(CHAINS):
            total = gl.full((CTAS, BLOCK_B, UNITS), 0., gl.float32, ACC)
            for k in gl.static_range(chain, PARTS, CHAINS):
                total = mma_v2(da.slice(k * WIDTH, WIDTH, 2).load(A), in_registers(r[k], R), total,
                               input_precision="tf32")
            sums += (total,)
        share = sums[0]
        for chain in gl.static_range(1, CHAINS):
            share += sums[chain]
        share = by_units(share)
        dh_before = dh
        if CTAS == 1:
            dh = gl.convert_layout(share.reshape(BLOCK_B, UNITS), UNIT)
        else:
            send_shares(share, shares.index(n % 2), bars.index(n % 2), BLOCK_H)
            inputs = load_inputs(coef_ptr, kept_ptr, dy_ptr, flags_ptr, offsets_ptr, upcoming, time, base, at,
                                 row, count, inside, B, stride_dyt, H, DIRECTIONS, DY_UNIT)
            mbarrier.wait(bars.index(n % 2), n // 2 % 2)
            dh = add_shares(shares.index(n % 2), BLOCK_H)
        if flags_ptr is not None:      # dh passes a step that is not live, and ends before a fresh one
            dh = gl.where((flags & LIVE) != 0, dh, dh_before)
            dh = gl.where((flags & FRESH) == 0, dh, 0.)
        n += 1
        if BUFFERS == 2:
            if n < S:
                dh, dc, db = step(inputs, dh, dc, db, staged.index(n % 2), da_ptr + at * (4 * H),
                              there(offsets_ptr, row, count, mask), kept_ptr, dy_ptr, flags_ptr, H, PRECISION)
    gl.store(dh_ptr + at_state, dh, mask=mask)
    gl.store(dc_ptr + at_state, dc, mask=mask)
    if db_ptr is not None:
        unit = gl.arange(0, UNITS, gl.SliceLayout(0, UNIT))
        db_ptr += (tile * DIRECTIONS + d) * (4 * H) + unit
        for gate in gl.static_range(4):
            gl.store(db_ptr + gate * H, gl.sum(gl.where(mask, db[gate], 0.), 0), mask=unit < H)
