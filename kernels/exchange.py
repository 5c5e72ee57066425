"""How the programs that share R exchange h and shares of dh through the second-level cache: the data is its own flag.

A reader polls the data itself, and each word of it tells whether it has arrived: one trip through the cache in place of
a barrier's two and a load. Nothing is ordered by these accesses but each word with itself; they are strong (relaxed or
volatile, as PTX has it), for a weak store may stay out of a poller's sight.
"""
import triton
import triton.language as tl

from .waiting import look_at_clock


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def any_bit(words):
    """The bits that any of ``words`` has, as a scalar."""
    return tl.reduce(words, None, _or)


@triton.jit
def send(ptr, bits, INTERPRET: tl.constexpr):
    """Store integers of 16, 32 or 64 bits in the sight of other programs: 16 or 32 at once, a reader's word at most."""
    BITS: tl.constexpr = bits.dtype.primitive_bitwidth
    if INTERPRET:
        tl.store(ptr.to(tl.pointer_type(bits.dtype)), bits)
    else:
        if BITS == 64:
            store: tl.constexpr = ("{ .reg .b32 low, high; mov.b64 {low, high}, $2; "
                                   "st.relaxed.gpu.global.v2.b32 [$1], {low, high}; mov.b32 $0, 0; }")
        else:
            store: tl.constexpr = f"st.relaxed.gpu.global.b{BITS} [$1], $2; mov.b32 $0, 0;"
        kind: tl.constexpr = "h" if BITS == 16 else "r" if BITS == 32 else "l"
        tl.inline_asm_elementwise(store, "=r,l," + kind, [ptr.to(tl.uint64), bits], dtype=tl.int32, is_pure=False,
                                  pack=1)


@triton.jit
def bits_of(h):
    """h as integers, with another NaN in the place of the one that means "nothing yet", all of whose bits are set."""
    integer: tl.constexpr = tl.int16 if h.dtype.primitive_bitwidth == 16 else tl.int32
    nan: tl.constexpr = 0x7FFF if h.dtype.primitive_bitwidth == 16 else 0x7FFFFFFF
    return tl.where(h == h, h.to(integer, bitcast=True), nan).to(integer)


@triton.jit
def send_h(ptr, h, INTERPRET: tl.constexpr):
    """``send`` h, so that none of it means "nothing yet"."""
    send(ptr, bits_of(h), INTERPRET)


