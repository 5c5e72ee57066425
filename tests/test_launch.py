"""Everything that a launch on a GPU does before the kernel is launched."""
import contextlib
from unittest import mock

import pytest
import torch
import triton

import triton_lstm
from problems import PORTABLE
from triton_lstm.kernels import offline, sequence
from triton_lstm.plan import H200


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
    (100, "cluster", torch.float32, H200)], ids=str)
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
        y, h, c, kept = sequence.forward(x, w, r, b, state, state, None, plan, True)
        sequence.backward(y, h, c, x, w, r, b, state, state, None, y, kept, plan, [True] * 6)
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
        elif name != "coefficients":
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
