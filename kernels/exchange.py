"""How programs that share R exchange h and shares of dh through the second-level cache: the data is its own flag.

A reader polls the data itself, and each 32-bit word tells by its value whether it has arrived. That takes one trip
through the cache, where a barrier takes two and a load a third. No order between accesses to different words is needed.
Accesses to one word are strong (relaxed or volatile, in PTX's terms), because a weak store may stay invisible to a
reader that polls.

h            slots (steps, directions, rows, units) of the input's type, new for each launch. The host sets all bits of
             every slot, which reads as a NaN; senders never send that one. A slot has arrived once it holds anything
             else.
shares of dh (2, directions, groups, tiles, PADDED_PROGRAMS to, PROGRAMS from, BLOCK_B, BLOCK_H) fp32, zero at first.
             The two halves take turns by step. The last bit of a share is a flag, which is one in the first turn of
             either half, zero in the next, and so on. A share has arrived once its flag is that of the turn.
"""
import torch

from .language import tl, triton
from .precision import rounded_to_tf32, same_nans
from .rows import FRESH, has, times_of
from .waiting import give_up, look_at_clock


@triton.jit
def send(ptr, bits, INTERPRET: tl.constexpr):
    """Store integers of 16, 32 or 64 bits where other programs see them. One of 64 bits arrives as two words."""
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
def _or(a, b):
    return a | b


@triton.jit
def any_bit(words):
    """The bits that any of ``words`` has, as a scalar."""
    return tl.reduce(words, None, _or)


# -- h ----------------------------------------------------------------------------------------------------------------

@triton.jit
def bits_of(h):
    """h as integers. A NaN becomes another one than that of an empty slot."""
    integer: tl.constexpr = tl.int16 if h.dtype.primitive_bitwidth == 16 else tl.int32
    nan: tl.constexpr = 0x7FFF if h.dtype.primitive_bitwidth == 16 else 0x7FFFFFFF
    return tl.where(h == h, h.to(integer, bitcast=True), nan).to(integer)


@triton.jit
def send_h(ptr, h, INTERPRET: tl.constexpr):
    """``send`` h into its slots."""
    send(ptr, bits_of(h), INTERPRET)


