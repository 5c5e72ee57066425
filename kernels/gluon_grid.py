"""The forward time loop for many batch rows in Gluon: programs share R and exchange h through the second-level cache as
in ``forward_grid``, but multiply 64 rows a warp group at a time (wgmma), with R in shared memory.

A warp has 16 rows, and the same rows in every program: it waits for h by itself, takes it from the cache straight into
the registers from which the tensor core reads it, and never meets the program's other warp groups in the loop. So while
h of one group's rows is on its way, the other multiplies.

A thread has a quarter of the units of two rows. Columns of the product are, from the highest bit of their number on,

    gate's high bit, 2 | unit within a thread, BLOCK_H / 4 | thread's units, 4 | gate's low bit, 2

(see ``gluon_cell``), and the units that feed come in such an order that what a thread multiplies lies side by side.
"""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

from .cell import FRESH, LIVE, chunk_shift, round_tf32, rows_at
from .exchange import bits_of, send
from .forward import load_marks
from .gluon_cell import cell, join_gates, load, powers, split_gates
from .waiting import FORWARD_WGMMA, give_up

barrier = getattr(gl, "barrier", None) or gl.thread_barrier     # its name before Triton 3.7


@gluon.constexpr_function
def rows_layout(own, blocks, warps):
    """(rows, columns): of each block of columns a thread has ``own`` adjacent ones, of two rows, and four threads have
    all; a warp has 16 rows."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, n] for n in powers(own)] + [[0, 4 * own * n] for n in powers(blocks)] + [[8, 0]],
        lane_bases=[[0, own], [0, 2 * own], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16 * n, 0] for n in powers(warps)], block_bases=[], shape=[16 * warps, 4 * own * blocks])


@gluon.constexpr_function
def look_again(count, start, kernel, limited):
    """Assembly: its ``count`` outputs are the words that it is given in the same registers, or those in memory, once no
    word has all bits set. Of ``count`` addresses it takes those of the thread's two rows and counts on from them, from
    ``start`` bytes behind; if ``limited``, as many of each part of a ``watch`` follow (see ``waiting``). Its operands'
    constraints are the second result."""
    lines = [".reg .pred p; .reg .b32 m, n, since;", "mov.b32 since, 0;", "LOOK:", "max.u32 m, $0, $1;",
             "max.u32 n, $2, $3;"]
    for n in range(4, count, 2):
        lines += [f"max.u32 m, m, ${n};", f"max.u32 n, n, ${n + 1};"]
    lines += ["max.u32 m, m, n;", "setp.eq.u32 p, m, 0xffffffff;", "vote.sync.any.pred p, p, 0xffffffff;",
              "@!p bra THERE;"]
    if limited:
        lines.append(give_up(kernel, "since", *(f"${n * count}" for n in range(3, 8))))
    for n in range(0, count, 4):
        row, behind = n - n % (count // 2), start + n % (count // 2) // 4 * 64
        lines += [f"ld.volatile.global.v4.b32 {{${n}, ${n + 1}, ${n + 2}, ${n + 3}}}, [${2 * count + row}+{behind}];"]
    lines += ["bra LOOK;", "THERE:"]
    same = [str(n) for n in range(count)]
    return "{ " + " ".join(lines) + " }", ",".join(
        ["=&r"] * count + same + ["l"] * count + (["l"] * count + ["r"] * (4 * count) if limited else []))


@gluon.jit
def places(tile, last_row, ROW: gl.constexpr, WORDS: gl.constexpr):
    """Where the first WORDS words of each of 16 rows a warp are in a tile of h with ROW words a row. Rows past the last
    one's read that one's, which are in the same cache lines."""
    LAYOUT: gl.constexpr = rows_layout(4, WORDS // 16, gl.num_warps())
    row = gl.arange(0, 16 * gl.num_warps(), gl.SliceLayout(1, LAYOUT))[:, None]
    word = gl.arange(0, WORDS, gl.SliceLayout(0, LAYOUT))[None, :]
    return tile.to(gl.pointer_type(gl.int32)) + gl.minimum(row, last_row) * ROW + word


@gluon.jit
def wait_for(words, at, watch, START: gl.constexpr, KERNEL: gl.constexpr):
    """``words`` of h, read START words behind ``at``, once all have arrived; each warp for itself. They arrive whole
    (see ``send``), and no two halves of one that has arrived have all bits set."""
    COUNT: gl.constexpr = words.numel // (32 * gl.num_warps())
    ASM: gl.constexpr = look_again(COUNT, 4 * START, KERNEL, watch[0] is not None)
    if watch[0] is None:
        return gl.inline_asm_elementwise(ASM[0], ASM[1], [words, at.to(gl.uint64)], dtype=gl.int32, is_pure=False,
                                         pack=COUNT)
    else:
        return gl.inline_asm_elementwise(ASM[0], ASM[1], [words, at.to(gl.uint64), watch[0].to(gl.uint64), watch[1],
                                                          watch[2], watch[3], watch[4]], dtype=gl.int32, is_pure=False,
                                         pack=COUNT)


@gluon.jit
def first_factor(words, dtype: gl.constexpr, A: gl.constexpr):
    """Words of h as first factor of a product, whose sum has the units in the order of ``unit_of``. Moves nothing."""
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
def unit_of(k, BITS: gl.constexpr):
    """The unit that is the ``k``-th of a product's sum: four threads have 16 adjacent bytes of h each."""
    if BITS == 16:
        return k // 32 * 32 + k // 2 % 4 * 8 + k // 16 % 2 * 4 + k // 8 % 2 * 2 + k % 2
    else:
        return k // 16 * 16 + k % 4 * 4 + k // 8 % 2 * 2 + k // 4 % 2


