"""The forward time loop in Gluon: by one CTA, or by a cluster whose CTAs share R by hidden units."""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .gluon_cell import (acc_layout, cell, chains, factor, in_registers, join_gates, load, narrowest, r_layout,
                         row_layout, split_gates, staging_layout, unit_layout)
from .cell import round_tf32
from .gluon_cluster import send_to_all


@gluon.jit
def load_gates(x, inside, H: gl.constexpr):
    """The four gates' pre-activations x W^T + b, (rows, units) each."""
    return load(x, inside), load(x + H, inside), load(x + 2 * H, inside), load(x + 3 * H, inside)


@gluon.jit
def load_r(r_ptr, start, WIDTH: gl.constexpr, H: gl.constexpr, BLOCK_H: gl.constexpr, PRECISION: gl.constexpr):
    """R from WIDTH units on to all columns of the cluster, as second factor."""
    UPPER: gl.constexpr = 4 * gl.num_warps()
    REP: gl.constexpr = BLOCK_H // UPPER
    layout: gl.constexpr = gl.DotOperandLayout(1, acc_layout(gl.num_warps(), gl.num_ctas()),
                                               2 if PRECISION == "native" else 1)
    n = gl.arange(0, 4 * gl.num_ctas() * BLOCK_H, gl.SliceLayout(0, layout))[None, :]
    k = start + gl.arange(0, WIDTH, gl.SliceLayout(1, layout))[:, None]
    gate = n // (2 * BLOCK_H) % 2 * 2 + n % 2
    unit = n // (4 * BLOCK_H) * BLOCK_H + n // 2 % UPPER * REP + n // (2 * UPPER) % REP
    return gl.load(r_ptr + (gate * H + unit) * H + k, mask=(unit < H) & (k < H), other=0.)