@triton.jit
def look(ptr, start, WIDTH: tl.constexpr, UNITS: tl.constexpr, BLOCK_B: tl.constexpr):
    """The words of WIDTH units from ``start`` on of a tile of slots (BLOCK_B, UNITS), arrived or not. A word has one
    unit, or two in 16-bit types."""
    PER_WORD: tl.constexpr = 32 // ptr.dtype.element_ty.primitive_bitwidth
    at = start // PER_WORD + tl.arange(0, WIDTH // PER_WORD)[None, :]
    return tl.load(ptr.to(tl.pointer_type(tl.int32)) + tl.arange(0, BLOCK_B)[:, None] * (UNITS // PER_WORD) + at,
                   volatile=True)


@triton.jit
def missing(words, dtype: tl.constexpr):
    """Integers whose sign bits tell which values have not arrived: one sign for each value, so two in a word of 16-bit
    types. The other bits mean nothing.

    A value v is empty if all its bits are set. That is the only v for which v and ~v - 1 are both negative.
    """
    if dtype.primitive_bitwidth == 16:
        return words & (~words - 0x10001)
    else:
        return words & (~words - 1)


@triton.jit
def is_missing(bits, dtype: tl.constexpr):
    """Whether ``any_bit`` of ``missing`` says that some value has not arrived."""
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
    """Whether any value of several blocks, widest first, has not arrived."""
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
def receive(ptr, watch, R_SLICES: tl.constexpr, UNITS: tl.constexpr, BLOCK_B: tl.constexpr, KERNEL: tl.constexpr):
    """The words of each of R_SLICES, once all have arrived. watch: see ``waiting``."""
    dtype: tl.constexpr = ptr.dtype.element_ty
    words = ()
    for k in tl.static_range(len(R_SLICES)):
        words += (tl.full((BLOCK_B, R_SLICES[k][1] * dtype.primitive_bitwidth // 32), 0, tl.int32),)
    waiting, since = True, 0
    while waiting:
        found = ()
        for k in tl.static_range(len(R_SLICES)):
            found += (look(ptr, R_SLICES[k][0], R_SLICES[k][1], UNITS, BLOCK_B),)
        words = found
        waiting = any_missing(words, dtype)
        if waiting:
            since = look_at_clock(since, watch, KERNEL)
    return words


@triton.jit
def wait_for_rest(ptr, watch, START: tl.constexpr, UNITS: tl.constexpr, BLOCK_B: tl.constexpr, KERNEL: tl.constexpr,
                  INTERPRET: tl.constexpr):
    """Wait until the units from START on have arrived, so that ordinary loads find them. A loop may then load them, and
    the compiler may turn its loads into asynchronous copies that fetch ahead."""
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
        # what one thread has seen, all threads of the program may read from here on
        tl.inline_asm_elementwise("fence.acq_rel.gpu; bar.sync 0; mov.b32 $0, 0;", "=r,r,~{memory}", [tl.program_id(0)],
                                  dtype=tl.int32, is_pure=False, pack=1)


@triton.constexpr_function
def look_again_at_h(count, start, kernel, limited):
    """Assembly of ``wait_for_words`` for the ``count`` words of a thread, half of them in each of two rows, and the
    constraints of its operands.

    Outputs are the words. Operands are the words of the first look, in the outputs' registers; ``count`` addresses, of
    which it reads the first of each row and finds the other words at fixed distances; and if ``limited`` ``count``
    copies of each part of a watch. Memory is read ``start`` bytes past the addresses.
    """
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


@triton.jit
def wait_for_words(words, at, watch, START: tl.constexpr, WARPS: tl.constexpr, KERNEL: tl.constexpr):
    """``words`` of h, as a first look found them START words behind ``at``, once all have arrived. Each warp waits by
    itself: a condition of the language would be the whole program's, by a reduction with two barriers.

    It tells from whole words, which is enough: words arrive whole (see ``send``), and no word of two values that have
    arrived has all bits set.
    """
    COUNT: tl.constexpr = words.numel // (32 * WARPS)
    ASM: tl.constexpr = look_again_at_h(COUNT, 4 * START, KERNEL, watch[0] is not None)
    if watch[0] is None:
        return tl.inline_asm_elementwise(ASM[0], ASM[1], [words, at.to(tl.uint64)], dtype=tl.int32, is_pure=False,
                                         pack=COUNT)
    else:
        return tl.inline_asm_elementwise(ASM[0], ASM[1], [words, at.to(tl.uint64), watch[0].to(tl.uint64), watch[1],
                                                          watch[2], watch[3], watch[4]], dtype=tl.int32, is_pure=False,
                                         pack=COUNT)


def slots_shape(steps, plan):
    """The shape of the slots of a launch of up to ``steps`` steps."""
    return steps, plan.directions, plan.groups * plan.tiles * plan.block_b, plan.padded_programs * plan.block_h


def fill(slots, plan):
    """Make ``slots`` (steps, ..., rows, units) empty, but those before the first step, and those of units that no
    program has, zero."""
    slots.view(torch.int16 if slots.element_size() == 2 else torch.int32).fill_(-1)
    slots[0].zero_()        # by one launch; slots[0] = 0 would take two
    if plan.padded_programs > plan.programs:
        slots[..., plan.programs * plan.block_h:].zero_()


def fill_from(h, slots, flags, first, T, plan):
    """``fill`` for the launch that begins with step ``first``, with h (D, B, H) before that step as programs would have
    sent it. flags: step flags or None."""
    if flags is not None:
        now = torch.stack([flags[d, times_of(d, first, 1, T)[0]] for d in range(plan.directions)])
        h = h.masked_fill(has(now, FRESH), 0)
    fill(slots, plan)
    # a NaN of h must not be that of an empty slot
    (rounded_to_tf32 if plan.precision == "tf32" else same_nans)(h, out=slots[0, :, :h.shape[1], :h.shape[2]])


# -- shares of dh -----------------------------------------------------------------------------------------------------

@triton.jit
def flag_of(turn):
    """The flag of shares sent at the ``turn``-th step, counted over all launches of a backward pass."""
    return 1 - turn // 2 % 2


@triton.jit
def flagged(shares, flag):
    """fp32 ``shares`` as integers with ``flag`` for their last bit."""
    return (shares.to(tl.int32, bitcast=True) & -2) | flag


@triton.jit
def unflagged(bits):
    """The fp32 shares of ``flagged``, which lose their last bit."""
    return (bits & -2).to(tl.float32, bitcast=True)


@triton.jit
def send_shares(ptr, shares, flag, INTERPRET: tl.constexpr):
    """``send`` shares (BLOCK_B, units). ptr (BLOCK_B, units / 2): where every other one goes. Two at a time fill the
    cache's sectors with half the stores."""
    bits = flagged(shares, flag)
    low, high = bits.reshape(bits.shape[0], bits.shape[1] // 2, 2).split()
    send(ptr, low.to(tl.uint32, bitcast=True).to(tl.int64) | (high.to(tl.int64) << 32), INTERPRET)


@triton.jit
def add_batch(shares_ptr, total, found, flag, COUNT: tl.constexpr, AREA: tl.constexpr):
    """``total`` with COUNT shares added, and ``found`` with the last bit set where one of them has not arrived.

    All loads come before the first sum, so that all are on their way at the same time. Where loads and sums alternate
    the compiler may wait for each load alone.
    """
    shares = ()
    for q in tl.static_range(COUNT):
        shares += (tl.load(shares_ptr + q * AREA, volatile=True),)
    for q in tl.static_range(COUNT):
        total += unflagged(shares[q])
        found |= shares[q] ^ flag
    return total, found


@triton.jit
def look_at_shares(ptr, flag, PROGRAMS: tl.constexpr, AREA: tl.constexpr, BLOCK_B: tl.constexpr,
                   BLOCK_H: tl.constexpr):
    """The sum of PROGRAMS tiles of (BLOCK_B, BLOCK_H), always in the same order, and whether any share has not arrived,
    which makes the sum worthless."""
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
    """The sum of ``look_at_shares``, once all shares have arrived. watch: see ``waiting``."""
    total = tl.full((BLOCK_B, BLOCK_H), 0., tl.float32)
    late, since = True, 0
    while late:
        total, late = look_at_shares(ptr, flag, PROGRAMS, AREA, BLOCK_B, BLOCK_H)
        if late:
            since = look_at_clock(since, watch, KERNEL)
    return total


@triton.constexpr_function
def look_again_at_shares(tensors, count, stride, kernel, limited):
    """Assembly of ``wait_for_shares`` for the ``count`` adjacent words of a thread in each of ``tensors``, which lie
    ``stride`` bytes apart, and the constraints of its operands.

    Outputs are the words. Operands are the words of the first look, in the outputs' registers; ``count`` addresses, of
    which it reads the first; ``count`` flags; and if ``limited`` ``count`` copies of each part of a watch.
    """
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


@triton.constexpr_function
def repeated(dtype, n):
    return (dtype,) * n


@triton.jit
def look_at_words(at, COUNT: tl.constexpr, STRIDE: tl.constexpr):
    """The words at ``at`` of each of COUNT tensors, STRIDE words apart, arrived or not."""
    words = ()
    for q in tl.static_range(COUNT):
        words += (tl.load(at + q * STRIDE, volatile=True),)
    return words


@triton.jit
def wait_for_shares(words, at, flag, watch, COUNT: tl.constexpr, STRIDE: tl.constexpr, KERNEL: tl.constexpr):
    """``words`` of ``look_at_words``, COUNT of each tensor in a thread, once all have arrived. Each warp waits by
    itself."""
    ASM: tl.constexpr = look_again_at_shares(len(words), COUNT, 4 * STRIDE, KERNEL, watch[0] is not None)
    operands = words + (at.to(tl.uint64), flag)
    if watch[0] is not None:
        operands += (watch[0].to(tl.uint64), watch[1], watch[2], watch[3], watch[4])
    return tl.inline_asm_elementwise(ASM[0], ASM[1], operands, dtype=repeated(tl.int32, len(words)), is_pure=False,
                                     pack=COUNT)


def new_shares(dh, plan):
    """Memory for the shares of a backward pass. No share has arrived yet."""
    tiles = 2 * plan.directions * plan.groups * plan.tiles
    return dh.new_zeros(tiles * plan.padded_programs * plan.programs * plan.block_b * plan.block_h)
