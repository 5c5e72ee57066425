"""Device functions that the kernels share: activations, the LSTM cell, dot operands."""
import triton
import triton.language as tl

TANH_SMALL = tl.constexpr(0.625)
# Marks of a row at a step, where rows have lengths of their own or states are reset; see ``launch.marks``
LIVE, FRESH, START, END, BEFORE, CUT = (tl.constexpr(1 << n) for n in range(6))


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
