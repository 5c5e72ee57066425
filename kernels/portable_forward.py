"""The forward time loop in plain Triton, which runs wherever Triton does: ``forward_resident`` and ``forward_grid``."""

from .cell import cell, zoneout
from .exchange import receive, send_h, values, wait_for_rest
from .language import tl, triton
from .precision import load_operand, narrow, operand, product, received_operand, round_tf32
from .rows import FRESH, LIVE, START, chunk_shift, first_row, load_flags, rows_at
from .waiting import FORWARD_GRID


@triton.jit
def load_gates(x_ptr, at, mask, H: tl.constexpr):
    """The pre-activations x W^T + b of the four gates of some units, (rows, units) each; 0 outside of ``mask``."""
    i = tl.load(x_ptr + at, mask=mask, other=0.)
    f = tl.load(x_ptr + at + H, mask=mask, other=0.)
    g = tl.load(x_ptr + at + 2 * H, mask=mask, other=0.)
    o = tl.load(x_ptr + at + 3 * H, mask=mask, other=0.)
    return i, f, g, o


@triton.jit
def store_gates(x_ptr, at, mask, i, f, g, o, H: tl.constexpr, INTERPRET: tl.constexpr):
    """The reverse of ``load_gates``: fp32 pre-activations into the places from which the input's were loaded."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    tl.store(x_ptr + at, narrow(i, dtype, INTERPRET), mask=mask)
    tl.store(x_ptr + at + H, narrow(f, dtype, INTERPRET), mask=mask)
    tl.store(x_ptr + at + 2 * H, narrow(g, dtype, INTERPRET), mask=mask)
    tl.store(x_ptr + at + 3 * H, narrow(o, dtype, INTERPRET), mask=mask)


@triton.jit(do_not_specialize=["T", "S", "B", "first", "keep_every", "rate_h", "rate_c"])
def forward_resident(x_ptr, r_ptr, h_ptr, c_ptr, y_ptr, kept_ptr, T, S, B, first, keep_every,
                     H: tl.constexpr, DIRECTIONS: tl.constexpr, R_SLICES: tl.constexpr, BLOCK_B: tl.constexpr,
                     PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
                     flags_ptr=None, offsets_ptr=None, ZONEOUT: tl.constexpr = None, seed_ptr=None, rate_h=None,
                     rate_c=None, KEEP_GATES: tl.constexpr = False):
    """Steps ``first`` to ``first + S`` of a layer. Each program has all of R and BLOCK_B batch rows.

    x         (D, S, B, 4H) pre-activations of the input; packed (rows, 4H), see ``chunk_shift``. With KEEP_GATES each
              step replaces them by those of the gates, x W^T + b + h R^T
    r         (D, 4H, H)
    h         (B, D H) before the first step
    c         (D, B, H) fp32, before the first step when the kernel begins and after the last when it ends
    y         (T, B, D H); packed (rows, D H)
    kept      (-, D, B, H) fp32: c before steps keep_every, 2 keep_every, ...; with KEEP_GATES before every step
    flags     (D, T, B) step flags or None; see ``rows``
    offsets   (T + 1,) of packed rows, or None; see ``rows``
    seed      (1,) int64, only with zoneout, as rate_h and rate_c; see ``cell.zoneout``

    grid (batch tiles, D). R_SLICES cut the H units into (start, width).
    """
    tile, d = tl.program_id(0), tl.program_id(1)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    FIRST_KEPT: tl.constexpr = 0 if KEEP_GATES else 1       # c before step 0 is stored only with KEEP_GATES
    r_ptr += d * (4 * H * H)
    x_ptr += chunk_shift(offsets_ptr, d, T, S, B, first) * (4 * H)
    row = tile * BLOCK_B + tl.arange(0, BLOCK_B)
    alive = row[:, None] < B
    flags = row[:, None]
    goes_on = alive
    time = tl.where(d == 0, first, T - 1 - first)
    base, count = rows_at(offsets_ptr, time, B)
    if flags_ptr is not None:
        flags_ptr += d.to(tl.int64) * T * B
        flags = load_flags(flags_ptr, time.to(tl.int64), row[:, None], B)
        goes_on = alive & ((flags & FRESH) == 0)
    # state and R, by slices of hidden units: r[j][k] holds the four gates of units j, for the units k that feed
    r, c, h, x = (), (), (), ()
    own = ()        # zoneout needs h once more, as the cell has it and not as products read it
    seed = 0
    if ZONEOUT == "drawn":
        seed = tl.load(seed_ptr)
    for j in tl.static_range(len(R_SLICES)):
        unit = R_SLICES[j][0] + tl.arange(0, R_SLICES[j][1])
        held = goes_on & (unit[None, :] < H)
        c += (tl.load(c_ptr + (d * B + row[:, None]).to(tl.int64) * H + unit[None, :], mask=held, other=0.),)
        h_j = tl.load(h_ptr + row[:, None] * (DIRECTIONS * H) + d * H + unit[None, :], mask=held, other=0.)
        h += (operand(h_j, PRECISION, INTERPRET),)
        if ZONEOUT is not None:
            own += (h_j,)
        x += (load_gates(x_ptr + base * (4 * H), row[:, None] * (4 * H) + unit[None, :],
                         (row[:, None] < count) & (unit[None, :] < H), H),)
        row_of_r = ()
        for k in tl.static_range(len(R_SLICES)):
            source = R_SLICES[k][0] + tl.arange(0, R_SLICES[k][1])
            gates = ()
            for gate in tl.static_range(4):
                gates += (load_operand(r_ptr, (gate * H + unit[None, :]) * H + source[:, None],
                                 (unit[None, :] < H) & (source[:, None] < H), False, PRECISION, INTERPRET),)
            row_of_r += (gates,)
        r += (row_of_r,)
    s = 0
    while s < S:
        if ((first + s) % keep_every == 0) & (first + s >= FIRST_KEPT):
            at_kept = ((first + s) // keep_every - FIRST_KEPT).to(tl.int64) * DIRECTIONS + d
            for j in tl.static_range(len(R_SLICES)):
                unit = R_SLICES[j][0] + tl.arange(0, R_SLICES[j][1])
                tl.store(kept_ptr + (at_kept * B + row[:, None]) * H + unit[None, :], c[j],
                         mask=alive & (unit[None, :] < H))
        now = tl.where(d == 0, first + s, T - 1 - first - s)
        upcoming = first + tl.minimum(s + 1, S - 1)
        time = tl.where(d == 0, upcoming, T - 1 - upcoming)
        next_base, next_count = rows_at(offsets_ptr, time, B)
        next_flags = flags
        if flags_ptr is not None:
            next_flags = load_flags(flags_ptr, time.to(tl.int64), row[:, None], B)
            live = (flags & LIVE) != 0
            goes_on = ((next_flags & FRESH) == 0) | (s == S - 1)
        new_c, new_h, new_x, new_own = (), (), (), ()
        for j in tl.static_range(len(R_SLICES)):
            unit = R_SLICES[j][0] + tl.arange(0, R_SLICES[j][1])
            mask = alive & (unit[None, :] < H)
            i, f, g, o = x[j]
            i, f, g, o = i.to(tl.float32), f.to(tl.float32), g.to(tl.float32), o.to(tl.float32)
            for k in tl.static_range(len(R_SLICES)):
                i = product(h[k], r[j][k][0], i, PRECISION)
                f = product(h[k], r[j][k][1], f, PRECISION)
                g = product(h[k], r[j][k][2], g, PRECISION)
                o = product(h[k], r[j][k][3], o, PRECISION)
            new_x += (load_gates(x_ptr + next_base * (4 * H), row[:, None] * (4 * H) + unit[None, :],
                                 (row[:, None] < next_count) & (unit[None, :] < H), H),)
            if KEEP_GATES:
                store_gates(x_ptr + base * (4 * H), row[:, None] * (4 * H) + unit[None, :],
                            (row[:, None] < count) & (unit[None, :] < H), i, f, g, o, H, INTERPRET)
            y, c_j = cell(i, f, g, o, c[j])
            if ZONEOUT is not None:
                m_h, m_c = zoneout(seed, rate_h, rate_c, d, now, row[:, None], unit[None, :], ZONEOUT)
                y = m_h * own[j].to(tl.float32) + (1 - m_h) * y
                c_j = m_c * c[j] + (1 - m_c) * c_j
            y = narrow(y, dtype, INTERPRET)
            h_j = y
            if flags_ptr is not None:
                if DIRECTIONS == 2:     # a row that has not begun yet keeps its first h
                    first_h = tl.load(h_ptr + row[:, None] * (DIRECTIONS * H) + d * H + unit[None, :],
                                      mask=mask & ((flags & LIVE) == 0), other=0.)
                    h_j = tl.where(live, y, first_h)
                h_j = tl.where(goes_on, h_j, 0.).to(dtype)
                c_j = tl.where(goes_on, tl.where(live, c_j, c[j]), 0.)
                y = tl.where(live, y, 0.).to(dtype)
            tl.store(y_ptr + (base + row[:, None]) * (DIRECTIONS * H) + d * H + unit[None, :], y,
                     mask=(row[:, None] < count) & (unit[None, :] < H))
            new_c += (c_j,)
            new_h += (operand(h_j, PRECISION, INTERPRET),)
            if ZONEOUT is not None:
                new_own += (h_j,)
        c, h, x, own, flags = new_c, new_h, new_x, new_own, next_flags
        base, count = next_base, next_count
        s += 1
    for j in tl.static_range(len(R_SLICES)):
        unit = R_SLICES[j][0] + tl.arange(0, R_SLICES[j][1])
        tl.store(c_ptr + (d * B + row[:, None]).to(tl.int64) * H + unit[None, :], c[j],
                 mask=alive & (unit[None, :] < H))


@triton.jit
def load_r_columns(r_ptr, at_r, n_unit, start, WIDTH: tl.constexpr, H: tl.constexpr, ROUNDED: tl.constexpr,
                   PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """A slice of R, (WIDTH units that feed, columns). ``at_r``: where the row of R of each column begins."""
    source = start + tl.arange(0, WIDTH)[:, None]
    return load_operand(r_ptr, at_r + source, (n_unit < H) & (source < H), ROUNDED, PRECISION, INTERPRET)


@triton.jit(do_not_specialize=["T", "S", "B", "first", "keep_every", "tiles", "rate_h", "rate_c", "limit"])
def forward_grid(x_ptr, r_ptr, h_ptr, c_ptr, y_ptr, kept_ptr, sent_ptr, T, S, B, first, keep_every, tiles,
                 H: tl.constexpr, DIRECTIONS: tl.constexpr, R_SLICES: tl.constexpr, BLOCK_H: tl.constexpr,
                 PADDED_PROGRAMS: tl.constexpr, HELD: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr,
                 PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
                 flags_ptr=None, offsets_ptr=None, ZONEOUT: tl.constexpr = None, seed_ptr=None, rate_h=None,
                 rate_c=None, h0_ptr=None, stuck_ptr=None, limit=None, KEEP_GATES: tl.constexpr = False):
    """As ``forward_resident``, but the programs of a group share R: each has the rows of R of BLOCK_H hidden units.

    sent          (S, D, groups, tiles, BLOCK_B, PADDED_PROGRAMS BLOCK_H) slots for h, of y's type, in TF32 rounded;
                  filled by ``exchange.fill_from``
    h0            (D, B, H), only with zoneout: the h that units keep is never rounded to TF32
    stuck, limit  see ``waiting``

    grid (programs, groups, D). A group takes ``tiles`` batch tiles through each step: while h of one tile is on its
    way, the others are computed. c stays in memory, so that a program needs registers for one tile only. R_SLICES cut
    the first HELD units that feed, whose part of R stays on chip; R of the others is read each step, BLOCK_K units at a
    time, and for TF32 r is rounded then.
    """
    p, group, d = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    FIRST_KEPT: tl.constexpr = 0 if KEEP_GATES else 1       # c before step 0 is stored only with KEEP_GATES
    UNITS: tl.constexpr = PADDED_PROGRAMS * BLOCK_H
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
    for k in tl.static_range(len(R_SLICES)):
        r += (load_r_columns(r_ptr, at_r, n_unit, R_SLICES[k][0], R_SLICES[k][1], H, HELD < H, PRECISION, INTERPRET),)
    row = group * tiles * BLOCK_B + rows
    time = tl.where(d == 0, first, T - 1 - first)
    base, count = rows_at(offsets_ptr, time, B)
    x_i, x_f, x_g, x_o = load_gates(x_ptr + base * (4 * H), row * (4 * H) + unit, (row < count) & (unit < H), H)
    if flags_ptr is not None:
        flags_ptr += d.to(tl.int64) * T * B
    s, m = 0, 0
    while s < S:
        row = (group * tiles + m) * BLOCK_B + rows
        mask = (row < B) & (unit < H)
        at_c = (d * B + row).to(tl.int64) * H + unit
        c_prev = tl.load(c_ptr + at_c, mask=mask, other=0.)
        if flags_ptr is not None:
            flags = load_flags(flags_ptr, time.to(tl.int64), row, B)
            live = (flags & LIVE) != 0
            upcoming = first + tl.minimum(s + 1, S - 1)
            next_flags = load_flags(flags_ptr, tl.where(d == 0, upcoming, T - 1 - upcoming).to(tl.int64), row, B)
            if DIRECTIONS == 2:     # a row that has not begun yet keeps its first h
                first_h = tl.load(h_ptr + row * (DIRECTIONS * H) + d * H + unit, mask=mask & ((flags & LIVE) == 0),
                                  other=0.).to(tl.float32)
            c_prev = tl.where((flags & FRESH) == 0, c_prev, 0.)
        tile = sent_ptr + s * step_of_sent + m * AREA
        # All loads come before the first product: the compiler does not move them past its barriers, and would wait
        # for each alone.
        watch = (stuck_ptr, limit, first, s, m)
        h = receive(tile, watch, R_SLICES, UNITS, BLOCK_B, FORWARD_GRID)
        if ZONEOUT is not None:
            # The units' own earlier h comes from y, which has it unrounded. Another thread of this program may have
            # stored it; ``receive`` has a barrier in between.
            begins, has_own = first + s == 0, mask
            if flags_ptr is not None:
                begins, has_own = begins | ((flags & START) != 0), mask & live
            before = tl.where(begins, time, time + tl.where(d == 0, -1, 1))
            y_prev = y_ptr + first_row(offsets_ptr, before, B) * (DIRECTIONS * H) + d * H
            own = tl.load(tl.where(begins, h0_ptr + at_c, y_prev + row * (DIRECTIONS * H) + unit), mask=has_own,
                          other=0., cache_modifier=".cg").to(tl.float32)
            if flags_ptr is not None:
                own = tl.where((flags & FRESH) == 0, own, 0.)
        a = tl.full((BLOCK_B, 4 * BLOCK_H), 0., tl.float32)
        for k in tl.static_range(len(R_SLICES)):
            a = product(received_operand(values(h[k], dtype), PRECISION, INTERPRET), r[k], a, PRECISION)
        if HELD < H:
            wait_for_rest(tile, watch, HELD, UNITS, BLOCK_B, FORWARD_GRID, INTERPRET)
            for start in range(HELD, H, BLOCK_K):
                h_part = tl.load(tile + rows * UNITS + start + tl.arange(0, BLOCK_K)[None, :], cache_modifier=".cg")
                a = product(received_operand(h_part, PRECISION, INTERPRET),
                            load_r_columns(r_ptr, at_r, n_unit, start, BLOCK_K, H, True, PRECISION, INTERPRET), a,
                            PRECISION)
        low, high = a.reshape(BLOCK_B, 2, BLOCK_H, 2).permute(0, 2, 3, 1).split()
        i, f = low.split()
        g, o = high.split()
        i, f, g, o = i + x_i, f + x_f, g + x_g, o + x_o
        if KEEP_GATES:
            store_gates(x_ptr + base * (4 * H), row * (4 * H) + unit, (row < count) & (unit < H), i, f, g, o, H,
                        INTERPRET)
        y, c = cell(i, f, g, o, c_prev)
        if ZONEOUT is not None:
            m_h, m_c = zoneout(seed, rate_h, rate_c, d, time, row, unit, ZONEOUT)
            y = m_h * own + (1 - m_h) * y
            c = m_c * c_prev + (1 - m_c) * c
        h_next = y
        if flags_ptr is not None:
            if DIRECTIONS == 2:
                h_next = tl.where(live, y, first_h)
            h_next = tl.where((next_flags & FRESH) == 0, h_next, 0.)
            y = tl.where(live, y, 0.)
            c = tl.where(live, c, c_prev)
        if s < S - 1:
            if PRECISION == "tf32":
                h_next = round_tf32(h_next, INTERPRET)
            send_h(tile + step_of_sent + rows * UNITS + unit, narrow(h_next, dtype, INTERPRET), INTERPRET)
        tl.store(y_ptr + (base + row) * (DIRECTIONS * H) + d * H + unit, narrow(y, dtype, INTERPRET),
                 mask=(row < count) & (unit < H))
        if ((first + s) % keep_every == 0) & (first + s >= FIRST_KEPT):
            at_kept = ((first + s) // keep_every - FIRST_KEPT).to(tl.int64) * DIRECTIONS + d
            tl.store(kept_ptr + (at_kept * B + row) * H + unit, c_prev, mask=mask)
        tl.store(c_ptr + at_c, c, mask=mask)
        # the next tile, or the first one of the next step
        last = m == tiles - 1
        m = tl.where(last, 0, m + 1)
        s = tl.where(last, s + 1, s)
        upcoming = first + tl.minimum(s, S - 1)
        time = tl.where(d == 0, upcoming, T - 1 - upcoming)
        base, count = rows_at(offsets_ptr, time, B)
        row = (group * tiles + m) * BLOCK_B + rows
        x_i, x_f, x_g, x_o = load_gates(x_ptr + base * (4 * H), row * (4 * H) + unit, (row < count) & (unit < H), H)
