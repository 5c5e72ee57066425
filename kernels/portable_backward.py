"""The backward time loop in plain Triton, and kernels that prepare what every backward loop and the products around it
read: h before each step, and the loop's coefficients, or c of each step for loops that compute these themselves.

With the gates known, what the gradient of a step needs beside dh and dc are six coefficients for each unit:

    ko = tanh(c) o (1 - o)    kh = o (1 - tanh(c)^2)    ki = g i (1 - i)
    kf = c_prev f (1 - f)     kg = i (1 - g^2)          and f itself

The loop goes from the last step to the first and has neither sigmoid nor tanh:

    dh += dy;  da_o = dh ko;  dc += dh kh;  da_{i,f,g} = dc k_{i,f,g};  dc *= f;  dh = da R

With zoneout a unit keeps the shares m_h and m_c of its earlier state. These are two more coefficients: m_h dh and
m_c dc go to the earlier state directly, and the step gets (1 - m_h) dh, which is part of ko and kh, and (1 - m_c) dc.
"""

from .cell import coefficients_from, near_sigmoid, near_tanh, sigmoid, tanh, zoneout
from .exchange import add_shares, flag_of, send_shares
from .language import tl, triton
from .precision import load_operand, narrow, operand, product
from .rows import (
    BEFORE,
    CUT,
    END,
    FRESH,
    LIVE,
    START,
    chunk_shift,
    load_flags,
    of_live_steps,
    padded_or_packed,
    rows_at,
)
from .waiting import BACKWARD_GRID


