"""The backward time loop for few batch rows in Gluon: programs share R and exchange shares of dh through the
second-level cache as in ``backward_grid``, each with its rows of R in registers.

A thread has one unit of one row, or two adjacent ones, and waits by itself for their shares of dh from all programs.
The four da of all units then meet in shared memory, once a step: they are the first factor of every warp, each of which
computes shares for a part of the targets, and sends them from the accumulator's registers. Its columns are in such an
order that a thread has four adjacent targets.
"""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .cell import BEFORE, CUT, END, FRESH, LIVE, chunk_shift, place_of, round_tf32, rows_at
from .exchange import flag_of
from .forward import load_marks
from .gluon_cell import load_there, powers, shared_layout
from .gluon_split import unit_layout
from .waiting import BACKWARD_SPLIT, give_up


@gluon.constexpr_function
def sent_layout(width, warps):
    """(16, targets): a thread has four adjacent targets of rows 8 apart, a warp 16 of each 16 * warps."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0]] + [[0, 16 * warps * n] for n in powers(width // (16 * warps))],
        lane_bases=[[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[0, 16 * n] for n in powers(warps)], block_bases=[], shape=[16, width])


@gluon.jit
def load_rows(r_ptr, p, start, WIDTH: gl.constexpr, H: gl.constexpr, BLOCK_H: gl.constexpr, R: gl.constexpr):
    """The rows of R of program p's units, gates innermost, as far as they reach WIDTH targets: second factor."""
    W: gl.constexpr = gl.num_warps()
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [W, 1], [1, 0])
    k = gl.arange(0, 4 * BLOCK_H, gl.SliceLayout(1, LAYOUT))[:, None]
    target = start + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))[None, :]
    unit = p * BLOCK_H + k // 4
    r = gl.load(r_ptr + (k % 4 * H + unit) * H + target, mask=(unit < H) & (target < H), other=0.)
    r = r.reshape(4 * BLOCK_H, WIDTH // (16 * W), W, 4, 2, 2).permute(0, 1, 4, 2, 3, 5)
    return gl.convert_layout(r.reshape(4 * BLOCK_H, WIDTH), R)


@gluon.constexpr_function
def stores(count, groups, row, group):
    """Assembly: ``count`` words to where the first address says, four adjacent ones of each of two rows, ``row`` bytes
    apart, then ``group`` bytes behind the same again. Its operands' constraints are the second result."""
    lines = []
    for n in range(0, count, 4):
        words = ", ".join(f"${count + n + i}" for i in range(4))
        behind = n // 4 % 2 * row + n // 8 * group
        lines += [f"st.relaxed.gpu.global.v4.b32 [${2 * count}+{behind}], {{{words}}};"]
    lines += [f"mov.b32 ${n}, 0;" for n in range(count)]
    return " ".join(lines), ",".join(["=r"] * count + ["r"] * count + ["l"] * count)


@gluon.jit
def send_shares(slot, share, p, flag, START: gl.constexpr, PROGRAMS: gl.constexpr, BLOCK_H: gl.constexpr):
    """The accumulator of program p's shares of dh of the targets from START on to their owners in ``slot``, with
    ``flag`` in the place of their last bit."""
    W: gl.constexpr = gl.num_warps()
    WIDTH: gl.constexpr = share.shape[1]
    AREA: gl.constexpr = 16 * BLOCK_H
    OWNER: gl.constexpr = PROGRAMS * AREA
    TO: gl.constexpr = sent_layout(WIDTH, W)
    share = share.reshape(16, WIDTH // (16 * W), 2, W, 4, 2).permute(0, 1, 3, 4, 2, 5).reshape(16, WIDTH)
    bits = gl.convert_layout((share.to(gl.int32, bitcast=True) & -2) | flag, TO, assert_trivial=True)
    target = START + gl.arange(0, WIDTH, gl.SliceLayout(0, TO))[None, :]
    to = (target // BLOCK_H * OWNER + p * AREA + gl.arange(0, 16, gl.SliceLayout(1, TO))[:, None] * BLOCK_H
          + target % BLOCK_H)
    COUNT: gl.constexpr = WIDTH // (2 * W)
    ASM: gl.constexpr = stores(COUNT, WIDTH // (16 * W), 8 * BLOCK_H * 4, 16 * W // BLOCK_H * OWNER * 4)
    gl.inline_asm_elementwise(ASM[0], ASM[1], [bits, (slot + to).to(gl.uint64)], dtype=gl.int32, is_pure=False,
                              pack=COUNT)


@gluon.constexpr_function
def look_again(tensors, count, stride, kernel, limited):
    """Assembly: outputs are ``count`` adjacent words of each of ``tensors``, ``stride`` bytes apart: those that it is
    given in the same registers, or those in memory, once the last bit of each is the flag's. Further operands are
    ``count`` addresses, flags and, if ``limited``, of each part of a ``watch`` (see ``waiting``), of which it takes the
    first. Their constraints are the second result."""
    total = tensors * count
    address, flag = 2 * total, 2 * total + count
    sums = min(4, total)
    lines = [".reg .pred p; .reg .b32 n, m<4>, since;", "mov.b32 since, 0;", "LOOK:"]
    for n in range(total):
        lines += [f"xor.b32 n, ${n}, ${flag}; or.b32 m{n % sums}, m{n % sums}, n;" if n >= sums else
                  f"xor.b32 m{n}, ${n}, ${flag};"]
    lines += [f"or.b32 m0, m0, m{n};" for n in range(1, sums)]
    lines += ["and.b32 m0, m0, 1;", "setp.ne.u32 p, m0, 0;", "vote.sync.any.pred p, p, 0xffffffff;", "@!p bra THERE;"]
    if limited:
        lines.append(give_up(kernel, "since", *(f"${flag + n * count}" for n in range(1, 6))))
    for t in range(tensors):
        words = ", ".join(f"${t * count + n}" for n in range(count))
        size, words = ("v2.b32", f"{{{words}}}") if count == 2 else ("b32", words)
        lines += [f"ld.volatile.global.{size} {words}, [${address}+{t * stride}];"]
    lines += ["bra LOOK;", "THERE:"]
    constraints = ["=&r"] * total + [str(n) for n in range(total)] + ["l"] * count + ["r"] * count
    constraints += ["l"] * count + ["r"] * (4 * count) if limited else []
    return "{ " + " ".join(lines) + " }", ",".join(constraints)


@gluon.constexpr_function
def repeated(dtype, n):
    return (dtype,) * n


@gluon.constexpr_function
def batches(programs, most):
    """(first, count) of programs whose shares are waited for together."""
    return [(n, min(most, programs - n)) for n in range(0, programs, most)]


@gluon.jit
def look(at, COUNT: gl.constexpr, AREA: gl.constexpr):
    words = ()
    for q in gl.static_range(COUNT):
        words += (gl.load(at + q * AREA, volatile=True),)
    return words


@gluon.jit
def wait_for(words, at, flag, watch, AREA: gl.constexpr):
    """``words`` of ``look`` once all have arrived; each warp for itself."""
    EACH: gl.constexpr = at.shape[1] // 16
    ASM: gl.constexpr = look_again(len(words), EACH, 4 * AREA, BACKWARD_SPLIT, watch[0] is not None)
    operands = words + (at.to(gl.uint64), flag)
    if watch[0] is not None:
        operands += (watch[0].to(gl.uint64), watch[1], watch[2], watch[3], watch[4])
    return gl.inline_asm_elementwise(ASM[0], ASM[1], operands, dtype=repeated(gl.int32, len(words)), is_pure=False,
                                     pack=EACH)


@gluon.jit
def add_shares(ptr, flag, watch, PROGRAMS: gl.constexpr, BLOCK_H: gl.constexpr, UNIT: gl.constexpr,
               BATCH: gl.constexpr):
    """The sum of PROGRAMS tiles of (16, BLOCK_H), one after another, always in the same order."""
    AREA: gl.constexpr = 16 * BLOCK_H
    BATCHES: gl.constexpr = batches(PROGRAMS, BATCH)
    at = ptr.to(gl.pointer_type(gl.int32)) + (gl.arange(0, 16, gl.SliceLayout(1, UNIT))[:, None] * BLOCK_H
                                              + gl.arange(0, BLOCK_H, gl.SliceLayout(0, UNIT))[None, :])
    even = gl.full((16, BLOCK_H), 0., gl.float32, UNIT)
    odd = even
    words = look(at, BATCHES[0][1], AREA)
    for k in gl.static_range(len(BATCHES)):
        found = wait_for(words, at + BATCHES[k][0] * AREA, flag, watch, AREA)
        if k + 1 < len(BATCHES):
            words = look(at + BATCHES[k + 1][0] * AREA, BATCHES[k + 1][1], AREA)
        for q in gl.static_range(len(found)):
            share = (found[q] & -2).to(gl.float32, bitcast=True)
            if q % 2 == 0:
                even += share
            else:
                odd += share
    return even + odd


@gluon.jit
def load_inputs(dy_ptr, coef_ptr, dc_ptr, marks_ptr, offsets_ptr, s, m, group, rows, unit, inside, d, shift, T, B,
                first, tiles, stride_dyt, stride_dyb, stride_dyh, H: gl.constexpr, HAS_DY: gl.constexpr,
                DY_UNIT: gl.constexpr, MARKED: gl.constexpr):
    """What a step of a tile needs beside dh: six coefficients, dc, dy, and the marks of the rows; for an unused one of
    the last two something else."""
    time = gl.where(d == 0, first + s, T - 1 - first - s).to(gl.int64)
    base, count = rows_at(offsets_ptr, time, B)
    own = (group * tiles + m) * 16 + rows
    row = gl.minimum(own, B - 1)        # rows past the end repeat the last one, and nothing of them is stored
    k = coef_ptr + (shift + base + row) * (6 * H) + unit
    inputs = ()
    for n in gl.static_range(6):
        inputs += (load_there(k + n * H, offsets_ptr, row, count, inside, 1. if n == 5 else 0.),)
    inputs += (gl.load(dc_ptr + (d * B + own).to(gl.int64) * H + unit, mask=(own < B) & (unit < H), other=0.),)
    if HAS_DY:
        dy = dy_ptr + place_of(offsets_ptr, time, base) * stride_dyt * DY_UNIT
        dy += row.to(gl.int64) * stride_dyb * DY_UNIT + (d * H + unit) * stride_dyh
        inputs += (load_there(dy, offsets_ptr, row, count, inside),)
    else:
        inputs += (inputs[0],)
    if MARKED:
        inputs += (load_marks(marks_ptr, d * T + time, own, B),)
    else:
        inputs += (inputs[0],)
    return inputs


@gluon.jit
def step(inputs, dh, staged, da_ptr, dc_ptr, offsets_ptr, s, m, group, rows, unit, d, shift, T, B, first, tiles,
         H: gl.constexpr, HAS_DY: gl.constexpr, MARKED: gl.constexpr, PRECISION: gl.constexpr):
    """Stage the four da of a step of a tile as first factor, (16, 4 units), and store them and dc before it."""
    dtype: gl.constexpr = staged.dtype
    if HAS_DY:
        dy = inputs[7].to(gl.float32)
        if MARKED:
            dy = gl.where((inputs[8] & LIVE) != 0, dy, 0.)
        dh += dy
    dc = inputs[6] + dh * inputs[1]
    i, f = (dc * inputs[2]).to(dtype), (dc * inputs[3]).to(dtype)
    g, o = (dc * inputs[4]).to(dtype), (dh * inputs[0]).to(dtype)
    if PRECISION == "tf32":
        all_i, all_f, all_g, all_o = round_tf32(i, False), round_tf32(f, False), round_tf32(g, False), round_tf32(
            o, False)
        staged.store(gl.join(gl.join(all_i, all_g), gl.join(all_f, all_o)).reshape(staged.shape))
    else:
        staged.store(gl.join(gl.join(i, g), gl.join(f, o)).reshape(staged.shape))
    time = gl.where(d == 0, first + s, T - 1 - first - s).to(gl.int64)
    base, count = rows_at(offsets_ptr, time, B)
    row = (group * tiles + m) * 16 + rows
    here = (row < count) & (unit < H)
    da = da_ptr + (shift + base + row) * (4 * H) + unit
    gl.store(da, i, mask=here)
    gl.store(da + H, f, mask=here)
    gl.store(da + 2 * H, g, mask=here)
    gl.store(da + 3 * H, o, mask=here)
    gl.store(dc_ptr + (d * B + row).to(gl.int64) * H + unit, dc * inputs[5], mask=(row < B) & (unit < H))


@gluon.jit(do_not_specialize=["T", "S", "B", "first", "tiles", "stride_dyt", "stride_dyb", "limit"])
def backward_split_gluon(dy_ptr, coef_ptr, r_ptr, da_ptr, dh_ptr, dc_ptr, marks_ptr, offsets_ptr, share_ptr,
                         T, S, B, first, tiles, stride_dyt, stride_dyb, stride_dyh,
                         H: gl.constexpr, DIRECTIONS: gl.constexpr, CHUNKS: gl.constexpr, BLOCK_H: gl.constexpr,
                         PROGRAMS: gl.constexpr, OWNERS: gl.constexpr, HAS_DY: gl.constexpr, DY_UNIT: gl.constexpr,
                         MARKED: gl.constexpr, PRECISION: gl.constexpr, stuck_ptr=None, limit=None,
                         BATCH: gl.constexpr = 64):
    """As ``backward_grid`` in tiles of 16 rows, without zoneout. CHUNKS cut the targets, in powers of two from 16 a
    warp on. BATCH: words of shares that a thread waits for at a time."""
    p, group, d = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    dtype: gl.constexpr = da_ptr.dtype.element_ty
    BITS: gl.constexpr = dtype.primitive_bitwidth
    AREA: gl.constexpr = 16 * BLOCK_H
    W: gl.constexpr = gl.num_warps()
    UNIT: gl.constexpr = unit_layout(BLOCK_H, W)
    ACC: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, W], [16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, ACC, 32 // BITS)
    R: gl.constexpr = gl.DotOperandLayout(1, ACC, 32 // BITS)
    PER_BATCH: gl.constexpr = BATCH * 16 // BLOCK_H
    of_tile = gl.to_tensor(OWNERS * PROGRAMS * AREA).to(gl.int64)       # many tiles of wide layers pass 2^31
    share_ptr += (d * gl.num_programs(1) + group) * tiles * of_tile
    half = gl.num_programs(2) * gl.num_programs(1) * tiles * of_tile
    r_ptr += d * (4 * H * H)
    shift = chunk_shift(offsets_ptr, d, T, S, B, first)
    rows = gl.arange(0, 16, gl.SliceLayout(1, UNIT))[:, None]
    unit = p * BLOCK_H + gl.arange(0, BLOCK_H, gl.SliceLayout(0, UNIT))[None, :]
    inside = None if PROGRAMS * BLOCK_H == H else unit < H
    r = ()
    for j in gl.static_range(len(CHUNKS)):
        r += (load_rows(r_ptr, p, CHUNKS[j][0], CHUNKS[j][1], H, BLOCK_H, R),)
    # Two buffers for da, and a step ends with the next one's da: see ``gluon_cell.buffers``.
    staged = gl.allocate_shared_memory(dtype, [2, 16, 4 * BLOCK_H], shared_layout(BITS, 1024 // BITS, [1, 0], None, 1))
    n, s, m = 0, S - 1, 0
    inputs = load_inputs(dy_ptr, coef_ptr, dc_ptr, marks_ptr, offsets_ptr, s, m, group, rows, unit, inside, d, shift,
                         T, B, first, tiles, stride_dyt, stride_dyb, stride_dyh, H, HAS_DY, DY_UNIT, MARKED)
    row = group * tiles * 16 + rows
    dh = gl.load(dh_ptr + (d * B + row).to(gl.int64) * H + unit, mask=(row < B) & (unit < H), other=0.)
    step(inputs, dh, staged.index(0), da_ptr, dc_ptr, offsets_ptr, s, m, group, rows, unit, d, shift, T, B, first,
         tiles, H, HAS_DY, MARKED, PRECISION)
    while s >= 0:
        last = m == tiles - 1
        next_m, next_s = gl.where(last, 0, m + 1), gl.where(last, s - 1, s)
        # the next step's inputs arrive during the products
        inputs = load_inputs(dy_ptr, coef_ptr, dc_ptr, marks_ptr, offsets_ptr, gl.maximum(next_s, 0), next_m, group,
                             rows, unit, inside, d, shift, T, B, first, tiles, stride_dyt, stride_dyb, stride_dyh,
                             H, HAS_DY, DY_UNIT, MARKED)
        da = staged.index(n % 2).load(A)
        turn = T - 1 - first - s        # steps of all launches before this one
        slot = share_ptr + m * of_tile + turn % 2 * half
        for j in gl.static_range(len(CHUNKS)):
            share = gl.full((16, CHUNKS[j][1]), 0., gl.float32, ACC)
            share = mma_v2(da, r[j], share, input_precision="tf32")
            send_shares(slot, share, p, flag_of(turn), CHUNKS[j][0], PROGRAMS, BLOCK_H)
        n, s, m = n + 1, next_s, next_m
        if s >= 0:
            row = (group * tiles + m) * 16 + rows
            mask = (row < B) & (unit < H)
            at_state = (d * B + row).to(gl.int64) * H + unit
            if s == S - 1:
                dh = gl.load(dh_ptr + at_state, mask=mask, other=0.)
            else:
                turn = T - 2 - first - s
                dh = add_shares(share_ptr + m * of_tile + turn % 2 * half + p * (PROGRAMS * AREA), flag_of(turn),
                                (stuck_ptr, limit, first, s, m), PROGRAMS, BLOCK_H, UNIT, PER_BATCH)
                if MARKED:
                    dh = gl.where((inputs[8] & CUT) == 0, dh, 0.)
                    dh += gl.load(dh_ptr + at_state, mask=mask & ((inputs[8] & END) != 0), other=0.)
                    gl.store(dh_ptr + at_state, dh, mask=mask & ((inputs[8] & BEFORE) != 0))
            step(inputs, dh, staged.index(n % 2), da_ptr, dc_ptr, offsets_ptr, s, m, group, rows, unit, d, shift, T, B,
                 first, tiles, H, HAS_DY, MARKED, PRECISION)
    for m in range(tiles):
        row = (group * tiles + m) * 16 + rows
        mask = (row < B) & (unit < H)
        turn = T - 1 - first
        dh = add_shares(share_ptr + m * of_tile + turn % 2 * half + p * (PROGRAMS * AREA), flag_of(turn),
                        (stuck_ptr, limit, first, -1, m), PROGRAMS, BLOCK_H, UNIT, PER_BATCH)
        if MARKED:
            mark = load_marks(marks_ptr, d * T + gl.where(d == 0, first, T - 1 - first).to(gl.int64), row, B)
            dh = gl.where((mark & FRESH) == 0, dh, 0.)
            mask = mask & ((mark & LIVE) != 0)
        gl.store(dh_ptr + (d * B + row).to(gl.int64) * H + unit, dh, mask=mask)
