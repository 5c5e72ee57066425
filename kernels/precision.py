"""How products are computed: rounding to TF32, operands of products, and the switch of torch's own products.

    native    16-bit types: products of 16-bit operands, added up in fp32
    tf32      fp32 operands rounded to TF32, to nearest
    tf32x3    fp32 as the sum of two TF32 numbers each: three products, close to the accuracy of fp32
"""
import contextlib
import threading
import warnings

import torch

from .language import InterpretedFunction, tl, triton

# -- in the kernels ---------------------------------------------------------------------------------------------------

@triton.jit
def narrow(v, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """``v`` (fp32) rounded to nearest even in ``dtype``. Triton's interpreter does not round to bf16 by itself."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = v.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        v = tl.where(v == v, rounded.to(tl.float32, bitcast=True), v)
    return v.to(dtype)


# Whether the kernels of this copy of the package run in Triton's interpreter, which is decided when they are defined.
INTERPRET = isinstance(narrow, InterpretedFunction)


@triton.jit
def round_tf32(v, INTERPRET: tl.constexpr):
    """``v`` (fp32) rounded to the nearest TF32, as cuBLAS and cuDNN do. The tensor core alone cuts the bits off."""
    if INTERPRET:   # which knows no machine instructions; the carry would turn the NaN 0x7fffffff into a zero
        rounded = (v.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000
        return tl.where(v == v, rounded.to(tl.float32, bitcast=True), v)
    else:
        return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [v], dtype=tl.float32, is_pure=True,
                                         pack=1)


@triton.jit
def operand(v, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """``v`` as an operand of ``product``: a tuple of one tensor, or of two for tf32x3.

    Triton's interpreter multiplies the raw bits of bf16, so there the same values are passed as fp32.
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
def received_operand(h, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """``operand`` of what is rounded to TF32 already, such as h that another program has sent."""
    if PRECISION == "tf32":
        return (h,)
    else:
        return operand(h, PRECISION, INTERPRET)


@triton.jit
def load_operand(r_ptr, at, mask, ROUNDED: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """A block of R as the second operand of ``product``. ROUNDED: R is rounded to TF32 already."""
    r = tl.load(r_ptr + at, mask=mask, other=0.)
    if ROUNDED:
        return received_operand(r, PRECISION, INTERPRET)
    else:
        return operand(r, PRECISION, INTERPRET)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b. tf32x3 adds three TF32 products, the smallest first."""
    if PRECISION == "tf32x3":
        acc = tl.dot(a[1], b[0], acc, input_precision="tf32")
        acc = tl.dot(a[0], b[1], acc, input_precision="tf32")
    return tl.dot(a[0], b[0], acc, input_precision="tf32")


# -- on the host ------------------------------------------------------------------------------------------------------

def rounded_to_tf32(v, out=None):
    """``round_tf32`` of a tensor. All NaNs become that of ``torch.nan``."""
    bits = same_nans(v).view(torch.int32) + 0x1000
    return torch.bitwise_and(bits, -0x2000, out=None if out is None else out.view(torch.int32)).view(torch.float32)


def same_nans(v, out=None):
    """A copy of ``v`` whose NaNs are all that of ``torch.nan``: its bits are neither all set nor carried to a zero by
    ``round_tf32``."""
    return torch.nan_to_num(v, torch.nan, torch.inf, -torch.inf, out=out)


# Held while products are queued, by every thread that cares how they are computed. It is the process's switch: a thread
# that does not ask here and multiplies meanwhile still sees it.
_lock = threading.RLock()
_warned = False


# What has torch's newer switch, ``torch.backends.<backend>.matmul.fp32_precision``, since torch 2.9. The functions
# behind the property are called directly: the property takes four times as long.
_NEWER = ("cuda", "mkldnn") if hasattr(torch.backends.cuda.matmul, "fp32_precision") else ()
fp32_precision, _set_fp32_precision = (
    getattr(torch._C, f"_{verb}_fp32_precision_{verb}ter", None) for verb in ("get", "set"))


def _in_tf32():
    return fp32_precision("cuda", "matmul") == "tf32" if _NEWER else torch.backends.cuda.matmul.allow_tf32


def _set(tf32):
    """Set the older of torch's two interfaces, which sets the newer one too: the other way round whoever asks the older
    one gets a RuntimeError. Off by ``set_float32_matmul_precision``, for what it once set must agree with the rest."""
    global _warned
    if not _warned:             # some versions of torch warn once that it is the older one
        _warned = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _set(tf32)
    if tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    else:
        torch.set_float32_matmul_precision("highest")


class products_in_tf32:
    """A context in which products of fp32 tensors on CUDA are in TF32, or are not; torch's switch is touched only where
    it differs, and is as it was afterwards, by either interface. A generator would take the host twice as long."""

    def __init__(self, tf32):
        self._tf32, self._before = tf32, None

    def __enter__(self):
        _lock.acquire()
        try:
            if _in_tf32() != self._tf32:
                try:
                    older = torch.get_float32_matmul_precision()
                except RuntimeError:    # the user has set the newer one, and torch does not tell the older one then
                    older = None
                self._before = older, [fp32_precision(backend, "matmul") for backend in _NEWER]
                _set(self._tf32)
        except BaseException:
            _lock.release()
            raise

    def __exit__(self, *error):
        try:
            if self._before is not None:
                older, newer = self._before
                if older is not None:
                    torch.set_float32_matmul_precision(older)
                for backend, value in zip(_NEWER, newer):
                    _set_fp32_precision(backend, "matmul", value)
        finally:
            _lock.release()


def products_in(precision):
    """torch's own products of fp32 tensors on CUDA are computed as the kernels of ``precision`` compute theirs. Torch
    has one switch for nn.LSTM and another for matrix products."""
    return contextlib.nullcontext() if INTERPRET or precision == "native" else products_in_tf32(precision == "tf32")
