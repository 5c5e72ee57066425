"""``proj_size``, nn.LSTM's projection. The kernels run it as an LSTM over m, with R W_hr in the place of R."""
import copy
from unittest import mock

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import harness
import triton_lstm
import triton_lstm.layer
from problems import BUDGET, Problem, error, floor
from test_double_backward import penalty
from test_gates import written_out
from test_layer import compare, pair

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
FP32, FP16, BF16 = DTYPES = torch.float32, torch.float16, torch.bfloat16
CLUSTERS = pytest.mark.skipif(harness.TRITON < (3, 9), reason="clusters need Triton 3.9")
torch_forward = torch.nn.LSTM.forward


@pytest.fixture
def kernels():
    """Runs the kernels in the interpreter and raises on a fallback, which would compare nn.LSTM with itself."""
    with harness.interpreter(), mock.patch.object(triton_lstm.layer._TorchLSTM, "forward", side_effect=AssertionError):
        yield


def states(layer, *batch, dtype=FP32):
    rows = layer.num_layers * (1 + layer.bidirectional)
    return tuple(torch.randn(rows, *batch, n).to(dtype) for n in (layer.proj_size, layer.hidden_size))


# -- numbers ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", [
    Problem(60, 3, 7, 33, 2, P=5), Problem(60, 5, 16, 64, 1, P=16), Problem(30, 4, 40, 100, 1, P=40),
    Problem(1, 17, 2, 5, 2, P=1, bias=False), Problem(9, 4, 3, 20, 2, P=6, ragged=True),
    Problem(9, 4, 3, 20, 2, P=6, resets=True), Problem(9, 4, 3, 20, 2, P=6, ragged=True, resets=True)], ids=str)
def test_error_budget(problem, dtype):
    problem = Problem(**{**vars(problem), "dtype": dtype})
    with harness.interpreter():
        problem.check(problem.ours(keep_every=16))


def test_error_budget_of_large_weights():
    """With large weights errors grow from step to step. fp32 stays within the budget because R W_hr is computed in
    fp64."""
    problem = Problem(20, 17, 12, 128, P=100)
    real = Problem.tensors

    def tensors(self):
        inputs, gradients = real(self)
        return [3 * t if i in (2, 6) else t for i, t in enumerate(inputs)], gradients
    with mock.patch.object(Problem, "tensors", tensors), harness.interpreter():
        problem.check(problem.ours())


@pytest.mark.parametrize("schedule, dtype, arch", [("resident", FP16, 80), ("grid", FP32, 90), ("grid", BF16, 80),
                                                   ("streamed", BF16, 90)], ids=str)
def test_emulated(schedule, dtype, arch):
    problem = Problem(3, 4, 3, 33, 2, dtype=dtype, ragged=True, P=5)
    plan = (problem.plan(schedule="resident", keep_every=2) if schedule == "resident" else
            problem.shared_plan(schedule))
    with harness.emulator(arch, seed=1, memory="weak"):
        problem.check(problem.ours(plan=plan))


@pytest.mark.parametrize("ctas, dtype", [(1, BF16), (1, FP32), pytest.param(2, FP32, marks=CLUSTERS),
                                         pytest.param(4, FP16, marks=CLUSTERS)], ids=str)
def test_cluster(ctas, dtype):
    """fp32 runs in TF32, to which R W_hr is rounded once."""
    problem = Problem(3, 3, 4, 40, 2, dtype=dtype, tf32=dtype == FP32, P=12)
    with harness.emulator(90):
        problem.check(problem.ours(plan=problem.cluster_plan(ctas)))


# -- the layer --------------------------------------------------------------------------------------------------------

