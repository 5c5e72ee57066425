"""Layers as a wavefront: each layer runs over a chunk of steps as soon as the layer before has finished that chunk."""
import functools
import math

import torch
from torch.autograd import forward_ad

from . import op
from .functional import check, lstm
from .kernels.streams import run_diagonals
from .kernels.waiting import explained
from .plan import Plan, step_cycles

CHUNK, CHUNKS = 64, 8       # steps of a chunk at least, and how many chunks there are of a long input
CHUNK_US = 100              # that a chunk takes on the GPU at least, by prediction: the host needs as long to queue it


def chunk_steps(T, plan, limits):
    """Steps of a chunk of the forward pass. They are a multiple of 16, as most chunks of other calls, so that Triton
    compiles nothing new."""
    return max(-(-T // (16 * CHUNKS)) * 16, CHUNK if limits is None else _least_steps(plan, limits))


@functools.lru_cache
def _least_steps(plan, limits):
    step_us = step_cycles(plan, limits.multiprocessors, "forward", limits.multiply_adds) / limits.mhz
    return max(CHUNK, math.ceil(CHUNK_US / step_us / 16) * 16)


def why_not(plan, T, layers, limits):
    """The reason why ``layers`` layers of ``plan`` run one after the other; None if they run as a wavefront."""
    if limits is None:
        return "the interpreter runs one program at a time"
    if plan.directions == 2:
        return "the reverse direction begins where the layer before ends"
    if T < 2 * (steps := chunk_steps(T, plan, limits)):
        return f"{T} steps are fewer than two chunks of {steps}"
    programs = max(plan.launched, plan.backward.launched) * layers
    if programs > limits.multiprocessors:
        return f"{programs} programs of all layers do not run side by side on {limits.multiprocessors} multiprocessors"


def plan_of_all(x, hx, weights, layers, hidden_size, plan):
    """The plan by which ``layers`` layers run over x (T, B, I) as a wavefront; None where they run one after the other.

    There are no lengths, resets or packed rows. ``plan`` is the layer's own or None.
    """
    if (not op.plain(x, *(hx or ()), *weights) or x.numel() == 0 or forward_ad._current_level >= 0
            or not isinstance(plan, (Plan, type(None)))):
        return None
    (T, B), own = x.shape[:2], True
    if plan is None:
        plan, _ = op.on_device(B, hidden_size, x.dtype, 1, x.device)
        own = False
    limits = op.limits_of(x.device)
    if plan is None or why_not(plan, T, layers, limits):
        return None
    if not own:         # in backward layers overlap only if each goes over several chunks
        plan, _ = op.on_device(B, hidden_size, x.dtype, 1, x.device,
                               min(plan.keep_every, chunk_steps(T, plan, limits)))
    return plan


def lstm_layers(x, hx, layers, plan, dropout):
    """All of ``layers``, (w (1, 4H, I), r (1, 4H, H), b (1, 4H) or None) each, over x (T, B, I), by one plan.

    hx: (h0, c0), (layers, B, H) each, or None for zeros. dropout: the rate between layers, 0 for none. It draws the
    same random numbers as torch.nn.functional.dropout between one layer and the next. Returns ``y, (h_n, c_n)``.
    """
    B, H = x.shape[1], layers[0][1].shape[-1]
    h0, c0 = hx or (x.new_zeros(len(layers), B, H), x.new_zeros(len(layers), B, H))
    for n, (w, r, b) in enumerate(layers):
        check(x, (1, B, H if n else x.shape[2], H, H), w, r, b, h0[n:n + 1], c0[n:n + 1])
    op.plan_for(x, h0[:1], plan.encode(), plan.keep_every, zoneout=False)
    inputs = x, h0, c0, *(t for layer in layers for t in layer)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        y, h_n, c_n = _Wavefront.apply(plan, dropout, *inputs)
    else:
        y, h_n, c_n = _forward(plan, dropout, False, *inputs)[0]
    return y, (h_n, c_n)


def _by_layer(flat):
    return [flat[n:n + 3] for n in range(0, len(flat), 3)]


def _scale(x, dropout):
    """The factor of the elements that dropout keeps. On CPUs torch rounds it to the type of x."""
    if dropout == 1:
        return 0.
    return 1 / (1 - dropout) if x.is_cuda else x.new_ones(()).div(1 - dropout).item()


def _forward(plan, dropout, save, x, h0, c0, *weights):
    """((y, h_n, c_n), what backward needs of each layer): x if dropout made it from the y before, else None; y; the c
    that are kept; and the mask of dropout."""
    layers, T = _by_layer(weights), x.shape[0]
    steps = min(chunk_steps(T, plan, op.limits_of(x.device)), plan.forward_steps(T, x.element_size()))
    scale, chunks, dropped, ys, keep = _scale(x, dropout), [], [], [], []
    for n, (w, r, b) in enumerate(layers):
        keep.append(torch.nn.functional.dropout(torch.ones_like(x), dropout) != 0 if n and dropout else None)
        dropped.append(x.new_empty(x.shape) if n and dropout else None)
        x = x if dropped[n] is None else dropped[n]
        state = h0[n:n + 1], c0[n:n + 1]
        chunks.append(op.sequence.forward_chunks(x, w, r, b, *state, None, plan, save, steps=steps))
        x = next(chunks[n])
        ys.append(x)

    def drop(n, k):
        if n and dropout:
            now = slice(k * steps, (k + 1) * steps)
            torch.mul(ys[n - 1][now], keep[n][now], out=dropped[n][now]).mul_(scale)

    with op.without_autocast(x), explained():
        run_diagonals(chunks, -(-T // steps), drop, x.device)
        _, h_n, c_n, kept, _ = zip(*map(op.sequence.finish, chunks))
    return (ys[-1], torch.cat(h_n), torch.cat(c_n)), (dropped, ys, kept, keep)


def _backward(plan, scale, needs, gradients, inputs, saved):
    """Gradients for ``inputs``, by the kernels.

    needs        for each input, whether it needs a gradient; otherwise its gradient is None
    gradients    those of y, h_n and c_n; None for zero
    inputs       x, h0, c0 and the weights, as in ``_forward``
    saved        the four lists that ``_forward`` returns
    """
    (dy, *state_gradients), (x, h0, c0, *weights) = gradients, inputs
    dropped, ys, kept, keep = saved
    xs = [x, *(before if made is None else made for before, made in zip(ys, dropped[1:]))]
    layers, needed, K, T = _by_layer(weights), _by_layer(needs[3:]), plan.keep_every, len(x)
    lowest = 0 if any(needs[:3]) else next(n for n, of in enumerate(needed) if any(of))
    order = list(reversed(range(lowest, len(layers))))
    of_layer = lambda t, n: None if t is None else t[n:n + 1]
    chunks, dys = [], []
    for n in order:
        w, r, b = layers[n]
        wants = [needs[0] if n == 0 else n > lowest, *needed[n], *needs[1:3]]
        chunks.append(op.sequence.backward_chunks(dy, *(of_layer(g, n) for g in state_gradients), xs[n], w, r, b,
                                                h0[n:n + 1], c0[n:n + 1], None, ys[n], kept[n], None, plan, wants))
        dys.append(dy)
        dy = next(chunks[-1])
    count = -(-T // K)

    def drop(i, k):
        if i and keep[order[i - 1]] is not None:
            now = slice((count - 1 - k) * K, (count - k) * K)
            dys[i][now].mul_(keep[order[i - 1]][now]).mul_(scale)

    with op.without_autocast(x), explained():
        run_diagonals(chunks, count, drop, x.device)
        results = dict(zip(order, map(op.sequence.finish, chunks)))
    states = [torch.cat([results[n][which] for n in range(len(layers))]) if needs[which - 3] else None
              for which in (4, 5)]
    of_weights = [g for n in range(len(layers)) for g in (results[n][1:4] if n in results else (None,) * 3)]
    return results[0][0] if needs[0] else None, *states, *of_weights


def _differentiably(plan, keep, scale, needs, gradients, inputs):
    """``_backward`` in operators that can be differentiated and mapped over. It runs layer by layer, and computes
    forward again from the inputs."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # aliases: one input may have been computed from another
        inputs = [t.view_as(t) if need else t for t, need in zip(inputs, needs)]
        x, h0, c0, *weights = inputs
        h_n, c_n = [], []
        for n, (w, r, b) in enumerate(_by_layer(weights)):
            if keep[n] is not None:
                x = x * keep[n] * scale
            x, (h, c) = lstm(x, w, r, b, (h0[n:n + 1], c0[n:n + 1]), plan=plan)
            h_n.append(h)
            c_n.append(c)
        outputs = x, torch.cat(h_n), torch.cat(c_n)
    outputs, gradients = zip(*((t, g) for t, g in zip(outputs, gradients) if g is not None))
    found = iter(torch.autograd.grad(outputs, [t for t, need in zip(inputs, needs) if need], gradients,
                                     create_graph=create_graph, allow_unused=True))
    return [next(found) if need else None for need in needs]


class _Wavefront(torch.autograd.Function):
    """``_forward`` with gradients. Takes the arguments of ``_forward`` except ``save``."""

    @staticmethod
    def forward(ctx, plan, dropout, *inputs):
        outputs, saved = _forward(plan, dropout, True, *inputs)
        ctx.plan, ctx.scale = plan, _scale(inputs[0], dropout)
        ctx.save_for_backward(*inputs, *(t for of in saved for t in of))
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx, *gradients):
        needs = ctx.needs_input_grad[2:]
        if all(g is None for g in gradients):
            return (None,) * (2 + len(needs))
        tensors = ctx.saved_tensors         # once: checkpoints give them only once
        inputs, rest = tensors[:len(needs)], tensors[len(needs):]
        layers = len(rest) // 4
        saved = [rest[n:n + layers] for n in range(0, len(rest), layers)]
        mapped = any(g is not None and op.is_legacy_batchedtensor(g) for g in gradients)
        if torch.is_grad_enabled() or op.transformed() or mapped:
            return None, None, *_differentiably(ctx.plan, saved[3], ctx.scale, needs, gradients, inputs)
        return None, None, *_backward(ctx.plan, ctx.scale, needs, gradients, inputs, saved)
