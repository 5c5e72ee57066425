"""The backward time loop for few batch rows: ``backward_split``.

Programs share R and exchange shares of dh through the second-level cache, as in ``portable_backward.backward_grid``.
Each has its rows of R in registers, and in shared memory what does not fit there.

A thread has one unit of one row, or two adjacent ones. Each warp waits by itself for the shares of dh of its units from
all programs. The four da of all units of the program then meet in shared memory, once a step, where every warp reads
them. A warp computes shares of dh for a part of the targets, which are the units of the earlier h. It sends the shares
from the registers of the accumulator, whose columns are in such an order that a thread has four adjacent targets.
"""

from .exchange import flag_of, flagged, look_at_words, unflagged, wait_for_shares
from .language import gl, gluon, mma_v2
from .layouts import in_registers, load_r, load_there, powers, shared_layout, split_unit_layout
from .precision import round_tf32
from .rows import BEFORE, CUT, END, FRESH, LIVE, chunk_shift, load_flags, padded_or_packed, rows_at
from .waiting import BACKWARD_SPLIT


@gluon.constexpr_function
def sent_layout(width, warps):
    """(16, targets): a thread has four adjacent targets in two rows, 8 apart; a warp 16 of each 16 * warps targets."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0]] + [[0, 16 * warps * n] for n in powers(width // (16 * warps))],
        lane_bases=[[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[0, 16 * n] for n in powers(warps)], block_bases=[], shape=[16, width])


@gluon.jit
def load_r_targets(r_ptr, p, start, WIDTH: gl.constexpr, H: gl.constexpr, BLOCK_H: gl.constexpr):
    """The rows of R of program p's units, gates innermost, for WIDTH targets in the order of a second operand."""
    W: gl.constexpr = gl.num_warps()
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [W, 1], [1, 0])
    k = gl.arange(0, 4 * BLOCK_H, gl.SliceLayout(1, LAYOUT))[:, None]
    target = start + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))[None, :]
    unit = p * BLOCK_H + k // 4
    r = load_r(r_ptr + (k % 4 * H + unit) * H + target, (unit < H) & (target < H))
    r = r.reshape(4 * BLOCK_H, WIDTH // (16 * W), W, 4, 2, 2).permute(0, 1, 4, 2, 3, 5)
    return r.reshape(4 * BLOCK_H, WIDTH)


@gluon.constexpr_function
def stores(count, groups, row, group, together):
    """Assembly that stores the ``count`` words of a thread, and the constraints of its operands, words and then
    addresses. It uses the first address only. Eight words, four adjacent ones in each of two rows ``row`` bytes apart,
    make a group; groups are ``group`` bytes apart. If the warp goes on ``together`` the assembler moves no product from
    behind the stores to before them."""
    lines = []
    for n in range(0, count, 4):
        words = ", ".join(f"${count + n + i}" for i in range(4))
        behind = n // 4 % 2 * row + n // 8 * group
        lines += [f"st.relaxed.gpu.global.v4.b32 [${2 * count}+{behind}], {{{words}}};"]
    lines += [f"mov.b32 ${n}, 0;" for n in range(count)] + ["bar.warp.sync -1;"] * together
    return " ".join(lines), ",".join(["=r"] * count + ["r"] * count + ["l"] * count)


@gluon.jit
def send_shares(slot, share, p, flag, START: gl.constexpr, PROGRAMS: gl.constexpr, BLOCK_H: gl.constexpr,
                WIDE: gl.constexpr):
    """Send program p's shares of dh to the programs that have the units. ``share``: an accumulator of the targets from
    START on; ``slot``: the half of the memory for shares, at the tile."""
    W: gl.constexpr = gl.num_warps()
    WIDTH: gl.constexpr = share.shape[1]
    AREA: gl.constexpr = 16 * BLOCK_H
    OWNER: gl.constexpr = PROGRAMS * AREA
    TO: gl.constexpr = sent_layout(WIDTH, W)
    share = share.reshape(16, WIDTH // (16 * W), 2, W, 4, 2).permute(0, 1, 3, 4, 2, 5).reshape(16, WIDTH)
    bits = gl.convert_layout(flagged(share, flag), TO, assert_trivial=True)
    target = START + gl.arange(0, WIDTH, gl.SliceLayout(0, TO))[None, :]
    to = (target // BLOCK_H * OWNER + p * AREA + gl.arange(0, 16, gl.SliceLayout(1, TO))[:, None] * BLOCK_H
          + target % BLOCK_H)
    COUNT: gl.constexpr = WIDTH // (2 * W)
    ASM: gl.constexpr = stores(COUNT, WIDTH // (16 * W), 8 * BLOCK_H * 4, 16 * W // BLOCK_H * OWNER * 4, WIDE)
    gl.inline_asm_elementwise(ASM[0], ASM[1], [bits, (slot + to).to(gl.uint64)], dtype=gl.int32, is_pure=False,
                              pack=COUNT)


@gluon.constexpr_function
def batches(programs, most):
    """(first, count) of programs whose shares are waited for together."""
    return [(n, min(most, programs - n)) for n in range(0, programs, most)]


@gluon.jit
def receive_shares(ptr, flag, watch, PROGRAMS: gl.constexpr, BLOCK_H: gl.constexpr, UNIT: gl.constexpr,
               BATCH: gl.constexpr):
    """The sum of PROGRAMS tiles of (16, BLOCK_H), one after another, always in the same order."""
    AREA: gl.constexpr = 16 * BLOCK_H
    BATCHES: gl.constexpr = batches(PROGRAMS, BATCH)
    at = ptr.to(gl.pointer_type(gl.int32)) + (gl.arange(0, 16, gl.SliceLayout(1, UNIT))[:, None] * BLOCK_H
                                              + gl.arange(0, BLOCK_H, gl.SliceLayout(0, UNIT))[None, :])
    even = gl.full((16, BLOCK_H), 0., gl.float32, UNIT)
    odd = even
    words = look_at_words(at, BATCHES[0][1], AREA)
    for k in gl.static_range(len(BATCHES)):
        found = wait_for_shares(words, at + BATCHES[k][0] * AREA, flag, watch, BLOCK_H // 16, AREA, BACKWARD_SPLIT)
        if k + 1 < len(BATCHES):
            words = look_at_words(at + BATCHES[k + 1][0] * AREA, BATCHES[k + 1][1], AREA)
        for q in gl.static_range(len(found)):
            share = unflagged(found[q])
            if q % 2 == 0:
                even += share
            else:
                odd += share
    return even + odd


@gluon.jit
def load_inputs(dy_ptr, coef_ptr, dc_ptr, flags_ptr, offsets_ptr, s, m, group, rows, unit, inside, d, shift, T, B,
                first, tiles, stride_dyt, stride_dyb, stride_dyh, H: gl.constexpr, DY_UNIT: gl.constexpr):
    """What a step of a tile needs beside dh: six coefficients, dc, dy, and the step flags of the rows. In the place of
    dy or flags that are None stands something else."""
    time = gl.where(d == 0, first + s, T - 1 - first - s).to(gl.int64)
    base, count = rows_at(offsets_ptr, time, B)
    own = (group * tiles + m) * 16 + rows
    row = gl.minimum(own, B - 1)        # rows past the end repeat the last one, and nothing of them is stored
    k = coef_ptr + (shift + base + row) * (6 * H) + unit
    inputs = ()
    for n in gl.static_range(6):
        inputs += (load_there(k + n * H, offsets_ptr, row, count, inside, 1. if n == 5 else 0.),)
    inputs += (gl.load(dc_ptr + (d * B + own).to(gl.int64) * H + unit, mask=(own < B) & (unit < H), other=0.),)
    if dy_ptr is not None:
        dy = dy_ptr + padded_or_packed(offsets_ptr, time, base) * stride_dyt * DY_UNIT
        dy += row.to(gl.int64) * stride_dyb * DY_UNIT + (d * H + unit) * stride_dyh
        inputs += (load_there(dy, offsets_ptr, row, count, inside),)
    else:
        inputs += (inputs[0],)
    if flags_ptr is not None:
        inputs += (load_flags(flags_ptr, d * T + time, own, B),)
    else:
        inputs += (inputs[0],)
    return inputs


@gluon.jit
def step(inputs, dh, staged, da_ptr, dc_ptr, dy_ptr, flags_ptr, offsets_ptr, s, m, group, rows, unit, d, shift, T, B,
         first, tiles, H: gl.constexpr, PRECISION: gl.constexpr):
    """Stage the four da of a step of a tile as first operand, (16, 4 units), and store them and dc before the step."""
    dtype: gl.constexpr = staged.dtype
    if dy_ptr is not None:
        dy = inputs[7].to(gl.float32)
        if flags_ptr is not None:
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
def backward_split(coef_ptr, r_ptr, da_ptr, dh_ptr, dc_ptr, share_ptr, T, S, B, first, tiles, stride_dyt, stride_dyb,
                   stride_dyh,
                   H: gl.constexpr, DIRECTIONS: gl.constexpr, TARGET_SLICES: gl.constexpr, BLOCK_H: gl.constexpr,
                   PROGRAMS: gl.constexpr, PADDED_PROGRAMS: gl.constexpr, HELD: gl.constexpr, DY_UNIT: gl.constexpr,
                   PRECISION: gl.constexpr,
                   dy_ptr=None, flags_ptr=None, offsets_ptr=None, stuck_ptr=None, limit=None, BATCH: gl.constexpr = 64):
    """As ``portable_backward.backward_grid`` in tiles of 16 rows, without zoneout.

    TARGET_SLICES cut the targets into powers of two, 16 targets for each warp at least. R of the first of them, as many
    as fit HELD bytes, is in registers, that of the others in shared memory. BATCH: how many words of shares a thread
    waits for at a time; twice as many where part of R is in shared memory.
    """
    p, group, d = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    dtype: gl.constexpr = da_ptr.dtype.element_ty
    BITS: gl.constexpr = dtype.primitive_bitwidth
    AREA: gl.constexpr = 16 * BLOCK_H
    W: gl.constexpr = gl.num_warps()
    UNIT: gl.constexpr = split_unit_layout(BLOCK_H, W)
    ACC: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, W], [16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, ACC, 32 // BITS)
    R: gl.constexpr = gl.DotOperandLayout(1, ACC, 32 // BITS)
    TARGET_BYTES: gl.constexpr = 4 * BLOCK_H * BITS // 8        # of R, for one target
    # Then many programs share R, and fewer registers have it. But the products of all slices at once, which is the
    # order that the assembler prefers, would take more than there are.
    WIDE: gl.constexpr = (TARGET_SLICES[-1][0] + TARGET_SLICES[-1][1]) * TARGET_BYTES > HELD
    PER_BATCH: gl.constexpr = (2 * BATCH if WIDE else BATCH) * 16 // BLOCK_H
    of_tile = gl.to_tensor(PADDED_PROGRAMS * PROGRAMS * AREA).to(gl.int64)       # many tiles of wide layers pass 2^31
    share_ptr += (d * gl.num_programs(1) + group) * tiles * of_tile
    half = gl.num_programs(2) * gl.num_programs(1) * tiles * of_tile
    r_ptr += d * (4 * H * H)
    shift = chunk_shift(offsets_ptr, d, T, S, B, first)
    rows = gl.arange(0, 16, gl.SliceLayout(1, UNIT))[:, None]
    unit = p * BLOCK_H + gl.arange(0, BLOCK_H, gl.SliceLayout(0, UNIT))[None, :]
    inside = None if PROGRAMS * BLOCK_H == H else unit < H
    r = ()
    for j in gl.static_range(len(TARGET_SLICES)):
        part = load_r_targets(r_ptr, p, TARGET_SLICES[j][0], TARGET_SLICES[j][1], H, BLOCK_H)
        if (TARGET_SLICES[j][0] + TARGET_SLICES[j][1]) * TARGET_BYTES <= HELD:
            part = gl.convert_layout(part, R)
        else:
            part = gl.allocate_shared_memory(dtype, part.shape, shared_layout(BITS, 1024 // BITS, [0, 1], None, 1),
                                             part)
        r += (part,)
    # Two buffers for da, so a step ends with da of the next step: see ``layouts.buffers``.
    staged = gl.allocate_shared_memory(dtype, [2, 16, 4 * BLOCK_H], shared_layout(BITS, 1024 // BITS, [1, 0], None, 1))
    n, s, m = 0, S - 1, 0
    inputs = load_inputs(dy_ptr, coef_ptr, dc_ptr, flags_ptr, offsets_ptr, s, m, group, rows, unit, inside, d, shift,
                         T, B, first, tiles, stride_dyt, stride_dyb, stride_dyh, H, DY_UNIT)
    row = group * tiles * 16 + rows
    dh = gl.load(dh_ptr + (d * B + row).to(gl.int64) * H + unit, mask=(row < B) & (unit < H), other=0.)
    step(inputs, dh, staged.index(0), da_ptr, dc_ptr, dy_ptr, flags_ptr, offsets_ptr, s, m, group, rows, unit, d, shift,
         T, B, first, tiles, H, PRECISION)
    while s >= 0:
        last = m == tiles - 1
        next_m, next_s = gl.where(last, 0, m + 1), gl.where(last, s - 1, s)
        # the next step's inputs arrive during the products
        inputs = load_inputs(dy_ptr, coef_ptr, dc_ptr, flags_ptr, offsets_ptr, gl.maximum(next_s, 0), next_m, group,
                             rows, unit, inside, d, shift, T, B, first, tiles, stride_dyt, stride_dyb, stride_dyh,
                             H, DY_UNIT)
        da = staged.index(n % 2).load(A)
        turn = T - 1 - first - s        # steps of all launches before this one
        slot = share_ptr + m * of_tile + turn % 2 * half
        for j in gl.static_range(len(TARGET_SLICES)):
            share = gl.full((16, TARGET_SLICES[j][1]), 0., gl.float32, ACC)
            share = mma_v2(da, in_registers(r[j], R), share, input_precision="tf32")
            send_shares(slot, share, p, flag_of(turn), TARGET_SLICES[j][0], PROGRAMS, BLOCK_H, WIDE)
        n, s, m = n + 1, next_s, next_m
        if s >= 0:
            row = (group * tiles + m) * 16 + rows
            mask = (row < B) & (unit < H)
            at_state = (d * B + row).to(gl.int64) * H + unit
            if s == S - 1:
                dh = gl.load(dh_ptr + at_state, mask=mask, other=0.)
            else:
                turn = T - 2 - first - s
                dh = receive_shares(share_ptr + m * of_tile + turn % 2 * half + p * (PROGRAMS * AREA), flag_of(turn),
                                    (stuck_ptr, limit, first, s, m), PROGRAMS, BLOCK_H, UNIT, PER_BATCH)
                if flags_ptr is not None:
                    dh = gl.where((inputs[8] & CUT) == 0, dh, 0.)
                    dh += gl.load(dh_ptr + at_state, mask=mask & ((inputs[8] & END) != 0), other=0.)
                    gl.store(dh_ptr + at_state, dh, mask=mask & ((inputs[8] & BEFORE) != 0))
            step(inputs, dh, staged.index(n % 2), da_ptr, dc_ptr, dy_ptr, flags_ptr, offsets_ptr, s, m, group, rows,
                 unit, d, shift, T, B, first, tiles, H, PRECISION)
    for m in range(tiles):
        row = (group * tiles + m) * 16 + rows
        mask = (row < B) & (unit < H)
        turn = T - 1 - first
        dh = receive_shares(share_ptr + m * of_tile + turn % 2 * half + p * (PROGRAMS * AREA), flag_of(turn),
                            (stuck_ptr, limit, first, -1, m), PROGRAMS, BLOCK_H, UNIT, PER_BATCH)
        if flags_ptr is not None:
            flags = load_flags(flags_ptr, d * T + gl.where(d == 0, first, T - 1 - first).to(gl.int64), row, B)
            dh = gl.where((flags & FRESH) == 0, dh, 0.)
            mask = mask & ((flags & LIVE) != 0)
        gl.store(dh_ptr + (d * B + row).to(gl.int64) * H + unit, dh, mask=mask)
