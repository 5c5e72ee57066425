"""Device functions that the kernels share: activations, the LSTM cell, dot operands."""
import triton
import triton.language as tl

TANH_SMALL = tl.constexpr(0.625)
# Marks of a row at a step, where rows have lengths of their own or states are reset; see ``launch.marks``
LIVE, FRESH, START, END, BEFORE, CUT = (tl.constexpr(1 << n) for n in range(6))
# Factors and key steps of Philox-4x32
PHILOX_M0, PHILOX_M1, PHILOX_W0, PHILOX_W1 = map(tl.constexpr, (0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85))


@triton.jit
def first_row(offsets_ptr, time, B):
    """Where the rows of one time begin in x and y: B a time where padded, packed as offsets (T + 1,) int64 tell."""
    if offsets_ptr is None:
        return time.to(tl.int64) * B
    else:
        return tl.load(offsets_ptr + time)


@triton.jit
def rows_at(offsets_ptr, time, B):
    """``first_row``, and how many rows there are at that time: always the first ones of the batch."""
    start = first_row(offsets_ptr, time, B)
    if offsets_ptr is None:
        return start, B
    else:
        return start, (first_row(offsets_ptr, time + 1, B) - start).to(tl.int32)


@triton.jit
def place_of(offsets_ptr, padded, packed):
    """The one or the other, as rows lie: where a tensor's first dimension is time, or rows."""
    if offsets_ptr is None:
        return padded
    else:
        return packed


@triton.jit
def chunk_shift(offsets_ptr, d, T, S, B, first):
    """From a row of x and y to its place in a chunk's buffers: the rows of direction 0's times ``first`` to
    ``first + S``, then those of the times that direction 1 takes meanwhile, each in order of time."""
    others = first_row(offsets_ptr, first + S, B) - first_row(offsets_ptr, first, B)
    return d * others - first_row(offsets_ptr, tl.where(d == 0, first, T - first - S), B)


@triton.jit
def sigmoid(x):
    # exp overflows to inf for x < -88 and the quotient is then 0: right at every finite and infinite x.
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh(x):
    # Below 0.625 an odd polynomial (our own minimax fit, 0.8 ulp in fp32), for the quotient cancels there;
    # above it 1 - 2 / (e^2|x| + 1), which saturates to 1 without overflow to NaN.
    x2 = x * x
    p = -5.704985e-3 * x2 + 2.063908614e-2
    p = p * x2 - 5.373971537e-2
    p = p * x2 + 1.333144158e-1
    p = p * x2 - 3.333328068e-1
    far = 1 - 2 / (1 + tl.exp(2 * tl.abs(x)))
    return tl.where(tl.abs(x) < TANH_SMALL, x + x * (x2 * p), tl.where(x < 0, -far, far))


@triton.jit
def cell(i, f, g, o, c):
    """One LSTM step from pre-activations and the state c, all fp32: the new (h, c)."""
    c = sigmoid(f) * c + sigmoid(i) * tanh(g)
    return sigmoid(o) * tanh(c), c


@triton.jit
def zoneout(seed, rate_h, rate_c, d, time, row, unit, ZONEOUT: tl.constexpr):
    """What share of their earlier h and c some units keep at a step: fp32, broadcast from row and unit.

    ZONEOUT "expected": the rates. "drawn": 0 or 1, and 1 for rate of 2^24 values, rates being integers here. The bits
    are two words of Philox-4x32 (Salmon et al. 2011; 7 rounds, the fewest that pass their tests) of the 64-bit ``seed``
    at counter (unit, row, time, direction): whoever asks and however the steps are cut, a unit gets the same. The
    package's reference has the same in torch.
    """
    if ZONEOUT == "expected":
        return rate_h, rate_c
    else:
        key, other_key = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
        n0, n1 = unit.to(tl.uint32), row.to(tl.uint32)
        n2, n3 = time.to(tl.uint32), d.to(tl.uint32)
        for _ in tl.static_range(7):
            high0, low0 = tl.umulhi(n0, PHILOX_M0), n0 * PHILOX_M0
            high2, low2 = tl.umulhi(n2, PHILOX_M1), n2 * PHILOX_M1
            n0, n1, n2, n3 = high2 ^ n1 ^ key, low2, high0 ^ n3 ^ other_key, low0
            key += PHILOX_W0
            other_key += PHILOX_W1
        return ((n0 >> 8).to(tl.int32) < rate_h).to(tl.float32), ((n1 >> 8).to(tl.int32) < rate_c).to(tl.float32)


@triton.jit
def narrow(v, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """``v`` (fp32) rounded to nearest even in ``dtype``, which Triton's interpreter fails to do for bf16."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = v.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        v = tl.where(v == v, rounded.to(tl.float32, bitcast=True), v)
    return v.to(dtype)


@triton.jit
def round_tf32(v, INTERPRET: tl.constexpr):
    """``v`` (fp32) to the nearest TF32, as cuBLAS and cuDNN round: the tensor core itself drops the bits."""
    if INTERPRET:   # which knows no machine instructions; the carry would turn the NaN 0x7fffffff into a zero
        rounded = (v.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000
        return tl.where(v == v, rounded.to(tl.float32, bitcast=True), v)
    else:
        return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [v], dtype=tl.float32, is_pure=True,
                                         pack=1)


@triton.jit
def operand(v, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """``v`` as ``product`` wants its first factor: a tuple of one tensor, or of two for tf32x3.

    Triton's interpreter multiplies the raw bits of bf16; there the same values are passed as fp32.
    """
    if PRECISION == "tf32":
        return (round_tf32(v, INTERPRET),)
    elif PRECISION == "tf32x3":
        high = round_tf32(v, INTERPRET)
        low = tl.where(tl.abs(v) < float("inf"), v - high, 0.)
        return (high, round_tf32(low, INTERPRET))
    elif INTERPRET:
        return (v.to(tl.float32),)
    else:
        return (v,)


@triton.jit
def load_r(r_ptr, at, mask, plane, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """A block of R as ``product`` wants its second factor.

    R comes rounded, for tf32x3 as two planes whose sum it is: once a call, not in every program of every launch.
    """
    high = tl.load(r_ptr + at, mask=mask, other=0.)
    if PRECISION == "tf32x3":
        return (high, tl.load(r_ptr + plane + at, mask=mask, other=0.))
    elif INTERPRET:
        return (high.to(tl.float32),)
    else:
        return (high,)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b. tf32x3 sums three TF32 products, smallest first, and comes close to fp32's accuracy."""
    if PRECISION == "tf32x3":
        acc = tl.dot(a[1], b[0], acc, input_precision="tf32")
        acc = tl.dot(a[0], b[1], acc, input_precision="tf32")
    return tl.dot(a[0], b[0], acc, input_precision="tf32")
