"""``LSTMCell`` against torch.nn.LSTMCell, and ``LSTM.step`` against the layer over the whole sequence."""
import contextlib
import copy
import pickle
from unittest import mock

import pytest
import torch

import harness
import triton_lstm
import triton_lstm.layer
from problems import BUDGET, error, floor


def pair(*args, **kwargs):
    """nn.LSTMCell, and our LSTMCell with the same weights."""
    torch.manual_seed(1)
    theirs, ours = torch.nn.LSTMCell(*args, **kwargs), triton_lstm.LSTMCell(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def run(cell, xs, hx, dtype):
    """{name: tensor} of the last state after the steps of xs, and of the gradients."""
    cell = copy.deepcopy(cell).to(dtype)
    xs = xs.to(dtype, copy=True).requires_grad_()
    leaves = hx = None if hx is None else tuple(s.to(dtype, copy=True).requires_grad_() for s in hx)
    for x in xs:
        hx = cell(x, hx)
    (hx[0].square().sum() + hx[1].sum()).backward()
    results = dict(h=hx[0], c=hx[1], dx=xs.grad) | {name: p.grad for name, p in cell.named_parameters()}
    return results if leaves is None else results | dict(dh0=leaves[0].grad, dc0=leaves[1].grad)


@pytest.mark.parametrize("state, bias", [(False, True), (True, False)], ids=["zeros, bias", "state, no bias"])
@pytest.mark.parametrize("batch", [(5,), ()], ids=["batched", "unbatched"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_matches(state, batch, bias, dtype):
    theirs, ours = pair(6, 9, bias)
    xs = torch.randn(2, *batch, 6)
    hx = (torch.randn(*batch, 9), torch.randn(*batch, 9)) if state else None
    with harness.interpreter():
        got = run(ours, xs, hx, dtype)
    # The same rounded values for all.
    theirs, xs, hx = theirs.to(dtype), xs.to(dtype), hx and tuple(s.to(dtype) for s in hx)
    want, right = run(theirs, xs, hx, dtype), run(theirs, xs, hx, torch.float64)
    assert got.keys() == right.keys()
    for name in right:
        assert got[name].shape == want[name].shape and got[name].dtype == want[name].dtype, name
        allowed = BUDGET * max(error(want[name], right[name]), floor(right[name], dtype))
        assert error(got[name], right[name]) <= allowed, name


def test_constructor():
    """Parameters from the same seed, their names, repr and pickled copies are those of nn.LSTMCell."""
    cells = []
    for kind in (torch.nn.LSTMCell, triton_lstm.LSTMCell):
        torch.manual_seed(3)
        cells.append(kind(6, 9, dtype=torch.float64))
    theirs, ours = cells
    assert list(ours.state_dict()) == list(theirs.state_dict()) and repr(ours) == repr(theirs) == "LSTMCell(6, 9)"
    for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert p.dtype == torch.float64 and torch.equal(p, q)
    assert torch.equal(pickle.loads(pickle.dumps(ours)).weight_hh, ours.weight_hh)


X, S = torch.zeros(3, 6), torch.zeros(3, 9)


@pytest.mark.parametrize("input, hx", [
    (torch.zeros(3, 7), None), (torch.zeros(7), None), (torch.zeros(2, 3, 6), None), (X, S), (X, (S,)), (X, (S, S, S)),
    (X, (S[:2], S)), (X, (S, S[:2])), (X, (S[0], S[0])), (torch.zeros(6), (S, S)), (X.double(), None), (X.long(), None),
    (X, (S.double(), S.double())), (X, (S, None)), (None, None), ([1.], None), (X.to("meta"), None), (X[:1], S[:2]),
], ids=lambda v: str(tuple(v.shape)) if isinstance(v, torch.Tensor) else type(v).__name__)
def test_errors(input, hx):
    theirs, ours = pair(6, 9)
    with pytest.raises(Exception) as error:
        theirs(input, hx)
    with harness.interpreter(), mock.patch.object(triton_lstm.functional, "_told", {"LSTMCell in torch.float64"}), \
            pytest.raises(error.type) as our_error:
        ours(input, hx)
    assert str(our_error.value) == str(error.value)


def test_elsewhere_it_is_torchs_cell():
    """Without a warning on CPU tensors, and with a warning in float64 where the kernels run."""
    theirs, ours = pair(6, 9)
    x = torch.randn(3, 6)
    assert all(map(torch.equal, ours(x), theirs(x)))
    theirs.double(), ours.double()
    with harness.interpreter(), mock.patch.object(triton_lstm.functional, "_told", set()), \
            pytest.warns(UserWarning, match="torch's own LSTM: LSTMCell in torch.float64"):
        got = ours(x.double())
    assert all(map(torch.equal, got, theirs(x.double())))


def test_empty_batch():
    _, ours = pair(6, 9)
    with harness.interpreter():
        h, c = ours(torch.zeros(0, 6))
    assert h.shape == c.shape == (0, 9)


LAYERS = [dict(), dict(num_layers=2, bias=False), dict(batch_first=True, num_layers=2)]


@pytest.mark.parametrize("options", LAYERS, ids=str)
@pytest.mark.parametrize("state", [False, True], ids=["zeros", "state"])
def test_steps_are_the_layer(options, state):
    """Step by step gives the outputs, the last state and the gradients of one call over the sequence."""
    torch.manual_seed(0)
    layer, layers = triton_lstm.LSTM(6, 9, **options), options.get("num_layers", 1)
    x = torch.randn(3, 3, 6, requires_grad=True)
    hx = (torch.randn(layers, 3, 9), torch.randn(layers, 3, 9)) if state else None
    time = 1 if options.get("batch_first") else 0
    with harness.interpreter():
        want, want_state = layer(x.transpose(0, time), hx)
        want_grads = torch.autograd.grad(want.square().sum() + want_state[1].sum(), [x, *layer.parameters()])
        steps = []
        for x_t in x:
            y, hx = layer.step(x_t, hx)
            assert y.shape == (3, 9)
            steps.append(y)
        y = torch.stack(steps, time)
        grads = torch.autograd.grad(y.square().sum() + hx[1].sum(), [x, *layer.parameters()])
    for got, right in zip([y, *hx, *grads], [want, *want_state, *want_grads]):
        torch.testing.assert_close(got, right)


def test_step_inplace():
    """The new state is stored in the given tensors, which are returned."""
    torch.manual_seed(0)
    layer, xs = triton_lstm.LSTM(6, 9, num_layers=2), torch.randn(5, 3, 6)
    state = (torch.zeros(2, 3, 9), torch.zeros(2, 3, 9))
    with torch.no_grad(), harness.interpreter():
        want, want_state = layer(xs)
        for x, y_want in zip(xs, want):
            y, new = layer.step(x, state, inplace=True)
            assert new is state
            torch.testing.assert_close(y, y_want)
            assert torch.equal(y, state[0][-1]) and y.data_ptr() != state[0][-1].data_ptr()
    for got, right in zip(state, want_state):
        torch.testing.assert_close(got, right)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("computing", [harness.interpreter, contextlib.nullcontext], ids=["natively", "torch"])
def test_step_calls_hooks_and_projects(computing):
    layer, seen = triton_lstm.LSTM(6, 9, proj_size=4), []
    layer.register_forward_hook(lambda *args: seen.append(args))
    with computing():
        y, (h, c) = layer.step(torch.randn(3, 6))
    assert y.shape == (3, 4) and h.shape == (1, 3, 4) and c.shape == (1, 3, 9) and len(seen) == 1


@pytest.mark.parametrize("options, shape, keywords, message", [
    (dict(bidirectional=True), (3, 6), {}, "reverse direction"), (dict(), (1, 3, 6), {}, r"\(B, I\)"),
    (dict(), (6,), {}, r"\(B, I\)"), (dict(), (3, 6), dict(inplace=True), "needs a state"),
    (dict(), (3, 6), dict(state=(torch.zeros(1, 3, 9),) * 2, inplace=True), "no_grad"),
], ids=lambda v: str(v)[:25])
@pytest.mark.parametrize("computing", [harness.interpreter, contextlib.nullcontext], ids=["natively", "torch"])
def test_step_errors(options, shape, keywords, message, computing):
    layer = triton_lstm.LSTM(6, 9, **options)
    with computing(), pytest.raises(ValueError, match=message):
        layer.step(torch.zeros(shape), **keywords)
    for s in keywords.get("state", ()):
        assert not s.any()                      # unchanged


def test_compile_full_graph():
    torch.manual_seed(0)
    layer, cell, x = triton_lstm.LSTM(4, 6), triton_lstm.LSTMCell(4, 6), torch.randn(3, 4)

    def function(x, h, c):
        y, (h, c) = layer.step(x, (h[None], c[None]))
        return y, *cell(x, (h[0], c[0]))
    state = torch.randn(3, 6), torch.randn(3, 6)
    with harness.interpreter():
        got = torch.compile(function, backend="aot_eager", fullgraph=True)(x, *state)
        for ours, right in zip(got, function(x, *state), strict=True):
            torch.testing.assert_close(ours, right)
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("H", [64, 300])
def test_step_in_a_cuda_graph(H):
    """One step is captured and replayed for each step of a stream; the state is updated in place."""
    torch.manual_seed(0)
    layer = triton_lstm.LSTM(20, H, num_layers=2).cuda().half()
    xs = torch.randn(30, 17, 20, device="cuda", dtype=torch.half)
    x = xs[0].clone()
    state = tuple(torch.zeros(2, 17, H, device="cuda", dtype=torch.half) for _ in range(2))
    with torch.no_grad():
        want, want_state = layer(xs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            layer.step(x, state, inplace=True)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, _ = layer.step(x, state, inplace=True)
        for s in state:
            s.zero_()
        for x_t, y_want in zip(xs, want):
            x.copy_(x_t)
            graph.replay()
            torch.testing.assert_close(y, y_want, rtol=1e-2, atol=2e-3)
    for got, right in zip(state, want_state):
        torch.testing.assert_close(got, right, rtol=1e-2, atol=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("H", [64, 300])
def test_step_does_not_synchronise(H):
    layer, x = triton_lstm.LSTM(20, H).cuda(), torch.randn(17, 20, device="cuda")
    state = tuple(torch.zeros(1, 17, H, device="cuda") for _ in range(2))
    with torch.no_grad():
        layer.step(x, state, inplace=True)                  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer.step(x, state, inplace=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