OPTIONS = [dict(), dict(bias=False), dict(bidirectional=True), dict(num_layers=2, batch_first=True),
           dict(num_layers=3, bidirectional=True, batch_first=True), dict(num_layers=2, bias=False, bidirectional=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_matches(options, with_state, dtype):
    theirs, ours, exact = pair(6, 9, proj_size=4, dtype=dtype, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict()) and "weight_hr_l0" in ours.state_dict()
    batch = 4 if ours.batch_first else 5
    with harness.interpreter():
        compare(theirs, ours, exact, torch.randn(4, 5, 6).to(dtype), states(ours, batch, dtype=dtype) if with_state
                else None)


def test_the_kernels_compute(kernels):
    """The kernels compute these cases; otherwise the fixture ``kernels`` would raise."""
    for options in OPTIONS:
        ours = triton_lstm.LSTM(6, 9, proj_size=4, **options)
        y, (h, c) = ours(torch.randn(4, 4, 6), states(ours, 4))
        assert y.shape == (4, 4, 4 * (1 + ours.bidirectional)) and h.shape[1:] == (4, 4) and c.shape[1:] == (4, 9)


@pytest.mark.parametrize("options", [dict(), dict(batch_first=True, bidirectional=True, num_layers=2)], ids=str)
def test_one_step_and_unbatched(options):
    modules = pair(6, 9, proj_size=4, **options)
    with harness.interpreter():
        compare(*modules, torch.randn(4, 6))
        compare(*modules, torch.randn(4, 6), states(modules[1]))
        compare(*modules, torch.randn(1, 1, 6), states(modules[1], 1))


@pytest.mark.parametrize("batch, T", [(0, 4), (3, 0)])
@pytest.mark.parametrize("context", [harness.interpreter, torch.enable_grad])
def test_empty(batch, T, context):
    """Without rows, or without steps (which nn.LSTM refuses), h_n and c_n are copies of the initial state."""
    x, w, r, hr = torch.randn(T, batch, 6), torch.randn(2, 36, 6), torch.randn(2, 36, 4), torch.randn(2, 4, 9)
    hx = torch.randn(2, batch, 4), torch.randn(2, batch, 9)
    with context():
        y, state = triton_lstm.lstm(x, w, r, None, hx, weight_hr=hr)
        _, zeros = triton_lstm.lstm(x, w, r, weight_hr=hr)
    assert y.shape == (T, batch, 8)
    for s, before, zero in zip(state, hx, zeros):
        assert torch.equal(s, before) and s is not before and torch.equal(zero, torch.zeros_like(before))


@pytest.mark.parametrize("lengths", [[6, 4, 4, 1], [3, 6, 1, 6]], ids=str)
@pytest.mark.parametrize("with_state", [False, True])
def test_packed_sequences(lengths, with_state, kernels):
    theirs, ours, _ = pair(3, 7, 2, bidirectional=True, proj_size=2)
    rows = [torch.randn(n, 3) for n in lengths]
    hx = states(ours, len(lengths)) if with_state else None
    packed = torch.nn.utils.rnn.pack_sequence(rows, enforce_sorted=lengths == sorted(lengths, reverse=True))
    y, state = ours(packed, hx)
    (y.data.square().sum() + sum(s.sin().sum() for s in state)).backward()
    with mock.patch.object(triton_lstm.layer._TorchLSTM, "forward", torch_forward):
        want, want_state = theirs(packed, hx)
    (want.data.square().sum() + sum(s.sin().sum() for s in want_state)).backward()
    assert torch.equal(y.batch_sizes, want.batch_sizes)
    for got, right in zip((y.data, *state), (want.data, *want_state)):
        torch.testing.assert_close(got, right, atol=1e-6, rtol=1e-5)
    for got, right in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(got.grad, right.grad, atol=1e-5, rtol=1e-5)


def test_rows_without_steps_and_resets_at_the_start(kernels):
    """A row of length 0 keeps its state. A reset at the first step hides h0 from the forward direction, including NaN
    and gradient. The reverse direction starts from h0, at the row's last step."""
    _, ours, _ = pair(3, 5, bidirectional=True, proj_size=2)
    x, lengths = torch.randn(4, 3, 3), torch.tensor([0, 2, 9])
    reset = torch.zeros(4, 3, dtype=torch.bool)
    reset[0] = True
    h0, c0 = states(ours, 3)
    clean = ours(x, (h0, c0), lengths=lengths, reset=reset)
    for got, before in zip(clean[1], (h0, c0)):
        assert torch.equal(got[:, 0], before[:, 0])
    poisoned = h0.clone()
    poisoned[0, 1:] = float("nan")
    poisoned.requires_grad_()
    y, (h_n, c_n) = ours(x, (poisoned, c0), lengths=lengths, reset=reset)
    for got, right in zip((y, h_n, c_n), (clean[0], *clean[1])):
        assert torch.equal(got, right)
    y.sum().backward()
    assert (poisoned.grad[0] == 0).all() and (poisoned.grad[1, 1:] != 0).all() and (poisoned.grad[1, 0] == 0).all()


def test_one_step_needs_no_product_of_weights():
    """For one step R W_hr is not computed, because it would be multiplied by zero: R h0 is part of the input
    product."""
    problem = Problem(1, 3, 4, 9, 2, P=4)
    with harness.interpreter(), mock.patch.object(triton_lstm.functional, "combine", None):
        problem.check(problem.ours())


def test_dropout():
    """Results with p = 1 are those of nn.LSTM: h_n is taken before dropout, and eval mode has none."""
    theirs, ours, _ = pair(6, 9, num_layers=2, proj_size=4, dropout=1.0)
    x = torch.randn(4, 3, 6)
    for train in (True, False):
        theirs.train(train), ours.train(train)
        want, (h_want, _) = theirs(x)
        with harness.interpreter():
            y, (h, _) = ours(x)
        torch.testing.assert_close(y, want)
        torch.testing.assert_close(h, h_want)
    assert not torch.equal(y, ours.train()(x)[0])


@pytest.mark.parametrize("weights", [FP32, BF16], ids=str)
def test_autocast(weights, kernels):
    _, ours, exact = pair(6, 9, num_layers=2, proj_size=4)
    x, hx = torch.randn(4, 3, 6), states(ours, 3)
    ours.to(weights)
    with torch.autocast("cpu", BF16):
        y, (h, c) = ours(x, hx)
        y.float().sum().backward()
    with mock.patch.object(triton_lstm.layer._TorchLSTM, "forward", torch_forward):
        right = exact(x.double(), tuple(s.double() for s in hx))[0]
    assert y.dtype == h.dtype == c.dtype == BF16
    # the rounding errors of x, the weights, their product, m and h are 2^-9 each
    assert error(y, right) < 5 * 2 ** -9
    assert ours.weight_hr_l0.grad.dtype == weights and ours.weight_hr_l0.grad.isfinite().all()


def test_state_is_checked_as_nn_lstm_does():
    theirs, ours, _ = pair(6, 9, proj_size=4)
    x, h, c = torch.zeros(4, 3, 6), torch.zeros(1, 3, 4), torch.zeros(1, 3, 9)
    for hx in ((c, c), (h, h), (h[:, :2], c), (h, c[0])):
        messages = []
        for layer in (theirs, ours):
            with harness.interpreter(), pytest.raises(RuntimeError) as caught:
                layer(x, hx)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


def test_larger_than_the_chip():
    """R W_hr of 2128 units does not fit on the chip, although R would. So torch's LSTM runs, for any batch, after one
    warning. With a plan of the user's, or with lengths, the kernels run."""
    with harness.emulator(), mock.patch.object(triton_lstm.functional, "_told", set()), \
            mock.patch.object(triton_lstm.layer, "runs_kernels", lambda x, dtype: True), \
            mock.patch.object(triton_lstm.layer, "one_of", side_effect=InterruptedError):
        theirs, ours, _ = pair(4, 2128, proj_size=8, dtype=BF16)
        x = torch.randn(1, 2, 4).to(BF16)
        with pytest.warns(UserWarning, match="torch's own LSTM: proj_size: the product of weight_hh and weight_hr, "
                                             "8512 x 2128, does not fit on the chip"):
            got = ours(x)[0]
        assert torch.equal(got, theirs(x)[0])
        ours(x)             # a second warning would be an error
        assert torch.equal(ours(torch.cat([x] * 9, 1))[0], theirs(torch.cat([x] * 9, 1))[0])
        with pytest.raises(InterruptedError):
            ours(x, lengths=torch.tensor([1, 1]))
        ours.plan = triton_lstm.make_plan(2, 2128, BF16)
        with pytest.raises(InterruptedError):
            ours(x)
        with pytest.raises(InterruptedError):       # R W_hr of 2112 units fits
            triton_lstm.LSTM(4, 2112, proj_size=8).to(BF16)(x)


def test_plan_attribute():
    theirs, ours, exact = pair(6, 33, proj_size=7)
    x = torch.randn(3, 5, 6)
    ours.plan = triton_lstm.make_plan(5, 33, FP32, schedule="grid", tf32=False)
    with harness.interleaved(0):
        compare(theirs, ours, exact, x, states(ours, 5))
    with harness.interpreter(), pytest.raises(ValueError, match="batch 5.*has 4"):
        ours(torch.randn(3, 4, 6))


@pytest.mark.parametrize("change, reason", [
    (dict(weight_hr=torch.zeros(3, 5)), r"weight_hr must have the shape \(1, 2, 5\), got \(1, 3, 5\)"),
    (dict(weight_hr=torch.zeros(2, 6)), "weight_ih must have the shape"),
    (dict(weight_hr=torch.zeros(2, 5).half()), "weight_hr must have the input's dtype"),
    (dict(weight_hh=torch.zeros(20, 5), weight_hr=torch.zeros(5, 5)), "fewer units than the layer, got 5 of 5"),
    (dict(hx=(torch.zeros(1, 2, 5), torch.zeros(1, 2, 5))), r"h0 must have the shape \(1, 2, 2\)"),
    (dict(hx=(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2))), r"c0 must have the shape \(1, 2, 5\)")], ids=str)
def test_functional_errors(change, reason):
    arguments = dict(x=torch.zeros(3, 2, 4), weight_ih=torch.zeros(20, 4), weight_hh=torch.zeros(20, 2),
                     weight_hr=torch.zeros(2, 5))
    for context in (harness.interpreter, torch.enable_grad):
        with context(), pytest.raises(ValueError, match=reason):
            triton_lstm.lstm(**(arguments | change))


# -- derivatives ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [dict(), dict(num_layers=2, bidirectional=True)], ids=str)
def test_gradient_penalty(options):
    theirs, layer, exact = pair(6, 9, proj_size=4, **options)
    x = torch.randn(4, 3, 6)
    right, want = penalty(exact, x.double()), penalty(theirs, x)
    with harness.interpreter():
        got = penalty(layer, x)
    for name in right:
        allowed = BUDGET * max(error(want[name], right[name]), floor(right[name], x.dtype))
        assert error(got[name], right[name]) <= allowed, name


def squares(layer, weights, x, hx=None):
    y, (h, c) = torch.func.functional_call(layer, weights, (x, hx))
    return y.square().sum() + h.sum() + c.sum()


def test_func(kernels):
    """torch.func: grad; an ensemble by vmap, with grad inside and outside of it; jacrev of jacrev."""
    members = [triton_lstm.LSTM(3, 5, bidirectional=True, proj_size=2) for _ in range(3)]
    x, hx = torch.randn(2, 2, 3), states(members[0], 2)
    for member in members:
        squares(member, dict(member.named_parameters()), x, hx).backward()
    weights, _ = torch.func.stack_module_state(members)
    want = {name: torch.stack([dict(m.named_parameters())[name].grad for m in members]) for name in weights}
    one = lambda w: squares(members[0], w, x, hx)
    inside = torch.func.vmap(torch.func.grad(one))(weights)
    outside = torch.func.grad(lambda w: torch.func.vmap(one)(w).sum())(weights)
    single = torch.func.grad(one)({name: w[1] for name, w in weights.items()})
    for name, right in want.items():
        for got in (inside[name], outside[name]):
            torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(single[name], right[1], rtol=1e-5, atol=1e-6)


def test_batched_gradients(kernels):
    ours = triton_lstm.LSTM(6, 9, 2, proj_size=4)
    y, (h, c) = ours(torch.randn(4, 3, 6))
    parameters = list(ours.parameters())
    batch = [torch.randn(3, *t.shape) for t in (y, h, c)]
    got = torch.autograd.grad((y, h, c), parameters, batch, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad((y, h, c), parameters, [g[n] for g in batch], retain_graph=True) for n in range(3)]
    for g, rows in zip(got, zip(*each), strict=True):
        torch.testing.assert_close(g, torch.stack(rows), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")     # torch's own, in its first dual level
def test_tangents_are_never_dropped(kernels):
    with torch.autograd.forward_ad.dual_level():
        hr = torch.autograd.forward_ad.make_dual(torch.randn(2, 5), torch.ones(2, 5))
        with pytest.raises(NotImplementedError, match="jacrev"):
            triton_lstm.lstm(torch.randn(3, 2, 4), torch.randn(20, 4), torch.randn(20, 2), weight_hr=hr)


# -- tracing ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("with_state", [False, True])
def test_compile_full_graph(with_state, kernels):
    """Other lengths and batches compile nothing new, forward and backward."""
    _, ours, _ = pair(6, 9, num_layers=2, bidirectional=True, proj_size=4)
    ours.keep_gates = False         # as by default under torch.compile, so that results are equal to the bit
    torch._dynamo.reset()
    counter = CompileCounter()
    model = torch.compile(ours, fullgraph=True, dynamic=True, backend=counter)
    traced = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for T, B in ((5, 3), (7, 4), (2, 6)):
        x, hx = torch.randn(T, B, 6), states(ours, B) if with_state else None
        got, want = model(x, hx), ours(x, hx)
        assert torch.equal(got[0], want[0]) and all(map(torch.equal, got[1], want[1]))
        gradients = [torch.autograd.grad(f(x, hx)[0].square().sum(), list(ours.parameters())) for f in (traced, ours)]
        assert all(map(torch.equal, *gradients))
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, kernels):
    _, ours, _ = pair(6, 9, 2, proj_size=4)
    T, B = torch.export.Dim("T", min=2), torch.export.Dim("B", min=2)
    program = torch.export.export(ours, (torch.randn(5, 3, 6), states(ours, 3)), strict=strict,
                                  dynamic_shapes=({0: T, 1: B}, ({1: B}, {1: B})))
    ops = [node.target for node in program.graph.nodes if str(node.target) == "triton_lstm.lstm.default"]
    assert len(ops) == 2
    for shape in ((5, 3, 6), (2, 7, 6)):
        x, hx = torch.randn(shape), states(ours, shape[1])
        got, want = program.module()(x, hx), ours(x, hx)
        assert torch.equal(got[0], want[0]) and all(map(torch.equal, got[1], want[1]))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")     # opcheck of torch 2.14
def test_operator_passes_torchs_own_checks():
    from triton_lstm.projection import product_op
    for exact in (False, True):
        a, b = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 4, 5, requires_grad=True)
        torch.library.opcheck(product_op, (a, b, exact))


