"""The forward time loop for few batch rows: ``forward_split``.

Programs share R and exchange h through the second-level cache, as in ``portable_forward.forward_grid``. The warps of a
program split the units that feed among themselves.

A warp has R of its part of these units, for all columns of the program, in registers, and in shared memory what does
not fit there. It waits for h of these units only, and loads h from the cache into the registers from which the tensor
core reads it. The products of the warps are added up through shared memory, once a step. Columns are hidden units,
gates innermost.

The head and the tail of a step are the same as in ``wgmma_forward``. As helpers for both they compile to the same
instructions in another order, in TF32 to others. So they are written out in both files: a change belongs in both.
"""

from .cell import cell_for
from .exchange import bits_of, send, wait_for_words
from .language import gl, gluon, mma_v2
from .layouts import in_registers, load_gates, load_r, powers, split_unit_layout, store_gates, unit_of
from .precision import round_tf32
from .rows import FRESH, LIVE, chunk_shift, load_flags, rows_at
from .waiting import FORWARD_SPLIT


@gluon.constexpr_function
def words_layout(words, warps):
    """(warps, 16 rows, words): a thread has 16 adjacent bytes in each of two rows, four threads have 64."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [0, 0, 2]] + [[0, 0, 16 * n] for n in powers(words // 16)] + [[0, 8, 0]],
        lane_bases=[[0, 0, 4], [0, 0, 8], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        warp_bases=[[n, 0, 0] for n in powers(warps)], block_bases=[], shape=[warps, 16, words])


@gluon.constexpr_function
def sums_layout(units, warps):
    """(warps, 16 rows, columns): a thread has all gates of adjacent units of one row, from all warps."""
    own = units // (2 * warps)
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [0, 0, 2]] + [[0, 0, 4 * n] for n in powers(own)] + [[n, 0, 0] for n in powers(warps)],
        lane_bases=[[0, 0, 4 * own * n] for n in powers(16)] + [[0, 1, 0]],
        warp_bases=[[0, 2 * n, 0] for n in powers(warps)], block_bases=[], shape=[warps, 16, 4 * units])


@gluon.constexpr_function
def sent_layout(bits, units, warps):
    """``split_unit_layout``; but a thread with one unit of 16 bits gets its neighbour's too, since two make a word."""
    own = units // (2 * warps)
    if own * bits >= 32:
        return split_unit_layout(units, warps)
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1]], lane_bases=[[0, 0]] + [[0, 2 * n] for n in powers(8)] + [[1, 0]],
        warp_bases=[[2 * n, 0] for n in powers(warps)], block_bases=[], shape=[16, units])


