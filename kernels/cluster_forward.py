"""The forward time loop in Gluon: by one CTA, or by a cluster whose CTAs share R by hidden units."""

from .cell import cell_for
from .cluster_exchange import allocate_mbarriers, send_to_all
from .language import gl, gluon, mbarrier, mma_v2
from .layouts import (
    buffers,
    chains,
    gates_layout,
    in_registers,
    join_gates,
    load,
    load_r,
    load_there,
    shared_layout,
    split_gates,
    store_gates,
    there,
    unit_layout,
)
from .precision import round_tf32
from .rows import FRESH, LIVE, chunk_shift, padded_or_packed, rows_at


@gluon.jit
def load_gates_there(x, offsets_ptr, row, count, inside, H: gl.constexpr):
    """The pre-activations x W^T + b of the four gates, (rows, units) each."""
    gates = ()
    for n in gl.static_range(4):
        gates += (load_there(x + n * H, offsets_ptr, row, count, inside),)
    return gates


@gluon.jit
def load_r_columns(r_ptr, start, WIDTH: gl.constexpr, K: gl.constexpr, H: gl.constexpr, BLOCK_H: gl.constexpr,
           layout: gl.constexpr):
    """A slice of R (4H, K), or of W likewise: (WIDTH units that feed, all columns of the cluster)."""
    THREADS: gl.constexpr = 4 * gl.num_warps()
    OWN: gl.constexpr = BLOCK_H // THREADS
    n = gl.arange(0, 4 * gl.num_ctas() * BLOCK_H, gl.SliceLayout(0, layout))[None, :]
    k = start + gl.arange(0, WIDTH, gl.SliceLayout(1, layout))[:, None]
    gate = n // (2 * BLOCK_H) % 2 * 2 + n % 2
    unit = n // (4 * BLOCK_H) * BLOCK_H + n // 2 % THREADS * OWN + n // (2 * THREADS) % OWN
    return load_r(r_ptr + (gate * H + unit) * K + k, (unit < H) & (k < K))


@gluon.jit
def load_x(x_ptr, base, count, tile, I: gl.constexpr, WIDTH: gl.constexpr, BLOCK_B: gl.constexpr,
           PRECISION: gl.constexpr, layout: gl.constexpr):
    """The inputs (rows, WIDTH) of a tile as first operand of a product, with zeros past the I features."""
    row = tile * BLOCK_B + gl.arange(0, BLOCK_B, gl.SliceLayout(1, layout))[:, None]
    k = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))[None, :]
    x = gl.load(x_ptr + (base + row) * I + k, mask=(row < count) & (k < I), other=0.)
    return rounded_h(x, x_ptr.dtype.element_ty, PRECISION)


@gluon.jit
def rounded_h(h, dtype: gl.constexpr, PRECISION: gl.constexpr):
    """h as the next product reads it: rounded once here, and not by each warp that reads it."""
    h = h.to(dtype)
    if PRECISION == "native":
        return h
    else:
        return round_tf32(h, False)


