"""``triton_lstm.LSTM`` against torch.nn.LSTM: results, state, errors, fallbacks, tracing."""
import copy
import os
import pickle
import subprocess
import sys
import warnings
from unittest import mock

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import harness
import triton_lstm
import triton_lstm.layer
from problems import BUDGET, error, floor

LAYERS = [
    dict(), dict(bias=False), dict(num_layers=2), dict(bidirectional=True), dict(batch_first=True),
    dict(num_layers=3, bidirectional=True, batch_first=True), dict(num_layers=2, bias=False, bidirectional=True),
]


def pair(*args, dtype=torch.float32, **kwargs):
    """nn.LSTM, our LSTM, and nn.LSTM in float64, with the same weights."""
    torch.manual_seed(1)
    theirs = torch.nn.LSTM(*args, **kwargs).to(dtype)
    ours = triton_lstm.LSTM(*args, **kwargs).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    exact = torch.nn.LSTM(*args, **kwargs).double()
    exact.load_state_dict(theirs.state_dict())
    return theirs, ours, exact


def run(module, x, hx=None):
    """Outputs and gradients of ``module``, for inputs cast to its type."""
    dtype = next(module.parameters()).dtype
    x = x.detach().to(dtype).requires_grad_()
    hx = hx and tuple(s.detach().to(dtype).requires_grad_() for s in hx)
    module.zero_grad()
    y, (h, c) = module(x, hx)
    generator = torch.Generator().manual_seed(5)
    torch.autograd.backward([y, h, c], [torch.randn(t.shape, generator=generator).to(t) for t in (y, h, c)])
    results = {"y": y, "h_n": h, "c_n": c, "dx": x.grad}
    if hx:
        results |= {"dh0": hx[0].grad, "dc0": hx[1].grad}
    return results | {name: p.grad for name, p in module.named_parameters()}


def compare(theirs, ours, exact, x, hx=None):
    got, want, right = run(ours, x, hx), run(theirs, x, hx), run(exact, x, hx)
    assert got.keys() == right.keys()
    for name in right:
        assert got[name].shape == want[name].shape and got[name].dtype == want[name].dtype, name
        allowed = BUDGET * max(error(want[name], right[name]), floor(right[name], x.dtype))
        assert error(got[name], right[name]) <= allowed, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_matches(options, dtype):
    modules = pair(6, 9, dtype=dtype, **options)
    with harness.interpreter():
        compare(*modules, torch.randn(4, 5, 6).to(dtype))


@pytest.mark.parametrize("options", LAYERS[3:6], ids=str)
def test_matches_with_initial_state(options):
    modules = pair(6, 9, **options)
    layers = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    batch = 4 if options.get("batch_first") else 5
    with harness.interpreter():
        compare(*modules, torch.randn(4, 5, 6), (torch.randn(layers, batch, 9), torch.randn(layers, batch, 9)))


@pytest.mark.parametrize("options", [dict(), dict(batch_first=True, bidirectional=True, num_layers=2)], ids=str)
def test_unbatched(options):
    modules = pair(6, 9, **options)
    layers = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    with harness.interpreter():
        compare(*modules, torch.randn(4, 6))
        compare(*modules, torch.randn(4, 6), (torch.randn(layers, 9), torch.randn(layers, 9)))


def test_layout_of_results():
    """batch_first changes only x and y. Results share memory neither with each other nor with hx."""
    theirs, ours, _ = pair(6, 9, batch_first=True)
    x, hx = torch.randn(3, 4, 6), (torch.randn(1, 3, 9), torch.randn(1, 3, 9))
    with harness.interpreter():
        y, state = ours(x, hx)
    assert isinstance(state, tuple) and y.shape == (3, 4, 9) and y.stride() == theirs(x, hx)[0].stride()
    places = {t.untyped_storage().data_ptr() for t in (y, *state, *hx)}
    assert len(places) == 5


def test_inter_layer_dropout():
    """With p = 1 the second layer's input is zero. In eval mode no random numbers are drawn. p may change between
    calls."""
    torch.manual_seed(0)
    layer = triton_lstm.LSTM(6, 9, num_layers=2, dropout=1.0)
    with harness.interpreter():
        y = layer(torch.randn(4, 3, 6))[0]
        assert torch.equal(y, layer(torch.randn(4, 3, 6))[0])
        layer.eval()
        state = torch.get_rng_state()
        x = torch.randn(4, 3, 6)
        torch.set_rng_state(state)
        assert not torch.equal(layer(x)[0], y)
        assert torch.equal(torch.get_rng_state(), state)
        layer.train()
        layer.dropout = 0.5
        first, second = layer(x)[0], layer(x)[0]
        assert not torch.equal(first, second)


