"""Second derivatives against float64: the formula by itself, the layer in a gradient penalty, and Hessians by
torch.func."""
import pytest
import torch

import harness
import triton_lstm
from problems import BUDGET, Problem, error, floor
from test_layer import pair
from triton_lstm.op import reference_backward, reference_double_backward
from triton_lstm.reference import lstm_reference

NINE = ("dy", "dh_n", "dc_n", "x", "w", "r", "b", "h0", "c0")


class Formula(torch.autograd.Function):
    """``reference_backward``, whose derivative is the formula under test."""

    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs)
        return tuple(g for g in reference_backward(*inputs) if g is not None)

    @staticmethod
    def backward(ctx, *cotangents):
        if ctx.saved_tensors[6] is None:
            cotangents = (*cotangents[:3], None, *cotangents[3:])
        return reference_double_backward(cotangents, ctx.saved_tensors)


def nine(problem, dtype):
    inputs, gradients = problem.tensors()
    return [None if t is None else t.to(dtype).requires_grad_() for t in gradients + inputs]


@pytest.mark.parametrize("problem", [Problem(3, 2, 2, 3, 2), Problem(2, 1, 1, 2, 1, bias=False)], ids=str)
def test_formula_by_differences(problem):
    """Compares derivatives up to the third order with finite differences in float64."""
    inputs = nine(problem, torch.float64)
    gradients = lambda *inputs: tuple(g for g in reference_backward(*inputs) if g is not None)
    assert torch.autograd.gradcheck(Formula.apply, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(Formula.apply, inputs, fast_mode=True)
    outputs = lstm_reference(*inputs[3:])
    present = [t for t in inputs[3:] if t is not None]
    want = torch.autograd.grad(outputs, present, inputs[:3])
    for got, right in zip(gradients(*inputs), want, strict=True):
        torch.testing.assert_close(got, right)


def second(problem, function, dtype, outputs=(0, 1, 2)):
    """{name: tensor} of the gradients of a weighted sum of all first gradients of ``function``. The first gradients are
    those of the outputs whose numbers are in ``outputs``."""
    tensors = dict(zip(NINE, nine(problem, dtype)))
    inputs = {name: t for name, t in list(tensors.items())[3:] if t is not None}
    results = function(*(tensors[name] for name in NINE[3:]))
    cotangents = [tensors[NINE[i]] for i in outputs]
    first = torch.autograd.grad([results[i] for i in outputs], list(inputs.values()), cotangents, create_graph=True)
    generator = torch.Generator().manual_seed(9)
    total = sum((g * torch.randn(g.shape, generator=generator).to(g)).sum() for g in first)
    wanted = [t for i, t in enumerate(tensors.values()) if t is not None and (i > 2 or i in outputs)]
    names = [name for i, (name, t) in enumerate(tensors.items()) if t is not None and (i > 2 or i in outputs)]
    return dict(zip(names, torch.autograd.grad(total, wanted, allow_unused=True)))


def ours(x, w, r, b, h0, c0):
    y, (h_n, c_n) = triton_lstm.lstm(x, w, r, b, (h0, c0), keep_every=2)
    return y, h_n, c_n


def torchs(problem):
    def function(x, w, r, b, h0, c0):
        weights = [t for d in range(problem.D) for t in
                   [w[d], r[d]] + ([b[d], torch.zeros_like(b[d])] if problem.bias else [])]
        return torch._VF.lstm(x, (h0, c0), weights, problem.bias, 1, 0., True, problem.D == 2, False)
    return function


@pytest.mark.parametrize("problem, outputs", [
    (Problem(5, 3, 4, 7, 1), (0, 1, 2)), (Problem(5, 3, 4, 7, 2), (0, 1, 2)),
    (Problem(4, 2, 3, 5, 2, bias=False), (0,)), (Problem(4, 2, 3, 5, 2), (1, 2)),
    (Problem(5, 3, 4, 7, 1), (1,)), (Problem(5, 3, 4, 7, 1), (0, 2)), (Problem(1, 1, 1, 1, 1), (0, 1, 2)),
    (Problem(5, 3, 4, 7, 2, torch.bfloat16), (0, 1, 2)), (Problem(5, 3, 4, 7, 1, torch.float16), (0, 1, 2)),
], ids=str)
def test_operator(problem, outputs):
    """The error of every second derivative is at most BUDGET times that of nn.LSTM, for each choice of outputs."""
    right = second(problem, lstm_reference, torch.float64, outputs)
    theirs = second(problem, torchs(problem), problem.dtype, outputs)
    with harness.interpreter():
        got = second(problem, ours, problem.dtype, outputs)
    assert got.keys() == right.keys()
    for name, want in right.items():
        assert got[name].dtype == problem.dtype and got[name].shape == want.shape
        assert error(got[name], want) <= BUDGET * max(error(theirs[name], want), floor(want, problem.dtype)), name


def penalty(module, x):
    """The gradient penalty of WGAN-GP: the mean over samples of (|dD/dx| - 1)^2, where D is a function of y, h_n and
    c_n."""
    x = x.detach().requires_grad_()
    y, (h, c) = module(x)
    gradient, = torch.autograd.grad(y.square().sum() + (h * c[..., :h.shape[2]]).sum(), x, create_graph=True)
    loss = ((gradient.transpose(0, 1).flatten(1).norm(dim=1) - 1) ** 2).mean()
    parameters = dict(module.named_parameters())
    return {"loss": loss, "x": torch.autograd.grad(loss, x, retain_graph=True)[0]} | dict(
        zip(parameters, torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)))


