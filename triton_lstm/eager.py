"""Eager calls of layers, with little work for the host: one autograd.Function for all layers, of their own weights.

``functional.lstm`` takes the weights of both directions as one tensor and the sum of both biases. To make these by
operators that autograd follows takes the host longer than some layers take the GPU. ``layers`` is for plain tensors
only: compilers, transforms and dispatch modes see ``functional.lstm`` and its operator.
"""
import dataclasses
import functools
import operator

import torch
from torch.autograd import forward_ad

from . import apart, op, replay, wavefront
from .dropout import NO_DROPOUT, Dropout
from .functional import checked, flags_of
from .plan import Plan

_requires_grad = operator.attrgetter("requires_grad")      # takes half the time of a generator


@functools.lru_cache
def shapes_of(num_layers, directions, input_size, hidden_size, bias):
    """The shapes of a layer's weights in the order of nn.LSTM."""
    shapes = []
    for layer in range(num_layers):
        own = [(4 * hidden_size, directions * hidden_size if layer else input_size), (4 * hidden_size, hidden_size)]
        shapes += (own + [(4 * hidden_size,)] * (2 if bias else 0)) * directions
    return shapes


def _of_layers(count, D, state):
    """The part of each layer of a state (layers D, B, H). A state (D, B, H) is the same for all layers."""
    return [state] * count if len(state) == D else state.chunk(count)       # split is in Python, and slower


def _sums(b_ih, b_hh):
    """The sum of each pair of biases, by one launch on CUDA."""
    if len(b_ih) == 1:
        return [b_ih[0] + b_hh[0]]
    return torch._foreach_add(b_ih, b_hh)       # pyright: ignore[reportPrivateImportUsage]


def _copies(tensors):
    """A copy of each, by one launch on CUDA."""
    if len(tensors) < 2:
        return [t.clone() for t in tensors]
    return torch._foreach_mul(tensors, 1)       # pyright: ignore[reportPrivateImportUsage]


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    """What all layers of a call have in common.

    count      of layers
    steps      of a chunk of forward, where layers run as a wavefront; None: they run one after the other
    all_live   as ``sequence.forward_chunks`` and ``backward_chunks`` take it

    ``_call_of`` makes them, so that equal ones are one and the same.
    """
    plan: Plan
    count: int
    dropout: Dropout
    keep_gates: bool
    steps: int | None
    all_live: bool

    def of_layers(self, weights):
        """The weights of each layer, from those of all."""
        if self.count == 1:
            return [weights]
        each = len(weights) // self.count
        return [weights[n * each:(n + 1) * each] for n in range(self.count)]