def test_backward_in_eval_mode():
    modules = [m.eval() for m in pair(6, 9, num_layers=2, dropout=0.3)]
    with harness.interpreter():
        compare(*modules, torch.randn(4, 5, 6))


def test_deterministic():
    _, ours, _ = pair(6, 33, bidirectional=True)
    x = torch.randn(5, 17, 6)
    with harness.interpreter():
        first, second = run(ours, x), run(ours, x)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_state_dict_both_ways_and_copies():
    theirs, ours, _ = pair(6, 9, num_layers=2, bidirectional=True)
    theirs.load_state_dict(ours.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert repr(ours) == repr(theirs) == "LSTM(6, 9, num_layers=2, bidirectional=True)"
    x = torch.randn(3, 2, 6)
    with harness.interpreter():
        y = ours(x)[0]
        for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert isinstance(other, triton_lstm.LSTM) and torch.equal(other(x)[0], y)


def test_same_initialisation():
    modules = []
    for kind in (torch.nn.LSTM, triton_lstm.LSTM):
        torch.manual_seed(3)
        modules.append((kind(5, 7, 2, True, True, 0.1, True), torch.get_rng_state()))
    (theirs, state), (ours, our_state) = modules
    assert torch.equal(state, our_state)
    for (name, p), (our_name, q) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        assert name == our_name and torch.equal(p, q)
    assert {k: v for k, v in theirs.__dict__.items() if not k.startswith("_")} == {
        k: v for k, v in ours.__dict__.items() if not k.startswith("_")}


@pytest.mark.parametrize("arguments", [
    dict(hidden_size=0), dict(hidden_size=-1), dict(input_size=0), dict(num_layers=0), dict(dropout=1.5),
    dict(dropout=-0.1), dict(dropout=True), dict(hidden_size=2.0), dict(proj_size=-1), dict(proj_size=9),
    dict(bias=1), dict(batch_first=0), dict(dropout=None), dict(nonsense=1),
], ids=str)
def test_constructor_errors(arguments):
    arguments = dict(input_size=6, hidden_size=9) | arguments
    with pytest.raises(Exception) as theirs:
        torch.nn.LSTM(**arguments)
    with pytest.raises(theirs.type) as ours:
        triton_lstm.LSTM(**arguments)
    assert str(ours.value) == str(theirs.value) or "nonsense" in arguments


X, STATE = torch.zeros(4, 3, 6), torch.zeros(1, 3, 9)


@pytest.mark.parametrize("input, hx", [
    (torch.zeros(4, 3, 7), None), (torch.zeros(6), None), (torch.zeros(1, 4, 3, 6), None), (X.double(), None),
    (X.long(), None), ([1.], None), (None, None), (torch.zeros(0, 3, 6), None), (torch.zeros(0, 6), None),
    (X, STATE), (X, (STATE,)), (X, (STATE, STATE, STATE)), (X, (STATE[:, :2], STATE)), (X, (STATE, STATE[..., :8])),
    (X, (STATE[0], STATE[0])), (X, (torch.zeros(2, 3, 9), STATE)), (torch.zeros(4, 6), (STATE, STATE)),
    (X, (STATE, None)), (X, (STATE[:, :1], STATE[:, :1])), (X.to("meta"), None),
], ids=lambda v: str(tuple(v.shape)) if isinstance(v, torch.Tensor) else type(v).__name__)
def test_forward_errors(input, hx):
    theirs, ours, _ = pair(6, 9)
    with pytest.raises(Exception) as error:
        theirs(input, hx)
    with harness.interpreter(), pytest.raises(error.type) as our_error:
        ours(input, hx)
    assert str(our_error.value) == str(error.value)


def test_empty_batch():
    theirs, ours, _ = pair(6, 9, bidirectional=True)
    x = torch.zeros(4, 0, 6, requires_grad=True)
    with harness.interpreter():
        y, (h, c) = ours(x)
        (y.sum() + h.sum()).backward()
    want, (h_want, _) = theirs(torch.zeros(4, 0, 6))
    assert y.shape == want.shape and h.shape == c.shape == h_want.shape
    assert x.grad.shape == x.shape and torch.equal(ours.weight_hh_l0.grad, torch.zeros(36, 9))


def test_list_as_state():
    _, ours, _ = pair(6, 9)
    with harness.interpreter():
        assert torch.equal(ours(X, [STATE, STATE])[0], ours(X, (STATE, STATE))[0])


@pytest.fixture
def untold():
    with mock.patch.object(triton_lstm.functional, "_told", set()):
        yield


@pytest.mark.parametrize("options, packed", [(dict(), False), (dict(bidirectional=True, proj_size=4), True)], ids=str)
def test_fallbacks_are_right_and_say_so_once(options, packed, untold):
    theirs, ours, _ = pair(6, 9, dtype=torch.float64, **options)
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    if packed:
        x = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 2, 1]))
    with harness.interpreter():
        with pytest.warns(UserWarning, match="torch's own LSTM: .*float64"):
            y, state = ours(x)
        ours(x)             # a second warning would be an error
        want, want_state = theirs(x)
    assert torch.equal(y.data if packed else y, want.data if packed else want)
    assert all(map(torch.equal, state, want_state))