@pytest.mark.parametrize("allowed", [True, False])
def test_products_follow_the_switch_of_rnns(allowed):
    """Products follow torch's switch for RNNs, not that for matmul. If it allows TF32, they are in TF32, except R W_hr,
    which is in fp32. Otherwise R W_hr is in fp64. R W_hr of 16-bit weights is always in TF32, which represents these
    exactly."""
    from triton_lstm import projection
    seen, real, switch = [], torch.bmm, torch.backends.cuda.matmul
    name, on, off = ("fp32_precision", "tf32", "ieee") if hasattr(switch, "fp32_precision") else (
        "allow_tf32", True, False)

    def bmm(a, b):
        seen.append((a.dtype, getattr(switch, name)))
        return real(a, b)
    before = getattr(switch, name)
    with mock.patch.object(projection, "tf32_allowed", lambda: allowed), mock.patch.object(torch, "bmm", bmm):
        for matmul in (on, off):
            setattr(switch, name, matmul)
            try:
                for dtype in (FP32, BF16):
                    for exact in (True, False):
                        projection.product_op(torch.ones(1, 2, 2).to(dtype), torch.ones(1, 2, 2).to(dtype), exact)
                assert getattr(switch, name) == matmul
            finally:
                setattr(switch, name, before)
            assert seen == [(FP32 if allowed else torch.float64, off), (FP32, on if allowed else off), (FP32, on),
                            (BF16, matmul)]
            seen.clear()


