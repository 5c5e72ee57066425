"""One step of a layer (T = 1) without gradients, in plain Triton: ``forward_step``."""

from .cell import cell
from .language import tl, triton
from .precision import load_operand, narrow, operand, product


@triton.jit
def add_rows_times(a, v_ptr, at_v, has_row, m_ptr, at_m, has_column, K: tl.constexpr, BLOCK_K: tl.constexpr,
                   PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """a + v m^T over K features. ``at_v`` and ``at_m``: where the rows of v and of m begin."""
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        v = tl.load(v_ptr + at_v + k[None, :], mask=has_row & (k[None, :] < K), other=0.)
        m = load_operand(m_ptr, at_m + k[:, None], has_column & (k[:, None] < K), False, PRECISION, INTERPRET)
        a = product(operand(v, PRECISION, INTERPRET), m, a, PRECISION)
    return a


@triton.jit
def load_bias(b_ih_ptr, b_hh_ptr, at, mask):
    """b_ih + b_hh in fp32, for some columns. b_hh may be None: then b_ih alone."""
    b = tl.load(b_ih_ptr + at, mask=mask, other=0.).to(tl.float32)
    if b_hh_ptr is not None:
        b += tl.load(b_hh_ptr + at, mask=mask, other=0.).to(tl.float32)
    return b


@triton.jit(do_not_specialize=["B", "first"])
def forward_step(x_ptr, w_ptr, r_ptr, b_ih_ptr, b_hh_ptr, reverse_w_ptr, reverse_r_ptr, reverse_b_ih_ptr,
                 reverse_b_hh_ptr, h0_ptr, c0_ptr, y_ptr, h_n_ptr, c_n_ptr, B, first,
                 H: tl.constexpr, DIRECTIONS: tl.constexpr, INPUTS: tl.constexpr, BLOCK_B: tl.constexpr,
                 BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """Input product, recurrent product, cell and state of one step. All tensors have x's type.

    x          (B, INPUTS)
    w, r       (4H, INPUTS) and (4H, H) of direction 0; reverse_w and reverse_r of direction 1
    b_ih, b_hh (4H,) or None, of direction 0; no bias if the first is None. reverse_b_ih and reverse_b_hh likewise
    h0, c0     (-, B, H), of this layer and direction d at [first + d]; zeros if None
    y          (B, D H) or None, if nobody needs it
    h_n, c_n   as h0 and c0, in memory of their own: other programs still read h0

    grid (tiles of BLOCK_B rows, tiles of BLOCK_H units, D). Each program reads the weights of its units once.
    """
    d = tl.program_id(2)
    dtype: tl.constexpr = h_n_ptr.dtype.element_ty
    if DIRECTIONS == 2:
        w_ptr, r_ptr = tl.where(d == 0, w_ptr, reverse_w_ptr), tl.where(d == 0, r_ptr, reverse_r_ptr)
        if b_ih_ptr is not None:
            b_ih_ptr = tl.where(d == 0, b_ih_ptr, reverse_b_ih_ptr)
        if b_hh_ptr is not None:
            b_hh_ptr = tl.where(d == 0, b_hh_ptr, reverse_b_hh_ptr)
    row = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B))[:, None].to(tl.int64)
    has_row = row < B
    # one product for the four gates; columns are (gate's high bit, unit, gate's low bit)
    n = tl.arange(0, 4 * BLOCK_H)[None, :]
    n_unit = tl.program_id(1) * BLOCK_H + n // 2 % BLOCK_H
    has_column = n_unit < H
    column = (n // (2 * BLOCK_H) * 2 + n % 2) * H + n_unit
    unit = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[None, :]
    mask = has_row & (unit < H)
    state = (first + d).to(tl.int64) * B * H
    at = state + row * H + unit
    # what is not needed before the end is loaded first, to be on its way meanwhile
    c = tl.full((BLOCK_B, BLOCK_H), 0., tl.float32)
    if c0_ptr is not None:
        c = tl.load(c0_ptr + at, mask=mask, other=0.).to(tl.float32)
    a = tl.full((BLOCK_B, 4 * BLOCK_H), 0., tl.float32)
    if b_ih_ptr is not None:
        a += load_bias(b_ih_ptr, b_hh_ptr, column, has_column)
    a = add_rows_times(a, x_ptr, row * INPUTS, has_row, w_ptr, column * INPUTS, has_column, INPUTS, BLOCK_K, PRECISION,
                       INTERPRET)
    if h0_ptr is not None:
        a = add_rows_times(a, h0_ptr + state, row * H, has_row, r_ptr, column * H, has_column, H, BLOCK_K, PRECISION,
                           INTERPRET)
    low, high = a.reshape(BLOCK_B, 2, BLOCK_H, 2).permute(0, 2, 3, 1).split()
    i, f = low.split()
    g, o = high.split()
    h, c = cell(i, f, g, o, c)
    h = narrow(h, dtype, INTERPRET)
    if y_ptr is not None:
        tl.store(y_ptr + row * (DIRECTIONS * H) + d * H + unit, h, mask=mask)
    tl.store(h_n_ptr + at, h, mask=mask)
    tl.store(c_n_ptr + at, narrow(c, dtype, INTERPRET), mask=mask)