def test_larger_than_the_chip(untold):
    """If R fits no plan, torch's LSTM runs, after a warning with the reason."""
    theirs, ours, _ = pair(4, 9)
    with harness.emulator(), mock.patch.object(triton_lstm.op, "limits_of",
                                               lambda device: triton_lstm.plan.Limits(0, 1)):
        triton_lstm.op.plan_or_reason.cache_clear()
        with mock.patch.object(triton_lstm.layer, "runs_kernels", lambda x, dtype: True), \
                pytest.warns(UserWarning, match="pass through shared memory once, which has 1;"):
            y = ours(torch.ones(3, 2, 4))[0]
    triton_lstm.op.plan_or_reason.cache_clear()
    assert torch.equal(y, theirs(torch.ones(3, 2, 4))[0])


def test_on_a_cpu_it_is_torchs_lstm():
    """On CPU tensors torch's LSTM runs without a warning, by the class that was imported."""
    theirs, ours, _ = pair(6, 9, num_layers=2, bidirectional=True)
    with mock.patch.object(torch.nn, "LSTM", triton_lstm.LSTM):
        assert torch.equal(ours(X)[0], theirs(X)[0])
    layer = torch.nn.LSTM(6, 9)
    with torch.no_grad():
        y, (h, c) = triton_lstm.lstm(X, layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0 + layer.bias_hh_l0)
        want, (h_want, c_want) = layer(X)
    for got, right in ((y, want), (h, h_want), (c, c_want)):
        torch.testing.assert_close(got, right)


def test_autocast():
    """Under autocast the layer computes in the type of autocast."""
    _, ours, exact = pair(6, 9, num_layers=2)
    x = torch.randn(4, 3, 6)
    with harness.interpreter(), torch.autocast("cpu", torch.bfloat16):
        y, (h, c) = ours(x)
        y.float().sum().backward()
    assert y.dtype == h.dtype == c.dtype == torch.bfloat16
    assert error(y, exact(x.double())[0]) < 0.01        # 2.5 roundings of bf16
    assert ours.weight_hh_l0.grad.dtype == torch.float32 and ours.weight_hh_l0.grad.isfinite().all()


def test_plan_attribute():
    theirs, ours, _ = pair(6, 33)
    x = torch.randn(3, 5, 6)
    ours.plan = triton_lstm.make_plan(5, 33, torch.float32, schedule="grid", tf32=False)
    with harness.interleaved(0):
        torch.testing.assert_close(ours(x)[0], theirs(x)[0])
    with harness.interpreter(), pytest.raises(ValueError, match="batch 5.*has 4"):
        ours(torch.randn(3, 4, 6))


def test_compile_full_graph():
    """Forward and backward are one graph each. Another length or batch compiles nothing new."""
    _, ours, _ = pair(6, 9, num_layers=2, bidirectional=True)
    head = torch.nn.Linear(18, 2)
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)
    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
    model = torch.compile(lambda x: head(ours(x)[0]).square().sum(), fullgraph=True, dynamic=True, backend=backend)
    with harness.interpreter():
        for T, B in ((5, 3), (7, 3), (2, 4)):
            x = torch.randn(T, B, 6)
            ours.zero_grad()
            model(x).backward()
            compiled = [p.grad.clone() for p in ours.parameters()]
            ours.zero_grad()
            head(ours(x)[0]).square().sum().backward()
            for got, p in zip(compiled, ours.parameters()):
                torch.testing.assert_close(got, p.grad)
    assert len(graphs) == 2, "one forward and one backward graph"
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")     # opcheck of torch 2.14
@pytest.mark.parametrize("flagged", [False, True])
def test_operators_pass_torchs_own_checks(flagged):
    """torch.library.opcheck checks schema, fake implementation and autograd registration."""
    from triton_lstm.kernels.rows import step_flags

    from triton_lstm.op import lstm_op
    tensors = [torch.randn(3, 2, 4), torch.randn(1, 20, 4), torch.randn(1, 20, 5), torch.randn(1, 20),
               torch.randn(1, 2, 5), torch.randn(1, 2, 5)]
    with harness.interpreter():
        flags = step_flags(3, 2, 1, torch.tensor([3, 1]), None, "cpu") if flagged else None
        torch.library.opcheck(lstm_op, (*(t.requires_grad_() for t in tensors), flags, None, "", 2, True))


