"""One step (T = 1) without gradients: one launch a layer, and little work for the host before it.

Such a call needs no plan, so it also runs where R fits no plan. Large layers with many rows go the general way, where
larger tiles read the weights less often. ``layers`` is for eager calls, whose host time counts; the operator of
``op.py`` takes the same kernel for all other calls.
"""
import torch
from torch.autograd import forward_ad

from . import op
from .eager import shapes_of


def layers(x, hx, weights, sizes, state, with_y=True):
    """(y, h_n, c_n) of one step, or None where the call is not one for this way. Wrong input is not.

    x        (..., I): a row for each row of the batch
    hx       (h0, c0) or None
    weights  of all layers, in nn.LSTM's order
    sizes    (num_layers, directions, I, H, bias)
    state    the shape of h0, c0, h_n and c_n
    with_y   whether y (..., D H) is wanted; otherwise it is None
    """
    if hx is None:
        tensors = weights
    elif isinstance(hx, (tuple, list)) and len(hx) == 2:
        tensors = [*weights, *hx]
    else:
        return None
    if not op.plain(x, *tensors) or forward_ad._current_level >= 0:
        return None
    dtype, device, gradients = x.dtype, x.device, torch.is_grad_enabled()
    if gradients and x.requires_grad or op.autocasts(x):
        return None
    for t in tensors:
        if t is None or t.dtype != dtype or t.device != device or gradients and t.requires_grad:
            return None
    if [t.shape for t in tensors] != [*shapes_of(*sizes), *([] if hx is None else [state] * 2)]:
        return None
    num_layers, D, I, H, bias = sizes
    widest = max(I, D * H) if num_layers > 1 else I
    precision = op.one_step_precision(x.shape[:-1].numel(), dtype, device, widest, H, D)
    if precision is None:
        return None
    of = [weights[n:n + 4] for n in range(0, len(weights), 4)] if bias else [
        (*weights[n:n + 2], None, None) for n in range(0, len(weights), 2)]
    return op.sequence.one_step(x, of, *(hx or (None, None)), state, D, precision, with_y)
