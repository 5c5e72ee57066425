"""The mathematics of the portable kernels, in Triton's interpreter: results and every gradient against float64."""
import dataclasses

import pytest
import torch

import harness
import triton_lstm
from problems import Problem
from triton_lstm.reference import lstm_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [  # T, B, I, H, D
    (1, 1, 1, 1, 1), (1, 3, 4, 5, 2), (3, 17, 1, 1, 2), (7, 3, 5, 5, 1), (4, 17, 6, 33, 1), (5, 3, 6, 33, 2),
    (3, 3, 9, 100, 1), (2, 17, 4, 100, 2), (2, 1, 3, 160, 1),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_resident(shape, dtype):
    problem = Problem(*shape, dtype=dtype)
    with harness.interpreter():
        problem.check(problem.ours(keep_every=3))


@pytest.mark.parametrize("shape", [(4, 3, 5, 33, 2), (3, 17, 4, 100, 1)], ids=str)
def test_tf32(shape):
    problem = Problem(*shape, tf32=True)
    with harness.interpreter():
        problem.check(problem.ours(plan=problem.plan(limits=None, keep_every=2)))


@pytest.mark.parametrize("keep_every", [1, 2, 5, 6, 64])
def test_chunks_of_steps(keep_every):
    problem = Problem(6, 3, 4, 10, D=2)
    with harness.interpreter():
        problem.check(problem.ours(keep_every=keep_every))


def test_no_bias():
    problem = Problem(4, 3, 5, 20, D=2, bias=False)
    with harness.interpreter():
        problem.check(problem.ours())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, schedule", [
    ((3, 3, 4, 33, 2), "grid"), ((2, 17, 3, 100, 1), "grid"), ((4, 3, 2, 5, 1), "grid"), ((3, 1, 1, 1, 2), "grid"),
    ((3, 3, 4, 33, 2), "streamed"), ((2, 17, 3, 100, 1), "streamed"), ((1, 1, 2, 100, 1), "streamed")], ids=str)
def test_shared(shape, schedule, dtype):
    problem = Problem(*shape, dtype=dtype)
    with harness.interleaved(seed=1):
        problem.check(problem.ours(plan=problem.shared_plan(schedule)))


@pytest.mark.parametrize("schedule", ["grid", "streamed"])
def test_shared_tf32(schedule):
    problem = Problem(3, 3, 4, 40, D=2, tf32=True)
    with harness.interleaved(seed=1):
        problem.check(problem.ours(plan=problem.shared_plan(schedule)))


