"""The forward time loop: R stays on chip from the first step to the last."""
import triton
import triton.language as tl

from .cell import (
    FRESH,
    LIVE,
    START,
    cell,
    chunk_shift,
    first_row,
    load_r,
    narrow,
    operand,
    product,
    round_tf32,
    rows_at,
    zoneout,
)
from .exchange import receive, send_h, values, wait_for
from .waiting import FORWARD_GRID


@triton.jit
def load_gates(x_ptr, at, mask, H: tl.constexpr):
    """The four gates' pre-activations x W^T + b of some units, (rows, units) each."""
    i = tl.load(x_ptr + at, mask=mask, other=0.)
    f = tl.load(x_ptr + at + H, mask=mask, other=0.)
    g = tl.load(x_ptr + at + 2 * H, mask=mask, other=0.)
    o = tl.load(x_ptr + at + 3 * H, mask=mask, other=0.)
    return i, f, g, o


@triton.jit
def load_marks(marks_ptr, time, row, B):
    """The marks (see ``launch.marks``) of some rows at one time, (rows, 1)."""
    return tl.load(marks_ptr + time * B + row, mask=row < B, other=0)


@triton.jit(do_not_specialize=["T", "S", "B", "first", "keep_every", "rate_h", "rate_c"])
def forward_resident(x_ptr, r_ptr, h_ptr, c_ptr, y_ptr, kept_ptr, marks_ptr, offsets_ptr, T, S, B, first, keep_every,
                     H: tl.constexpr, DIRECTIONS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_B: tl.constexpr,
                     MARKED: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
                     ZONEOUT: tl.constexpr = None, seed_ptr=None, rate_h=None, rate_c=None):
    """Steps ``first`` to ``first + S`` of a layer, every program alone with all of R and BLOCK_B rows.

    x (D, S, B, 4H) pre-activations, r (D, 4H, H) as ``load_r`` has it, h (B, D H) before the first step, c (D, B, H)
    fp32 in and out, y (T, B, D H), kept (-, D, B, H): c before step n keep_every, n = 1, 2, ... CHUNKS cut H into
    (start, width). MARKED: marks (D, T, B) tell which steps are live and which begin from a zero state. offsets: x and
    y are packed, (rows, 4H) as ``chunk_shift`` tells and (rows, D H), and what is not live is not there. ZONEOUT: see
    ``cell.zoneout``; the seed is one int64.
    """
    tile, d = tl.program_id(0), tl.program_id(1)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    r_ptr += d * (4 * H * H)
    x_ptr += chunk_shift(offsets_ptr, d, T, S, B, first) * (4 * H)
    row = tile * BLOCK_B + tl.arange(0, BLOCK_B)
    alive = row[:, None] < B
    mark = row[:, None]
    goes_on = alive
    time = tl.where(d == 0, first, T - 1 - first)
    base, count = rows_at(offsets_ptr, time, B)
    if MARKED:
        marks_ptr += d.to(tl.int64) * T * B
        mark = load_marks(marks_ptr, time.to(tl.int64), row[:, None], B)
        goes_on = alive & ((mark & FRESH) == 0)
    # state and R, by chunks of hidden units; r[j][k] holds the four gates of output units j and input units k
    r, c, h, x = (), (), (), ()
    own = ()        # with zoneout, h once more: as the cell has it, not as products read it
    seed = 0
    if ZONEOUT == "drawn":
        seed = tl.load(seed_ptr)
    for j in tl.static_range(len(CHUNKS)):
        unit = CHUNKS[j][0] + tl.arange(0, CHUNKS[j][1])
        held = goes_on & (unit[None, :] < H)
        c += (tl.load(c_ptr + (d * B + row[:, None]).to(tl.int64) * H + unit[None, :], mask=held, other=0.),)
        h_j = tl.load(h_ptr + row[:, None] * (DIRECTIONS * H) + d * H + unit[None, :], mask=held, other=0.)
        h += (operand(h_j, PRECISION, INTERPRET),)
        if ZONEOUT is not None:
            own += (h_j,)
        x += (load_gates(x_ptr + base * (4 * H), row[:, None] * (4 * H) + unit[None, :],
                         (row[:, None] < count) & (unit[None, :] < H), H),)
        row_of_r = ()
        for k in tl.static_range(len(CHUNKS)):
            source = CHUNKS[k][0] + tl.arange(0, CHUNKS[k][1])
            gates = ()
            for gate in tl.static_range(4):
                gates += (load_r(r_ptr, (gate * H + unit[None, :]) * H + source[:, None],
                                 (unit[None, :] < H) & (source[:, None] < H), DIRECTIONS * 4 * H * H,
                                 PRECISION, INTERPRET),)
            row_of_r += (gates,)
        r += (row_of_r,)
    s = 0
    while s < S:
        if ((first + s) % keep_every == 0) & (first + s > 0):
            at_kept = ((first + s) // keep_every - 1).to(tl.int64) * DIRECTIONS + d
            for j in tl.static_range(len(CHUNKS)):
                unit = CHUNKS[j][0] + tl.arange(0, CHUNKS[j][1])
                tl.store(kept_ptr + (at_kept * B + row[:, None]) * H + unit[None, :], c[j],
                         mask=alive & (unit[None, :] < H))
        now = tl.where(d == 0, first + s, T - 1 - first - s)
        ahead = first + tl.minimum(s + 1, S - 1)
        time = tl.where(d == 0, ahead, T - 1 - ahead)
        next_base, next_count = rows_at(offsets_ptr, time, B)
        next_mark = mark
        if MARKED:
            next_mark = load_marks(marks_ptr, time.to(tl.int64), row[:, None], B)
            live = (mark & LIVE) != 0
            goes_on = ((next_mark & FRESH) == 0) | (s == S - 1)
        new_c, new_h, new_x, new_own = (), (), (), ()
        for j in tl.static_range(len(CHUNKS)):
            unit = CHUNKS[j][0] + tl.arange(0, CHUNKS[j][1])
            mask = alive & (unit[None, :] < H)
            i, f, g, o = x[j]
            i, f, g, o = i.to(tl.float32), f.to(tl.float32), g.to(tl.float32), o.to(tl.float32)
            for k in tl.static_range(len(CHUNKS)):
                i = product(h[k], r[j][k][0], i, PRECISION)
                f = product(h[k], r[j][k][1], f, PRECISION)
                g = product(h[k], r[j][k][2], g, PRECISION)
                o = product(h[k], r[j][k][3], o, PRECISION)
            new_x += (load_gates(x_ptr + next_base * (4 * H), row[:, None] * (4 * H) + unit[None, :],
                                 (row[:, None] < next_count) & (unit[None, :] < H), H),)
            y, c_j = cell(i, f, g, o, c[j])
            if ZONEOUT is not None:
                keep_h, keep_c = zoneout(seed, rate_h, rate_c, d, now, row[:, None], unit[None, :], ZONEOUT)
                y = keep_h * own[j].to(tl.float32) + (1 - keep_h) * y
                c_j = keep_c * c[j] + (1 - keep_c) * c_j
            y = narrow(y, dtype, INTERPRET)
            h_j = y
            if MARKED:
                # a row that has yet to begin still waits with its first h; one that has ended needs none
                waiting = tl.load(h_ptr + row[:, None] * (DIRECTIONS * H) + d * H + unit[None, :],
                                  mask=mask & ((mark & LIVE) == 0), other=0.)
                h_j = tl.where(goes_on, tl.where(live, y, waiting), 0.).to(dtype)
                c_j = tl.where(goes_on, tl.where(live, c_j, c[j]), 0.)
                y = tl.where(live, y, 0.).to(dtype)
            tl.store(y_ptr + (base + row[:, None]) * (DIRECTIONS * H) + d * H + unit[None, :], y,
                     mask=(row[:, None] < count) & (unit[None, :] < H))
            new_c += (c_j,)
            new_h += (operand(h_j, PRECISION, INTERPRET),)
            if ZONEOUT is not None:
                new_own += (h_j,)
        c, h, x, own, mark = new_c, new_h, new_x, new_own, next_mark
        base, count = next_base, next_count
        s += 1
    for j in tl.static_range(len(CHUNKS)):
        unit = CHUNKS[j][0] + tl.arange(0, CHUNKS[j][1])
        tl.store(c_ptr + (d * B + row[:, None]).to(tl.int64) * H + unit[None, :], c[j],
                 mask=alive & (unit[None, :] < H))


@triton.jit
def load_columns(r_ptr, at_r, n_unit, start, WIDTH: tl.constexpr, H: tl.constexpr, DIRECTIONS: tl.constexpr,
                 PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """R from WIDTH input units on to the columns whose rows of R begin at ``at_r``."""
    source = start + tl.arange(0, WIDTH)[:, None]
    return load_r(r_ptr, at_r + source, (n_unit < H) & (source < H), DIRECTIONS * 4 * H * H, PRECISION, INTERPRET)


@triton.jit
def first_factor(h, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """h that has travelled as ``product`` wants it; what travels for TF32 is rounded already."""
    if PRECISION == "tf32":
        return (h,)
    else:
        return operand(h, PRECISION, INTERPRET)


@triton.jit(do_not_specialize=["T", "S", "B", "first", "keep_every", "tiles", "rate_h", "rate_c", "limit"])
def forward_grid(x_ptr, r_ptr, h_ptr, c_ptr, y_ptr, kept_ptr, marks_ptr, offsets_ptr, sent_ptr,
                 T, S, B, first, keep_every, tiles,
                 H: tl.constexpr, DIRECTIONS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_H: tl.constexpr,
                 OWNERS: tl.constexpr, HELD: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr,
                 MARKED: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
                 ZONEOUT: tl.constexpr = None, seed_ptr=None, rate_h=None, rate_c=None, h0_ptr=None,
                 stuck_ptr=None, limit=None):
    """As ``forward_resident``, but a group of programs shares R: each holds the rows of BLOCK_H hidden units.

    A group takes ``tiles`` batch tiles through a step; while h of one is on its way, the others are computed. h travels
    through sent (S, D, groups, tiles, BLOCK_B, OWNERS BLOCK_H), of y's type, rounded for TF32: at launch h before step
    0, then all bits set, but zero for owners that are no programs; see ``exchange``. c lives in c_ptr, so that a
    program needs no registers for more than one tile. CHUNKS cut the HELD first input units, whose part of R stays on
    chip; the rest is read each step, BLOCK_K units at a time. ZONEOUT: h0 (D, B, H) is never rounded. stuck, limit: see
    ``waiting``.
    """
    p, group, d = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    UNITS: tl.constexpr = OWNERS * BLOCK_H
    AREA: tl.constexpr = BLOCK_B * UNITS
    sent_ptr += ((d * tl.num_programs(1) + group) * tiles).to(tl.int64) * AREA
    step_of_sent = (tl.num_programs(2) * tl.num_programs(1) * tiles).to(tl.int64) * AREA
    r_ptr += d * (4 * H * H)
    x_ptr += chunk_shift(offsets_ptr, d, T, S, B, first) * (4 * H)
    rows = tl.arange(0, BLOCK_B)[:, None]
    unit = p * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    # one product for the four gates; columns are (gate's high bit, unit, gate's low bit)
    n = tl.arange(0, 4 * BLOCK_H)[None, :]
    gate = n // (2 * BLOCK_H) * 2 + n % 2
    n_unit = p * BLOCK_H + n // 2 % BLOCK_H
    at_r = (gate * H + n_unit) * H
    seed = 0
    if ZONEOUT == "drawn":
        seed = tl.load(seed_ptr)
    r = ()
    for k in tl.static_range(len(CHUNKS)):
        r += (load_columns(r_ptr, at_r, n_unit, CHUNKS[k][0], CHUNKS[k][1], H, DIRECTIONS, PRECISION, INTERPRET),)
    row = group * tiles * BLOCK_B + rows
    time = tl.where(d == 0, first, T - 1 - first)
    base, count = rows_at(offsets_ptr, time, B)
    x_i, x_f, x_g, x_o = load_gates(x_ptr + base * (4 * H), row * (4 * H) + unit, (row < count) & (unit < H), H)
    if MARKED:
        marks_ptr += d.to(tl.int64) * T * B
    s, m = 0, 0
    while s < S:
        row = (group * tiles + m) * BLOCK_B + rows
        mask = (row < B) & (unit < H)
        at_c = (d * B + row).to(tl.int64) * H + unit
        c_prev = tl.load(c_ptr + at_c, mask=mask, other=0.)
        if MARKED:
            mark = load_marks(marks_ptr, time.to(tl.int64), row, B)
            live = (mark & LIVE) != 0
            ahead = first + tl.minimum(s + 1, S - 1)
            next_mark = load_marks(marks_ptr, tl.where(d == 0, ahead, T - 1 - ahead).to(tl.int64), row, B)
            waiting = tl.load(h_ptr + row * (DIRECTIONS * H) + d * H + unit, mask=mask & ((mark & LIVE) == 0), other=0.)
            c_prev = tl.where((mark & FRESH) == 0, c_prev, 0.)
        tile = sent_ptr + s * step_of_sent + m * AREA
        # All loads first: the compiler keeps them in this order with the products' barriers, and each would be waited
        # for alone.
        watch = (stuck_ptr, limit, first, s, m)
        h = receive(tile, watch, CHUNKS, UNITS, BLOCK_B, FORWARD_GRID)
        if ZONEOUT is not None:
            # The units' own earlier h: y has it as it is, rounded only products may. Another thread may have stored it,
            # and ``receive`` has a barrier.
            begins, has_own = first + s == 0, mask
            if MARKED:
                begins, has_own = begins | ((mark & START) != 0), mask & live
            before = tl.where(begins, time, time + tl.where(d == 0, -1, 1))
            y_prev = y_ptr + first_row(offsets_ptr, before, B) * (DIRECTIONS * H) + d * H
            own = tl.load(tl.where(begins, h0_ptr + at_c, y_prev + row * (DIRECTIONS * H) + unit), mask=has_own,
                          other=0., cache_modifier=".cg").to(tl.float32)
            if MARKED:
                own = tl.where((mark & FRESH) == 0, own, 0.)
        a = tl.full((BLOCK_B, 4 * BLOCK_H), 0., tl.float32)
        for k in tl.static_range(len(CHUNKS)):
            a = product(first_factor(values(h[k], dtype), PRECISION, INTERPRET), r[k], a, PRECISION)
        if HELD < H:
            wait_for(tile, watch, HELD, UNITS, BLOCK_B, FORWARD_GRID, INTERPRET)
            for start in range(HELD, H, BLOCK_K):
                h_part = tl.load(tile + rows * UNITS + start + tl.arange(0, BLOCK_K)[None, :], cache_modifier=".cg")
                a = product(first_factor(h_part, PRECISION, INTERPRET),
                            load_columns(r_ptr, at_r, n_unit, start, BLOCK_K, H, DIRECTIONS, PRECISION, INTERPRET), a,
                            PRECISION)
        low, high = a.reshape(BLOCK_B, 2, BLOCK_H, 2).permute(0, 2, 3, 1).split()
        i, f = low.split()
        g, o = high.split()
        y, c = cell(i + x_i, f + x_f, g + x_g, o + x_o, c_prev)
        if ZONEOUT is not None:
            keep_h, keep_c = zoneout(seed, rate_h, rate_c, d, time, row, unit, ZONEOUT)
            y = keep_h * own + (1 - keep_h) * y
            c = keep_c * c_prev + (1 - keep_c) * c
        h_next = y
        if MARKED:
            # a row that has yet to begin still waits with its first h
            h_next = tl.where((next_mark & FRESH) == 0, tl.where(live, y, waiting.to(tl.float32)), 0.)
            y = tl.where(live, y, 0.)
            c = tl.where(live, c, c_prev)
        if s < S - 1:
            if PRECISION == "tf32":
                h_next = round_tf32(h_next, INTERPRET)
            send_h(tile + step_of_sent + rows * UNITS + unit, narrow(h_next, dtype, INTERPRET), INTERPRET)
        tl.store(y_ptr + (base + row) * (DIRECTIONS * H) + d * H + unit, narrow(y, dtype, INTERPRET),
                 mask=(row < count) & (unit < H))
        if ((first + s) % keep_every == 0) & (first + s > 0):
            at_kept = ((first + s) // keep_every - 1).to(tl.int64) * DIRECTIONS + d
            tl.store(kept_ptr + (at_kept * B + row) * H + unit, c_prev, mask=mask)
        tl.store(c_ptr + at_c, c, mask=mask)
        # the next tile, or the first one of the next step
        last = m == tiles - 1
        m = tl.where(last, 0, m + 1)
        s = tl.where(last, s + 1, s)
        ahead = first + tl.minimum(s, S - 1)
        time = tl.where(d == 0, ahead, T - 1 - ahead)
        base, count = rows_at(offsets_ptr, time, B)
        row = (group * tiles + m) * BLOCK_B + rows
        x_i, x_f, x_g, x_o = load_gates(x_ptr + base * (4 * H), row * (4 * H) + unit, (row < count) & (unit < H), H)
