"""Everything that a launch on a GPU does before the kernel is launched."""
import contextlib
import inspect
import os
import pathlib
import subprocess
import sys
from unittest import mock

import pytest
import torch
import triton
from triton_lstm.kernels.launch import BEFORE_LOOPS

import harness
import triton_lstm
from problems import PORTABLE
from triton_lstm.kernels import launch, offline, sequence
from triton_lstm.plan import H200

ROOT = pathlib.Path(__file__).parents[1]


@contextlib.contextmanager
def recorded(found):
    """Inside, ``kernel[grid](...)`` compiles the kernel and adds it and its grid to ``found``, but does not launch
    it."""
    def getitem(self, grid):
        def run(*args, **kwargs):
            found.append((self.warmup(*args, grid=grid, **kwargs), grid))
        return run

    with offline.no_gpu(90), mock.patch.object(triton.JITFunction, "__getitem__", getitem):
        yield


@pytest.mark.parametrize("inputs", [16, 64])        # the cluster kernels multiply 16 inputs in the time loop
@pytest.mark.parametrize("H, schedule, dtype, limits", [
    (32, "resident", torch.bfloat16, PORTABLE), (33, "resident", torch.float32, PORTABLE),
    (160, "grid", torch.float16, PORTABLE), (1056, "streamed", torch.bfloat16, PORTABLE),
    (32, "resident", torch.bfloat16, H200), (33, "resident", torch.float32, H200),
    (128, "resident", torch.float16, H200), (160, "cluster", torch.float16, H200),
    (100, "cluster", torch.float32, H200)], ids=lambda v: {PORTABLE: "plain Triton", H200: "H200"}.get(v, str(v)))
def test_launch_compiles_what_the_tests_compile(H, schedule, dtype, limits, inputs):
    """A launch compiles the same kernel as ``offline.compile_plan``, so it finds that in Triton's cache."""
    if schedule == "cluster" and limits.cluster < 2:
        pytest.skip("clusters need Triton 3.9")
    B, T, D = 32, 2, 2
    plan = triton_lstm.make_plan(B, H, dtype, D, schedule=schedule, tf32=True, limits=limits)
    tensor = lambda *shape: torch.empty(shape, dtype=dtype, device="meta")
    x, w, r = tensor(T, B, inputs), tensor(D, 4 * H, inputs), tensor(D, 4 * H, H)
    b, state = tensor(D, 4 * H), tensor(D, B, H)
    found = []
    with recorded(found):
        y, h, c, *kept = sequence.forward(x, w, r, b, state, state, None, plan, True)
        sequence.backward(y, h, c, x, w, r, b, state, state, None, y, *kept, plan, [True] * 6)
    expected = offline.compile_plan(plan, dtype, 90, inputs=inputs)
    assert [kernel.metadata.name for kernel, _ in found] == list(expected)
    for kernel, grid in found:
        other = expected[kernel.metadata.name]
        assert kernel.asm["ptx"] == other.asm["ptx"]
        assert kernel.hash == other.hash            # the key in Triton's cache
        name = kernel.metadata.name
        assert kernel.metadata.num_warps == (plan.forward_warps if name == "forward_cluster" else plan.num_warps)
        assert kernel.metadata.num_ctas == (plan.programs if name.endswith("_cluster") else 1)
        waits = name.endswith("_grid")
        assert kernel.metadata.launch_cooperative_grid == other.metadata.launch_cooperative_grid == waits
        if waits:
            assert grid == (plan.programs, plan.groups, D)
        elif name not in BEFORE_LOOPS:
            assert grid == (2, D)       # 32 rows in tiles of 16