@pytest.mark.parametrize("change, error, reason", [
    (dict(x=torch.zeros(3, 2)), ValueError, r"\(3, 2\)"),
    (dict(weight_hh=torch.zeros(1, 20, 4)), ValueError, "weight_ih must have the shape"),
    (dict(bias=torch.zeros(19)), ValueError, r"bias must have the shape \(1, 20\), got \(1, 19\)"),
    (dict(weight_ih=torch.zeros(20, 4).half()), ValueError, "weight_ih must have the input's dtype"),
    (dict(hx=(torch.zeros(1, 3, 5), torch.zeros(1, 2, 5))), ValueError, r"h0 must have the shape \(1, 2, 5\)"),
    (dict(weight_hh=torch.zeros(20, 5, device="meta")), RuntimeError, "weight_hh must be on the input's device cpu"),
    (dict(plan="grid"), TypeError, "got str"),
    (dict(keep_every=0), ValueError, "got 0"),
], ids=str)
def test_functional_errors(change, error, reason):
    arguments = dict(x=torch.zeros(3, 2, 4), weight_ih=torch.zeros(20, 4), weight_hh=torch.zeros(20, 5))
    for context in (harness.interpreter, warnings.catch_warnings):
        with context(), pytest.raises(error, match=reason):
            triton_lstm.lstm(**(arguments | change))


@pytest.mark.parametrize("context", [harness.interpreter, warnings.catch_warnings])
def test_functional_without_steps(context):
    h, c = torch.randn(1, 2, 5), torch.randn(1, 2, 5)
    with context():
        y, (h_n, c_n) = triton_lstm.lstm(torch.zeros(0, 2, 4), torch.zeros(20, 4), torch.zeros(20, 5), None, (h, c))
    assert y.shape == (0, 2, 5) and torch.equal(h_n, h) and torch.equal(c_n, c)


def test_trains_to_the_same_losses():
    """Two stacked LSTMs (128 and 64 units) with a linear head, on sequences of length 10, with Adam and MSE.

    Rounding in fp32 differs, and Adam amplifies this: its first steps divide a gradient by its magnitude, so a gradient
    near zero moves a weight by a full step in either direction. Losses stay within 0.1 %.
    """
    def model(kind):
        torch.manual_seed(7)
        return torch.nn.ModuleList([kind(1, 128, batch_first=True), kind(128, 64, batch_first=True),
                                    torch.nn.Linear(64, 1)])
    series = torch.sin(torch.arange(200) / 5.) + 0.1 * torch.randn(200, generator=torch.Generator().manual_seed(2))
    windows = series.unfold(0, 11, 12)[:, :, None]
    losses = {}
    for kind in (torch.nn.LSTM, triton_lstm.LSTM):
        layers = model(kind)
        optimizer = torch.optim.Adam(layers.parameters(), lr=5e-3)
        losses[kind] = []
        with harness.interpreter():
            for _ in range(8):
                x = layers[1](layers[0](windows[:, :10])[0])[0]
                loss = torch.nn.functional.mse_loss(layers[2](x[:, -1]), windows[:, 10])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[kind].append(loss.item())
    theirs, ours = (torch.tensor(losses[kind]) for kind in (torch.nn.LSTM, triton_lstm.LSTM))
    assert theirs[-1] < 0.7 * theirs[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)


def test_interpreter_by_environment():
    """As LIMITS.md says, with TRITON_INTERPRET=1 the layer runs the kernels on CPU tensors."""
    program = """
import torch, triton_lstm
from triton_lstm.kernels import launch
calls = []
real = launch.launch_kernel
launch.launch_kernel = lambda kernel, *a, **kw: (calls.append(kernel.fn.__name__), real(kernel, *a, **kw))
layer, x = triton_lstm.LSTM(4, 5), torch.randn(3, 2, 4)
torch.testing.assert_close(layer(x)[0], torch.nn.LSTM.forward(layer, x)[0])
layer(x)[0].sum().backward()
print(*calls)
"""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root,
                            env={**os.environ, "TRITON_INTERPRET": "1"})
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["forward_resident"] * 2 + ["coefficients", "backward_resident"]
