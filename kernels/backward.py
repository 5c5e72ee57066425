"""The backward time loop, and the recompute that turns pre-activations into its coefficients.

With the gates known, everything in the gradient of a step that does not depend on dh is one of six numbers a unit:

    ko = tanh(c) o (1 - o)    kh = o (1 - tanh(c)^2)    ki = g i (1 - i)
    kf = c_prev f (1 - f)     kg = i (1 - g^2)          and f itself

and the loop, from the last step to the first, is left with products:

    dh += dy;  da_o = dh ko;  dc += dh kh;  da_{i,f,g} = dc k_{i,f,g};  dc *= f;  dh = da R

Zoneout, where a unit keeps the shares m_h and m_c of its earlier state, has two coefficients more: they pass m_h dh
and m_c dc on, and leave the step (1 - m_h) dh, which is in ko and kh, and (1 - m_c) dc.
"""
import triton
import triton.language as tl

from .cell import (
    BEFORE,
    CUT,
    END,
    FRESH,
    LIVE,
    chunk_shift,
    load_r,
    narrow,
    operand,
    place_of,
    product,
    rows_at,
    sigmoid,
    tanh,
    zoneout,
)
from .exchange import add_shares, flag_of, send_shares
from .forward import load_marks
from .waiting import BACKWARD_GRID