def test_compiled_apart():
    """Jobs are compiled in other processes. Each comes back with its error or None; without time none is waited for."""
    plan = triton_lstm.make_plan(16, 32, torch.bfloat16, limits=PORTABLE)
    jobs = [(plan, torch.bfloat16, {}), (plan, torch.bfloat16, dict(nonsense=1))]
    errors = {str(options): error for (_, _, options), error in offline.compile_apart(jobs, 90)}
    assert errors.pop("{}") is None
    (error,) = errors.values()
    assert isinstance(error, TypeError) and "nonsense" in str(error)
    assert list(offline.compile_apart(jobs, 90, seconds=0.1)) == []


class Compiled:
    """Stands for what Triton returns of a launch; writes down how its own launcher is called."""
    function, packed_metadata = "function", "metadata"

    def __init__(self, calls):
        self.run = lambda *args: calls.append(args)


@contextlib.contextmanager
def written_down(first, later):
    """Adds to ``first`` what launches give Triton, in the order of the kernel's parameters, and to ``later`` what they
    give the launcher of a compiled kernel."""
    def getitem(self, grid):
        def run(*args, **kwargs):
            bound = inspect.signature(self.fn).bind(*args, **{
                name: value for name, value in kwargs.items() if name in self.arg_names})
            bound.apply_defaults()
            first.append([*bound.arguments.values()])
            return Compiled(later)
        return run

    driver = mock.Mock(get_current_device=lambda: 3, get_current_stream=lambda device: 10 * device)
    with mock.patch.object(triton.runtime.jit.KernelInterface, "__getitem__", getitem), \
            mock.patch.object(launch, "CompiledKernel", Compiled), mock.patch.object(launch, "_compiled", {}), \
            mock.patch.object(launch, "driver", mock.Mock(active=driver)):
        yield


def same(args, others):
    return len(args) == len(others) and all(
        a is b or not isinstance(a, torch.Tensor) and a == b for a, b in zip(args, others))


@pytest.mark.parametrize("H, limits", [(64, PORTABLE), (160, PORTABLE), (64, H200), (640, H200)], ids=str)
def test_later_launches_pass_what_the_first_one_passes(H, limits):
    """To the launcher of the compiled kernel, each argument in the order of the kernel's parameters. Another type,
    alignment or class of integers goes through Triton again."""
    plan = triton_lstm.make_plan(16, H, torch.float16, limits=limits)
    loop = launch.LOOPS[plan.kind, "forward"]
    first, later = [], []

    def call(tensors, T=5, **more):
        sizes = T, T, 16, 0, 64, *[plan.tiles] * plan.exchanges
        launch.launch_kernel(loop.kernel, plan, launch.grid_of(plan), *tensors, *sizes, waits=plan.exchanges,
                             flags_ptr=None, offsets_ptr=None, **loop.constants(plan), **more)

    tensors = [torch.zeros(32, dtype=torch.float16) for _ in range(6 + plan.exchanges)]
    with written_down(first, later):
        call(tensors)
        call(tensors)
        assert len(first) == len(later) == 1
        grid, (stream, function, metadata, *hooks), args = later[0][:3], later[0][3:9], later[0][9:]
        assert grid == (*launch.grid_of(plan), 1)[:3] and (stream, function, metadata) == (30, "function", "metadata")
        assert hooks == [None, None, None]
        assert same(args, first[0])
        others = [torch.zeros(32, dtype=torch.float16) for _ in tensors]
        call(others, T=7)
        assert len(first) == 1 and later[1][9] is others[0] and 7 in [a for a in later[1][9:] if isinstance(a, int)]
        for change in (others[0].bfloat16(), torch.zeros(33, dtype=torch.float16)[1:]):
            call([change, *others[1:]])
        call(others, T=16)
        call(others, T=1)
        assert len(first) == 5 and len(later) == 2
        with mock.patch.object(triton.knobs.runtime.launch_enter_hook, "calls", [lambda metadata: None]):
            call(others)
        assert len(first) == 6 and len(later) == 2