def _rs(call, weights, saved):
    """R of each layer, as ``sequence.forward_chunks`` takes it. saved: of two directions, a sequence that begins with
    all of them, (layers D, 4H, H)."""
    if call.plan.directions == 2:
        return _of_layers(call.count, 2, saved[0])
    return [(r,) for r in weights[1::len(weights) // call.count]]


_call_of = functools.lru_cache(op.launch.KNOWN)(_Call)


def _forward(call, save, flags, batch_sizes, x, h0, c0, *weights, launcher=None):
    """((y, h_n, c_n), what backward needs). The latter is R of two directions, for all layers in one tensor; then for
    each layer x if dropout made it, else None; the mask of dropout; y, and what else ``sequence.forward`` keeps; and
    the sums of the biases, if the gates are recomputed.

    h0, c0    of all layers; or the zeros (D, B, H), which each layer begins from, and None
    """
    plan, count, dropout = call.plan, call.count, call.dropout
    D, arguments, results, saved = plan.directions, [], [], []
    c_n = (x.new_zeros(count * D, plan.batch, plan.hidden_size, dtype=torch.float32) if c0 is None else
           op.sequence.in_fp32(c0))
    options = dict(all_live=call.all_live, zero_state=c0 is None, launcher=launcher, keep_gates=call.keep_gates)
    if flags is not None and batch_sizes is None and not call.all_live:
        options["ends"] = op.sequence.ends_of(flags)
    kinds = len(weights) // (count * D)
    sums = _sums(weights[2::4], weights[3::4]) if kinds > 2 else None
    if D == 2:          # by one launch for all layers; backward needs them too
        saved.append(torch.stack(weights[1::kinds]))
    rs = _rs(call, weights, saved)
    states = [_of_layers(count, D, state) for state in (h0, c_n)]
    for n, (own, r, *state) in enumerate(zip(call.of_layers(weights), rs, *states)):
        arguments.append((own[0::kinds], r, sums and sums[n * D:(n + 1) * D], *state, flags, plan, save, batch_sizes))
    with op.without_autocast(x):
        if call.steps is None:
            dropped, options["workspace"] = [], op.sequence.Workspace()
            for n, of_layer in enumerate(arguments):
                made, mask = dropout(x) if n else (None, None)
                x = x if made is None else made
                dropped.append((made, mask) if save else None)
                x, last, *kept = op.sequence.finish(op.sequence.forward_chunks(x, *of_layer, **options))
                # Without backward only the next layer needs x. ``last`` are views of x, which would keep it alive.
                results.append((x, last, *kept) if save else (None, [op.sequence.joined([last])]))
                del last
        else:
            dropped, results = wavefront.forward(plan, x, arguments, options, dropout, call.steps)
            x = results[-1][0]
    if save:
        for n, ((_, _, b, *_), (y, _, kept, gates)) in enumerate(zip(arguments, results)):
            saved += *dropped[n], y, kept, gates, *(() if b is None or len(gates) else b)
    h_n = results[0][1][0] if not save and count == 1 else op.sequence.joined([last for _, last, *_ in results])
    return (x, h_n, c_n if x.dtype == torch.float32 else c_n.to(x.dtype)), saved


class _Layers(torch.autograd.Function):
    """``_forward`` with gradients. Takes the arguments of ``_forward`` except ``save``."""

    @staticmethod
    def forward(ctx, call, *tensors):
        outputs, saved = replay.run(_forward, call, True, tensors)
        ctx.call = call
        ctx.save_for_backward(*tensors, *saved)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n):
        call, needs, given = ctx.call, ctx.needs_input_grad[3:], (dy, dh_n, dc_n)
        if dy is dh_n is dc_n is None:
            return (None,) * (3 + len(needs))
        tensors = ctx.saved_tensors        # once: checkpoints give them only once
        if torch.is_grad_enabled() or not op.plain(*given) or op.batched(*given):
            # there will be derivatives of these gradients, or a transform runs over them
            return None, None, None, *_differentiably(call, needs, given, *tensors)
        return None, None, None, *replay.run(_backward, call, needs, (*given, *tensors), given=3)


def _saved(call, needs, tensors):
    """(x, h0, c0 and the weights; R as ``_rs`` has it; of each layer what ``_forward`` saved) of the saved tensors."""
    inputs, tensors = tensors[:len(needs)], tensors[len(needs):]
    rs = _rs(call, inputs[3:], tensors)
    tensors = tensors[call.plan.directions - 1:]
    each = len(tensors) // call.count
    return inputs, rs, [tensors[n * each:(n + 1) * each] for n in range(call.count)]


def _backward(call, needs, dy, dh_n, dc_n, flags, batch_sizes, *tensors, launcher=None):
    """Gradients for x, h0, c0 and the weights, by the kernels.

    needs            for each of them, whether it needs a gradient; others are None
    dy, dh_n, dc_n   None for zero
    tensors          x, h0, c0, the weights, and what ``_forward`` saved
    """
    ((x, h0, c0, *weights), rs, saved), plan, D = _saved(call, needs, tensors), call.plan, call.plan.directions
    options = dict(all_live=call.all_live, zero_state=c0 is None, launcher=launcher)
    c0 = h0 if c0 is None else c0
    of_weights, needed = call.of_layers(weights), call.of_layers(needs[3:])
    kinds = len(of_weights[0]) // D
    count, arguments = call.count, []
    shape = D, plan.batch, plan.hidden_size
    states, of_states = op.sequence.state_gradients(dh_n, dc_n, needs[1] or needs[2], count, shape, x)
    h0, c0 = (_of_layers(count, D, state) for state in (h0, c0))
    for n in range(count):
        own, need, (made, _, y, kept, gates, *b) = of_weights[n], needed[n], saved[n]
        wanted = (n > 0 or needs[0], any(need[0::kinds]), any(need[1::kinds]),
                  kinds > 2 and any(need[2::kinds] + need[3::kinds]))
        of_x = made if made is not None else saved[n - 1][2] if n else x
        arguments.append((*of_states[n], of_x, own[0::kinds], rs[n], b or None, h0[n], c0[n], flags, y, kept, gates,
                          plan, wanted, batch_sizes))
    masks = [of_layer[1] for of_layer in saved]
    with op.without_autocast(x):
        if call.steps is None:
            results, options["workspace"] = [], op.sequence.Workspace()
            for n in reversed(range(count)):
                dy, *of_layer = op.sequence.finish(op.sequence.backward_chunks(dy, *arguments[n], **options,
                                                                               zero_past_ends=n > 0))
                dy = call.dropout.masked(dy, masks[n])
                results.insert(0, of_layer)
        else:
            dy, results = wavefront.backward(plan, x, dy, needs[0], arguments, options, masks, call.dropout)
    gradients = []
    # of b_hh in memory of its own: see ``apart``
    again = iter(_copies([g for *_, db in results if db is not None for g in db]))
    for dw, dr, db in results:
        for d in range(D):
            gradients += [None if g is None else g[d] for g in (dw, dr)]
            if kinds > 2:
                gradients += [None, None] if db is None else [db[d], next(again)]
    states = [None if g is None or not need else g.to(x.dtype) for g, need in zip(states, needs[1:3])]
    return [g if need else None for g, need in zip((dy, *states, *gradients), needs)]


def _differentiably(call, needs, given, flags, batch_sizes, *tensors):
    """``_backward`` in operators that can be differentiated and mapped over. It computes forward again, from the
    inputs."""
    create_graph, D = torch.is_grad_enabled(), call.plan.directions
    inputs, _, saved = _saved(call, needs, tensors)
    masks = [of_layer[1] for of_layer in saved]
    with torch.enable_grad():
        # aliases: one input may have been computed from another
        inputs = [t.view_as(t) if need else t for t, need in zip(inputs, needs)]
        x, h0, c0, *weights = inputs
        c0 = h0 if c0 is None else c0
        h_n, c_n = [], []
        states = [_of_layers(call.count, D, state) for state in (h0, c0)]
        for n, (own, *state) in enumerate(zip(call.of_layers(weights), *states)):
            x, h, c, *_ = op.differentiable(
                op.lstm_op, call.dropout.masked(x, masks[n]), *apart.stacked(own, len(own) // D), *state, flags,
                batch_sizes, call.plan.encode(), call.plan.keep_every, True, len(x) if call.keep_gates else 0, None, 0.,
                0.)
            h_n.append(h)
            c_n.append(c)
        outputs = x, torch.cat(h_n), torch.cat(c_n)
    outputs, given = zip(*((t, g) for t, g in zip(outputs, given) if g is not None))
    found = iter(torch.autograd.grad(outputs, [t for t, need in zip(inputs, needs) if need], given,
                                     create_graph=create_graph, allow_unused=True))
    return [next(found) if need else None for need in needs]


def layers(x, hx, weights, sizes, plan, dropout, keep_gates, batch_sizes=None, lengths=None, reset=None):
    """(y, (h_n, c_n)) as ``LSTM._layers``; None where the call is not one for this way. Wrong weights are not.

    x           (T, B, I), or packed (N, I), which the kernels compute
    hx          (h0, c0) or None
    weights     of all layers, in nn.LSTM's order and x's type
    sizes       (num_layers, directions, I, H, bias)
    plan        the layer's own, or None
    dropout     between layers
    keep_gates  True, False, or None: as the plan says

    Raises what ``lstm`` raises for masks and for a plan that does not fit.
    """
    if not op.plain(x, lengths, reset, *weights, *(hx or ())) or forward_ad._current_level >= 0:
        return None
    dtype, device = x.dtype, x.device
    if [t.shape for t in weights] != shapes_of(*sizes) or any(
            t.dtype != dtype or t.device != device for t in (*weights, *(hx or ()))):
        return None
    count, D, _, H, bias = sizes
    T, B = x.shape[:2] if batch_sizes is None else (
        len(batch_sizes), hx[0].shape[1] if hx is not None else int(batch_sizes[0]))
    needed = torch.is_grad_enabled() and any(map(_requires_grad, (x, *weights, *(hx or ()))))
    padded = batch_sizes is lengths is reset is None
    if T == 1 and padded and not needed and plan is None:       # has a kernel of its own
        return None
    h0, c0 = (x.new_zeros(D, B, H), None) if hx is None else hx
    own = plan
    if own is None:
        plan, _ = op.on_device(B, H, dtype, D, device, sequences=op.sequences_of(
            lengths is not None or reset is not None, batch_sizes is not None), or_torch=True)
    elif isinstance(own, Plan):
        op.plan_for(x, h0[:D], own.encode(), own.keep_every, zoneout=False)
    if not isinstance(plan, Plan):
        return None
    steps = None
    if count > 1 and D == 1 and padded and B:
        plan, steps = wavefront.plan_of_all(plan, own is None, T, count, dtype, device)
    if keep_gates is None:
        keep_gates = own is None and plan.keeps_gates(T, count)
    keep_gates = keep_gates and steps is None           # a wavefront keeps none
    flags = None
    if not padded:
        lengths, reset = checked(lengths, (B,), "lengths", device), checked(reset, (T, B), "reset", device)
        flags = flags_of(T, B, D, lengths, reset, batch_sizes, device, plain=True)
    dropout = Dropout.of(x, dropout) if dropout else NO_DROPOUT
    call = _call_of(plan, count, dropout, keep_gates, steps, lengths is None and batch_sizes is None)
    if not needed:
        (y, h_n, c_n), _ = replay.run(_forward, call, False, (flags, batch_sizes, x, h0, c0, *weights))
        return y, (h_n, c_n)
    # layers below the first one that wants gradients keep nothing
    below = 0 if x.requires_grad or hx is not None and any(map(_requires_grad, hx)) else count * next(
        n for n, weight in enumerate(weights) if weight.requires_grad) // len(weights)
    if below == 0:
        y, h_n, c_n = _Layers.apply(call, flags, batch_sizes, x, h0, c0, *weights)
        return y, (h_n, c_n)
    states, at = [], len(weights) // count * below
    for lo, hi, save, own in (0, below, False, weights[:at]), (below, count, True, weights[at:]):
        part = _call_of(plan, hi - lo, dropout, keep_gates, steps if hi - lo > 1 else None, call.all_live)
        inputs = flags, batch_sizes, x, *((h0, c0) if hx is None else (s[lo * D:hi * D] for s in hx)), *own
        x, *state = _Layers.apply(part, *inputs) if save else replay.run(_forward, part, False, inputs)[0]
        states.append(state)
        x = x if save or dropout.rate == 0 else dropout(x)[0]
    h_n, c_n = map(torch.cat, zip(*states))
    return x, (h_n, c_n)
