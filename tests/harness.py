"""Three ways to run the kernels with no GPU, each a context manager under which ``triton_lstm`` takes CPU tensors.

interpreter    Triton's interpreter, programs one after the other: the mathematics
interleaved    the same, programs switching at random at loads, stores and atomics: the protocol
emulator       the PTX that the compiler made, in ``ptx_emulator``: the compiled kernel and its synchronisation
"""
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
from triton_lstm.plan import A100, H200, RTX_4090

LIMITS = {80: A100, 89: RTX_4090, 90: H200}
TRITON = tuple(map(int, triton.__version__.split(".")[:2]))


@contextlib.contextmanager
def interpreting():
    """Triton's switch for the interpreter, which is an environment variable too, on and back to what it was."""
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        yield


def _load_kernels(name, folder):
    """``sequence`` of another copy of the kernels, imported from ``folder`` as the package ``name``."""
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        del sys.modules[module]
    package = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader=None, is_package=True))
    package.__path__ = [folder]
    sys.modules[name] = package
    return importlib.import_module(name + ".sequence")


# triton.jit decides at import whether a function is compiled or interpreted
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
    """``ReduceOps.generic_reduce`` of a whole block by halves, which spares a call for each element."""
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
    """``InterpretedFunction.__call__`` but for the patches of the language, which the launch has made already."""
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as e:
        raise triton_interpreter.InterpreterError(repr(e)) from e


def _once(function):
    """``function`` of a type, called once for each name of one."""
    known = {}

    def remembered(dtype):
        name = str(dtype)
        if name not in known:
            known[name] = function(dtype)
        return known[name]
    return remembered


def _init_once(cls, key, own=()):
    """``cls.__init__`` that works out the attributes once for each ``key`` of its arguments; ``own`` are the arguments
    themselves."""
    init, known = cls.__init__, {}

    def remembered(self, *args):
        name = key(*args)
        if name not in known:
            init(self, *args)
            known[name] = {k: v for k, v in vars(self).items() if k not in own}
        vars(self).update(known[name])
        vars(self).update(zip(own, args))
    return remembered


# The interpreter spends most of its time on types, on reductions and on patches of the language, again and again.
FASTER = (
    (triton_interpreter.ReduceOps, "generic_reduce", _reduce(triton_interpreter.ReduceOps.generic_reduce)),
    (triton_interpreter.InterpretedFunction, "__call__", _call),
    (triton_interpreter, "_get_np_dtype", _once(triton_interpreter._get_np_dtype)),
    (tl.block_type, "__init__", _init_once(
        tl.block_type, lambda element, shape: (str(element), *(getattr(n, "value", n) for n in shape)))),
    (tl.tensor, "__init__", _init_once(tl.tensor, lambda handle, dtype: str(dtype), ("handle", "type"))),
    # the assertions of overflow, in int64, are off without ``debug``, but what they assert is computed
    (triton_interpreter.interpreter_builder, "options",
     dataclasses.replace(triton_interpreter.interpreter_builder.options, sanitize_overflow=False)))


@contextlib.contextmanager
def interpreter():
    if TRITON < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("the interpreter of Triton 3.6 needs numpy < 2.4")
    # exp overflows on purpose, and numpy, unlike a GPU, remarks on it
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
    """``interpreter`` with a launch's programs as greenlets that switch around every memory access.

    The next program is drawn from ``seed``. Raises Stuck when no program stored or added anything over ``patience``
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

    def adds(args, kwargs):          # create_atomic_rmw(op, ptr, value, mask, ...): adding zero is a load
        return bool((args[2].data != 0).any())

    def run(real, executor, *args, **kwargs):
        programs = []
        body = executor.fn

        def collect(**kw):          # called once a program; the last call runs them all
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
    """The compiled kernels in the PTX emulator. ``edit`` may change the PTX text of the kernels named in ``only``.

    Further options as in ``ptx_emulator.run``."""
    def launch(kernel, plan, grid, *args, waits, **constants):
        compiled, run_time = compile_launch(kernel, plan, args, waits, constants, arch)
        changed = dict(ptx=edit(compiled.asm["ptx"])) if edit is not None and kernel.__name__ in only else {}
        emulate(compiled, grid, *run_time, seed=seed, memory=memory, **changed, **options)

    with _use(compiled_sequence), mock.patch.object(compiled_launch, "launch_kernel", launch), \
            mock.patch.object(triton_lstm.functional, "runs_kernels", lambda x, dtype: True), \
            mock.patch.object(triton_lstm.op, "limits_of", lambda device: LIMITS.get(arch, PORTABLE)):
        yield


@contextlib.contextmanager
def edited(module, tmp_path, old, new):
    """All kernels compiled from a copy of their sources in which ``old`` is replaced in ``module``, the name of one."""
    folder = tmp_path / "edited_kernels"
    shutil.copytree(kernels.__path__[0], folder)
    text = (folder / f"{module}.py").read_text()
    assert old in text
    (folder / f"{module}.py").write_text(text.replace(old, new))
    changed = _load_kernels("edited_kernels", str(folder)).launch
    names = ("LOOPS", "COEFFICIENTS", "forward_cluster")
    with mock.patch.multiple(compiled_launch, **{name: getattr(changed, name) for name in names}):
        yield


def caught(problem, plan, seeds=4, **options):
    """Whether a run in the emulator under one of a few seeds raises or gives a wrong number."""
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


def assert_drawn(path):
    """The picture has dark marks on white, not only a frame."""
    from matplotlib.image import imread
    picture = imread(path)[..., :3].mean(-1)
    assert picture.max() == 1 and 0.01 < (picture < 0.5).mean() < 0.5
