"""Eager calls of layers, with little work for the host: one autograd.Function for each layer, of its own weights.

``functional.lstm`` takes the weights of both directions as one tensor and the sum of both biases. To make these by
operators that autograd follows takes the host longer than some layers take the GPU. ``layers`` is for plain tensors
only: compilers, transforms and dispatch modes see ``functional.lstm`` and its operator.
"""
import functools

import torch
from torch.autograd import forward_ad

from . import apart, op, wavefront
from .functional import checked, flags_of


@functools.lru_cache
def shapes_of(num_layers, directions, input_size, hidden_size, bias):
    """The shapes of a layer's weights in the order of nn.LSTM."""
    shapes = []
    for layer in range(num_layers):
        own = [(4 * hidden_size, directions * hidden_size if layer else input_size), (4 * hidden_size, hidden_size)]
        shapes += (own + [(4 * hidden_size,)] * (2 if bias else 0)) * directions
    return shapes


def _by_direction(own, D):
    """W, R and the sum of both biases, or None, as lists of D matrices, where autograd does not follow."""
    kinds = len(own) // D
    b = [b_ih + b_hh for b_ih, b_hh in zip(own[2::kinds], own[3::kinds])] if kinds > 2 else None
    return own[0::kinds], own[1::kinds], b


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, h0, c0, flags, batch_sizes, plan, keep_gates, known, *own):
        w, r, b = _by_direction(own, plan.directions)
        # backward needs both directions' R in one tensor too
        both = None if plan.directions == 1 else torch.stack(r)
        with op.without_autocast(x):
            y, h_n, c_n, kept, gates = op.sequence.forward(x, w, r if both is None else both, b, h0, c0, flags, plan,
                                                           True, batch_sizes, keep_gates=keep_gates, **known)
        ctx.save_for_backward(x, both, h0, c0, flags, batch_sizes, y, kept, gates, *own, *(b or ()))
        ctx.plan, ctx.known = plan, known
        ctx.set_materialize_grads(False)
        return y, h_n, c_n

    @staticmethod
    def backward(ctx, *given):
        needs, D = ctx.needs_input_grad, ctx.plan.directions
        if all(g is None for g in given):
            return (None,) * len(needs)
        x, both, h0, c0, flags, batch_sizes, y, kept, gates, *own = ctx.saved_tensors
        of_own = needs[8:]
        own, b = own[:len(of_own)], own[len(of_own):] or None
        kinds = len(own) // D
        wanted = [needs[0], any(of_own[0::kinds]), any(of_own[1::kinds]),
                  kinds > 2 and any(of_own[2::kinds] + of_own[3::kinds]), needs[1], needs[2]]
        if torch.is_grad_enabled() or not op.plain(*given) or op.batched(*given):
            # there will be derivatives of these gradients, or a transform runs over them
            found = op.differentiable(op.lstm_backward_op, *given, x, *apart.stacked(own, kinds), h0, c0, flags,
                                      batch_sizes, y, kept, gates, "", ctx.plan.keep_every, wanted, None, 0., 0.)
        else:
            w, r = own[0::kinds], own[1::kinds] if both is None else both
            with op.without_autocast(x):
                found = op.sequence.backward(*given, x, w, r, b, h0, c0, flags, y, kept, gates, ctx.plan, wanted,
                                             batch_sizes, **ctx.known)
        dx, dw, dr, db, dh0, dc0 = (g if need else None for g, need in zip(found, wanted))
        gradients = []
        for d in range(D):
            gradients += [None if g is None else g[d] for g in ((dw, dr) if kinds == 2 else (dw, dr, db))]
            if kinds > 2:
                gradients.append(None if db is None else db[d].clone())     # in memory of its own: see ``apart``
        return dx, dh0, dc0, *[None] * 5, *(g if need else None for g, need in zip(gradients, of_own))


def layers(x, hx, weights, sizes, dropout, keep_gates, batch_sizes=None, lengths=None, reset=None):
    """(y, (h_n, c_n)) as ``LSTM._layers``, by automatic plans; None where the call is not one for this way, for
    example because its layers run as a wavefront. Wrong weights are not.

    x           (T, B, I), or packed (N, I), which the kernels compute
    hx          (h0, c0) or None
    weights     of all layers, in nn.LSTM's order and x's type
    sizes       (num_layers, directions, I, H, bias)
    dropout     between layers
    keep_gates  True, False, or None: as the plan says
    """
    if not op.plain(x, lengths, reset, *weights, *(hx or ())) or forward_ad._current_level >= 0:
        return None
    dtype, device = x.dtype, x.device
    if [t.shape for t in weights] != shapes_of(*sizes) or any(
            t.dtype != dtype or t.device != device for t in (*weights, *(hx or ()))):
        return None
    num_layers, D, _, H, bias = sizes
    T, B = x.shape[:2] if batch_sizes is None else (
        len(batch_sizes), hx[0].shape[1] if hx is not None else int(batch_sizes[0]))
    needed = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights, *(hx or ())))
    one_step = T == 1 and not needed and batch_sizes is lengths is reset is None        # has a kernel of its own
    if one_step:
        return None
    plan, _ = op.on_device(B, H, dtype, D, device, sequences=op.sequences_of(
        lengths is not None or reset is not None, batch_sizes is not None), or_torch=True)
    if plan is None or num_layers > 1 and batch_sizes is lengths is reset is None and (
            wavefront.why_not(plan, T, num_layers, op.limits_of(device)) is None):
        return None
    if keep_gates is None:
        keep_gates = plan.keeps_gates(T, num_layers)
    lengths, reset = checked(lengths, (B,), "lengths", device), checked(reset, (T, B), "reset", device)
    flags = flags_of(T, B, D, lengths, reset, batch_sizes, device, plain=True)
    known = dict(all_live=lengths is None and batch_sizes is None, zero_state=hx is None)
    if hx is None:
        zeros = x.new_zeros(D, B, H)
        hx = zeros, zeros
    per, states = (4 if bias else 2) * D, []
    for layer in range(num_layers):
        if layer and dropout:
            x = torch.nn.functional.dropout(x, dropout)
        own = weights[layer * per:(layer + 1) * per]
        h0, c0 = hx if len(hx[0]) == D else (s[layer * D:(layer + 1) * D] for s in hx)
        if needed and any(t.requires_grad for t in (x, h0, c0, *own)):
            x, *state = _Layer.apply(x, h0, c0, flags, batch_sizes, plan, keep_gates, known, *own)
        else:
            with op.without_autocast(x):
                x, *state, _, _ = op.sequence.forward(x, *_by_direction(own, D), h0, c0, flags, plan, False,
                                                         batch_sizes, **known)
        states.append(state)
    h_n, c_n = states[0] if num_layers == 1 else map(torch.cat, zip(*states))
    return x, (h_n, c_n)
