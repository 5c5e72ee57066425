"""The forward time loop for many batch rows: ``forward_wgmma``.

Programs share R and exchange h through the second-level cache, as in ``portable_forward.forward_grid``. Each warp group
multiplies 64 rows at a time (wgmma), with R in shared memory.

A warp has 16 rows, the same ones in every program. It waits for h of these rows by itself and loads h from the cache
into the registers from which the tensor core reads it. It never waits for the other warps of its program in the loop.
So while h of one warp group's rows is on its way, the other warp group multiplies.

A thread has a quarter of the units of two rows. The bits of a column's number are, from the highest to the lowest, with
how many values each part takes (see ``layouts``):

    gate's high bit, 2 | unit within a thread, BLOCK_H / 4 | thread's units, 4 | gate's low bit, 2

The units that feed are in the order of ``layouts.unit_of``, so that what a thread multiplies is adjacent in memory.

The head and the tail of a step are the same as in ``split_forward``. As helpers for both they compile to the same
instructions in another order, in TF32 to others. So they are written out in both files: a change belongs in both.
"""

from .cell import cell_for
from .exchange import bits_of, send, wait_for_words
from .language import fence_async_shared, gl, gluon, warpgroup_mma
from .layouts import join_gates, load_gates, load_r, powers, split_gates, store_gates, unit_of
from .precision import round_tf32
from .rows import FRESH, LIVE, chunk_shift, load_flags, rows_at
from .waiting import FORWARD_WGMMA

barrier = getattr(gl, "barrier", None) or gl.thread_barrier     # its name before Triton 3.7