@gluon.jit(do_not_specialize=["T", "S", "B", "first", "keep_every"])
def forward_gluon(x_ptr, r_ptr, h_ptr, c_ptr, y_ptr, kept_ptr, T, S, B, first, keep_every,
                  H: gl.constexpr, DIRECTIONS: gl.constexpr, CHUNKS: gl.constexpr, BLOCK_H: gl.constexpr,
                  BLOCK_B: gl.constexpr, HELD: gl.constexpr, PRECISION: gl.constexpr):
    tile, d = gl.program_id(0), gl.program_id(1)
    dtype: gl.constexpr = y_ptr.dtype.element_ty
    ACC: gl.constexpr = acc_layout(gl.num_warps(), gl.num_ctas())
    A: gl.constexpr = gl.DotOperandLayout(0, ACC, 2 if PRECISION == "native" else 1)
    R: gl.constexpr = gl.DotOperandLayout(1, ACC, 2 if PRECISION == "native" else 1)
    UNIT: gl.constexpr = unit_layout(BLOCK_B, BLOCK_H, gl.num_warps(), gl.num_ctas())
    CTAS: gl.constexpr = gl.num_ctas()
    UNITS: gl.constexpr = BLOCK_H * CTAS
    BITS: gl.constexpr = dtype.primitive_bitwidth
    IN_REGISTERS: gl.constexpr = in_registers([width for _, width in CHUNKS], BLOCK_H * BITS // 2, HELD)
    CHAINS: gl.constexpr = chains(4 * BLOCK_H, gl.num_warps(), len(CHUNKS))
    r_ptr += d * (4 * H * H)
    x_ptr += d.to(gl.int64) * S * B * (4 * H)
    row = tile * BLOCK_B + gl.arange(0, BLOCK_B, gl.SliceLayout(1, UNIT))[:, None]
    unit = gl.arange(0, UNITS, gl.SliceLayout(0, UNIT))[None, :]
    mask, inside = row < B, None
    if UNITS > H:
        inside = unit < H
        mask = mask & inside
    row = gl.minimum(row, B - 1)        # rows past the end repeat the last one, and nothing of them is stored
    r = ()
    for k in gl.static_range(len(CHUNKS)):
        r_k = load_r(r_ptr, CHUNKS[k][0], CHUNKS[k][1], H, BLOCK_H, PRECISION)
        if k >= IN_REGISTERS:
            r_k = gl.allocate_shared_memory(dtype, r_k.shape, r_layout(BITS, 2, CTAS, 1), r_k)
        r += (r_k,)
    at_c = (d * B + row).to(gl.int64) * H + unit
    at_y = row * (DIRECTIONS * H) + d * H + unit
    c = load(c_ptr + at_c, inside)
    h = load(h_ptr + at_y, inside)
    if PRECISION != "native":
        h = round_tf32(h, False)
    local = gl.where(d == 0, 0, S - 1)
    x = load_gates(x_ptr + local.to(gl.int64) * B * (4 * H) + (row * (4 * H) + unit), inside, H)
    ROWS: gl.constexpr = row_layout(BITS, narrowest(CHUNKS), gl.num_ctas())
    if CTAS == 1:
        rows = gl.allocate_shared_memory(dtype, [BLOCK_B, UNITS], ROWS)
    else:
        received = gl.allocate_shared_memory(dtype, [2, CTAS, BLOCK_B, UNITS],
                                             staging_layout(BITS, narrowest(CHUNKS), CTAS))
        bars = mbarrier.allocate_mbarrier(batch=2)
        for n in gl.static_range(2):
            mbarrier.init(bars.index(n), count=1)
        send_to_all(h, received.index(0), bars.index(0), BLOCK_H)
    until_kept = gl.where(first == 0, keep_every, (keep_every - first % keep_every) % keep_every)
    at_kept = gl.where(first == 0, 0, (first - 1) // keep_every)
    s = 0
    while s < S:
        if CTAS == 1:
            rows.store(h)
        else:
            mbarrier.wait(bars.index(s % 2), s // 2 % 2)
            rows = received.index(s % 2).reinterpret(dtype, [BLOCK_B, UNITS], ROWS)
        a = join_gates(x[0].to(gl.float32), x[1].to(gl.float32), x[2].to(gl.float32), x[3].to(gl.float32), BLOCK_H)
        ahead = gl.minimum(s + 1, S - 1)
        ahead = gl.where(d == 0, ahead, S - 1 - ahead)
        x = load_gates(x_ptr + ahead.to(gl.int64) * B * (4 * H) + (row * (4 * H) + unit), inside, H)
        sums = ()
        for n in gl.static_range(CHAINS):
            part = a if n == 0 else gl.full((BLOCK_B, 4 * UNITS), 0., gl.float32, ACC)
            for k in gl.static_range(n, len(CHUNKS), CHAINS):
                part = mma_v2(rows.slice(CHUNKS[k][0], CHUNKS[k][1], 1).load(A), factor(r[k], R), part, input_precision="tf32")
            sums += (part,)
        a = sums[0]
        for n in gl.static_range(1, CHAINS):
            a += sums[n]
        if until_kept == 0:
            gl.store(kept_ptr + (at_kept * DIRECTIONS + d).to(gl.int64) * B * H + (row * H + unit), c, mask=mask)
            until_kept = keep_every
            at_kept += 1
        until_kept -= 1
        time = gl.where(d == 0, first + s, T - 1 - first - s).to(gl.int64)
        i, f, g, o = split_gates(a, BLOCK_H)
        y, c = cell(i, f, g, o, c, dtype != gl.float32)
        h = y.to(dtype)
        gl.store(y_ptr + time * B * (DIRECTIONS * H) + at_y, h, mask=mask)
        if PRECISION != "native":
            h = round_tf32(h, False)
        s += 1
        if CTAS > 1:
            send_to_all(h, received.index(s % 2), bars.index(s % 2), BLOCK_H)
    if CTAS > 1:        # nobody exits while others store into its shared memory
        mbarrier.wait(bars.index(S % 2), S // 2 % 2)
    gl.store(c_ptr + at_c, c, mask=mask)
