"""Every tensor that a user gets has memory of its own, and the strides that nn.LSTM gives it."""
import itertools

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.nn.utils.rnn import pack_padded_sequence

import harness
import triton_lstm
from problems import Problem, assert_apart

T, B, I, H = 6, 5, 4, 6
LAYERS = [
    dict(), dict(bias=False), dict(num_layers=2), dict(bidirectional=True), dict(batch_first=True),
    dict(num_layers=2, bidirectional=True), dict(proj_size=3), dict(proj_size=3, bidirectional=True, num_layers=2),
    dict(num_layers=2, dropout=0.5),
]


def like(ours, theirs):
    """Our tensors have the shapes and strides of those of nn.LSTM."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].shape == tensor.shape and ours[name].stride() == tensor.stride(), name


def pair(options, **more):
    torch.manual_seed(0)
    theirs = torch.nn.LSTM(I, H, **options, **more)
    ours = triton_lstm.LSTM(I, H, **options, **more)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs(module, hx, packed=False):
    generator = torch.Generator().manual_seed(1)
    shape = (B, T, I) if module.batch_first else (T, B, I)
    x = torch.randn(shape, generator=generator).requires_grad_()
    rows = module.num_layers * (2 if module.bidirectional else 1)
    sizes = module.proj_size or H, H
    state = [torch.randn(rows, B, n, generator=generator).requires_grad_() for n in sizes] if hx else None
    return x, state


def call(module, x, state, packed):
    if packed:
        lengths = torch.tensor([6, 4, 3, 3, 1])
        return module(pack_padded_sequence(x, lengths, batch_first=module.batch_first), state)
    return module(x, state)


def everything(module, hx, packed, how):
    """{name: tensor} of the results of a call and of its gradients, which come from .grad or autograd.grad."""
    x, state = inputs(module, hx)
    y, (h_n, c_n) = call(module, x, state, packed)
    y = y.data if packed else y
    loss = y.sin().sum() + h_n.sin().sum() + c_n.sin().sum()
    leaves = {"x": x, **dict(zip(("h0", "c0"), state or ())), **dict(module.named_parameters())}
    if how == "backward":
        loss.backward()
        gradients = [leaf.grad for leaf in leaves.values()]
    else:
        gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"y": y.detach(), "h_n": h_n.detach(), "c_n": c_n.detach(),
            **{f"d{name}": g for name, g in zip(leaves, gradients)}}


@pytest.mark.parametrize("how", ["backward", "grad"])
@pytest.mark.parametrize("options, hx, packed", [
    *itertools.product(LAYERS, (False, True), (False,)), *itertools.product(LAYERS, (True,), (True,))], ids=str)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_layer(options, hx, packed, how):
    theirs, ours = pair(options)
    want = everything(theirs, hx, packed, how)
    with harness.interpreter():
        got = everything(ours, hx, packed, how)
    assert_apart(got)
    like(got, want)


@pytest.mark.parametrize("options", [dict(), dict(bidirectional=True), dict(num_layers=2)], ids=str)
def test_zoneout_and_drop_connect(options):
    _, ours = pair(options)
    ours.zoneout = 0.2
    triton_lstm.drop_connect(ours, 0.3)
    with harness.interpreter():
        got = everything(ours, True, False, "grad")
    assert_apart(got)


@pytest.mark.parametrize("options", [dict(ragged=True), dict(resets=True), dict(D=2), dict(P=3), dict(D=2, P=3),
                                     dict(bias=False), dict(packed=True)], ids=str)
def test_function(options):
    problem = Problem(5, 3, 4, 6, **options)
    with harness.interpreter():
        got = problem.ours()
    assert_apart({name: t for name, t in got.items()})


def test_cell():
    torch.manual_seed(0)
    theirs, ours = torch.nn.LSTMCell(I, H), triton_lstm.LSTMCell(I, H)
    ours.load_state_dict(theirs.state_dict())

    def run(cell):
        x, h, c = (torch.randn(B, n, generator=torch.Generator().manual_seed(n)).requires_grad_() for n in (I, H, H))
        h_new, c_new = cell(x, (h, c))
        leaves = {"x": x, "h": h, "c": c, **dict(cell.named_parameters())}
        gradients = torch.autograd.grad(h_new.sin().sum() + c_new.sin().sum(), list(leaves.values()))
        return {"h_new": h_new.detach(), "c_new": c_new.detach(), **dict(zip(leaves, gradients))}

    want = run(theirs)
    with harness.interpreter():
        got = run(ours)
    assert_apart(got)
    like(got, want)


def test_step():
    _, ours = pair(dict(num_layers=2))
    with harness.interpreter(), torch.no_grad():
        y, (h, c) = ours.step(torch.randn(B, I))
        again, state = ours.step(torch.randn(B, I), (h, c), inplace=True)
    assert_apart({"y": y, "h": h, "c": c, "again": again})
    assert state[0] is h and state[1] is c


def test_func():
    """Gradients by torch.func, of one layer and of an ensemble."""
    _, ours = pair(dict(bidirectional=True))
    parameters = {name: p.detach() for name, p in ours.named_parameters()}
    x = torch.randn(T, B, I)
    loss = lambda parameters, x: torch.func.functional_call(ours, parameters, (x,))[0].sin().sum()
    with harness.interpreter():
        assert_apart(torch.func.grad(loss)(parameters, x))
        several = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, torch.stack([x, x + 1]))
        each = [torch.func.grad(loss)(parameters, x + n) for n in range(2)]
    for name, gradients in several.items():
        torch.testing.assert_close(gradients, torch.stack([g[name] for g in each]))


@pytest.mark.parametrize("options", [dict(), dict(bidirectional=True), dict(proj_size=3)], ids=str)
def test_compiled(options):
    _, ours = pair(options)
    with harness.interpreter():
        eager = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward))
        compiled = torch.compile(ours, backend=eager, fullgraph=True)
        x, state = inputs(ours, True)
        compiled(x, state)[0].sin().sum().backward()
        gradients = {name: p.grad for name, p in ours.named_parameters()} | {"x": x.grad, "h0": state[0].grad}
    assert_apart(gradients)
    assert all(g.is_contiguous() for g in gradients.values())
