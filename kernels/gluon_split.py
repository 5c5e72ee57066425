"""The forward time loop for few batch rows in Gluon: programs share R and exchange h through the second-level cache as
in ``forward_grid``, and the warps of a program share the units that feed.

A warp holds R from its part of the units to all columns of the program in registers, and waits for those units' h
alone: it takes them from the cache straight into the registers from which the tensor core reads. What the warps'
products add up to goes through shared memory once a step. Columns are hidden units, gates innermost.
"""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .cell import FRESH, LIVE, chunk_shift, round_tf32, rows_at
from .exchange import bits_of, send
from .forward import load_marks
from .gluon_cell import cell, powers
from .gluon_grid import load_gates, unit_of, wait_for
from .waiting import FORWARD_SPLIT


@gluon.constexpr_function
def words_layout(words, warps):
    """(warps, 16 rows, words): 16 adjacent bytes of two rows a thread, four threads side by side."""
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
def unit_layout(units, warps):
    """(16 rows, units) of ``sums_layout``."""
    own = units // (2 * warps)
    return gl.DistributedLinearLayout(
        reg_bases=[[0, n] for n in powers(own)], lane_bases=[[0, own * n] for n in powers(16)] + [[1, 0]],
        warp_bases=[[2 * n, 0] for n in powers(warps)], block_bases=[], shape=[16, units])


@gluon.constexpr_function
def sent_layout(bits, units, warps):
    """``unit_layout``, but where a thread has one unit of 16 bits two, as every other thread has."""
    own = units // (2 * warps)
    if own * bits >= 32:
        return unit_layout(units, warps)
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1]], lane_bases=[[0, 0]] + [[0, 2 * n] for n in powers(8)] + [[1, 0]],
        warp_bases=[[2 * n, 0] for n in powers(warps)], block_bases=[], shape=[16, units])