@gluon.constexpr_function
def rows_layout(own, blocks, warps):
    """(rows, columns): a thread has ``own`` adjacent columns of each block, in two rows. Four threads have all columns
    of a row. A warp has 16 rows."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, n] for n in powers(own)] + [[0, 4 * own * n] for n in powers(blocks)] + [[8, 0]],
        lane_bases=[[0, own], [0, 2 * own], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16 * n, 0] for n in powers(warps)], block_bases=[], shape=[16 * warps, 4 * own * blocks])


@gluon.jit
def word_pointers(tile, last_row, ROW: gl.constexpr, WORDS: gl.constexpr):
    """Where the first WORDS words of a warp's 16 rows are in a tile of h, which has ROW words a row. Rows past
    ``last_row`` read that row's words."""
    LAYOUT: gl.constexpr = rows_layout(4, WORDS // 16, gl.num_warps())
    row = gl.arange(0, 16 * gl.num_warps(), gl.SliceLayout(1, LAYOUT))[:, None]
    word = gl.arange(0, WORDS, gl.SliceLayout(0, LAYOUT))[None, :]
    return tile.to(gl.pointer_type(gl.int32)) + gl.minimum(row, last_row) * ROW + word


@gluon.jit
def words_as_operand(words, dtype: gl.constexpr, A: gl.constexpr):
    """Words of h as first operand of a product that sums over units in the order of ``unit_of``. Moves nothing."""
    ROWS: gl.constexpr = words.shape[0]
    WORDS: gl.constexpr = words.shape[1]
    if dtype.primitive_bitwidth == 16:
        low, high = words.to(gl.int16).to(dtype, bitcast=True), (words >> 16).to(gl.int16).to(dtype, bitcast=True)
        h = gl.join(low, high).reshape(ROWS, WORDS // 16, 4, 2, 2, 2).permute(0, 1, 3, 4, 2, 5)
        return gl.convert_layout(h.reshape(ROWS, 2 * WORDS), A, assert_trivial=True)
    else:
        h = words.to(dtype, bitcast=True).reshape(ROWS, WORDS // 16, 4, 2, 2).permute(0, 1, 3, 4, 2)
        return gl.convert_layout(h.reshape(ROWS, WORDS), A, assert_trivial=True)


@gluon.jit
def load_r_slice(r_ptr, first_unit, start, WIDTH: gl.constexpr, H: gl.constexpr, BLOCK_H: gl.constexpr):
    """A slice of R: (all columns of the program, WIDTH units that feed)."""
    layout: gl.constexpr = gl.BlockedLayout([1, 2], [2, 16], [gl.num_warps(), 1], [1, 0])
    n = gl.arange(0, 4 * BLOCK_H, gl.SliceLayout(1, layout))[:, None]
    k = start + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))[None, :]
    gate = n // (2 * BLOCK_H) * 2 + n % 2
    unit = first_unit + n // 2 % 4 * (BLOCK_H // 4) + n // 8 % (BLOCK_H // 4)
    source = unit_of(k, r_ptr.dtype.element_ty.primitive_bitwidth)
    return load_r(r_ptr + (gate * H + unit) * H + source, (unit < H) & (source < H))


@gluon.jit
def send_units(tile, h, p, UNITS: gl.constexpr):
    """Program p's units of h into their slots in a tile (rows, UNITS): 8 bytes at a time if a thread has as many side
    by side, else 4."""
    ROWS: gl.constexpr = h.shape[0]
    words = bits_of(h)
    if h.dtype.primitive_bitwidth == 16:
        low, high = words.reshape(ROWS, words.shape[1] // 2, 2).split()
        words = (low.to(gl.int32) & 0xFFFF) | (high.to(gl.int32) << 16)
    if words.shape[1] > 4:
        low, high = words.reshape(ROWS, words.shape[1] // 2, 2).split()
        words = low.to(gl.uint32, bitcast=True).to(gl.int64) | (high.to(gl.int64) << 32)
    OWN: gl.constexpr = words.shape[1]
    ALL: gl.constexpr = UNITS * h.dtype.primitive_bitwidth // words.dtype.primitive_bitwidth
    TO: gl.constexpr = rows_layout(OWN // 4, 1, gl.num_warps())
    to = (gl.arange(0, ROWS, gl.SliceLayout(1, TO))[:, None] * ALL + p * OWN
          + gl.arange(0, OWN, gl.SliceLayout(0, TO))[None, :])
    send(tile.to(gl.pointer_type(words.dtype)) + to, gl.convert_layout(words, TO, assert_trivial=True), False)


@gluon.jit(do_not_specialize=["T", "S", "B", "first", "keep_every", "tiles", "limit"])
def forward_wgmma(x_ptr, r_ptr, h_ptr, c_ptr, y_ptr, kept_ptr, sent_ptr, T, S, B, first, keep_every, tiles,
                  H: gl.constexpr, DIRECTIONS: gl.constexpr, R_SLICES: gl.constexpr, BLOCK_H: gl.constexpr,
                  PADDED_PROGRAMS: gl.constexpr, BLOCK_B: gl.constexpr, PRECISION: gl.constexpr,
                  flags_ptr=None, offsets_ptr=None, stuck_ptr=None, limit=None, KEEP_GATES: gl.constexpr = False):
    """As ``portable_forward.forward_grid``, without zoneout, in tiles of 64 rows for each four warps.

    A warp waits for h of one of R_SLICES at a time. These have all the same width, except the last, which may have half
    of it.
    """
    p, group, d = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    dtype: gl.constexpr = y_ptr.dtype.element_ty
    BITS: gl.constexpr = dtype.primitive_bitwidth
    UNITS: gl.constexpr = PADDED_PROGRAMS * BLOCK_H
    AREA: gl.constexpr = BLOCK_B * UNITS
    ROW: gl.constexpr = UNITS * BITS // 32
    # For so many slices of R the 16 addresses each stay in registers; there are 63 uniform ones. With more slices in
    # all, fewer in registers would spill more.
    FIRST: gl.constexpr = 3 if len(R_SLICES) <= 6 else 6
    W: gl.constexpr = gl.num_warps()
    UNIT: gl.constexpr = rows_layout(BLOCK_H // 4, 1, W)
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, 4 * BLOCK_H, 256 // BITS])
    A: gl.constexpr = gl.DotOperandLayout(0, ACC, 32 // BITS)
    sent_ptr += ((d * gl.num_programs(1) + group) * tiles).to(gl.int64) * AREA
    step_of_sent = (gl.num_programs(2) * gl.num_programs(1) * tiles).to(gl.int64) * AREA
    r_ptr += d * (4 * H * H)
    x_ptr += chunk_shift(offsets_ptr, d, T, S, B, first) * (4 * H)
    r = ()
    for k in gl.static_range(len(R_SLICES)):
        part = gl.allocate_shared_memory(dtype, [1, 4 * BLOCK_H, R_SLICES[k][1]], gl.NVMMASharedLayout(128, BITS, 2))
        part.index(0).store(load_r_slice(r_ptr, p * BLOCK_H, R_SLICES[k][0], R_SLICES[k][1], H, BLOCK_H))
        r += (part,)
    fence_async_shared()
    barrier()
    rows = gl.arange(0, BLOCK_B, gl.SliceLayout(1, UNIT))[:, None]
    unit = p * BLOCK_H + gl.arange(0, BLOCK_H, gl.SliceLayout(0, UNIT))[None, :]
    inside = None if PADDED_PROGRAMS * BLOCK_H == H else unit < H
    time = gl.where(d == 0, first, T - 1 - first)
    base, count = rows_at(offsets_ptr, time, B)
    # rows past the end repeat the last one, and nothing of them is stored: a masked load is waited for at once
    x = load_gates(x_ptr + base * (4 * H) + gl.minimum(group * tiles * BLOCK_B + rows, count - 1) * (4 * H) + unit,
                   inside, H)
    if flags_ptr is not None:
        flags_ptr += d.to(gl.int64) * T * B
    until_kept = (keep_every - first % keep_every) % keep_every
    at_kept = first // keep_every
    if not KEEP_GATES:          # then c before step 0 is not stored
        until_kept = gl.where(first == 0, keep_every, until_kept)
        at_kept = gl.where(first == 0, 0, (first - 1) // keep_every)
    s, m = 0, 0
    while s < S:
        row = (group * tiles + m) * BLOCK_B + rows
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
        watch = (stuck_ptr, limit, first, s, m)
        last_row = gl.maximum(B - 1 - (group * tiles + m) * BLOCK_B, 0)
        words = gl.load(word_pointers(tile, last_row, ROW, R_SLICES[0][1] * BITS // 32), volatile=True)
        a = join_gates(x[0].to(gl.float32), x[1].to(gl.float32), x[2].to(gl.float32), x[3].to(gl.float32), BLOCK_H, 4,
                       ACC)
        # x of the next tile, or of the first one in the next step, to arrive during the products
        last = m == tiles - 1
        next_m, next_s = gl.where(last, 0, m + 1), gl.where(last, s + 1, s)
        upcoming = first + gl.minimum(next_s, S - 1)
        next_time = gl.where(d == 0, upcoming, T - 1 - upcoming)
        next_base, next_count = rows_at(offsets_ptr, next_time, B)
        next_row = gl.minimum((group * tiles + next_m) * BLOCK_B + rows, next_count - 1)
        x = load_gates(x_ptr + next_base * (4 * H) + next_row * (4 * H) + unit, inside, H)
        # The compiler does not know this number, and so computes addresses that depend on it where they are needed.
        zero = gl.inline_asm_elementwise("mov.b32 $0, 0;", "=r,r", [s], dtype=gl.int32, is_pure=False, pack=1)
        for k in gl.static_range(len(R_SLICES)):
            at = word_pointers(tile, last_row, ROW, R_SLICES[k][1] * BITS // 32)
            words = wait_for_words(words, at, watch, R_SLICES[k][0] * BITS // 32, W, FORWARD_WGMMA)
            h = words_as_operand(words, dtype, A)
            if k + 1 < len(R_SLICES):
                # once h of the first slice has arrived, that of the others is likely to have arrived too
                at = word_pointers(tile, last_row, ROW, R_SLICES[k + 1][1] * BITS // 32)
                words = gl.load(at + R_SLICES[k + 1][0] * BITS // 32, volatile=True)
            a = warpgroup_mma(h, r[k].index(0 if k < FIRST else zero).permute((1, 0)), a)
        i, f, g, o = split_gates(a, BLOCK_H, 4, UNIT)
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
        # With KEEP_GATES this is always true. A store without the branch made the step of isaac_ppo 28 % longer.
        if until_kept == 0:
            gl.store(kept_ptr + ((at_kept * DIRECTIONS + d).to(gl.int64) * B + row) * H + unit, c_prev, mask=mask)
        if last:
            at_kept += (until_kept == 0).to(gl.int32)
            until_kept = gl.where(until_kept == 0, keep_every, until_kept) - 1
        gl.store(c_ptr + at_c, c, mask=mask)
        s, m, time, base, count = next_s, next_m, next_time, next_base, next_count
