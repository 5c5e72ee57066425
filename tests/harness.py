"""Three ways to run the kernels without a GPU, each a context manager under which ``triton_lstm`` takes CPU tensors.

interpreter    Triton's interpreter, which runs programs one after the other. Tests the mathematics
interleaved    the same, but programs switch at random at loads, stores and atomics. Tests how programs wait for each
               other
emulator       runs the PTX that the compiler made in ``ptx_emulator``. Tests the compiled kernel and its
               synchronisation
"""
import collections
import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import random
import shutil
import sys
from unittest import mock

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as triton_interpreter
from triton_lstm.kernels.offline import compile_launch

import triton_lstm.functional
import triton_lstm.op
from problems import PORTABLE, error
from ptx_emulator import EmulatorError
from ptx_emulator import launch as emulate
from triton_lstm import kernels
from triton_lstm.kernels import launch as compiled_launch
from triton_lstm.kernels import sequence as compiled_sequence
from triton_lstm.plan import A100, B200, H200, RTX_3090, RTX_4090, RTX_5090
from triton_lstm.plan.limits import runs

LIMITS = {80: A100, 86: RTX_3090, 89: RTX_4090, 90: H200, 100: B200, 120: RTX_5090}
ARCH = None         # the option --arch: what the emulator compiles for, whatever the tests ask for
TRITON = tuple(map(int, triton.__version__.split(".")[:2]))


@contextlib.contextmanager
def interpreting():
    """Turns Triton's switch for the interpreter on, and afterwards back to what it was."""
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        yield


def _load_kernels(name, folder):
    """The module ``sequence`` of another copy of the kernels, imported from ``folder`` as the package ``name``."""
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        del sys.modules[module]
    package = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader=None, is_package=True))
    package.__path__ = [folder]
    sys.modules[name] = package
    return importlib.import_module(name + ".sequence")


# triton.jit decides when a function is imported whether it is compiled or interpreted.
with interpreting():
    interpreted_sequence = _load_kernels("interpreted_kernels", kernels.__path__[0])
interpreted_launch = interpreted_sequence.launch


@contextlib.contextmanager
def _use(sequence):
    triton_lstm.op.limits_of.cache_clear()
    with mock.patch.object(triton_lstm.op, "sequence", sequence):
        yield
    triton_lstm.op.limits_of.cache_clear()


def _reduce(element_by_element):
    """A faster ``ReduceOps.generic_reduce``: combines halves of a whole block, instead of one element at a time."""
    def reduce(self, inputs):
        if self.axis is not None or self.keep_dims or len(inputs) != 1:
            return element_by_element(self, inputs)
        block, = inputs
        data = block.handle.data.reshape(-1)
        while len(data) > 1:        # a power of two
            halves = [self.to_tensor(half, block.dtype) for half in np.split(data, 2)]
            data = self.combine_fn.fn(*halves).handle.data
        return [self.to_tensor(data.item(), block.dtype)]
    return reduce


def _call(self, *args, **kwargs):
    """A faster ``InterpretedFunction.__call__``: it does not patch ``triton.language`` again after the launch has."""
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as e:
        raise triton_interpreter.InterpreterError(repr(e)) from e


def _once(function):
    """``function`` of a type, called only once for each type."""
    known = {}

    def remembered(dtype):
        name = str(dtype)
        if name not in known:
            known[name] = function(dtype)
        return known[name]
    return remembered


def _init_once(cls, key, own=()):
    """A faster ``cls.__init__``: it computes attributes only once for each ``key`` of its arguments. The attributes
    named in ``own`` are the arguments themselves."""
    init, known = cls.__init__, {}

    def remembered(self, *args):
        name = key(*args)
        if name not in known:
            init(self, *args)
            known[name] = {k: v for k, v in vars(self).items() if k not in own}
        vars(self).update(known[name])
        vars(self).update(zip(own, args))
    return remembered