@gluon.jit(do_not_specialize=["T", "S", "B", "first", "keep_every"])
def forward_cluster(x_ptr, r_ptr, h_ptr, c_ptr, y_ptr, kept_ptr, T, S, B, first, keep_every,
                    H: gl.constexpr, DIRECTIONS: gl.constexpr, BLOCK_H: gl.constexpr, BLOCK_B: gl.constexpr,
                    HELD: gl.constexpr, PRECISION: gl.constexpr,
                    flags_ptr=None, offsets_ptr=None, INPUTS: gl.constexpr = 0, w_ptr=None, b_ptr=None,
                    KEEP_GATES: gl.constexpr = False):
    """As ``portable_forward.forward_resident``, but the CTAs of a cluster together have all of R.

    KEEP_GATES goes without INPUTS.

    w   (D, 4H, INPUTS), only with INPUTS; x is then the layer's input, (T, B, INPUTS) or packed
        (rows, INPUTS): where there are few features, reading them is less than reading pre-activations
    b   (D, 4H) or None, only with INPUTS

    grid (batch tiles, D), of CTAs in clusters. R is cut into slices along K. As many as fit HELD bytes are in
    registers, the others in shared memory.
    """
    tile, d = gl.program_id(0), gl.program_id(1)
    dtype: gl.constexpr = y_ptr.dtype.element_ty
    BITS: gl.constexpr = dtype.primitive_bitwidth
    CTAS: gl.constexpr = gl.num_ctas()
    UNITS: gl.constexpr = BLOCK_H * CTAS
    THREADS: gl.constexpr = 4 * gl.num_warps()
    UNIT: gl.constexpr = unit_layout(BLOCK_B, BLOCK_H, gl.num_warps(), CTAS)
    ACC: gl.constexpr = gates_layout(gl.num_warps(), CTAS)
    A: gl.constexpr = gl.DotOperandLayout(0, ACC, 32 // BITS)
    R: gl.constexpr = gl.DotOperandLayout(1, ACC, 32 // BITS)
    WIDTH: gl.constexpr = min(1024 // BITS, UNITS)      # of a slice, whose rows of 128 bytes fill the banks once
    PARTS: gl.constexpr = (H + WIDTH - 1) // WIDTH
    IN_REGISTERS: gl.constexpr = HELD // (WIDTH * BLOCK_H * BITS // 2)
    CHAINS: gl.constexpr = chains(4 * BLOCK_H, gl.num_warps(), PARTS)
    r_ptr += d * (4 * H * H)
    FEATURES: gl.constexpr = (INPUTS + 15) // 16 * 16       # one or two steps of the product's
    if INPUTS == 0:
        shift = chunk_shift(offsets_ptr, d, T, S, B, first)
        x_ptr += padded_or_packed(offsets_ptr, d.to(gl.int64) * S * B, shift) * (4 * H)
    row = tile * BLOCK_B + gl.arange(0, BLOCK_B, gl.SliceLayout(1, UNIT))[:, None]
    unit = gl.arange(0, UNITS, gl.SliceLayout(0, UNIT))[None, :]
    mask, inside = row < B, None
    if UNITS > H:
        inside = unit < H
        mask = mask & inside
    row = gl.minimum(row, B - 1)        # rows past the end repeat the last one, and nothing of them is stored
    r = ()
    for k in gl.static_range(PARTS):
        part = load_r_columns(r_ptr, k * WIDTH, WIDTH, H, H, BLOCK_H, R)
        if k >= IN_REGISTERS:
            part = gl.allocate_shared_memory(dtype, part.shape, shared_layout(BITS, WIDTH, [0, 1], 1, CTAS), part)
        r += (part,)
    at_x = row * (4 * H) + unit
    at_c = (d * B + row).to(gl.int64) * H + unit
    at_y = row * (DIRECTIONS * H) + d * H + unit
    c = load(c_ptr + at_c, inside)
    h = load(h_ptr + at_y, inside)
    flags = row
    time = gl.where(d == 0, first, T - 1 - first)
    base, count = rows_at(offsets_ptr, time, B)
    if flags_ptr is not None:
        flags_ptr += d.to(gl.int64) * T * B
        flags = gl.load(flags_ptr + time.to(gl.int64) * B + row)
        goes_on = (flags & FRESH) == 0
        c, h = gl.where(goes_on, c, 0.), gl.where(goes_on, h, 0.)
    h = rounded_h(h, dtype, PRECISION)
    at = padded_or_packed(offsets_ptr, gl.where(d == 0, 0, S - 1).to(gl.int64) * B, base)
    inputs = 0
    if INPUTS > 0:
        w = load_r_columns(w_ptr + d * (4 * H * INPUTS), 0, FEATURES, INPUTS, H, BLOCK_H, R)
        w = gl.allocate_shared_memory(dtype, w.shape, shared_layout(BITS, FEATURES, [0, 1], 1, CTAS), w)
        inputs = load_x(x_ptr, base, count, tile, INPUTS, FEATURES, BLOCK_B, PRECISION, A)
        if b_ptr is not None:
            x = load_gates_there(b_ptr + d * (4 * H) + unit + row * 0, None, row, B, inside, H)
        else:
            zero = gl.full((BLOCK_B, UNITS), 0., gl.float32, UNIT)
            x = zero, zero, zero, zero
    else:
        x = load_gates_there(x_ptr + at * (4 * H) + at_x, offsets_ptr, row, count, inside, H)
    ROWS: gl.constexpr = shared_layout(BITS, WIDTH, [1, 0], None, CTAS)
    if CTAS == 1:
        BUFFERS: gl.constexpr = buffers(CTAS, flags_ptr is not None)
        staged = gl.allocate_shared_memory(dtype, [BUFFERS, BLOCK_B, UNITS], ROWS)
        staged.index(0).store(h)
    else:
        received = gl.allocate_shared_memory(dtype, [2, CTAS, BLOCK_B, UNITS],
                                             shared_layout(BITS, WIDTH, [2, 1, 0], 0, CTAS))
        bars = allocate_mbarriers()
        send_to_all(h, received.index(0), bars.index(0), BLOCK_H)
    until_kept = (keep_every - first % keep_every) % keep_every
    at_kept = first // keep_every
    if not KEEP_GATES:          # then c before step 0 is not stored
        until_kept = gl.where(first == 0, keep_every, until_kept)
        at_kept = gl.where(first == 0, 0, (first - 1) // keep_every)
    s = 0
    while s < S:
        if CTAS == 1:
            rows = staged.index(s % BUFFERS)
        else:
            mbarrier.wait(bars.index(s % 2), s // 2 % 2)
            rows = received.index(s % 2).reinterpret(dtype, [BLOCK_B, UNITS], ROWS)
        a = join_gates(x[0].to(gl.float32), x[1].to(gl.float32), x[2].to(gl.float32), x[3].to(gl.float32), BLOCK_H,
                       THREADS, ACC)
        # the next x, to arrive during the products
        upcoming = gl.minimum(s + 1, S - 1)
        time = gl.where(d == 0, first + upcoming, T - 1 - first - upcoming)
        next_base, next_count = rows_at(offsets_ptr, time, B)
        at = padded_or_packed(offsets_ptr, gl.where(d == 0, upcoming, S - 1 - upcoming).to(gl.int64) * B, next_base)
        if INPUTS > 0:
            a = mma_v2(inputs, w.load(R), a, input_precision="tf32")
            inputs = load_x(x_ptr, next_base, next_count, tile, INPUTS, FEATURES, BLOCK_B, PRECISION, A)
        else:
            x = load_gates_there(x_ptr + at * (4 * H) + at_x, offsets_ptr, row, next_count, inside, H)
        next_flags = flags
        if flags_ptr is not None:
            next_flags = gl.load(flags_ptr + time.to(gl.int64) * B + row)
        sums = ()
        for n in gl.static_range(CHAINS):
            total = a if n == 0 else gl.full((BLOCK_B, 4 * UNITS), 0., gl.float32, ACC)
            for k in gl.static_range(n, PARTS, CHAINS):
                total = mma_v2(rows.slice(k * WIDTH, WIDTH, 1).load(A), in_registers(r[k], R), total,
                               input_precision="tf32")
            sums += (total,)
        a = sums[0]
        for n in gl.static_range(1, CHAINS):
            a += sums[n]
        # With TF32 or step flags the assembler orders a step better around a branch, even if it is always taken.
        if KEEP_GATES and PRECISION == "native" and flags_ptr is None:
            gl.store(kept_ptr + ((first + s) * DIRECTIONS + d).to(gl.int64) * B * H + (row * H + unit), c, mask=mask)
        else:
            if until_kept == 0:
                gl.store(kept_ptr + (at_kept * DIRECTIONS + d).to(gl.int64) * B * H + (row * H + unit), c, mask=mask)
                until_kept = keep_every
                at_kept += 1
            until_kept -= 1
        i, f, g, o = split_gates(a, BLOCK_H, THREADS, UNIT)
        if KEEP_GATES:
            at = padded_or_packed(offsets_ptr, gl.where(d == 0, s, S - 1 - s).to(gl.int64) * B, base)
            store_gates(x_ptr + at * (4 * H) + at_x, there(offsets_ptr, row, count, mask), i, f, g, o, H)
        y, new_c = cell_for(i, f, g, o, c, dtype)
        h = y
        if flags_ptr is not None:
            live = (flags & LIVE) != 0
            goes_on = ((next_flags & FRESH) == 0) | (s == S - 1)
            if DIRECTIONS == 2:     # a row that has not begun yet keeps its first h
                first_h = gl.load(h_ptr + at_y, mask=mask & ((flags & LIVE) == 0), other=0.)
                h = gl.where(live, y, first_h.to(gl.float32))
            h = gl.where(goes_on, h, 0.)
            new_c = gl.where(goes_on, gl.where(live, new_c, c), 0.)
            y = gl.where(live, y, 0.)
        c, flags = new_c, next_flags
        h = rounded_h(h, dtype, PRECISION)
        time = gl.where(d == 0, first + s, T - 1 - first - s)
        at = padded_or_packed(offsets_ptr, time.to(gl.int64) * B, base)
        s += 1
        if CTAS == 1:
            staged.index(s % BUFFERS).store(h)
        else:
            send_to_all(h, received.index(s % 2), bars.index(s % 2), BLOCK_H)
        gl.store(y_ptr + at * (DIRECTIONS * H) + at_y, y.to(dtype), mask=there(offsets_ptr, row, count, mask))
        base, count = next_base, next_count
    if CTAS > 1:        # no CTA exits while others store into its shared memory
        mbarrier.wait(bars.index(S % 2), S // 2 % 2)
    gl.store(c_ptr + at_c, c, mask=mask)
