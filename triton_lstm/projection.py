"""LSTMs with projection (``proj_size``; Sak et al. 2014), written as LSTMs without, so that the kernels run them.

With h_t = W_hr m_t and m_t = o tanh(c_t) the recurrent product is R h_{t-1} = (R W_hr) m_{t-1}. This is an LSTM over m
with the recurrent matrix R W_hr, (4H, H), which is computed once a call. y is one product after the time loop. There is
no m that belongs to h0. R h0 is therefore added by the input product: x gets columns that contain h0 at the first step
of a direction, and W gets columns that contain R.
"""
import torch

from . import apart
from .kernels.precision import products_in
from .op import differentiable, register, tf32_allowed
from .plan import precision_for


def _product(a: torch.Tensor, b: torch.Tensor, exact: bool) -> torch.Tensor:
    """a @ b for each direction, a (D, N, K) and b (D, K, M). It is computed in the precision of the layer's products;
    or, with ``exact``, in a higher one and then rounded to a's type once."""
    precision, dtype = precision_for(a.dtype, tf32_allowed()), a.dtype
    if exact:
        # TF32 holds 16-bit numbers as they are; fp32 is exact enough for an R W_hr that is rounded to TF32 afterwards
        precision, dtype = {"native": ("tf32", torch.float32), "tf32": ("tf32x3", torch.float32),
                            "tf32x3": ("tf32x3", torch.float64)}[precision]
    with torch.autocast(a.device.type, enabled=False), products_in(precision):
        return torch.bmm(a.to(dtype), b.to(dtype)).to(a.dtype)


product_op = torch.library.custom_op("triton_lstm::product", _product, mutates_args=())


@product_op.register_fake
def _(a, b, exact):
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2])


def _setup_context(ctx, inputs, output):
    a, b, ctx.exact = inputs
    ctx.save_for_backward(a, b)


def _backward(ctx, g):
    a, b = ctx.saved_tensors
    da, db = ctx.needs_input_grad[:2]
    # the second one lies as b does, which may be the transposed of something
    as_b = lambda: product(g.mT, a, ctx.exact).mT if b.stride(-2) == 1 else product(a.mT, g, ctx.exact)
    return product(g, b.mT, ctx.exact) if da else None, as_b() if db else None


def _vmap(info, in_dims, a, b, exact):
    members = (t.movedim(dim, 0) if dim is not None else t.expand(info.batch_size, *t.shape)
               for t, dim in zip((a, b), in_dims))
    return product_op(*(t.flatten(0, 1) for t in members), exact).unflatten(0, (info.batch_size, -1)), 0


register(product_op, _product, "Product", _setup_context, _backward, _vmap)


def product(a, b, exact=False):
    """``product_op`` that can be differentiated any number of times."""
    return differentiable(product_op, a, b, exact)


def combine(weight_hh, weight_hr):
    """R W_hr (D, 4H, H) from R (D, 4H, P) and W_hr (D, P, H)."""
    return product(weight_hh, weight_hr, exact=True)


def project(m, weight_hr):
    """y (T, B, D P) from m (T, B, D H), or packed (N, D P) from (N, D H), and W_hr (D, P, H)."""
    D, P, H = weight_hr.shape
    steps = m.flatten(0, -2).unflatten(1, (D, H)).transpose(0, 1)
    return product(steps, weight_hr.mT).transpose(0, 1).reshape(*m.shape[:-1], D * P)


def with_state(x, weight_ih, weight_hh, h0, lengths, reset, batch_sizes):
    """x and W with further columns, whose product is R h0 at the first live step of each row and direction.

    x (T, B, I + D P), packed (N, I + D P), zero in these columns at all other steps; W (D, 4H, I + D P), zero where x
    has the h0 of the other direction.
    """
    D, P = len(h0), h0.shape[-1]
    if batch_sizes is not None:
        T, B = len(batch_sizes), h0.shape[1]
        live = torch.arange(B, device="cpu") < batch_sizes[:, None]
        last = live.sum(0) - 1
        times, places = live.nonzero(as_tuple=True)
        last, times, places = (t.to(x.device, non_blocking=True) for t in (last[places], times, places))
        first = [(times == (last if d else 0))[:, None] for d in range(D)]
        states = [h0[d].index_select(0, places) for d in range(D)]
    else:
        T = x.shape[0]
        time = torch.arange(T, device=x.device)[:, None]
        last = T - 1 if lengths is None else lengths.clamp(max=T) - 1
        first = [(time == (last if d else 0))[..., None] for d in range(D)]
        if reset is not None:       # the other direction ends with time 0
            first[0] = first[0] & ~reset[..., None]
        states = h0
    columns, rows = [], []
    for d in range(D):
        columns.append(torch.where(first[d], states[d], 0).expand(*x.shape[:-1], P))
        rows.append(torch.cat([weight_hh[d] if d == e else torch.zeros_like(weight_hh[d]) for e in range(D)], 1))
    return apart.cat(x, torch.cat(columns, -1), -1), apart.cat(weight_ih, torch.stack(rows), 2)


def too_large_together(plan):
    """The reason why R W_hr should not replace R, which has H / P times fewer elements; None where R W_hr fits on chip.

    ``plan`` is that of a batch of one row, so that the batch does not decide which implementation a layer has.
    """
    if plan.backward.schedule == "streamed":
        return (f"proj_size: the product of weight_hh and weight_hr, {4 * plan.hidden_size} x {plan.hidden_size}, does "
                "not fit on the chip")