# -- the rest of the package ------------------------------------------------------------------------------------------

def test_convert():
    theirs, _, _ = pair(6, 9, num_layers=2, proj_size=4)
    layer, x = copy.deepcopy(theirs), torch.randn(4, 3, 6)
    assert triton_lstm.convert(layer) == ([""], {}) and type(layer) is triton_lstm.LSTM
    with harness.interpreter():
        torch.testing.assert_close(layer(x)[0], theirs(x)[0])
    assert triton_lstm.to_torch(layer) == ([""], {}) and torch.equal(layer(x)[0], theirs(x)[0])


@pytest.mark.parametrize("options", [dict(), dict(num_layers=2, bidirectional=True, batch_first=True)], ids=str)
def test_drop_connect(options):
    """torch's LSTM and ours drop the same elements of weight_hh, and none of weight_hr."""
    theirs, ours, _ = pair(6, 9, proj_size=4, **options)
    x, results = torch.randn(4, 3, 6), []
    for layer, context in ((theirs, torch.enable_grad), (ours, harness.interpreter)):
        triton_lstm.drop_connect(layer, 0.5)
        torch.manual_seed(3)
        with context():
            y, _ = layer(x)
            y.square().sum().backward()
        results.append((y, {name: p.grad for name, p in layer.named_parameters()}))
    torch.testing.assert_close(*results)
    gradients = results[1][1]
    assert (gradients["weight_hh_l0"] == 0).float().mean() > 0.3 and (gradients["weight_hr_l0"] != 0).all()