@gluon.jit
def load_r(r_ptr, first_unit, start, WIDTH: gl.constexpr, H: gl.constexpr, BLOCK_H: gl.constexpr):
    """R from WIDTH units that feed on to all columns of the program, (columns, WIDTH)."""
    layout: gl.constexpr = gl.BlockedLayout([1, 2], [2, 16], [gl.num_warps(), 1], [1, 0])
    n = gl.arange(0, 4 * BLOCK_H, gl.SliceLayout(1, layout))[:, None]
    k = start + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))[None, :]
    gate = n // (2 * BLOCK_H) * 2 + n % 2
    unit = first_unit + n // 2 % 4 * (BLOCK_H // 4) + n // 8 % (BLOCK_H // 4)
    source = unit_of(k, r_ptr.dtype.element_ty.primitive_bitwidth)
    return gl.load(r_ptr + (gate * H + unit) * H + source, mask=(unit < H) & (source < H), other=0.)


@gluon.jit
def load_gates(x, inside, H: gl.constexpr):
    """The four gates' pre-activations x W^T + b of some units, (rows, units) each."""
    return load(x, inside), load(x + H, inside), load(x + 2 * H, inside), load(x + 3 * H, inside)


@gluon.jit
def send_h(tile, h, p, UNITS: gl.constexpr):
    """Program p's units of h into a tile (rows, UNITS), for ``wait_for`` to find: 8 bytes at a time if a thread has as
    many side by side, or 4."""
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
def forward_grid_gluon(x_ptr, r_ptr, h_ptr, c_ptr, y_ptr, kept_ptr, marks_ptr, offsets_ptr, sent_ptr,
                       T, S, B, first, keep_every, tiles,
                       H: gl.constexpr, DIRECTIONS: gl.constexpr, CHUNKS: gl.constexpr, BLOCK_H: gl.constexpr,
                       OWNERS: gl.constexpr, BLOCK_B: gl.constexpr, MARKED: gl.constexpr, PRECISION: gl.constexpr,
                       stuck_ptr=None, limit=None):
    """As ``forward_grid``, 64 rows to each four warps. CHUNKS are as wide as units of h are waited for at a time; the
    last one may have half the width."""
    p, group, d = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    dtype: gl.constexpr = y_ptr.dtype.element_ty
    BITS: gl.constexpr = dtype.primitive_bitwidth
    UNITS: gl.constexpr = OWNERS * BLOCK_H
    AREA: gl.constexpr = BLOCK_B * UNITS
    ROW: gl.constexpr = UNITS * BITS // 32
    # Chunks of R whose 16 addresses each stay in registers, 63 of them uniform. Of many chunks few spill more.
    FIRST: gl.constexpr = 3 if len(CHUNKS) <= 6 else 6
    W: gl.constexpr = gl.num_warps()
    UNIT: gl.constexpr = rows_layout(BLOCK_H // 4, 1, W)
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, 4 * BLOCK_H, 256 // BITS])
    A: gl.constexpr = gl.DotOperandLayout(0, ACC, 32 // BITS)
    sent_ptr += ((d * gl.num_programs(1) + group) * tiles).to(gl.int64) * AREA
    step_of_sent = (gl.num_programs(2) * gl.num_programs(1) * tiles).to(gl.int64) * AREA
    r_ptr += d * (4 * H * H)
    x_ptr += chunk_shift(offsets_ptr, d, T, S, B, first) * (4 * H)
    r = ()
    for k in gl.static_range(len(CHUNKS)):
        part = gl.allocate_shared_memory(dtype, [1, 4 * BLOCK_H, CHUNKS[k][1]], gl.NVMMASharedLayout(128, BITS, 2))
        part.index(0).store(load_r(r_ptr, p * BLOCK_H, CHUNKS[k][0], CHUNKS[k][1], H, BLOCK_H))
        r += (part,)
    fence_async_shared()
    barrier()
    rows = gl.arange(0, BLOCK_B, gl.SliceLayout(1, UNIT))[:, None]
    unit = p * BLOCK_H + gl.arange(0, BLOCK_H, gl.SliceLayout(0, UNIT))[None, :]
    inside = None if OWNERS * BLOCK_H == H else unit < H
    time = gl.where(d == 0, first, T - 1 - first)
    base, count = rows_at(offsets_ptr, time, B)
    # rows past the end repeat the last one, and nothing of them is stored: a masked load is waited for at once
    x = load_gates(x_ptr + base * (4 * H) + gl.minimum(group * tiles * BLOCK_B + rows, count - 1) * (4 * H) + unit,
                   inside, H)
    if MARKED:
        marks_ptr += d.to(gl.int64) * T * B
    until_kept = gl.where(first == 0, keep_every, (keep_every - first % keep_every) % keep_every)
    at_kept = gl.where(first == 0, 0, (first - 1) // keep_every)
    s, m = 0, 0
    while s < S:
        row = (group * tiles + m) * BLOCK_B + rows
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
        watch = (stuck_ptr, limit, first, s, m)
        last_row = gl.maximum(B - 1 - (group * tiles + m) * BLOCK_B, 0)
        words = gl.load(places(tile, last_row, ROW, CHUNKS[0][1] * BITS // 32), volatile=True)
        a = join_gates(x[0].to(gl.float32), x[1].to(gl.float32), x[2].to(gl.float32), x[3].to(gl.float32), BLOCK_H, 4,
                       ACC)
        # x of the next tile, or of the first one in the next step, to arrive during the products
        last = m == tiles - 1
        next_m, next_s = gl.where(last, 0, m + 1), gl.where(last, s + 1, s)
        ahead = first + gl.minimum(next_s, S - 1)
        next_time = gl.where(d == 0, ahead, T - 1 - ahead)
        next_base, next_count = rows_at(offsets_ptr, next_time, B)
        next_row = gl.minimum((group * tiles + next_m) * BLOCK_B + rows, next_count - 1)
        x = load_gates(x_ptr + next_base * (4 * H) + next_row * (4 * H) + unit, inside, H)
        # the compiler takes this for another number each time, and computes the addresses from it when they are wanted
        zero = gl.inline_asm_elementwise("mov.b32 $0, 0;", "=r,r", [s], dtype=gl.int32, is_pure=False, pack=1)
        for k in gl.static_range(len(CHUNKS)):
            at = places(tile, last_row, ROW, CHUNKS[k][1] * BITS // 32)
            h = first_factor(wait_for(words, at, watch, CHUNKS[k][0] * BITS // 32, FORWARD_WGMMA), dtype, A)
            if k + 1 < len(CHUNKS):
                # once the first is there, the others are likely to be
                at = places(tile, last_row, ROW, CHUNKS[k + 1][1] * BITS // 32)
                words = gl.load(at + CHUNKS[k + 1][0] * BITS // 32, volatile=True)
            a = warpgroup_mma(h, r[k].index(0 if k < FIRST else zero).permute((1, 0)), a)
        i, f, g, o = split_gates(a, BLOCK_H, 4, UNIT)
        y, c = cell(i, f, g, o, c_prev, dtype)
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
        s, m, time, base, count = next_s, next_m, next_time, next_base, next_count