@gluon.jit
def load_r(r_ptr, p, start, WIDTH: gl.constexpr, EACH: gl.constexpr, H: gl.constexpr, BLOCK_H: gl.constexpr,
           layout: gl.constexpr):
    """R from WIDTH units of each warp's EACH on to all columns of the program, (warps, WIDTH, columns)."""
    warp = gl.arange(0, gl.num_warps(), gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    k = gl.arange(0, WIDTH, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    n = gl.arange(0, 4 * BLOCK_H, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    source = warp * EACH + start + unit_of(k, r_ptr.dtype.element_ty.primitive_bitwidth)
    unit = p * BLOCK_H + n // 4
    return gl.load(r_ptr + (n % 4 * H + unit) * H + source, mask=(unit < H) & (source < H), other=0.)


@gluon.jit
def first_factor(words, dtype: gl.constexpr, A: gl.constexpr):
    """As ``gluon_grid.first_factor``, for each warp."""
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
def places(tile, start, WORDS: gl.constexpr, EACH: gl.constexpr, ROW: gl.constexpr):
    """Where WORDS words of each warp's EACH, from the ``start``-th on, are in a tile of h with ROW words a row."""
    LAYOUT: gl.constexpr = words_layout(WORDS, gl.num_warps())
    warp = gl.arange(0, gl.num_warps(), gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    row = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    word = gl.arange(0, WORDS, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    return tile.to(gl.pointer_type(gl.int32)) + (warp * EACH + row * ROW + start + word)


@gluon.jit
def send_h(tile, h, p, UNITS: gl.constexpr):
    """Program p's units of h into a tile (16, UNITS), for ``wait_for`` to find: 4 bytes at a time."""
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
def forward_split_gluon(x_ptr, r_ptr, h_ptr, c_ptr, y_ptr, kept_ptr, marks_ptr, offsets_ptr, sent_ptr,
                        T, S, B, first, keep_every, tiles,
                        H: gl.constexpr, DIRECTIONS: gl.constexpr, CHUNKS: gl.constexpr, BLOCK_H: gl.constexpr,
                        OWNERS: gl.constexpr, EACH: gl.constexpr, MARKED: gl.constexpr, PRECISION: gl.constexpr,
                        stuck_ptr=None, limit=None):
    """As ``forward_grid`` in tiles of 16 rows. CHUNKS cut the EACH units of a warp."""
    p, group, d = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    dtype: gl.constexpr = y_ptr.dtype.element_ty
    BITS: gl.constexpr = dtype.primitive_bitwidth
    UNITS: gl.constexpr = OWNERS * BLOCK_H
    AREA: gl.constexpr = 16 * UNITS
    ROW: gl.constexpr = UNITS * BITS // 32
    W: gl.constexpr = gl.num_warps()
    UNIT: gl.constexpr = unit_layout(BLOCK_H, W)
    ACC: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1, 1], [1, 16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, ACC, 32 // BITS)
    R: gl.constexpr = gl.DotOperandLayout(1, ACC, 32 // BITS)
    sent_ptr += ((d * gl.num_programs(1) + group) * tiles).to(gl.int64) * AREA
    step_of_sent = (gl.num_programs(2) * gl.num_programs(1) * tiles).to(gl.int64) * AREA
    r_ptr += d * (4 * H * H)
    x_ptr += chunk_shift(offsets_ptr, d, T, S, B, first) * (4 * H)
    r = ()
    for k in gl.static_range(len(CHUNKS)):
        r += (load_r(r_ptr, p, CHUNKS[k][0], CHUNKS[k][1], EACH, H, BLOCK_H, R),)
    partial = gl.allocate_shared_memory(gl.float32, [W, 16, 4 * BLOCK_H], gl.SwizzledSharedLayout(4, 1, 8, [2, 1, 0]))
    rows = gl.arange(0, 16, gl.SliceLayout(1, UNIT))[:, None]
    unit = p * BLOCK_H + gl.arange(0, BLOCK_H, gl.SliceLayout(0, UNIT))[None, :]
    inside = None if OWNERS * BLOCK_H == H else unit < H
    time = gl.where(d == 0, first, T - 1 - first)
    base, count = rows_at(offsets_ptr, time, B)
    # rows past the end repeat the last one, and nothing of them is stored: a masked load is waited for at once
    row = gl.minimum(group * tiles * 16 + rows, count - 1)
    x = load_gates(x_ptr + base * (4 * H) + row * (4 * H) + unit, inside, H)
    if MARKED:
        marks_ptr += d.to(gl.int64) * T * B
    until_kept = gl.where(first == 0, keep_every, (keep_every - first % keep_every) % keep_every)
    at_kept = gl.where(first == 0, 0, (first - 1) // keep_every)
    s, m = 0, 0
    while s < S:
        row = (group * tiles + m) * 16 + rows
        mask = (row < B) & (unit < H)
        at_c = (d * B + row).to(gl.int64) * H + unit
        c_prev = gl.load(c_ptr + at_c, mask=mask, other=0.)
        if MARKED:
            mark = load_marks(marks_ptr, time.to(gl.int64), row, B)
            live = (mark & LIVE) != 0
            ahead = first + gl.minimum(s + 1, S - 1)
            next_mark = load_marks(marks_ptr, gl.where(d == 0, ahead, T - 1 - ahead).to(gl.int64), row, B)
            c_prev = gl.where((mark & FRESH) == 0, c_prev, 0.)
        tile = sent_ptr + s * step_of_sent + m * AREA
        at, words = (), ()
        for k in gl.static_range(len(CHUNKS)):
            at += (places(tile, CHUNKS[k][0] * BITS // 32, CHUNKS[k][1] * BITS // 32, EACH * BITS // 32, ROW),)
            words += (gl.load(at[k], volatile=True),)
        # x of the next tile, or of the first one in the next step, to arrive during the products
        last = m == tiles - 1
        next_m, next_s = gl.where(last, 0, m + 1), gl.where(last, s + 1, s)
        ahead = first + gl.minimum(next_s, S - 1)
        next_time = gl.where(d == 0, ahead, T - 1 - ahead)
        next_base, next_count = rows_at(offsets_ptr, next_time, B)
        next_row = gl.minimum((group * tiles + next_m) * 16 + rows, next_count - 1)
        next_x = load_gates(x_ptr + next_base * (4 * H) + next_row * (4 * H) + unit, inside, H)
        a = gl.full((W, 16, 4 * BLOCK_H), 0., gl.float32, ACC)
        for k in gl.static_range(len(CHUNKS)):
            h = first_factor(wait_for(words[k], at[k], (stuck_ptr, limit, first, s, m), 0, FORWARD_SPLIT), dtype, A)
            a = mma_v2(h, r[k], a, input_precision="tf32")
        partial.store(a)
        a = gl.sum(partial.load(sums_layout(BLOCK_H, W)), 0).reshape(16, BLOCK_H, 2, 2)
        even, odd = a.split()
        i, g = even.split()
        f, o = odd.split()
        i, f = gl.convert_layout(i, UNIT, assert_trivial=True), gl.convert_layout(f, UNIT, assert_trivial=True)
        g, o = gl.convert_layout(g, UNIT, assert_trivial=True), gl.convert_layout(o, UNIT, assert_trivial=True)
        y, c = cell(i + x[0].to(gl.float32), f + x[1].to(gl.float32), g + x[2].to(gl.float32), o + x[3].to(gl.float32),
                    c_prev, dtype)
        h_next = y
        if MARKED:
            # a row that has yet to begin still waits with its first h
            waiting = gl.load(h_ptr + row * (DIRECTIONS * H) + d * H + unit, mask=mask & ((mark & LIVE) == 0), other=0.)
            h_next = gl.where((next_mark & FRESH) == 0, gl.where(live, y, waiting.to(gl.float32)), 0.)
            y = gl.where(live, y, 0.)
            c = gl.where(live, c, c_prev)
        if s < S - 1:
            if PRECISION == "tf32":
                h_next = round_tf32(h_next, False)
            send_h(tile + step_of_sent, h_next.to(dtype), p, UNITS)
        gl.store(y_ptr + (base + row) * (DIRECTIONS * H) + d * H + unit, y.to(dtype), mask=(row < count) & (unit < H))
        if until_kept == 0:
            gl.store(kept_ptr + ((at_kept * DIRECTIONS + d).to(gl.int64) * B + row) * H + unit, c_prev, mask=mask)
        if last:
            at_kept += (until_kept == 0).to(gl.int32)
            until_kept = gl.where(until_kept == 0, keep_every, until_kept) - 1
        gl.store(c_ptr + at_c, c, mask=mask)
        s, m, time, base, count, x = next_s, next_m, next_time, next_base, next_count, next_x