# Replacements for what takes the interpreter most time: types, reductions, and patching ``triton.language``.
FASTER = (
    (triton_interpreter.ReduceOps, "generic_reduce", _reduce(triton_interpreter.ReduceOps.generic_reduce)),
    (triton_interpreter.InterpretedFunction, "__call__", _call),
    (triton_interpreter, "_get_np_dtype", _once(triton_interpreter._get_np_dtype)),
    (tl.block_type, "__init__", _init_once(
        tl.block_type, lambda element, shape: (str(element), *(getattr(n, "value", n) for n in shape)))),
    (tl.tensor, "__init__", _init_once(tl.tensor, lambda handle, dtype: str(dtype), ("handle", "type"))),
    # Assertions of overflow are off unless ``debug`` is set, but the interpreter computes their conditions, in int64.
    (triton_interpreter.interpreter_builder, "options",
     dataclasses.replace(triton_interpreter.interpreter_builder.options, sanitize_overflow=False)))


@contextlib.contextmanager
def interpreter():
    if TRITON < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("the interpreter of Triton 3.6 needs numpy < 2.4")
    # exp overflows on purpose. numpy would warn of it, unlike a GPU.
    with contextlib.ExitStack() as stack:
        for owner, name, faster in FASTER:
            stack.enter_context(mock.patch.object(owner, name, faster))
        stack.enter_context(_use(interpreted_sequence))
        stack.enter_context(interpreting())
        stack.enter_context(np.errstate(over="ignore", invalid="ignore"))
        yield


class Stuck(AssertionError):
    """No program can make progress."""


@contextlib.contextmanager
def interleaved(seed, patience=3000):
    """``interpreter`` in which the programs of a launch are greenlets, which switch before and after each memory
    access.

    ``seed`` decides which program is next. Raises Stuck if no program stores or adds anything during ``patience``
    switches for each program.
    """
    greenlet = pytest.importorskip("greenlet")
    rng = random.Random(seed)
    builder = triton_interpreter.interpreter_builder
    state = {"driver": None, "idle": 0}

    def switching(real, progress):
        def access(*args, **kwargs):
            driver = state["driver"]
            if driver is None:
                return real(*args, **kwargs)
            driver.switch()
            result = real(*args, **kwargs)
            if progress(args, kwargs):
                state["idle"] = 0
            driver.switch()
            return result
        return access

    def adds(args, kwargs):          # of create_atomic_rmw(op, ptr, value, mask, ...); adding zero only loads
        return bool((args[2].data != 0).any())

    def run(real, executor, *args, **kwargs):
        programs = []
        body = executor.fn

        def collect(**kw):          # called once for each program; the last call runs them all
            programs.append((tuple(builder.grid_idx), kw))
            if len(programs) < builder.grid_dim[0] * builder.grid_dim[1] * builder.grid_dim[2]:
                return
            state["driver"] = greenlet.getcurrent()
            alive = [(greenlet.greenlet(lambda kw=kw: body(**kw)), index) for index, kw in programs]
            state["idle"] = 0
            while alive:
                state["idle"] += 1
                if state["idle"] > patience * len(alive):
                    raise Stuck(f"{len(alive)} of {len(programs)} programs wait for ever")
                which = rng.randrange(len(alive))
                program, index = alive[which]
                builder.set_grid_idx(*index)
                program.switch()
                if program.dead:
                    alive.pop(which)
            state["driver"] = None

        collect.__annotations__ = body.__annotations__          # tells the executor which arguments are constexpr
        seen = lambda fn: body if fn is collect else fn
        spec, callargs, patch = inspect.getfullargspec, inspect.getcallargs, triton_interpreter._patch_lang
        executor.fn = collect
        with mock.patch.object(inspect, "getfullargspec", lambda fn: spec(seen(fn))), \
                mock.patch.object(inspect, "getcallargs", lambda fn, *a, **kw: callargs(seen(fn), *a, **kw)), \
                mock.patch.object(triton_interpreter, "_patch_lang", lambda fn: patch(seen(fn))):
            try:
                return real(executor, *args, **kwargs)
            finally:
                state["driver"] = None

    call = triton_interpreter.GridExecutor.__call__
    with interpreter(), mock.patch.object(interpreted_launch, "interleaved", True), \
            mock.patch.object(triton_interpreter.GridExecutor, "__call__",
                              lambda self, *a, **kw: run(call, self, *a, **kw)), \
            mock.patch.object(builder, "create_atomic_rmw", switching(builder.create_atomic_rmw, adds)), \
            mock.patch.object(builder, "create_masked_load", switching(builder.create_masked_load, lambda *a: False)), \
            mock.patch.object(builder, "create_masked_store", switching(builder.create_masked_store, lambda *a: True)):
        yield