@pytest.mark.parametrize("inplace", [False, True])
def test_step(inplace, kernels):
    """``step`` gives the results of the whole sequence."""
    _, ours, _ = pair(6, 9, num_layers=2, proj_size=4)
    x, state = torch.randn(5, 3, 6), states(ours, 3)
    with torch.no_grad():
        want, want_state = ours(x, state)
        for x_t, right in zip(x, want):
            y, state = ours.step(x_t, state, inplace=inplace)
            assert y.shape == (3, 4)
            torch.testing.assert_close(y, right)
    for got, right in zip(state, want_state):
        torch.testing.assert_close(got, right)


@pytest.mark.parametrize("kind, context", [(torch.nn.LSTM, torch.enable_grad), (triton_lstm.LSTM, harness.interpreter)])
@pytest.mark.parametrize("with_state", [False, True])
def test_gates(with_state, kind, context):
    torch.manual_seed(0)
    layer, x = kind(4, 7, num_layers=2, bidirectional=True, proj_size=3), torch.randn(5, 3, 4)
    hx = states(layer, 3) if with_state else None
    want = written_out(layer, x, hx or tuple(map(torch.zeros_like, states(layer, 3))))
    with context():
        got = triton_lstm.gates(layer, x, hx)
    assert len(got) == 4
    for trajectories, right in zip(got, want, strict=True):
        for name, value in trajectories._asdict().items():
            assert value.shape == (5, 3, 7)
            torch.testing.assert_close(value, right[name].float(), rtol=1e-5, atol=2e-6)


