"""Compiles kernels for an architecture without a GPU. Tests and benchmark read machine code from what it returns."""
import concurrent.futures
import contextlib
import multiprocessing
import os

import torch

from . import launch, sequence
from .language import GPUTarget, driver


class _Names:
    """The part of a driver that Triton uses before a launch. The device's number is that of the architecture, because
    Triton remembers kernels by device."""

    def __init__(self, arch):
        self._arch = arch

    def get_current_target(self):
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self):
        return self._arch

    def get_current_stream(self, device):
        return 0


@contextlib.contextmanager
def no_gpu(arch):
    """Triton compiles for ``arch``, such as 80, 90 or 100, on any device. This switches the whole process."""
    try:
        before = driver.active
    except RuntimeError:            # there is none
        before = None
    driver.set_active(_Names(arch))
    try:
        yield
    finally:
        driver.set_active(before)


def compile_launch(kernel, plan, args, waits, constants, arch):
    """The compiled kernel that a launch with these arguments would use, and the arguments that remain at run time."""
    constants = {**constants, "H": plan.hidden_size, "DIRECTIONS": plan.directions}
    with no_gpu(arch):
        compiled = kernel.warmup(*args, grid=(1,), **constants, **launch.options(kernel, plan, waits, constants))
    values = {**dict(zip(kernel.arg_names, args)), **constants}
    return compiled, [values[name] for name, kind in compiled.src.signature.items() if kind != "constexpr"]


def compile_plan(plan, dtype, arch=90, flagged=False, packed=False, zoneout=None, inputs=64, keep_gates=False,
                 bias=True):
    """The kernels that a layer of ``plan`` launches in ``dtype``, compiled: {name: what triton.compile returns}.

    flagged: those for lengths or resets; packed: those for packed sequences; zoneout: those for zoneout, "drawn" or
    "expected". inputs: features of x. keep_gates: those of a forward pass that keeps the gates for backward.
    bias: whether the layer has one.
    """
    found = {}
    collect = _collector(found, arch)
    D, B, H = plan.directions, plan.batch, plan.hidden_size
    tensor = lambda *shape, dtype=dtype: torch.empty(shape, dtype=dtype, device="meta")
    x, w, r = tensor(2, B, inputs), tensor(D, 4 * H, inputs), tensor(D, 4 * H, H)
    b, state = tensor(D, 4 * H) if bias else None, tensor(D, B, H)
    flags = tensor(D, 2, B, dtype=torch.uint8) if flagged or packed else None
    batch_sizes = torch.tensor([B, B]) if packed else None
    x = x.flatten(0, 1) if packed else x
    # lengths, rows of each time and resets, from which flags are written
    sources = [(None, tensor(2, dtype=torch.int64), None)] if packed else [
        (tensor(B, dtype=torch.int64), None, None), (None, None, tensor(2, B, dtype=torch.bool))] if flagged else []
    for lengths, sizes, reset in sources:
        sequence.step_flags(2, B, D, lengths, sizes, reset, "meta", collect)
    seed = torch.empty(1, dtype=torch.int64, device="meta") if zoneout == "drawn" else None
    more = batch_sizes, zoneout and (seed, 0.1, 0.1), collect
    y, h_n, c_n, *kept = sequence.forward(x, w, r, b, state, state, flags, plan, True, *more, keep_gates=keep_gates)
    needs = [True, True, True, bias, True, True]
    sequence.backward(y, h_n, c_n, x, w, r, b, state, state, flags, y, *kept, plan, needs, *more)
    return found


def compile_step(step, dtype, arch=90, bias=True):
    """``compile_plan`` for one step (T = 1) without gradients of a layer, with and without a state. step:
    ``launch.Step``."""
    found = {}
    D, B, H = step.directions, step.block_b, step.hidden_size
    tensor = lambda *shape: torch.empty(shape, dtype=dtype, device="meta")
    weights = (tensor(4 * H, step.inputs), tensor(4 * H, H), *([tensor(4 * H)] * 2 if bias else [None] * 2))
    for state in (None, tensor(D, B, H)):
        sequence.one_step(tensor(B, step.inputs), [weights] * D, state, state, (D, B, H), D, step.precision,
                          launcher=_collector(found, arch))
    return found


def _collector(found, arch):
    """A launcher that compiles for ``arch`` and launches nothing. found: {name: compiled kernel}, to which it adds."""
    def collect(kernel, plan, grid, *args, waits, **constants):
        found[kernel.__name__] = compile_launch(kernel, plan, args, waits, constants, arch)[0]
    return collect


def _compile(plan, dtype, arch, options):
    (compile_step if isinstance(plan, launch.Step) else compile_plan)(plan, dtype, arch, **options)


def compile_apart(jobs, arch, seconds=None):
    """Compile ``jobs`` into Triton's cache, where launches find them, in processes on all cores that touch no GPU.

    A job is (plan, dtype, options of ``compile_plan``), or a ``Step`` with options of ``compile_step``. Yields (job,
    exception or None) as each is done. Jobs that are not done after ``seconds`` are given up.
    """
    pool = concurrent.futures.ProcessPoolExecutor(min(os.cpu_count(), max(len(jobs), 1)),
                                                  multiprocessing.get_context("spawn"))
    try:
        futures = {pool.submit(_compile, plan, dtype, arch, options): (plan, dtype, options)
                   for plan, dtype, options in jobs}
        for future in concurrent.futures.as_completed(futures, timeout=seconds):
            yield futures[future], future.exception()
    except concurrent.futures.TimeoutError:
        for process in list(pool._processes.values()):
            process.kill()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