@triton.jit(do_not_specialize=["T", "S", "B", "first", "rate_h", "rate_c"])
def coefficients(a_ptr, c0_ptr, kept_ptr, coef_ptr, marks_ptr, offsets_ptr, T, S, B, first, keep_every,
                 H: tl.constexpr, DIRECTIONS: tl.constexpr, MARKED: tl.constexpr, BLOCK: tl.constexpr,
                 ZONEOUT: tl.constexpr = None, seed_ptr=None, rate_h=None, rate_c=None):
    """Roll c through steps ``first`` to ``first + S`` and write each step's coefficients.

    a (D, S, B, 4H) pre-activations in local time order, coef (D, S, B, 6H): ko, kh, ki, kf, kg, f. c starts from c0
    (D, B, H) or, past the first step, from what the forward loop kept. A step that is not live passes dc on and has no
    da; before a fresh one dc ends. offsets: a and coef are packed, as ``forward_resident`` has its x. With ZONEOUT (see
    ``cell.zoneout``) coef is (D, S, B, 8H): m_h and m_c follow, and what ends before a fresh step is left to the loop.
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
    if first == 0:
        c = tl.load(c0_ptr + (d * B + row) * H + unit, mask=mask, other=0.)
    else:
        at_kept = (first // keep_every - 1).to(tl.int64) * DIRECTIONS + d
        c = tl.load(kept_ptr + (at_kept * B + row) * H + unit, mask=mask, other=0.)
    s = 0
    while s < S:
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
        if MARKED:
            mark = load_marks(marks_ptr, (d * T + time).to(tl.int64), row, B)
            c_prev = tl.where((mark & FRESH) == 0, c, 0.)
        c = f * c_prev + i * g
        tanh_c = tanh(c)
        ko, kh = tanh_c * o * (1 - o), o * (1 - tanh_c * tanh_c)
        ki, kf, kg = g * i * (1 - i), c_prev * f * (1 - f), i * (1 - g * g)
        if ZONEOUT is not None:
            keep_h, keep_c = zoneout(seed, rate_h, rate_c, d, time, row, unit, ZONEOUT)
            ko, kh = (1 - keep_h) * ko, (1 - keep_h) * kh
            c = keep_c * c_prev + (1 - keep_c) * c
        if MARKED:
            live = (mark & LIVE) != 0
            ko, kh, ki = tl.where(live, ko, 0.), tl.where(live, kh, 0.), tl.where(live, ki, 0.)
            kf, kg = tl.where(live, kf, 0.), tl.where(live, kg, 0.)
            f = tl.where(live, tl.where((mark & FRESH) == 0, f, 0.), 1.)
            c = tl.where(live, c, c_prev)
            if ZONEOUT is not None:
                keep_h, keep_c = tl.where(live, keep_h, 1.), tl.where(live, keep_c, 1.)
        tl.store(k, ko, mask=here)
        tl.store(k + H, kh, mask=here)
        tl.store(k + 2 * H, ki, mask=here)
        tl.store(k + 3 * H, kf, mask=here)
        tl.store(k + 4 * H, kg, mask=here)
        tl.store(k + 5 * H, f, mask=here)
        if ZONEOUT is not None:
            tl.store(k + 6 * H, keep_h, mask=here)
            tl.store(k + 7 * H, keep_c, mask=here)
        s += 1


@triton.jit
def load_coefficients(k, mask, H: tl.constexpr, COUNT: tl.constexpr):
    """ko, kh, ki, kf, kg and f of some units, and of 8 m_h and m_c; where ``mask`` is off, those that pass state on."""
    k_all = ()
    for n in tl.static_range(COUNT):
        k_all += (tl.load(k + n * H, mask=mask, other=1. if n >= 5 else 0.),)
    return k_all


@triton.jit
def gate_gradients(k, da, dh, dc, mask, H: tl.constexpr, INTERPRET: tl.constexpr):
    """One reverse step of some units with coefficients k: stores da, returns it by gate and the earlier dc."""
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
def backward_resident(dy_ptr, coef_ptr, r_ptr, da_ptr, dh_ptr, dc_ptr, marks_ptr, offsets_ptr, T, S, B, first,
                      stride_dyt, stride_dyb, stride_dyh,
                      H: tl.constexpr, DIRECTIONS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_B: tl.constexpr,
                      HAS_DY: tl.constexpr, DY_UNIT: tl.constexpr, MARKED: tl.constexpr, PRECISION: tl.constexpr,
                      INTERPRET: tl.constexpr, COUNT: tl.constexpr = 6):
    """Steps ``first + S`` back to ``first``, every program alone with all of R and BLOCK_B rows.

    dy (T, B, D H) by strides, the first two in units of DY_UNIT; coef (D, S, B, COUNT H), COUNT 6, or 8 with zoneout; r
    (D, 4H, H); da (D, S, B, 4H); dh, dc (D, B, H) fp32: gradients after the last of these steps in, before the first
    out. offsets: dy (rows, D H), coef and da are packed, as ``forward_resident`` has its y and x.
    """
    tile, d = tl.program_id(0), tl.program_id(1)
    r_ptr += d * (4 * H * H)
    shift = chunk_shift(offsets_ptr, d, T, S, B, first)
    row = tile * BLOCK_B + tl.arange(0, BLOCK_B)
    alive = row[:, None] < B
    # r[k][j] holds the four gates of units k, seen from the units j of the earlier h
    r, dh, dc = (), (), ()
    for k in tl.static_range(len(CHUNKS)):
        unit = CHUNKS[k][0] + tl.arange(0, CHUNKS[k][1])
        at_state = (d * B + row[:, None]).to(tl.int64) * H + unit[None, :]
        mask = alive & (unit[None, :] < H)
        dh += (tl.load(dh_ptr + at_state, mask=mask, other=0.),)
        dc += (tl.load(dc_ptr + at_state, mask=mask, other=0.),)
        row_of_r = ()
        for j in tl.static_range(len(CHUNKS)):
            target = CHUNKS[j][0] + tl.arange(0, CHUNKS[j][1])
            gates = ()
            for gate in tl.static_range(4):
                gates += (load_r(r_ptr, (gate * H + unit[:, None]) * H + target[None, :],
                                 (unit[:, None] < H) & (target[None, :] < H), DIRECTIONS * 4 * H * H,
                                 PRECISION, INTERPRET),)
            row_of_r += (gates,)
        r += (row_of_r,)
    s = S - 1
    while s >= 0:
        time = tl.where(d == 0, first + s, T - 1 - first - s).to(tl.int64)
        base, count = rows_at(offsets_ptr, time, B)
        at = shift + base + row[:, None]
        live = alive
        if MARKED:
            mark = load_marks(marks_ptr, d * T + time, row[:, None], B)
            live = (mark & LIVE) != 0
        da, new_dc, new_dh, passed = (), (), (), ()
        for k in tl.static_range(len(CHUNKS)):
            unit = CHUNKS[k][0] + tl.arange(0, CHUNKS[k][1])
            mask = (row[:, None] < count) & (unit[None, :] < H)
            dh_k = dh[k]
            if HAS_DY:
                dy_t = dy_ptr + place_of(offsets_ptr, time, base) * stride_dyt * DY_UNIT
                dy = dy_t + row[:, None].to(tl.int64) * stride_dyb * DY_UNIT
                dh_k += tl.load(dy + (d * H + unit[None, :]) * stride_dyh, mask=mask & live, other=0.).to(tl.float32)
            k_all = load_coefficients(coef_ptr + at * (COUNT * H) + unit[None, :], mask, H, COUNT)
            i, f, g, o, dc_k = gate_gradients(k_all, da_ptr + at * (4 * H) + unit[None, :], dh_k, dc[k], mask, H,
                                              INTERPRET)
            if COUNT == 8:
                passed += (k_all[6] * dh_k,)
                if MARKED:
                    dc_k = tl.where((mark & FRESH) == 0, dc_k, 0.)
            da += ((operand(i, PRECISION, INTERPRET), operand(f, PRECISION, INTERPRET),
                    operand(g, PRECISION, INTERPRET), operand(o, PRECISION, INTERPRET)),)
            new_dc += (dc_k,)
        for j in tl.static_range(len(CHUNKS)):
            dh_j = tl.full((BLOCK_B, CHUNKS[j][1]), 0., tl.float32)
            if COUNT == 8:
                dh_j = passed[j]
            elif MARKED:
                dh_j = tl.where(live, 0., dh[j])        # passes a step that is not live
            for k in tl.static_range(len(CHUNKS)):
                for gate in tl.static_range(4):
                    dh_j = product(da[k][gate], r[k][j][gate], dh_j, PRECISION)
            if MARKED:
                dh_j = tl.where((mark & FRESH) == 0, dh_j, 0.)
            new_dh += (dh_j,)
        dh, dc = new_dh, new_dc
        s -= 1
    for k in tl.static_range(len(CHUNKS)):
        unit = CHUNKS[k][0] + tl.arange(0, CHUNKS[k][1])
        at_state = (d * B + row[:, None]).to(tl.int64) * H + unit[None, :]
        mask = alive & (unit[None, :] < H)
        tl.store(dh_ptr + at_state, dh[k], mask=mask)
        tl.store(dc_ptr + at_state, dc[k], mask=mask)


@triton.jit
def load_rows(r_ptr, unit, start, WIDTH: tl.constexpr, H: tl.constexpr, DIRECTIONS: tl.constexpr,
              PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """The rows of R of some hidden units, by gate, as far as they reach WIDTH units of the earlier h."""
    target = start + tl.arange(0, WIDTH)[None, :]
    gates = ()
    for gate in tl.static_range(4):
        gates += (load_r(r_ptr, (gate * H + unit[:, None]) * H + target, (unit[:, None] < H) & (target < H),
                         DIRECTIONS * 4 * H * H, PRECISION, INTERPRET),)
    return gates


@triton.jit
def multiply_and_send(slot, da, r, p, flag, start, WIDTH: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK_B: tl.constexpr,
                BLOCK_H: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """Program p's share of dh for WIDTH units, put where their owners look for it."""
    share = tl.full((BLOCK_B, WIDTH), 0., tl.float32)
    for gate in tl.static_range(4):
        share = product(da[gate], r[gate], share, PRECISION)
    # blocks that begin with an owner's units share these offsets, which take a register each
    target = start % BLOCK_H + 2 * tl.arange(0, WIDTH // 2)[None, :]
    to = (target // BLOCK_H * PROGRAMS + p) * (BLOCK_B * BLOCK_H) + target % BLOCK_H
    slot += start // BLOCK_H * (PROGRAMS * BLOCK_B * BLOCK_H)
    send_shares(slot + to + tl.arange(0, BLOCK_B)[:, None] * BLOCK_H, share, flag, INTERPRET)


@triton.jit(do_not_specialize=["T", "S", "B", "first", "tiles", "stride_dyt", "stride_dyb", "limit"])
def backward_grid(dy_ptr, coef_ptr, r_ptr, da_ptr, dh_ptr, dc_ptr, marks_ptr, offsets_ptr, share_ptr,
                  T, S, B, first, tiles,
                  stride_dyt, stride_dyb, stride_dyh,
                  H: tl.constexpr, DIRECTIONS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_H: tl.constexpr,
                  PROGRAMS: tl.constexpr, OWNERS: tl.constexpr, HELD: tl.constexpr, BLOCK_K: tl.constexpr,
                  BLOCK_B: tl.constexpr, HAS_DY: tl.constexpr, DY_UNIT: tl.constexpr, MARKED: tl.constexpr,
                  PRECISION: tl.constexpr, INTERPRET: tl.constexpr, COUNT: tl.constexpr = 6, stuck_ptr=None,
                  limit=None):
    """As ``backward_resident``, but a group of programs shares R as in ``forward_grid``.

    A program multiplies its own da by its own rows of R, which gives a share of every unit's dh; the shares meet in
    share (2, D, groups, tiles, OWNERS to, PROGRAMS from, BLOCK_B, BLOCK_H) fp32, where each owner adds its own up.
    The halves take turns by step, and a share's last bit by turns of its half (see ``exchange``): all zero at first,
    then ones. A program overwrites what it sent two steps before once it has a share of the step between from the
    reader, who computed that from what it had read. Over steps that are not live, dh waits in dh_ptr; with zoneout
    the part of every dh that the step passes on does. stuck, limit: see ``waiting``.
    """
    p, group, d = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    AREA: tl.constexpr = BLOCK_B * BLOCK_H
    of_tile = tl.full((), OWNERS * PROGRAMS * AREA, tl.int64)      # many tiles of wide layers pass 2^31
    share_ptr += (d * tl.num_programs(1) + group) * tiles * of_tile
    half = tl.num_programs(2) * tl.num_programs(1) * tiles * of_tile
    r_ptr += d * (4 * H * H)
    shift = chunk_shift(offsets_ptr, d, T, S, B, first)
    rows = tl.arange(0, BLOCK_B)[:, None]
    unit = p * BLOCK_H + tl.arange(0, BLOCK_H)
    r = ()
    for j in tl.static_range(len(CHUNKS)):
        r += (load_rows(r_ptr, unit, CHUNKS[j][0], CHUNKS[j][1], H, DIRECTIONS, PRECISION, INTERPRET),)
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
        if MARKED:
            mark = load_marks(marks_ptr, d * T + time, row, B)
            live = (mark & LIVE) != 0
        # loads that wait for nobody come first, to be on their way together with the shares
        k = load_coefficients(coef_ptr + at * (COUNT * H) + unit[None, :], here, H, COUNT)
        dc = tl.load(dc_ptr + at_state, mask=mask, other=0.)
        if HAS_DY:
            dy_t = dy_ptr + place_of(offsets_ptr, time, base) * stride_dyt * DY_UNIT
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
                if MARKED:
                    dh = tl.where((mark & CUT) == 0, dh, 0.)
            elif MARKED:
                dh = tl.where((mark & CUT) == 0, dh, 0.)
                dh += tl.load(dh_ptr + at_state, mask=mask & ((mark & END) != 0), other=0.)
                tl.store(dh_ptr + at_state, dh, mask=mask & ((mark & BEFORE) != 0))
        if HAS_DY:
            dh += dy
        i, f, g, o, dc = gate_gradients(k, da_ptr + at * (4 * H) + unit[None, :], dh, dc, here, H, INTERPRET)
        if COUNT == 8:
            tl.store(dh_ptr + at_state, k[6] * dh, mask=mask)
            if MARKED:
                dc = tl.where((mark & FRESH) == 0, dc, 0.)
        tl.store(dc_ptr + at_state, dc, mask=mask)
        da = (operand(i, PRECISION, INTERPRET), operand(f, PRECISION, INTERPRET),
              operand(g, PRECISION, INTERPRET), operand(o, PRECISION, INTERPRET))
        slot, flag = tile + turn % 2 * half, flag_of(turn)
        for j in tl.static_range(len(CHUNKS)):
            multiply_and_send(slot, da, r[j], p, flag, CHUNKS[j][0], CHUNKS[j][1], PROGRAMS, BLOCK_B, BLOCK_H,
                              PRECISION, INTERPRET)
        if HELD < H:
            for start in range(HELD, H, BLOCK_K):
                multiply_and_send(slot, da, load_rows(r_ptr, unit, start, BLOCK_K, H, DIRECTIONS, PRECISION, INTERPRET),
                                  p, flag, start, BLOCK_K, PROGRAMS, BLOCK_B, BLOCK_H, PRECISION, INTERPRET)
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
        if MARKED:
            mark = load_marks(marks_ptr, d * T + tl.where(d == 0, first, T - 1 - first).to(tl.int64), row, B)
            dh = tl.where((mark & FRESH) == 0, dh, 0.)
            mask = mask & ((mark & LIVE) != 0)
        tl.store(dh_ptr + (d * B + row).to(tl.int64) * H + unit[None, :], dh, mask=mask)