def test_saved_for_backward():
    """Besides x, y and the weights are saved: c of every keep_every-th step, m of all steps, and R W_hr."""
    T, B, I, H, P, D = 12, 3, 5, 10, 4, 2
    tensor = lambda *shape: torch.randn(shape).requires_grad_()
    arguments = [tensor(T, B, I), tensor(D, 4 * H, I), tensor(D, 4 * H, P), tensor(D, 4 * H)]
    hr, kept = tensor(D, P, H), []
    with harness.interpreter(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y, _ = triton_lstm.lstm(*arguments, weight_hr=hr, keep_every=4)
    own = {t.untyped_storage().data_ptr() for t in (*arguments, hr, y)}
    others = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    plan = triton_lstm.make_plan(B, H, FP32, D, limits=None, keep_every=4)
    states_bytes = 4 * (3 * D * B * H)          # m and c before the first step (zeros), and m_n, for h_n
    got = sum(size for place, size in others.items() if place not in own)
    assert got == plan.saved_bytes(T) + 4 * (T * B * D * H + D * 4 * H * H) + states_bytes


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(20, 17, 12, 100, 2), (30, 33, 40, 512, 1)], ids=str)
def test_on_a_gpu(shape, dtype):
    problem = Problem(*shape, dtype=dtype, tf32=dtype == FP32, device="cuda", P=40)
    problem.check(problem.ours())
