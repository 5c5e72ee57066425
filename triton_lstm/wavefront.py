"""Layers as a wavefront: each layer runs over a chunk of steps as soon as the layer before has finished that chunk."""
import functools
import math

import torch

from . import op
from .kernels.streams import run_diagonals
from .kernels.waiting import explained
from .plan import step_cycles

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


@functools.lru_cache
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


def plan_of_all(plan, automatic, T, layers, dtype, device):
    """(plan, steps of a chunk of forward) by which ``layers`` layers run over T steps as a wavefront, or (plan, None)
    where they run one after the other. There are no lengths, resets or packed rows. automatic: whether ``plan`` is not
    the caller's own."""
    limits = op.limits_of(device)
    if why_not(plan, T, layers, limits) is not None:
        return plan, None
    steps = chunk_steps(T, plan, limits)
    if automatic:           # in backward layers overlap only if each goes over several chunks
        plan = op.on_device(plan.batch, plan.hidden_size, dtype, 1, device, min(plan.keep_every, steps))[0] or plan
    return plan, steps


def forward(plan, x, arguments, options, dropout, steps):
    """(what ``dropout`` returns for the input of each layer, the results of each layer).

    arguments, options    of ``sequence.forward_chunks``, for each layer after x, and for all layers
    steps                 of a chunk
    """
    T, chunks, dropped, ys = len(x), [], [], []
    steps = min(steps, plan.forward_steps(T, x.element_size()))
    for n, of_layer in enumerate(arguments):
        drops = n > 0 and dropout.rate > 0
        dropped.append((x.new_empty(x.shape), dropout.mask(x)) if drops else (None, None))
        chunks.append(op.sequence.forward_chunks(dropped[n][0] if drops else x, *of_layer, **options, steps=steps))
        x = next(chunks[n])
        ys.append(x)

    def drop(n, k):
        made, mask = dropped[n]
        if made is not None:
            now = slice(k * steps, (k + 1) * steps)
            torch.mul(ys[n - 1][now], mask[now], out=made[now]).mul_(dropout.scale)

    with explained():
        run_diagonals(chunks, -(-T // steps), drop, x.device)
        return dropped, [op.sequence.finish(of_layer) for of_layer in chunks]


def backward(plan, x, dy, needs_dx, arguments, options, masks, dropout):
    """(dx, or None; the other gradients of each layer).

    arguments, options    of ``sequence.backward_chunks``, for each layer after dy, and for all layers
    masks                 of ``dropout`` of the input of each layer, or None
    """
    chunks, dys, T, K = [], [], len(x), plan.keep_every
    for n, (dh, dc, x, *of_layer) in reversed(list(enumerate(arguments))):
        dx = x.new_empty(x.shape) if n or needs_dx else None
        chunks.append(op.sequence.backward_chunks(dy, dh, dc, x, *of_layer, **options, dx=dx))
        dys.append(dy)
        dy = dx
        next(chunks[-1])
    count, masks = -(-T // K), masks[::-1]

    def drop(n, k):
        if n and masks[n - 1] is not None:
            now = slice((count - 1 - k) * K, (count - k) * K)
            dys[n][now].mul_(masks[n - 1][now]).mul_(dropout.scale)

    with explained():
        run_diagonals(chunks, count, drop, x.device)
        return dy, [op.sequence.finish(of_layer)[1:] for of_layer in reversed(chunks)]