FLAGGED = [dict(ragged=True), dict(resets=True), dict(ragged=True, resets=True)]
FLAGGED_SHAPES = [(1, 1, 2, 5, 2), (5, 3, 4, 10, 1), (7, 17, 3, 5, 2), (6, 4, 2, 33, 2), (9, 5, 3, 1, 2),
                  (4, 3, 2, 100, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("flagged", FLAGGED, ids=" ".join)
@pytest.mark.parametrize("shape", FLAGGED_SHAPES, ids=str)
def test_lengths_and_resets(shape, flagged, dtype):
    """In chunks of three steps, which may begin or end between resets, or after the end of a row."""
    problem = Problem(*shape, dtype=dtype, **flagged)
    with harness.interpreter():
        problem.check(problem.ours(keep_every=3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("flagged", FLAGGED, ids=" ".join)
@pytest.mark.parametrize("shape, schedule", [((5, 3, 4, 10, 2), "grid"), ((4, 17, 3, 33, 1), "grid"),
                                             ((6, 4, 2, 20, 2), "streamed")], ids=str)
def test_shared_lengths_and_resets(shape, schedule, flagged, dtype):
    problem = Problem(*shape, dtype=dtype, **flagged)
    with harness.interleaved(seed=2):
        problem.check(problem.ours(plan=problem.shared_plan(schedule)))


def test_lengths_and_resets_in_tf32_in_pieces_of_forward(monkeypatch):
    monkeypatch.setattr("triton_lstm.plan.plan.FORWARD_BYTES", 1)
    problem = Problem(7, 4, 3, 20, 2, tf32=True, ragged=True, resets=True)
    with harness.interleaved(seed=3):
        problem.check(problem.ours(plan=problem.shared_plan("grid")))
        problem.check(problem.ours(plan=problem.plan(limits=None, keep_every=2)))


def test_several_tiles_a_group():
    problem = Problem(3, 50, 4, 20)
    plan = dataclasses.replace(problem.shared_plan("grid"), programs=2, block_h=16, groups=2, tiles=2)
    with harness.interleaved(seed=1):
        problem.check(problem.ours(plan=plan))


def wide(problem, schedule):
    """Four tiles of 32 rows in two groups. Of the 70 rows of the batch the third tile has 6 and the fourth none."""
    plan = problem.shared_plan(schedule)
    return dataclasses.replace(plan, groups=2, tiles=2, block_b=32)


@pytest.mark.parametrize("schedule, dtype", [*(("grid", dtype) for dtype in DTYPES), ("streamed", torch.float32),
                                             ("streamed", torch.bfloat16)], ids=str)
@pytest.mark.parametrize("flagged", [{}, dict(ragged=True, resets=True)], ids=" ".join)
def test_tiles_of_32_rows(schedule, flagged, dtype):
    problem = Problem(3, 70, 4, 20, 2, dtype=dtype, **flagged)
    with harness.interleaved(seed=5):
        problem.check(problem.ours(plan=wide(problem, schedule)))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_tiles_of_32_rows_emulated(dtype, arch):
    problem = Problem(3, 70, 4, 33, dtype=dtype, tf32=dtype == torch.float32)
    with harness.emulator(arch, seed=5, memory="weak"):
        problem.check(problem.ours(plan=wide(problem, "grid")))


def test_forward_in_pieces(monkeypatch):
    """If the pre-activations of a sequence take more than FORWARD_BYTES, forward runs as several launches."""
    monkeypatch.setattr("triton_lstm.plan.plan.FORWARD_BYTES", 1)
    problem = Problem(7, 3, 4, 10, D=2)
    with harness.interpreter():
        problem.check(problem.ours(keep_every=2))


def test_strided_and_expanded():
    problem = Problem(4, 3, 5, 10, D=2)

    def function(x, w, r, b, h0, c0):
        y, (h, c) = triton_lstm.lstm(x.transpose(0, 1).contiguous().transpose(0, 1), w.transpose(1, 2).contiguous()
                                     .transpose(1, 2), r, b, (h0, c0))
        return y, h, c
    with harness.interpreter():
        problem.check(problem.results(function))
        x = torch.randn(3, 1, 5).expand(3, 4, 5)
        w, r = torch.randn(1, 24, 5), torch.randn(1, 24, 6) / 3
        y, _ = triton_lstm.lstm(x, w, r)
        assert torch.equal(y[:, 0], y[:, 3])


@pytest.mark.parametrize("wanted", ["x", "w", "r", "b", "h0", "c0", "x c0"])
def test_only_wanted_gradients(wanted):
    """Each gradient is the same, whether it is computed alone or with all others."""
    problem = Problem(5, 3, 4, 10, D=2)
    inputs, (dy, _, dc) = problem.tensors()
    wanted = set(wanted.split())
    names = ("x", "w", "r", "b", "h0", "c0")
    with harness.interpreter():
        def gradients(wanted):
            leaves = {n: t.clone().requires_grad_(n in wanted) for n, t in zip(names, inputs)}
            x, w, r, b, h0, c0 = leaves.values()
            y, (h_n, c_n) = triton_lstm.lstm(x, w, r, b, (h0, c0), keep_every=2)
            torch.autograd.backward([y, c_n], [dy, dc])
            return {n: t.grad for n, t in leaves.items()}
        every, some = gradients(set(names)), gradients(wanted)
    for name in names:
        assert some[name] is None if name not in wanted else torch.equal(some[name], every[name]), name


@pytest.mark.parametrize("used", ["y", "h_n", "c_n"])
def test_gradient_through_one_output(used):
    problem = Problem(4, 3, 5, 10, D=2)

    def results(function, dtype):
        inputs = [t.to(dtype).requires_grad_() for t in problem.tensors()[0]]
        y, h_n, c_n = function(*inputs)
        dict(y=y, h_n=h_n, c_n=c_n)[used].square().sum().backward()
        return [t.grad for t in inputs]

    def ours(*inputs):
        y, (h, c) = triton_lstm.lstm(*inputs[:4], inputs[4:])
        return y, h, c
    right = results(lstm_reference, torch.float64)
    with harness.interpreter():
        for got, want in zip(results(ours, torch.float32), right):
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_expanded_gradient():
    """The gradient that y.sum() gives has strides of zero."""
    problem = Problem(4, 3, 5, 10)
    inputs = problem.tensors()[0]
    exact = [t.double().requires_grad_() for t in inputs]
    lstm_reference(*exact)[0].sum().backward()
    leaves = [t.clone().requires_grad_() for t in inputs]
    with harness.interpreter():
        triton_lstm.lstm(*leaves[:4], leaves[4:])[0].sum().backward()
    for got, want in zip(leaves, exact):
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_values(dtype):
    """Pre-activations from 1e-4 to 6e4 saturate as in torch. Infinities and NaN stay in their row."""
    x = torch.tensor([0., 1e-4, -1e-4, 30., -45., 1000., -6e4, 6e4, float("inf"), float("-inf"), float("nan")],
                     dtype=dtype)[None, :, None].expand(3, -1, -1).contiguous()
    H = 4
    generator = torch.Generator().manual_seed(1)
    w = torch.rand(1, 4 * H, 1, generator=generator).to(dtype) + 0.5
    r = (torch.rand(1, 4 * H, H, generator=generator) - 0.5).to(dtype)
    with harness.interpreter():
        y, (h_n, c_n) = triton_lstm.lstm(x, w, r)
    weights = [w[0], r[0]]
    zeros = x.new_zeros(1, x.shape[1], H)
    want = torch._VF.lstm(x.double(), (zeros.double(),) * 2, [t.double() for t in weights], False, 1, 0., False, False,
                          False)
    for got, right in zip((y, h_n, c_n), want):
        assert got.isfinite()[..., :8, :].all() and got[..., 10, :].isnan().all()
        torch.testing.assert_close(got.double(), right, rtol=0, atol=3 * torch.finfo(dtype).eps, equal_nan=True)