@pytest.mark.parametrize("options", [dict(), dict(num_layers=2, bidirectional=True)], ids=str)
def test_gradient_penalty(options):
    """With two layers, because the gradient of the second one depends on the output of the first one."""
    theirs, layer, exact = pair(6, 9, **options)
    x = torch.randn(4, 3, 6)
    right, want = penalty(exact, x.double()), penalty(theirs, x)
    with harness.interpreter():
        got = penalty(layer, x)
    for name in right:
        allowed = BUDGET * max(error(want[name], right[name]), floor(right[name], x.dtype))
        assert error(got[name], right[name]) <= allowed, name


def test_third_derivative():
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    _, layer, exact = pair(4, 5)

    def third(module, x):
        x = x.requires_grad_()
        value = module(x)[0].square().sum()
        for _ in range(2):
            g, = torch.autograd.grad(value, x, create_graph=True)
            value = g.pow(3).sum()
        return torch.autograd.grad(value, x)[0]
    right = third(exact, x.clone())
    with harness.interpreter():
        assert error(third(layer, x.float()), right) < 1e-5


@pytest.mark.parametrize("options", [dict(), dict(proj_size=2)], ids=str)
def test_hessian(options):
    """jacrev of jacrev, by torch.func."""
    _, layer, exact = pair(2, 3, **options)
    x = torch.randn(2, 1, 2, dtype=torch.float64)
    right = torch.autograd.functional.hessian(lambda x: exact(x)[0].square().sum(), x)
    with harness.interpreter():
        got = torch.func.jacrev(torch.func.jacrev(lambda x: layer(x)[0].square().sum()))(x.float())
    assert error(got, right) < 1e-5


def test_first_derivatives_stay_in_the_kernels(monkeypatch):
    """With create_graph, first derivatives are still computed by the kernels: they have the same bits, and the
    equations are not run."""
    _, layer, _ = pair(6, 9)
    x = torch.randn(3, 2, 6, requires_grad=True)
    monkeypatch.setattr(triton_lstm.op, "lstm_reference", None)
    with harness.interpreter():
        want, = torch.autograd.grad(layer(x)[0].square().sum(), x)
        got, = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
        assert torch.equal(got, want) and got.requires_grad
        with pytest.raises(TypeError):
            got.sum().backward()