@gluon.constexpr_function
def by_warp_layout(bits, width):
    """Shared memory (warps, units, columns) of a slice of R: ldmatrix reads 16 bytes of each of eight columns. A column
    has 128 bytes, which fill the banks once, or if ``width`` units take less several columns fill them."""
    columns = max(1024 // (width * bits), 1)
    return gl.SwizzledSharedLayout(128 // bits, columns, 8 // columns, [1, 2, 0])


@gluon.jit
def load_r_by_warp(r_ptr, p, start, WIDTH: gl.constexpr, UNITS_PER_WARP: gl.constexpr, H: gl.constexpr,
                   BLOCK_H: gl.constexpr, layout: gl.constexpr):
    """A slice of R for each warp: (warps, WIDTH of the units of a warp, all columns of the program)."""
    warp = gl.arange(0, gl.num_warps(), gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    k = gl.arange(0, WIDTH, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    n = gl.arange(0, 4 * BLOCK_H, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    source = warp * UNITS_PER_WARP + start + unit_of(k, r_ptr.dtype.element_ty.primitive_bitwidth)
    unit = p * BLOCK_H + n // 4
    return load_r(r_ptr + (n % 4 * H + unit) * H + source, (unit < H) & (source < H))


@gluon.jit
def words_as_operand_by_warp(words, dtype: gl.constexpr, A: gl.constexpr):
    """Words of h as first operand of a product of each warp that sums over units in the order of ``unit_of``. Moves
    nothing."""
    W: gl.constexpr = words.shape[0]
    WORDS: gl.constexpr = words.shape[2]
    if dtype.primitive_bitwidth == 16:
        low, high = words.to(gl.int16).to(dtype, bitcast=True), (words >> 16).to(gl.int16).to(dtype, bitcast=True)
        h = gl.join(low, high).reshape(W, 16, WORDS // 16, 4, 2, 2, 2).permute(0, 1, 2, 4, 5, 3, 6)
        return gl.convert_layout(h.reshape(W, 16, 2 * WORDS), A, assert_trivial=True)
    else:
        h = words.to(dtype, bitcast=True).reshape(W, 16, WORDS // 16, 4, 2, 2).permute(0, 1, 2, 4, 5, 3)
        return gl.convert_layout(h.reshape(W, 16, WORDS), A, assert_trivial=True)


@gluon.jit
def word_pointers(tile, start, WORDS: gl.constexpr, WORDS_PER_WARP: gl.constexpr, ROW: gl.constexpr):
    """Where WORDS of each warp's WORDS_PER_WARP words, from the ``start``-th on, are in a tile of h with ROW words a
    row."""
    LAYOUT: gl.constexpr = words_layout(WORDS, gl.num_warps())
    warp = gl.arange(0, gl.num_warps(), gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    row = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    word = gl.arange(0, WORDS, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    return tile.to(gl.pointer_type(gl.int32)) + (warp * WORDS_PER_WARP + row * ROW + start + word)


@gluon.jit
def send_units(tile, h, p, UNITS: gl.constexpr):
    """Program p's units of h into their slots in a tile (16, UNITS): 4 bytes at a time."""
    BITS: gl.constexpr = h.dtype.primitive_bitwidth
    BLOCK_H: gl.constexpr = h.shape[1]
    words = bits_of(gl.convert_layout(h, sent_layout(BITS, BLOCK_H, gl.num_warps())))
    if BITS == 16:
        low, high = words.reshape(16, BLOCK_H // 2, 2).split()
        words = (low.to(gl.int32) & 0xFFFF) | (high.to(gl.int32) << 16)
    OWN: gl.constexpr = words.shape[1]
    TO: gl.constexpr = words.type.layout
    to = (gl.arange(0, 16, gl.SliceLayout(1, TO))[:, None] * (UNITS * BITS // 32) + p * OWN
          + gl.arange(0, OWN, gl.SliceLayout(0, TO))[None, :])
    send(tile.to(gl.pointer_type(gl.int32)) + to, words, False)


@gluon.jit(do_not_specialize=["T", "S", "B", "first", "keep_every", "tiles", "limit"])
def forward_split(x_ptr, r_ptr, h_ptr, c_ptr, y_ptr, kept_ptr, sent_ptr, T, S, B, first, keep_every, tiles,
                  H: gl.constexpr, DIRECTIONS: gl.constexpr, R_SLICES: gl.constexpr, BLOCK_H: gl.constexpr,
                  PADDED_PROGRAMS: gl.constexpr, UNITS_PER_WARP: gl.constexpr, HELD: gl.constexpr,
                  PRECISION: gl.constexpr,
                  flags_ptr=None, offsets_ptr=None, stuck_ptr=None, limit=None, KEEP_GATES: gl.constexpr = False):
    """As ``portable_forward.forward_grid``, without zoneout, in tiles of 16 rows. R_SLICES cut the UNITS_PER_WARP units
    of a warp. The first of them, as many as fit HELD bytes, are in registers, the others in shared memory."""
    p, group, d = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    dtype: gl.constexpr = y_ptr.dtype.element_ty
    BITS: gl.constexpr = dtype.primitive_bitwidth
    UNITS: gl.constexpr = PADDED_PROGRAMS * BLOCK_H
    AREA: gl.constexpr = 16 * UNITS
    ROW: gl.constexpr = UNITS * BITS // 32
    W: gl.constexpr = gl.num_warps()
    UNIT: gl.constexpr = split_unit_layout(BLOCK_H, W)
    ACC: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1, 1], [1, 16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, ACC, 32 // BITS)
    R: gl.constexpr = gl.DotOperandLayout(1, ACC, 32 // BITS)
    UNIT_BYTES: gl.constexpr = W * 4 * BLOCK_H * BITS // 8          # of R, for one unit of each warp
    sent_ptr += ((d * gl.num_programs(1) + group) * tiles).to(gl.int64) * AREA
    step_of_sent = (gl.num_programs(2) * gl.num_programs(1) * tiles).to(gl.int64) * AREA
    r_ptr += d * (4 * H * H)
    x_ptr += chunk_shift(offsets_ptr, d, T, S, B, first) * (4 * H)
    r = ()
    for k in gl.static_range(len(R_SLICES)):
        part = load_r_by_warp(r_ptr, p, R_SLICES[k][0], R_SLICES[k][1], UNITS_PER_WARP, H, BLOCK_H, R)
        if (R_SLICES[k][0] + R_SLICES[k][1]) * UNIT_BYTES > HELD:
            part = gl.allocate_shared_memory(dtype, part.shape, by_warp_layout(BITS, R_SLICES[k][1]), part)
        r += (part,)
    partial = gl.allocate_shared_memory(gl.float32, [W, 16, 4 * BLOCK_H], gl.SwizzledSharedLayout(4, 1, 8, [2, 1, 0]))
    rows = gl.arange(0, 16, gl.SliceLayout(1, UNIT))[:, None]
    unit = p * BLOCK_H + gl.arange(0, BLOCK_H, gl.SliceLayout(0, UNIT))[None, :]
    inside = None if PADDED_PROGRAMS * BLOCK_H == H else unit < H
    time = gl.where(d == 0, first, T - 1 - first)
    base, count = rows_at(offsets_ptr, time, B)
    # rows past the end repeat the last one, and nothing of them is stored: a masked load is waited for at once
    row = gl.minimum(group * tiles * 16 + rows, count - 1)
    x = load_gates(x_ptr + base * (4 * H) + row * (4 * H) + unit, inside, H)
    if flags_ptr is not None:
        flags_ptr += d.to(gl.int64) * T * B
    until_kept = gl.where(first == 0, keep_every, (keep_every - first % keep_every) % keep_every)
    at_kept = gl.where(first == 0, 0, (first - 1) // keep_every)
    s, m = 0, 0
    while s < S:
        row = (group * tiles + m) * 16 + rows
        mask = (row < B) & (unit < H)
        at_c = (d * B + row).to(gl.int64) * H + unit
        c_prev = gl.load(c_ptr + at_c, mask=mask, other=0.)
        if flags_ptr is not None:
            flags = load_flags(flags_ptr, time.to(gl.int64), row, B)
            live = (flags & LIVE) != 0
            upcoming = first + gl.minimum(s + 1, S - 1)
            next_flags = load_flags(flags_ptr, gl.where(d == 0, upcoming, T - 1 - upcoming).to(gl.int64), row, B)
            c_prev = gl.where((flags & FRESH) == 0, c_prev, 0.)
        tile = sent_ptr + s * step_of_sent + m * AREA
        at, words = (), ()
        for k in gl.static_range(len(R_SLICES)):
            at += (word_pointers(tile, R_SLICES[k][0] * BITS // 32, R_SLICES[k][1] * BITS // 32,
                                 UNITS_PER_WARP * BITS // 32, ROW),)
            words += (gl.load(at[k], volatile=True),)
        # x of the next tile, or of the first one in the next step, to arrive during the products
        last = m == tiles - 1
        next_m, next_s = gl.where(last, 0, m + 1), gl.where(last, s + 1, s)
        upcoming = first + gl.minimum(next_s, S - 1)
        next_time = gl.where(d == 0, upcoming, T - 1 - upcoming)
        next_base, next_count = rows_at(offsets_ptr, next_time, B)
        next_row = gl.minimum((group * tiles + next_m) * 16 + rows, next_count - 1)
        next_x = load_gates(x_ptr + next_base * (4 * H) + next_row * (4 * H) + unit, inside, H)
        a = gl.full((W, 16, 4 * BLOCK_H), 0., gl.float32, ACC)
        watch = (stuck_ptr, limit, first, s, m)
        for k in gl.static_range(len(R_SLICES)):
            h = words_as_operand_by_warp(wait_for_words(words[k], at[k], watch, 0, W, FORWARD_SPLIT), dtype, A)
            a = mma_v2(h, in_registers(r[k], R), a, input_precision="tf32")
        partial.store(a)
        a = gl.sum(partial.load(sums_layout(BLOCK_H, W)), 0).reshape(16, BLOCK_H, 2, 2)
        even, odd = a.split()
        i, g = even.split()
        f, o = odd.split()
        i, f = gl.convert_layout(i, UNIT, assert_trivial=True), gl.convert_layout(f, UNIT, assert_trivial=True)
        g, o = gl.convert_layout(g, UNIT, assert_trivial=True), gl.convert_layout(o, UNIT, assert_trivial=True)
        i, f = i + x[0].to(gl.float32), f + x[1].to(gl.float32)
        g, o = g + x[2].to(gl.float32), o + x[3].to(gl.float32)
        if KEEP_GATES:
            store_gates(x_ptr + (base + row) * (4 * H) + unit, (row < count) & (unit < H), i, f, g, o, H)
        y, c = cell_for(i, f, g, o, c_prev, dtype)
        h_next = y
        if flags_ptr is not None:
            if DIRECTIONS == 2:     # a row that has not begun yet keeps its first h
                first_h = gl.load(h_ptr + row * (DIRECTIONS * H) + d * H + unit, mask=mask & ((flags & LIVE) == 0),
                                  other=0.)
                h_next = gl.where(live, y, first_h.to(gl.float32))
            h_next = gl.where((next_flags & FRESH) == 0, h_next, 0.)
            y = gl.where(live, y, 0.)
            c = gl.where(live, c, c_prev)
        if s < S - 1:
            if PRECISION == "tf32":
                h_next = round_tf32(h_next, False)
            send_units(tile + step_of_sent, h_next.to(dtype), p, UNITS)
        gl.store(y_ptr + (base + row) * (DIRECTIONS * H) + d * H + unit, y.to(dtype), mask=(row < count) & (unit < H))
        if KEEP_GATES:
            at = (((first + s) * DIRECTIONS + d).to(gl.int64) * B + row) * H + unit
            gl.store(kept_ptr + at, c_prev, mask=mask)
        else:
            if until_kept == 0:
                gl.store(kept_ptr + ((at_kept * DIRECTIONS + d).to(gl.int64) * B + row) * H + unit, c_prev, mask=mask)
            if last:
                at_kept += (until_kept == 0).to(gl.int32)
                until_kept = gl.where(until_kept == 0, keep_every, until_kept) - 1
        gl.store(c_ptr + at_c, c, mask=mask)
        s, m, time, base, count, x = next_s, next_m, next_time, next_base, next_count, next_x