@contextlib.contextmanager
def emulator(arch=90, seed=0, memory="sc", edit=None, only=None, **options):
    """Runs the compiled kernels in the PTX emulator. ``edit`` is a function that changes the PTX of the kernels named
    in ``only``. Further options are those of ``ptx_emulator.run``."""
    arch = ARCH or arch

    def launch(kernel, plan, grid, *args, waits, **constants):
        if ARCH and plan.kind in ("cluster", "wgmma") and not runs(plan.kind, divmod(ARCH, 10)):
            pytest.skip(f"no {plan.kind} kernels on sm_{ARCH}")
        compiled, run_time = compile_launch(kernel, plan, args, waits, constants, arch)
        changed = dict(ptx=edit(compiled.asm["ptx"])) if edit is not None and kernel.__name__ in only else {}
        emulate(compiled, grid, *run_time, seed=seed, memory=memory, **changed, **options)

    # Tests make plans for an H200. The emulator has room for these with --arch too.
    limits = H200 if ARCH else LIMITS.get(arch, PORTABLE)
    with _use(compiled_sequence), mock.patch.object(compiled_launch, "launch_kernel", launch), \
            mock.patch.object(triton_lstm.functional, "runs_kernels", lambda x, dtype: True), \
            mock.patch.object(triton_lstm.op, "limits_of", lambda device: limits):
        yield


@contextlib.contextmanager
def edited(module, tmp_path, old, new):
    """Compiles all kernels from a copy of their sources, in which ``old`` is replaced by ``new`` in the file of
    ``module``."""
    folder = tmp_path / "edited_kernels"
    shutil.copytree(kernels.__path__[0], folder)
    text = (folder / f"{module}.py").read_text()
    assert old in text
    (folder / f"{module}.py").write_text(text.replace(old, new))
    changed = _load_kernels("edited_kernels", str(folder)).launch
    names = ("LOOPS", "COEFFICIENTS", "PREVIOUS", "STATES", "FLAGS", "STEP", "forward_cluster")
    with mock.patch.multiple(compiled_launch, **{name: getattr(changed, name) for name in names}):
        _forget_launches()
        yield
    _forget_launches()


def _forget_launches(sequence=compiled_sequence):
    """Launches keep their kernels. The next ones are made anew."""
    for made in vars(sequence).values():
        if hasattr(made, "cache_clear"):
            made.cache_clear()


def caught(problem, plan, seeds=4, **options):
    """Whether a run in the emulator raises or gives a wrong result under at least one of ``seeds`` seeds."""
    exact = problem.exact()
    for seed in range(seeds):
        try:
            with emulator(seed=seed, **options):
                results = problem.ours(plan=plan)
        except EmulatorError:
            return True
        if any(not error(results[name], exact[name]) < 0.03 for name in exact):
            return True
    return False


@contextlib.contextmanager
def places():
    """Yields {(name of an interpreted kernel, name of an argument): where that tensor was in each launch}. All tensors
    are kept, so that no other gets their place."""
    found, kept, real = collections.defaultdict(list), [], interpreted_launch.launch_kernel

    def launch_kernel(kernel, plan, grid, *args, **constants):
        for name, tensor in zip(kernel.arg_names, args):
            if isinstance(tensor, torch.Tensor):
                kept.append(tensor)
                found[kernel.__name__, name].append(tensor.data_ptr())
        return real(kernel, plan, grid, *args, **constants)

    with mock.patch.object(interpreted_launch, "launch_kernel", launch_kernel):
        yield found


def assert_drawn(path):
    """The picture is white with enough dark pixels for more than a frame."""
    from matplotlib.image import imread
    picture = imread(path)[..., :3].mean(-1)
    assert picture.max() == 1 and 0.01 < (picture < 0.5).mean() < 0.5
