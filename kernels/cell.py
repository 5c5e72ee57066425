"""The LSTM cell: activations, one step from pre-activations, and zoneout."""
from .language import tl, triton

TANH_SMALL = tl.constexpr(0.625)
# Factors and key steps of Philox-4x32
PHILOX_M0, PHILOX_M1, PHILOX_W0, PHILOX_W1 = map(tl.constexpr, (0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85))
RATE_BITS = 24          # zoneout compares a rate with so many random bits


@triton.jit
def sigmoid(x):
    # exp overflows to inf for x < -88, and the quotient is then 0: right at every finite and infinite x
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh(x):
    # Below 0.625 an odd polynomial (our own minimax fit, 0.8 ulp in fp32), because the quotient cancels there.
    # Above it 1 - 2 / (e^2|x| + 1), which saturates to 1 and does not overflow to NaN.
    x2 = x * x
    p = -5.704985e-3 * x2 + 2.063908614e-2
    p = p * x2 - 5.373971537e-2
    p = p * x2 + 1.333144158e-1
    p = p * x2 - 3.333328068e-1
    far = 1 - 2 / (1 + tl.exp(2 * tl.abs(x)))
    return tl.where(tl.abs(x) < TANH_SMALL, x + x * (x2 * p), tl.where(x < 0, -far, far))


@triton.jit
def fast_tanh(x):
    """Relative error 2^-11: for results in 16-bit types."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def fast_sigmoid(x):
    return fast_tanh(0.5 * x) * 0.5 + 0.5


@triton.jit
def cell(i, f, g, o, c):
    """One LSTM step from pre-activations and the state c, all fp32: the new (h, c)."""
    c = sigmoid(f) * c + sigmoid(i) * tanh(g)
    return sigmoid(o) * tanh(c), c


@triton.jit
def cell_for(i, f, g, o, c, dtype: tl.constexpr):
    """``cell`` whose h will be rounded to ``dtype``: with the hardware's approximate tanh for 16-bit types."""
    if dtype == tl.float32:
        return cell(i, f, g, o, c)
    else:
        c = fast_sigmoid(f) * c + fast_sigmoid(i) * fast_tanh(g)
        return fast_sigmoid(o) * fast_tanh(c), c


@triton.jit
def exp2_approx(x):
    """2^x with a relative error of 2^-22: one instruction."""
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def reciprocal_approx(x):
    """1 / x with an error of one unit in the last place: one instruction."""
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def near_sigmoid(x):
    """Absolute error below 2^-21, so that 1 - sigmoid(x) keeps its digits where tanh.approx would lose them."""
    return reciprocal_approx(1 + exp2_approx(-1.4426950408889634 * x))


@triton.jit
def near_tanh(x):
    """As ``near_sigmoid``."""
    return 1 - 2 * reciprocal_approx(1 + exp2_approx(2.8853900817779268 * x))


@triton.jit
def coefficients_from(i, f, g, o, tanh_c, c_prev):
    """The six coefficients of a backward step (see ``portable_backward``), from activated gates, tanh of c after the
    step and c before it."""
    return (tanh_c * o * (1 - o), o * (1 - tanh_c * tanh_c), g * i * (1 - i), c_prev * f * (1 - f), i * (1 - g * g), f)


@triton.jit
def zoneout(seed, rate_h, rate_c, d, time, row, unit, ZONEOUT: tl.constexpr):
    """The shares m_h and m_c of their earlier h and c that some units keep at a step: fp32, by row and unit.

    ZONEOUT "expected": the rates themselves. "drawn": 0 or 1; rates are then integers, out of 2^24, and a share is 1
    where 24 random bits are below the rate. The bits are two words of Philox-4x32 (Salmon et al. 2011; 7 rounds, the
    fewest that pass their tests) of the 64-bit ``seed`` at counter (unit, row, time, direction). So forward and
    backward, and any way to cut the steps into launches, get the same shares. ``triton_lstm/reference.py`` has the same
    in torch.
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


def zoneout_arguments(zoneout):
    """(seed, rate_h, rate_c) or None as arguments of a kernel; a seed of None asks for the expectation. None adds no
    argument, and so leaves the kernels what they are without zoneout."""
    if zoneout is None:
        return {}
    seed, *rates = zoneout
    if seed is not None:
        rates = [round(rate * 2 ** RATE_BITS) for rate in rates]
    return dict(ZONEOUT="expected" if seed is None else "drawn", seed_ptr=seed, rate_h=rates[0], rate_c=rates[1])