@triton.jit
def look(ptr, start, WIDTH: tl.constexpr, UNITS: tl.constexpr, BLOCK_B: tl.constexpr):
    """What there is of WIDTH units of a tile of h (BLOCK_B, UNITS), in words of 32 bits: one unit or two."""
    PER_WORD: tl.constexpr = 32 // ptr.dtype.element_ty.primitive_bitwidth
    at = start // PER_WORD + tl.arange(0, WIDTH // PER_WORD)[None, :]
    return tl.load(ptr.to(tl.pointer_type(tl.int32)) + tl.arange(0, BLOCK_B)[:, None] * (UNITS // PER_WORD) + at,
                   volatile=True)


@triton.jit
def missing(words, dtype: tl.constexpr):
    """Words whose sign bits, of each half for 16-bit types, tell which values have not arrived; the other bits are
    anything. Of v with all bits set, and of no other, both v and ~v - 1 have the sign."""
    if dtype.primitive_bitwidth == 16:
        return words & (~words - 0x10001)
    else:
        return words & (~words - 1)


@triton.jit
def is_missing(bits, dtype: tl.constexpr):
    """Whether a scalar of ``any_bit`` of ``missing`` words says that a value has not arrived."""
    SIGNS: tl.constexpr = -0x7FFF8000 if dtype.primitive_bitwidth == 16 else -0x80000000
    return (bits & SIGNS) != 0


@triton.jit
def values(words, dtype: tl.constexpr):
    """The h in ``words`` of ``look``, (BLOCK_B, units)."""
    if dtype.primitive_bitwidth == 16:
        low = words.to(tl.int16).to(dtype, bitcast=True)
        high = (words >> 16).to(tl.int16).to(dtype, bitcast=True)
        return tl.join(low, high).reshape(words.shape[0], 2 * words.shape[1])
    else:
        return words.to(dtype, bitcast=True)


@triton.jit
def any_missing(words, dtype: tl.constexpr):
    """Whether a value of any of several blocks, the widest first, has not arrived."""
    found = missing(words[0], dtype)
    bits = 0
    for k in tl.static_range(1, len(words)):
        if words[k].shape[1] == words[k - 1].shape[1]:
            found |= missing(words[k], dtype)
        else:
            bits |= any_bit(found)
            found = missing(words[k], dtype)
    return is_missing(bits | any_bit(found), dtype)


@triton.jit
def receive(ptr, watch, CHUNKS: tl.constexpr, UNITS: tl.constexpr, BLOCK_B: tl.constexpr, KERNEL: tl.constexpr):
    """The words of each of CHUNKS, once all are there. watch: see ``waiting``."""
    dtype: tl.constexpr = ptr.dtype.element_ty
    words = ()
    for k in tl.static_range(len(CHUNKS)):
        words += (tl.full((BLOCK_B, CHUNKS[k][1] * dtype.primitive_bitwidth // 32), 0, tl.int32),)
    waiting, since = True, 0
    while waiting:
        found = ()
        for k in tl.static_range(len(CHUNKS)):
            found += (look(ptr, CHUNKS[k][0], CHUNKS[k][1], UNITS, BLOCK_B),)
        words = found
        waiting = any_missing(words, dtype)
        if waiting:
            since = look_at_clock(since, watch, KERNEL)
    return words


@triton.jit
def wait_for(ptr, watch, START: tl.constexpr, UNITS: tl.constexpr, BLOCK_B: tl.constexpr, KERNEL: tl.constexpr,
             INTERPRET: tl.constexpr):
    """Wait until the units from START on are there, for ordinary loads to find: of a loop, which the compiler may turn
    into asynchronous copies that fetch ahead."""
    dtype: tl.constexpr = ptr.dtype.element_ty
    PER_WORD: tl.constexpr = 32 // dtype.primitive_bitwidth
    WIDTH: tl.constexpr = 128
    rows = tl.arange(0, BLOCK_B)[:, None] * (UNITS // PER_WORD)
    waiting, since = True, 0
    while waiting:
        found = tl.full((BLOCK_B, WIDTH), 0, tl.int32)
        for start in tl.static_range(START // PER_WORD, UNITS // PER_WORD, WIDTH):
            at = start + tl.arange(0, WIDTH)[None, :]
            words = tl.load(ptr.to(tl.pointer_type(tl.int32)) + rows + at, mask=at < UNITS // PER_WORD, other=0,
                            volatile=True)
            found |= missing(words, dtype)
        waiting = is_missing(any_bit(found), dtype)
        if waiting:
            since = look_at_clock(since, watch, KERNEL)
    if not INTERPRET:
        # what a thread has seen, all threads of the program may read from here on
        tl.inline_asm_elementwise("fence.acq_rel.gpu; bar.sync 0; mov.b32 $0, 0;", "=r,r,~{memory}", [tl.program_id(0)],
                                  dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def flag_of(turn):
    """The last bit of shares sent at the ``turn``-th step of all, for which two halves of the memory take turns."""
    return 1 - turn // 2 % 2


@triton.jit
def send_shares(ptr, shares, flag, INTERPRET: tl.constexpr):
    """``send`` shares (BLOCK_B, units) in fp32, with ``flag`` in the place of their last bit. ptr (BLOCK_B, units / 2):
    where every other one goes; two at a time fill the cache's sectors with half the stores."""
    bits = (shares.to(tl.int32, bitcast=True) & -2) | flag
    low, high = bits.reshape(bits.shape[0], bits.shape[1] // 2, 2).split()
    send(ptr, low.to(tl.uint32, bitcast=True).to(tl.int64) | (high.to(tl.int64) << 32), INTERPRET)


@triton.jit
def add_batch(shares_ptr, total, found, flag, COUNT: tl.constexpr, AREA: tl.constexpr):
    """``total`` and COUNT shares more, and what is not yet there of them. All are on their way at the same time; the
    compiler may wait for each alone where loads and sums alternate."""
    shares = ()
    for q in tl.static_range(COUNT):
        shares += (tl.load(shares_ptr + q * AREA, volatile=True),)
    for q in tl.static_range(COUNT):
        total += (shares[q] & -2).to(tl.float32, bitcast=True)
        found |= shares[q] ^ flag
    return total, found


@triton.jit
def look_at_shares(ptr, flag, PROGRAMS: tl.constexpr, AREA: tl.constexpr, BLOCK_B: tl.constexpr,
                   BLOCK_H: tl.constexpr):
    """The sum of PROGRAMS tiles of (BLOCK_B, BLOCK_H), one after another, always in the same order; and whether any
    of their shares has not arrived, so that it is worth nothing."""
    BATCH: tl.constexpr = min(max(16384 // AREA, 1), PROGRAMS)      # 64 registers of each of 256 threads
    shares = ptr.to(tl.pointer_type(tl.int32)) + (tl.arange(0, BLOCK_B)[:, None] * BLOCK_H
                                                  + tl.arange(0, BLOCK_H)[None, :])
    total = tl.full((BLOCK_B, BLOCK_H), 0., tl.float32)
    found = tl.full((BLOCK_B, BLOCK_H), 0, tl.int32)
    if BATCH == PROGRAMS:
        total, found = add_batch(shares, total, found, flag, PROGRAMS, AREA)
    else:
        for _ in range(PROGRAMS // BATCH):
            total, found = add_batch(shares, total, found, flag, BATCH, AREA)
            shares += BATCH * AREA
        if PROGRAMS % BATCH:
            total, found = add_batch(shares, total, found, flag, PROGRAMS % BATCH, AREA)
    return total, (any_bit(found) & 1) != 0


@triton.jit
def add_shares(ptr, flag, watch, PROGRAMS: tl.constexpr, AREA: tl.constexpr, BLOCK_B: tl.constexpr,
               BLOCK_H: tl.constexpr, KERNEL: tl.constexpr):
    """The sum that ``look_at_shares`` finds, once all are there."""
    total = tl.full((BLOCK_B, BLOCK_H), 0., tl.float32)
    late, since = True, 0
    while late:
        total, late = look_at_shares(ptr, flag, PROGRAMS, AREA, BLOCK_B, BLOCK_H)
        if late:
            since = look_at_clock(since, watch, KERNEL)
    return total