@pytest.mark.parametrize("H, limits", [(64, PORTABLE), (160, PORTABLE), (64, H200), (640, H200)], ids=str)
def test_launches_of_known_sizes(H, limits):
    """A ``Launch`` passes what it would pass through ``launch_kernel``, each time. What it remembers is for tensors of
    the same types and alignment, and for the current device."""
    plan = triton_lstm.make_plan(16, H, torch.float16, limits=limits)
    loop = launch.LOOPS[plan.kind, "forward"]
    sizes = 5, 5, 16, 0, 64, *[plan.tiles] * plan.exchanges
    tensor = lambda dtype=torch.float16: torch.zeros(32, dtype=dtype)
    tensors, flags, offsets = [tensor() for _ in range(6 + plan.exchanges)], tensor(torch.uint8), tensor(torch.int64)
    of = launch.Launch(loop.kernel, plan, launch.grid_of(plan), *sizes, waits=plan.exchanges, KEEP_GATES=True,
                       **loop.constants(plan))
    first, later, general, real = [], [], [], launch.launch_kernel

    def expected(tensors, *named):
        """What ``launch_kernel`` gives Triton at the first such launch."""
        first, later = [], []
        with written_down(first, later):
            real(loop.kernel, plan, launch.grid_of(plan), *tensors, *sizes, waits=plan.exchanges, flags_ptr=named[0],
                 offsets_ptr=named[1], KEEP_GATES=True, **loop.constants(plan))
        return first[0]

    with written_down(first, later), mock.patch.object(
            launch, "launch_kernel", lambda *args, **named: general.append(1) or real(*args, **named)):
        for n, named in enumerate([(None, None), (flags, None), (flags, offsets)], 1):
            of(None, tensors, named)
            others = [tensor() for _ in tensors]
            of(None, others, named)
            assert len(first) == len(general) == len(later) == n and same(first[-1], expected(tensors, *named))
            grid, (stream, function, metadata, *hooks), args = later[-1][:3], later[-1][3:9], later[-1][9:]
            assert same(args, expected(others, *named))
            assert grid == (*launch.grid_of(plan), 1)[:3] and hooks == [None, None, None]
            assert (stream, function, metadata) == (30, "function", "metadata")
        for change in (others[0].bfloat16(), torch.zeros(33, dtype=torch.float16)[1:]):
            of(None, [change, *others[1:]], (None, None))
        assert len(first) == len(general) == 5 and len(later) == 3
        with mock.patch.object(triton.knobs.runtime.launch_enter_hook, "calls", [lambda metadata: None]):
            of(None, others, (None, None))
        assert len(first) == len(general) == 6
        elsewhere = mock.Mock(wraps=others[0], get_device=lambda: 2, is_cuda=False, dtype=torch.float16)
        for _ in range(2):
            of(None, [elsewhere, *others[1:]], (None, None))
        assert len(general) == 8
        calls = []
        of(lambda *args, **named: calls.append((args, named)), others, (flags, None), rate_h=0.5)
        assert same(calls[0][0], [loop.kernel, plan, launch.grid_of(plan), *others, *sizes])
        assert calls[0][1] == dict(waits=plan.exchanges, flags_ptr=flags, offsets_ptr=None, KEEP_GATES=True, rate_h=0.5,
                                   **loop.constants(plan))


def test_eager_calls_import_no_compiler():
    """Forward and backward of plain tensors do without the custom operator, whose first call imports torch._dynamo."""
    program = """
import sys, torch, triton_lstm
layer, x = triton_lstm.LSTM(4, 5, 2, bidirectional=True), torch.randn(3, 2, 4, requires_grad=True)
layer(x, reset=torch.ones(3, 2, dtype=torch.bool))[0].sum().backward()
print(x.grad.shape, "torch._dynamo" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                            env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)})
    if harness.TRITON < (3, 7):
        pytest.skip("the interpreter of Triton 3.6 needs numpy < 2.4")
    assert result.stdout.strip() == "torch.Size([3, 2, 4]) False", result.stderr