@triton.jit(do_not_specialize=["T", "S", "B", "first", "steps", "keep_every", "first_kept", "rate_h", "rate_c"])
def coefficients(a_ptr, c0_ptr, kept_ptr, coef_ptr, T, S, B, first, steps, keep_every, first_kept,
                 H: tl.constexpr, DIRECTIONS: tl.constexpr, BLOCK: tl.constexpr,
                 flags_ptr=None, offsets_ptr=None, ZONEOUT: tl.constexpr = None, seed_ptr=None, rate_h=None,
                 rate_c=None):
    """Compute c of steps ``first`` to ``first + S`` again, and write the coefficients of each step.

    a         (D, S, B, 4H) pre-activations in order of time; packed (rows, 4H), see ``chunk_shift``
    c0, kept  c before the first step of all, (D, B, H), and c before every ``keep_every``-th step from
              ``first_kept keep_every`` on, (-, D, B, H); fp32
    coef      (D, S, B, 6H) fp32: ko, kh, ki, kf, kg, f; with zoneout (D, S, B, 8H), then m_h and m_c; packed as a
    steps     that a program goes through; c was kept before the first of them
    flags, offsets, seed   as in ``portable_forward.forward_resident``

    grid (blocks of rows and units, D, S / steps rounded up). A step that is not live has no da and passes dc on. Before
    a fresh step dc ends: f is then zero, but with zoneout the loop sees to it.
    """
    COUNT: tl.constexpr = 6 if ZONEOUT is None else 8
    seed = 0
    if ZONEOUT == "drawn":
        seed = tl.load(seed_ptr)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.program_id(1)
    row, unit = (n // H).to(tl.int64), n % H
    mask = row < B
    shift = chunk_shift(offsets_ptr, d, T, S, B, first)
    s = tl.program_id(2) * steps
    end = tl.minimum(s + steps, S)
    if first + s == 0:
        c = tl.load(c0_ptr + (d * B + row) * H + unit, mask=mask, other=0.)
    else:
        at_kept = ((first + s) // keep_every - first_kept).to(tl.int64) * DIRECTIONS + d
        c = tl.load(kept_ptr + (at_kept * B + row) * H + unit, mask=mask, other=0.)
    while s < end:
        time = tl.where(d == 0, first + s, T - 1 - first - s)
        base, count = rows_at(offsets_ptr, time, B)
        at = shift + base + row
        here = row < count
        a = a_ptr + at * (4 * H) + unit
        i = sigmoid(tl.load(a, mask=here, other=0.).to(tl.float32))
        f = sigmoid(tl.load(a + H, mask=here, other=0.).to(tl.float32))
        g = tanh(tl.load(a + 2 * H, mask=here, other=0.).to(tl.float32))
        o = sigmoid(tl.load(a + 3 * H, mask=here, other=0.).to(tl.float32))
        k = coef_ptr + at * (COUNT * H) + unit
        c_prev = c
        if flags_ptr is not None:
            flags = load_flags(flags_ptr, (d * T + time).to(tl.int64), row, B)
            c_prev = tl.where((flags & FRESH) == 0, c, 0.)
        c = f * c_prev + i * g
        ko, kh, ki, kf, kg, f = coefficients_from(i, f, g, o, tanh(c), c_prev)
        if ZONEOUT is not None:
            m_h, m_c = zoneout(seed, rate_h, rate_c, d, time, row, unit, ZONEOUT)
            ko, kh = (1 - m_h) * ko, (1 - m_h) * kh
            c = m_c * c_prev + (1 - m_c) * c
        if flags_ptr is not None:
            live = (flags & LIVE) != 0
            ko, kh, ki = tl.where(live, ko, 0.), tl.where(live, kh, 0.), tl.where(live, ki, 0.)
            kf, kg = tl.where(live, kf, 0.), tl.where(live, kg, 0.)
            f = tl.where(live, tl.where((flags & FRESH) == 0, f, 0.), 1.)
            c = tl.where(live, c, c_prev)
            if ZONEOUT is not None:
                m_h, m_c = tl.where(live, m_h, 1.), tl.where(live, m_c, 1.)
        tl.store(k, ko, mask=here)
        tl.store(k + H, kh, mask=here)
        tl.store(k + 2 * H, ki, mask=here)
        tl.store(k + 3 * H, kf, mask=here)
        tl.store(k + 4 * H, kg, mask=here)
        tl.store(k + 5 * H, f, mask=here)
        if ZONEOUT is not None:
            tl.store(k + 6 * H, m_h, mask=here)
            tl.store(k + 7 * H, m_c, mask=here)
        s += 1


@triton.jit(do_not_specialize=["T", "S", "B", "first", "keep_every"])
def states(a_ptr, c0_ptr, kept_ptr, c_ptr, T, S, B, first, keep_every,
           H: tl.constexpr, DIRECTIONS: tl.constexpr, BLOCK: tl.constexpr, flags_ptr=None, offsets_ptr=None):
    """c before each of steps ``first`` to ``first + S``, into ``c`` (S, D, B, H) fp32. The other arguments are those of
    ``coefficients``.

    grid (blocks of rows and units, D).
    """
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.program_id(1)
    row, unit = (n // H).to(tl.int64), n % H
    mask = row < B
    shift = chunk_shift(offsets_ptr, d, T, S, B, first)
    if first == 0:
        c = tl.load(c0_ptr + (d * B + row) * H + unit, mask=mask, other=0.)
    else:
        at_kept = (first // keep_every - 1).to(tl.int64) * DIRECTIONS + d
        c = tl.load(kept_ptr + (at_kept * B + row) * H + unit, mask=mask, other=0.)
    s = 0
    while s < S:
        time = tl.where(d == 0, first + s, T - 1 - first - s)
        base, count = rows_at(offsets_ptr, time, B)
        here = row < count
        a = a_ptr + (shift + base + row) * (4 * H) + unit
        i = sigmoid(tl.load(a, mask=here, other=0.).to(tl.float32))
        f = sigmoid(tl.load(a + H, mask=here, other=0.).to(tl.float32))
        g = tanh(tl.load(a + 2 * H, mask=here, other=0.).to(tl.float32))
        tl.store(c_ptr + ((s.to(tl.int64) * DIRECTIONS + d) * B + row) * H + unit, c, mask=mask)
        if flags_ptr is not None:
            flags = load_flags(flags_ptr, (d * T + time).to(tl.int64), row, B)
            c_prev = tl.where((flags & FRESH) == 0, c, 0.)
            c = tl.where((flags & LIVE) != 0, f * c_prev + i * g, c_prev)
        else:
            c = f * c + i * g
        s += 1


@triton.jit(do_not_specialize=["T", "S", "B", "first", "blocks"])
def previous(y_ptr, h0_ptr, h_ptr, T, S, B, first, blocks, H: tl.constexpr, DIRECTIONS: tl.constexpr,
             BLOCK: tl.constexpr, flags_ptr=None, offsets_ptr=None):
    """h before each of steps ``first`` to ``first + S``.

    y, h0     (T, B, D H) or packed (rows, D H), which is h after each step; and h before the first, (D, B, H)
    h         (D, S, B, H) in order of time; packed (rows, H), see ``chunk_shift``
    blocks    of rows and units
    flags, offsets   as in ``portable_forward.forward_resident``

    grid (blocks S, D). Of steps that are not live h may be any number.
    """
    n = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    d = tl.program_id(1)
    row, unit = (n // H).to(tl.int64), n % H
    s = tl.program_id(0) // blocks
    time = tl.where(d == 0, first + s, T - 1 - first - s)
    base, count = rows_at(offsets_ptr, time, B)
    from_time = tl.where(d == 0, time - 1, time + 1)
    inside = (from_time >= 0) & (from_time < T)
    from_base, from_count = rows_at(offsets_ptr, tl.where(inside, from_time, time), B)
    here = row < count
    goes_on = row < tl.where(inside, from_count, 0)
    reads = here
    if flags_ptr is not None:
        flags = load_flags(flags_ptr, (d * T + time).to(tl.int64), row, B)
        goes_on &= (flags & START) == 0
        reads &= (flags & FRESH) == 0
    h = tl.load(y_ptr + (from_base + row) * (DIRECTIONS * H) + d * H + unit, mask=reads & goes_on, other=0.)
    h0 = tl.load(h0_ptr + (d * B + row) * H + unit, mask=reads & (goes_on == 0), other=0.)
    at = (chunk_shift(offsets_ptr, d, T, S, B, first) + base + row) * H + unit
    tl.store(h_ptr + at, tl.where(goes_on, h, h0), mask=here)


@triton.jit
def load_coefficients(k, mask, H: tl.constexpr, COUNT: tl.constexpr):
    """The COUNT coefficients of some units. Outside of ``mask`` they are those of a step that passes state on."""
    k_all = ()
    for n in tl.static_range(COUNT):
        k_all += (tl.load(k + n * H, mask=mask, other=1. if n >= 5 else 0.),)
    return k_all


@triton.jit
def load_gates(a, mask, H: tl.constexpr):
    """The pre-activations of the four gates of some units; 0 outside of ``mask``."""
    gates = ()
    for n in tl.static_range(4):
        gates += (tl.load(a + n * H, mask=mask, other=0.),)
    return gates


@triton.jit
def coefficients_near(gates, c, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """``coefficients_from``, with activations that are exact enough for the products."""
    i, f, g, o = gates[0].to(tl.float32), gates[1].to(tl.float32), gates[2].to(tl.float32), gates[3].to(tl.float32)
    if INTERPRET or PRECISION == "tf32x3":
        i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
        return coefficients_from(i, f, g, o, tanh(f * c + i * g), c)
    else:
        i, f, g, o = near_sigmoid(i), near_sigmoid(f), near_tanh(g), near_sigmoid(o)
        return coefficients_from(i, f, g, o, near_tanh(f * c + i * g), c)


@triton.jit
def gate_gradients(k, da, dh, dc, mask, H: tl.constexpr, INTERPRET: tl.constexpr):
    """One backward step of some units with coefficients k: stores da, and returns da of each gate and dc before it."""
    dtype: tl.constexpr = da.dtype.element_ty
    ko, kh, ki, kf, kg, f = k[0], k[1], k[2], k[3], k[4], k[5]
    if len(k) == 8:
        passed = k[7] * dc
        dc -= passed
    dc += dh * kh
    da_i, da_f = narrow(dc * ki, dtype, INTERPRET), narrow(dc * kf, dtype, INTERPRET)
    da_g, da_o = narrow(dc * kg, dtype, INTERPRET), narrow(dh * ko, dtype, INTERPRET)
    tl.store(da, da_i, mask=mask)
    tl.store(da + H, da_f, mask=mask)
    tl.store(da + 2 * H, da_g, mask=mask)
    tl.store(da + 3 * H, da_o, mask=mask)
    dc *= f
    if len(k) == 8:
        dc += passed
    return da_i, da_f, da_g, da_o, dc


@triton.jit(do_not_specialize=["T", "S", "B", "first", "stride_dyt", "stride_dyb"])
def backward_resident(coef_ptr, r_ptr, da_ptr, dh_ptr, dc_ptr, T, S, B, first, stride_dyt, stride_dyb, stride_dyh,
                      H: tl.constexpr, DIRECTIONS: tl.constexpr, R_SLICES: tl.constexpr, BLOCK_B: tl.constexpr,
                      DY_UNIT: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
                      dy_ptr=None, flags_ptr=None, offsets_ptr=None, COUNT: tl.constexpr = 6):
    """Steps ``first + S`` back to ``first``. Each program has all of R and BLOCK_B batch rows.

    coef      (D, S, B, COUNT H) fp32 of ``coefficients``: 6, or 8 with zoneout; packed (rows, COUNT H)
    r         (D, 4H, H)
    da        (D, S, B, 4H), written; packed (rows, 4H)
    dh, dc    (D, B, H) fp32: gradients after the last of these steps when the kernel begins, before the first when it
              ends
    dy        (T, B, D H) by its strides, the first two in units of DY_UNIT; packed (rows, D H); None for zeros
    flags, offsets   as in ``portable_forward.forward_resident``

    grid (batch tiles, D). R_SLICES cut the H units into (start, width).
    """
    tile, d = tl.program_id(0), tl.program_id(1)
    r_ptr += d * (4 * H * H)
    shift = chunk_shift(offsets_ptr, d, T, S, B, first)
    row = tile * BLOCK_B + tl.arange(0, BLOCK_B)
    alive = row[:, None] < B
    # r[k][j] holds the four gates of units k, for the units j of the earlier h that feed them
    r, dh, dc = (), (), ()
    for k in tl.static_range(len(R_SLICES)):
        unit = R_SLICES[k][0] + tl.arange(0, R_SLICES[k][1])
        at_state = (d * B + row[:, None]).to(tl.int64) * H + unit[None, :]
        mask = alive & (unit[None, :] < H)
        dh += (tl.load(dh_ptr + at_state, mask=mask, other=0.),)
        dc += (tl.load(dc_ptr + at_state, mask=mask, other=0.),)
        row_of_r = ()
        for j in tl.static_range(len(R_SLICES)):
            target = R_SLICES[j][0] + tl.arange(0, R_SLICES[j][1])
            gates = ()
            for gate in tl.static_range(4):
                gates += (load_operand(r_ptr, (gate * H + unit[:, None]) * H + target[None, :],
                                 (unit[:, None] < H) & (target[None, :] < H), False, PRECISION, INTERPRET),)
            row_of_r += (gates,)
        r += (row_of_r,)
    s = S - 1
    while s >= 0:
        time = tl.where(d == 0, first + s, T - 1 - first - s).to(tl.int64)
        base, count = rows_at(offsets_ptr, time, B)
        at = shift + base + row[:, None]
        live = alive
        if flags_ptr is not None:
            flags = load_flags(flags_ptr, d * T + time, row[:, None], B)
            live = (flags & LIVE) != 0
        da, new_dc, new_dh, passed = (), (), (), ()
        for k in tl.static_range(len(R_SLICES)):
            unit = R_SLICES[k][0] + tl.arange(0, R_SLICES[k][1])
            mask = (row[:, None] < count) & (unit[None, :] < H)
            dh_k = dh[k]
            if dy_ptr is not None:
                dy_t = dy_ptr + padded_or_packed(offsets_ptr, time, base) * stride_dyt * DY_UNIT
                dy = dy_t + row[:, None].to(tl.int64) * stride_dyb * DY_UNIT
                dh_k += tl.load(dy + (d * H + unit[None, :]) * stride_dyh, mask=mask & live, other=0.).to(tl.float32)
            k_all = load_coefficients(coef_ptr + at * (COUNT * H) + unit[None, :], mask, H, COUNT)
            i, f, g, o, dc_k = gate_gradients(k_all, da_ptr + at * (4 * H) + unit[None, :], dh_k, dc[k], mask, H,
                                              INTERPRET)
            if COUNT == 8:
                passed += (k_all[6] * dh_k,)
                if flags_ptr is not None:
                    dc_k = tl.where((flags & FRESH) == 0, dc_k, 0.)
            da += ((operand(i, PRECISION, INTERPRET), operand(f, PRECISION, INTERPRET),
                    operand(g, PRECISION, INTERPRET), operand(o, PRECISION, INTERPRET)),)
            new_dc += (dc_k,)
        for j in tl.static_range(len(R_SLICES)):
            dh_j = tl.full((BLOCK_B, R_SLICES[j][1]), 0., tl.float32)
            if COUNT == 8:
                dh_j = passed[j]
            elif flags_ptr is not None:
                dh_j = tl.where(live, 0., dh[j])        # a step that is not live passes it on
            for k in tl.static_range(len(R_SLICES)):
                for gate in tl.static_range(4):
                    dh_j = product(da[k][gate], r[k][j][gate], dh_j, PRECISION)
            if flags_ptr is not None:
                dh_j = tl.where((flags & FRESH) == 0, dh_j, 0.)
            new_dh += (dh_j,)
        dh, dc = new_dh, new_dc
        s -= 1
    for k in tl.static_range(len(R_SLICES)):
        unit = R_SLICES[k][0] + tl.arange(0, R_SLICES[k][1])
        at_state = (d * B + row[:, None]).to(tl.int64) * H + unit[None, :]
        mask = alive & (unit[None, :] < H)
        tl.store(dh_ptr + at_state, dh[k], mask=mask)
        tl.store(dc_ptr + at_state, dc[k], mask=mask)


@triton.jit
def load_r_rows(r_ptr, unit, start, WIDTH: tl.constexpr, H: tl.constexpr, ROUNDED: tl.constexpr,
                PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """The rows of R of some hidden units, each gate a tensor, for WIDTH units of the earlier h."""
    target = start + tl.arange(0, WIDTH)[None, :]
    gates = ()
    for gate in tl.static_range(4):
        gates += (load_operand(r_ptr, (gate * H + unit[:, None]) * H + target, (unit[:, None] < H) & (target < H),
                               ROUNDED, PRECISION, INTERPRET),)
    return gates


@triton.jit
def multiply_and_send(slot, da, r, p, flag, start, WIDTH: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK_B: tl.constexpr,
                BLOCK_H: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """Program p's share of dh of WIDTH units from ``start`` on, sent to the programs that have these units."""
    share = tl.full((BLOCK_B, WIDTH), 0., tl.float32)
    for gate in tl.static_range(4):
        share = product(da[gate], r[gate], share, PRECISION)
    # slices that begin with a program's first unit have these offsets in common, which take a register each
    target = start % BLOCK_H + 2 * tl.arange(0, WIDTH // 2)[None, :]
    to = (target // BLOCK_H * PROGRAMS + p) * (BLOCK_B * BLOCK_H) + target % BLOCK_H
    slot += start // BLOCK_H * (PROGRAMS * BLOCK_B * BLOCK_H)
    send_shares(slot + to + tl.arange(0, BLOCK_B)[:, None] * BLOCK_H, share, flag, INTERPRET)


@triton.jit(do_not_specialize=["T", "S", "B", "first", "tiles", "stride_dyt", "stride_dyb", "limit"])
def backward_grid(coef_ptr, r_ptr, da_ptr, dh_ptr, dc_ptr, share_ptr, T, S, B, first, tiles, stride_dyt, stride_dyb,
                  stride_dyh,
                  H: tl.constexpr, DIRECTIONS: tl.constexpr, R_SLICES: tl.constexpr, BLOCK_H: tl.constexpr,
                  PROGRAMS: tl.constexpr, PADDED_PROGRAMS: tl.constexpr, HELD: tl.constexpr, BLOCK_K: tl.constexpr,
                  BLOCK_B: tl.constexpr, DY_UNIT: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
                  dy_ptr=None, flags_ptr=None, offsets_ptr=None, COUNT: tl.constexpr = 6, stuck_ptr=None, limit=None,
                  kept_ptr=None):
    """As ``backward_resident``, but the programs of a group share R as in ``portable_forward.forward_grid``.

    share         memory for the shares of dh, of ``exchange.new_shares``
    kept          as in ``cluster_backward.backward_cluster``
    stuck, limit  see ``waiting``

    grid (programs, groups, D). A program multiplies da of its own units by its own rows of R, which gives a share of dh
    of every unit. It sends each share to the program that has the unit, and adds up those that it receives.

    A program may overwrite what it sent two steps before: it has received a share of the step between from each reader,
    who computed that share from what it had read. Over steps that are not live, dh stays in dh_ptr. With zoneout the
    part of dh that goes to the earlier state directly does so at every step.
    """
    p, group, d = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    AREA: tl.constexpr = BLOCK_B * BLOCK_H
    of_tile = tl.full((), PADDED_PROGRAMS * PROGRAMS * AREA, tl.int64)      # many tiles of wide layers pass 2^31
    share_ptr += (d * tl.num_programs(1) + group) * tiles * of_tile
    half = tl.num_programs(2) * tl.num_programs(1) * tiles * of_tile
    r_ptr += d * (4 * H * H)
    shift = chunk_shift(offsets_ptr, d, T, S, B, first)
    rows = tl.arange(0, BLOCK_B)[:, None]
    unit = p * BLOCK_H + tl.arange(0, BLOCK_H)
    r = ()
    for j in tl.static_range(len(R_SLICES)):
        r += (load_r_rows(r_ptr, unit, R_SLICES[j][0], R_SLICES[j][1], H, HELD < H, PRECISION, INTERPRET),)
    s, m = S - 1, 0
    while s >= 0:
        row = (group * tiles + m) * BLOCK_B + rows
        alive = row < B
        mask = alive & (unit[None, :] < H)
        time = tl.where(d == 0, first + s, T - 1 - first - s).to(tl.int64)
        base, count = rows_at(offsets_ptr, time, B)
        here = (row < count) & (unit[None, :] < H)
        at = shift + base + row
        at_state = (d * B + row).to(tl.int64) * H + unit[None, :]
        live = alive
        if flags_ptr is not None:
            flags = load_flags(flags_ptr, d * T + time, row, B)
            live = (flags & LIVE) != 0
        # loads that wait for no other program come first, to be on their way together with the shares
        if kept_ptr is not None:
            gates = load_gates(coef_ptr + at * (4 * H) + unit[None, :], here, H)
            c = tl.load(kept_ptr + s.to(tl.int64) * DIRECTIONS * B * H + at_state, mask=mask, other=0.)
        else:
            k = load_coefficients(coef_ptr + at * (COUNT * H) + unit[None, :], here, H, COUNT)
        dc = tl.load(dc_ptr + at_state, mask=mask, other=0.)
        if dy_ptr is not None:
            dy_t = dy_ptr + padded_or_packed(offsets_ptr, time, base) * stride_dyt * DY_UNIT
            dy_t += row.to(tl.int64) * stride_dyb * DY_UNIT
            dy = tl.load(dy_t + (d * H + unit[None, :]) * stride_dyh, mask=here & live, other=0.).to(tl.float32)
        turn = T - 1 - first - s        # steps of all launches before this one
        tile = share_ptr + m * of_tile
        if s == S - 1:
            dh = tl.load(dh_ptr + at_state, mask=mask, other=0.)
        else:
            dh = add_shares(tile + (turn - 1) % 2 * half + p * (PROGRAMS * AREA), flag_of(turn - 1),
                            (stuck_ptr, limit, first, s, m), PROGRAMS, AREA, BLOCK_B, BLOCK_H, BACKWARD_GRID)
            if COUNT == 8:
                dh += tl.load(dh_ptr + at_state, mask=mask, other=0.)
                if flags_ptr is not None:
                    dh = tl.where((flags & CUT) == 0, dh, 0.)
            elif flags_ptr is not None:
                dh = tl.where((flags & CUT) == 0, dh, 0.)
                dh += tl.load(dh_ptr + at_state, mask=mask & ((flags & END) != 0), other=0.)
                tl.store(dh_ptr + at_state, dh, mask=mask & ((flags & BEFORE) != 0))
        if dy_ptr is not None:
            dh += dy
        if kept_ptr is not None:
            if flags_ptr is not None:
                c = tl.where((flags & FRESH) == 0, c, 0.)
            k = coefficients_near(gates, c, PRECISION, INTERPRET)
            if flags_ptr is not None:
                k = of_live_steps(k, flags)
        i, f, g, o, dc = gate_gradients(k, da_ptr + at * (4 * H) + unit[None, :], dh, dc, here, H, INTERPRET)
        if COUNT == 8:
            tl.store(dh_ptr + at_state, k[6] * dh, mask=mask)
            if flags_ptr is not None:
                dc = tl.where((flags & FRESH) == 0, dc, 0.)
        tl.store(dc_ptr + at_state, dc, mask=mask)
        da = (operand(i, PRECISION, INTERPRET), operand(f, PRECISION, INTERPRET),
              operand(g, PRECISION, INTERPRET), operand(o, PRECISION, INTERPRET))
        slot, flag = tile + turn % 2 * half, flag_of(turn)
        for j in tl.static_range(len(R_SLICES)):
            multiply_and_send(slot, da, r[j], p, flag, R_SLICES[j][0], R_SLICES[j][1], PROGRAMS, BLOCK_B, BLOCK_H,
                              PRECISION, INTERPRET)
        if HELD < H:
            for start in range(HELD, H, BLOCK_K):
                rows_of_r = load_r_rows(r_ptr, unit, start, BLOCK_K, H, True, PRECISION, INTERPRET)
                multiply_and_send(slot, da, rows_of_r, p, flag, start, BLOCK_K, PROGRAMS, BLOCK_B, BLOCK_H, PRECISION,
                                  INTERPRET)
        last = m == tiles - 1
        m = tl.where(last, 0, m + 1)
        s = tl.where(last, s - 1, s)
    for m in range(tiles):
        row = (group * tiles + m) * BLOCK_B + rows
        mask = (row < B) & (unit[None, :] < H)
        turn = T - 1 - first
        tile = share_ptr + m * of_tile
        dh = add_shares(tile + turn % 2 * half + p * (PROGRAMS * AREA), flag_of(turn),
                        (stuck_ptr, limit, first, -1, m), PROGRAMS, AREA, BLOCK_B, BLOCK_H, BACKWARD_GRID)
        if COUNT == 8:
            dh += tl.load(dh_ptr + (d * B + row).to(tl.int64) * H + unit[None, :], mask=mask, other=0.)
        if flags_ptr is not None:
            flags = load_flags(flags_ptr, d * T + tl.where(d == 0, first, T - 1 - first).to(tl.int64), row, B)
            dh = tl.where((flags & FRESH) == 0, dh, 0.)
            mask = mask & ((flags & LIVE) != 0)
        tl.store(dh_ptr + (d * B + row).to(tl.int64) * H + unit[None, :], dh, mask=mask)
