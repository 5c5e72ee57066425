"""Layers as a wavefront: results are those of one layer after the other, and order and waits are right."""
import contextlib
import dataclasses
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton_lstm.kernels.launch import BEFORE_LOOPS

import harness
import triton_lstm
import triton_lstm.layer
from harness import TRITON
from problems import BUDGET, PORTABLE, Problem, assert_apart, error, floor
from triton_lstm import wavefront
from triton_lstm.kernels import streams as order
from triton_lstm.plan import H200, Plan, make_plan, step_cycles

SLOW = dataclasses.replace(PORTABLE, mhz=1000)         # 64 steps take 100 us
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@contextlib.contextmanager
def overlapping(steps):
    """Inside, all layers that can run as a wavefront do so, in chunks of ``steps`` steps. Yields the mock of
    run_diagonals, which shows whether they did."""
    with mock.patch.object(wavefront, "why_not", lambda *args: None), \
            mock.patch.object(wavefront, "chunk_steps", lambda T, plan, limits: steps), \
            mock.patch.object(wavefront, "run_diagonals", wraps=order.run_diagonals) as runs:
        yield runs


@contextlib.contextmanager
def one_by_one(steps):
    """Inside, layers run one after the other, in chunks of ``steps``, because products over other numbers of rows may
    be rounded differently."""
    chunks = [sequence._forward_chunks for sequence in (harness.interpreted_sequence, harness.compiled_sequence)]
    with mock.patch.object(Plan, "forward_steps", lambda self, T, element: min(steps, T)):
        for remembered in chunks:       # of the same sizes, by the real number of steps
            remembered.cache_clear()
        yield
    for remembered in chunks:
        remembered.cache_clear()


def make(I, H, layers, dtype=torch.float32, batch=3, keep_every=4, **options):
    torch.manual_seed(1)
    layer = triton_lstm.LSTM(I, H, layers, **options).to(dtype)
    layer.plan = make_plan(batch, H, dtype, limits=None, tf32=False, keep_every=keep_every)
    return layer


def step(layer, x, hx=None, outputs=(0, 1, 2), frozen=(), needs_x=True):
    """{name: tensor} of outputs and gradients, with a fixed seed for dropout; None for what has no gradient."""
    x = x.detach().requires_grad_(needs_x)
    hx = hx and tuple(s.detach().requires_grad_() for s in hx)
    for name, p in layer.named_parameters():
        p.requires_grad_(not any(part in name for part in frozen))
        p.grad = None
    torch.manual_seed(2)
    y, state = layer(x, hx)
    drawn = torch.rand(1)
    results = [y, *state]
    generator = torch.Generator().manual_seed(5)
    gradients = [torch.randn(t.shape, generator=generator).to(t) for t in results]
    torch.autograd.backward([results[n] for n in outputs], [gradients[n] for n in outputs])
    named = dict(zip(("y", "h_n", "c_n"), results), drawn=drawn, dx=x.grad)
    named.update((name, p.grad) for name, p in layer.named_parameters())
    if hx:
        named.update(dh0=hx[0].grad, dc0=hx[1].grad)
    return named


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert (got[name] is None) == (want[name] is None), name
        if want[name] is not None:
            assert torch.isfinite(want[name]).all() and got[name].stride() == want[name].stride(), name
            torch.testing.assert_close(got[name], want[name], rtol=0, atol=0, msg=name)


def both(layer, steps, function):
    """(``function(layer)`` as a wavefront, the same layer by layer)."""
    with harness.interpreter():
        with overlapping(steps) as runs:
            got = function(layer)
        assert runs.called
        with one_by_one(steps), mock.patch.object(wavefront, "run_diagonals", side_effect=AssertionError):
            return got, function(layer)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T, B, I, H, layers, steps, keep_every, given, options", [
    (7, 3, 6, 9, 2, 3, 3, True, dict()), (8, 3, 6, 9, 3, 3, 2, False, dict(dropout=0.3)),
    (5, 17, 4, 33, 2, 2, 3, False, dict(bias=False)), (6, 3, 5, 5, 4, 2, 4, True, dict(batch_first=True, dropout=0.5)),
    (1, 1, 1, 1, 2, 4, 4, True, dict()), (4, 1, 3, 1, 3, 1, 1, False, dict(dropout=1.)),
    (3, 2, 3, 100, 2, 64, 16, False, dict(dropout=0.25, batch_first=True)),
], ids=str)
def test_equals_layer_by_layer(T, B, I, H, layers, steps, keep_every, given, options, dtype):
    layer = make(I, H, layers, dtype, B, keep_every, **options)
    x = torch.randn((B, T, I) if layer.batch_first else (T, B, I)).to(dtype)
    hx = (torch.randn(layers, B, H).to(dtype), torch.randn(layers, B, H).to(dtype)) if given else None
    got, want = both(layer, steps, lambda layer: step(layer, x, hx))
    assert_equal(got, want)
    assert_apart({name: tensor for name, tensor in got.items() if name != "drawn"})


def test_layers_have_workspace_of_their_own():
    """They run at the same time, in a stream each."""
    with harness.interpreter(), overlapping(3), harness.places() as places:
        step(make(6, 9, 3), torch.randn(7, 3, 6))
    for name in ("forward_resident", "x_ptr"), ("coefficients", "coef_ptr"), ("backward_resident", "da_ptr"):
        assert len({*places[name]}) == 3, name


def test_unbatched():
    layer = make(6, 9, 2, batch=1)
    assert_equal(*both(layer, 3, lambda layer: step(layer, torch.randn(8, 6, generator=torch.manual_seed(3)))))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_within_the_budget(dtype):
    """Compared with nn.LSTM in float64, with the automatic plan and the automatic chunks."""
    torch.manual_seed(1)
    theirs = torch.nn.LSTM(6, 9, 2).to(dtype)
    exact, layer = torch.nn.LSTM(6, 9, 2).double(), triton_lstm.LSTM(6, 9, 2).to(dtype)
    for other in (exact, layer):
        other.load_state_dict(theirs.state_dict())
    x = torch.randn(40, 2, 6).to(dtype)
    with mock.patch.object(wavefront, "CHUNK", 16):
        steps = wavefront.chunk_steps(40, None, None)
    with harness.interpreter(), overlapping(steps) as runs:
        got = step(layer, x)
    assert runs.call_args_list[0].args[1] == 3
    want, right = step(theirs, x), step(exact, x.double())
    for name in right.keys() - {"drawn"}:
        allowed = BUDGET * max(error(want[name], right[name]), floor(right[name], dtype))
        assert error(got[name], right[name]) <= allowed, name


@pytest.mark.parametrize("outputs", [(0,), (1,), (2,), (1, 2)], ids=str)
def test_some_outputs(outputs):
    x = torch.randn(5, 3, 6)
    assert_equal(*both(make(6, 9, 3, dropout=0.2), 3, lambda layer: step(layer, x, outputs=outputs)))


@pytest.mark.parametrize("needs_x, given", [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("frozen", [("l0",), ("l0", "l1"), ("weight_hh", "bias"), ("l1",), ("l2",), ("weight_ih", "l2"),
                                    ("_l0", "bias", "hh")], ids=str)
def test_frozen_weights(frozen, given, needs_x):
    x, hx = torch.randn(4, 3, 6), (torch.randn(3, 3, 9), torch.randn(3, 3, 9)) if given else None
    layer = make(6, 9, 3, keep_every=2, dropout=0.2)
    assert_equal(*both(layer, 2, lambda layer: step(layer, x, hx, frozen=frozen, needs_x=needs_x)))


def test_layers_below_all_that_learns_keep_nothing():
    """Layers that are frozen, below all others, overlap with each other. Nothing of them is kept."""
    with harness.interpreter(), overlapping(3) as runs, torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(t) or t, lambda t: t):
        saved = []
        step(make(6, 9, 4, dropout=0.5), torch.randn(7, 3, 6), frozen=("l0", "l1", "l2"), needs_x=False)
        assert [len(call.args[0]) for call in runs.call_args_list] == [3]
    # x and y of the last layer
    assert sorted(t.shape for t in saved if t.dim() > 2 and t.numel() > 2 * 3 * 9) == [(7, 3, 9)] * 2


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_no_grad_saves_nothing(training):
    layer, x = make(6, 9, 2, dropout=0.4).train(training), torch.randn(7, 3, 6)
    real = harness.interpreted_sequence.forward_chunks
    with mock.patch.object(harness.interpreted_sequence, "forward_chunks", side_effect=real) as chunks:
        def function(layer):
            torch.manual_seed(2)
            with torch.no_grad():
                y, (h, c) = layer(x)
            assert y.grad_fn is None and not y.requires_grad
            return dict(y=y, h=h, c=c, drawn=torch.rand(1))
        assert_equal(*both(layer, 3, function))
    assert chunks.call_count == 4 and all(call.args[8] is False for call in chunks.call_args_list)


def test_eval_with_gradients():
    x = torch.randn(7, 3, 6)
    assert_equal(*both(make(6, 9, 2, dropout=0.4).eval(), 3, lambda layer: step(layer, x)))


def test_autocast():
    """Weights and x are cast once, and gradients of weights are in fp32."""
    def function(layer):
        with torch.autocast("cpu", torch.bfloat16):
            return step(layer, x)
    layer, x = make(6, 9, 2, dropout=0.2), torch.randn(7, 3, 6)
    layer.plan = triton_lstm.make_plan(3, 9, torch.bfloat16, limits=None, keep_every=3)
    got, want = both(layer, 3, function)
    assert_equal(got, want)
    assert got["y"].dtype == torch.bfloat16 and got["weight_hh_l0"].dtype == torch.float32


@pytest.mark.parametrize("penalty", ["y", "h_n"])
def test_second_derivatives(penalty):
    """A gradient penalty. Weights depend on each other and on x, which shows whether a gradient is counted twice."""
    def function(layer):
        torch.manual_seed(2)
        x = torch.randn(6, 3, 9).requires_grad_()
        s = (torch.randn(2, 3, 9).requires_grad_(), torch.randn(2, 3, 9).requires_grad_())
        weights = dict(layer.named_parameters())
        tied = dict(weights, weight_ih_l0=weights["weight_hh_l0"] * 2 + x.sum() * 0.01)
        y, (h, c) = torch.func.functional_call(layer, tied, (x, s))
        out = (y.square().sum() + c.sum() if penalty == "y" else h.square().sum())
        wanted = [x, *s, *(p for name, p in weights.items() if name != "weight_ih_l0")]
        first = torch.autograd.grad(out, wanted, create_graph=True, allow_unused=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted)
        return {f"{n}": t.detach() for n, t in enumerate((*first, *second))}
    got, want = both(make(9, 9, 2, dropout=0.3), 64, function)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)


def test_batched_gradients():
    """With ``is_grads_batched``, vmap runs over backward."""
    def function(layer):
        y, _ = layer(x)
        dx, dw = torch.autograd.grad(y, (x, layer.weight_hh_l0), dy, is_grads_batched=True)
        return dict(dx=dx, dw=dw)
    x, dy = torch.randn(5, 3, 6).requires_grad_(), torch.randn(2, 5, 3, 9)
    got, want = both(make(6, 9, 2), 64, function)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6)


def test_saved_tensors():
    """No tensor is saved twice, because hooks may copy each. Besides the inputs, both y, y after dropout, the mask of
    dropout, and c are saved."""
    layer, x, saved = make(6, 9, 2, dropout=0.5, keep_every=2), torch.randn(5, 3, 6), []
    with harness.interpreter(), overlapping(3), torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(t) or t, lambda t: t):
        y, _ = layer(x)
        saved.clear()
        y, _ = layer(x)
    found = [tuple(t.shape) for t in saved if t.shape[:2] == (5, 3)]
    assert sorted(found) == [(5, 3, 6), *[(5, 3, 9)] * 4]
    assert [tuple(t.shape) for t in saved if t.dim() == 4] == [(2, 1, 3, 9)] * 2
    assert [t.dtype for t in saved].count(torch.bool) == 1


def test_backward_twice():
    layer, x = make(6, 9, 2), torch.randn(5, 3, 6).requires_grad_()
    with harness.interpreter(), overlapping(3):
        y, _ = layer(x)
        first, = torch.autograd.grad(y.sum(), x, retain_graph=True)
        second, = torch.autograd.grad(y.sum(), x)
        assert torch.equal(first, second) and first.abs().max() > 0
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(y.sum(), x)
        y, _ = layer(x)
        y += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_checkpointed():
    """With checkpointing, backward computes the layers again, with the same seed."""
    def function(layer):
        torch.manual_seed(2)
        leaf = x.detach().requires_grad_()
        y, _ = torch.utils.checkpoint.checkpoint(layer, leaf, use_reentrant=False)
        return dict(y=y, dx=torch.autograd.grad(y.square().sum(), leaf)[0])
    x = torch.randn(5, 3, 6)
    assert_equal(*both(make(6, 9, 2, dropout=0.4), 3, function))


def test_programs_that_exchange():
    """Two layers with grid plans, whose programs exchange h and are interleaved."""
    layer, x = make(4, 20, 2, torch.float16), torch.randn(5, 3, 4).half()
    layer.plan = make_plan(3, 20, torch.float16, limits=PORTABLE, schedule="grid", keep_every=3)
    assert layer.plan.programs == 2
    with harness.interleaved(0), overlapping(2) as runs:
        got = step(layer, x)
    assert runs.called
    with harness.interleaved(1), one_by_one(2):
        assert_equal(got, step(layer, x))


@pytest.mark.parametrize("ctas", [1, 2])
def test_cluster_chunks_between_kept_states(ctas):
    """The compiled kernels keep c before steps 3 and 6, although chunks of forward begin at other steps."""
    if TRITON < (3, 9) and ctas > 1:
        pytest.skip("clusters need Triton 3.9")
    layer, x = make(4, 33, 2, torch.float16), torch.randn(7, 3, 4).half()
    layer.plan = Problem(7, 3, 4, 33, dtype=torch.float16).cluster_plan(ctas, keep_every=3)
    assert layer.plan.gluon and layer.plan.programs == ctas
    with harness.emulator(), mock.patch.object(triton_lstm.layer, "runs_kernels", lambda x, dtype: True):
        with overlapping(2) as runs:
            got = step(layer, x)
        assert runs.call_count == 2
        with one_by_one(7):
            want = step(layer, x)
    for name in want.keys() - {"drawn"}:
        # In fp16, products over fewer rows may be rounded differently.
        assert error(got[name], want[name].double()) < 2e-3, name


class Other(torch.Tensor):
    pass


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options, arguments", [
    (dict(num_layers=1), dict()), (dict(bidirectional=True), dict()), (dict(proj_size=3), dict()),
    (dict(zoneout=0.1), dict()), (dict(), dict(lengths=torch.tensor([7, 2, 0]))),
    (dict(), dict(reset=torch.zeros(7, 3, dtype=torch.bool))),
], ids=["one layer", "bidirectional", "proj_size", "zoneout", "lengths", "reset"])
def test_layer_by_layer_with(options, arguments):
    layer = triton_lstm.LSTM(6, 9, **{"num_layers": 2, **options})
    with harness.interpreter(), overlapping(3) as runs:
        layer(torch.randn(7, 3, 6), **arguments)
    assert not runs.called


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")     # torch's own, in its first dual level
def test_layer_by_layer_under_transforms():
    layer, x = make(6, 9, 2), torch.randn(7, 3, 6)
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(5, 6)] * 3)
    with harness.interpreter(), overlapping(3) as runs:
        torch.func.grad(lambda x: layer(x)[0].sum())(x)
        torch.func.vmap(layer)(x[None])
        layer(packed)
        layer(x.as_subclass(Other))
        with pytest.raises(ValueError, match="the plan is for batch 3"):
            layer(x[:, :0])
        with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward AD"):
            layer(torch.autograd.forward_ad.make_dual(x, x))
        with Watching():
            layer(x)
        with mock.patch.object(torch.compiler, "is_compiling", lambda: True):
            layer(x)
        assert not runs.called
        layer(x)
        assert runs.called


def test_errors():
    """Errors are those of ``lstm``."""
    layer, x = make(6, 9, 2), torch.randn(7, 3, 6)
    with harness.interpreter(), overlapping(3):
        with pytest.raises(ValueError, match="the plan is for batch 3"):
            layer(torch.randn(7, 4, 6))
        with pytest.raises(ValueError, match=r"weight_ih must have the shape \(1, 36, 9\), got \(1, 36, 8\)"):
            torch.func.functional_call(layer, dict(weight_ih_l1=torch.randn(36, 8)), (x,))
        layer.plan = dataclasses.replace(layer.plan, hidden_size=8)
        with pytest.raises(ValueError, match="hidden_size 8"):
            layer(x)
        layer.plan = "grid"
        with pytest.raises(TypeError, match="plan must be"):
            layer(x)


def test_rule():
    """A wavefront needs at least two chunks of 64 steps, and all programs must run at once."""
    plan = make_plan(16, 256, torch.bfloat16, limits=PORTABLE, schedule="grid")
    layers = 132 // plan.launched
    assert layers > 1 and wavefront.why_not(plan, 128, layers, SLOW) is None
    assert "127 steps are fewer than two chunks of 64" in wavefront.why_not(plan, 127, layers, SLOW)
    assert "do not run side by side on 132" in wavefront.why_not(plan, 128, layers + 1, SLOW)
    assert "reverse direction" in wavefront.why_not(dataclasses.replace(plan, directions=2), 128, 2, SLOW)
    assert "interpreter" in wavefront.why_not(plan, 128, 2, None)
    assert [wavefront.chunk_steps(T, plan, SLOW) for T in (128, 500, 512, 513, 600, 1024, 1025)] == [
        64, 64, 64, 80, 80, 128, 144]
    # a chunk takes 100 us at least
    short = make_plan(16, 64, torch.bfloat16, limits=H200)
    cycles, steps = step_cycles(short, 132, "forward"), wavefront.chunk_steps(128, short, H200)
    assert steps % 16 == 0 and steps * cycles / H200.mhz >= 100 > (steps - 16) * cycles / H200.mhz
    assert f"two chunks of {steps}" in wavefront.why_not(short, 2 * steps - 1, 2, H200)


def test_not_in_the_interpreter():
    with harness.interpreter(), mock.patch.object(wavefront, "run_diagonals", side_effect=AssertionError):
        make(2, 3, 2)(torch.randn(130, 3, 2))


def test_explained():
    x = torch.empty(1000, 16, 64, dtype=torch.bfloat16, device="meta")
    text = lambda x=x, num_layers=2, **options: triton_lstm.explain(
        triton_lstm.LSTM(64, 256, num_layers, **options), x, H200)
    assert ("\n  layers run as a wavefront, side by side, 192 steps at a time forward and 192 backward, unless there "
            "are lengths, resets or torch.compile\n  launches of the time loop a layer: 6 forward, 6 backward\n"
            ) in text()
    assert "\n  layers run one after the other: 100 steps are fewer than two chunks of 192\n" in text(x[:100])
    assert "\n  layers run one after the other: the reverse direction" in text(bidirectional=True)
    assert "\n  layers run one after the other: there is zoneout\n" in text(zoneout=0.1)
    assert "\n  layers run one after the other: there is proj_size\n" in text(proj_size=8)
    assert "wavefront" not in text(num_layers=1) and "one after the other" not in text(num_layers=1)


class FakeStreams:
    """Stand-ins for CUDA streams that record in ``done`` what happens: ("wait", stream, other stream), ("before",
    stream, layer, chunk) and ("run", stream, layer, chunk)."""

    def __init__(self, count):
        self.done, self.now = [], "caller"
        self.streams = {name: mock.Mock() for name in ("caller", *range(count))}
        for name, stream in self.streams.items():
            stream.configure_mock(label=name)
            stream.wait_stream = lambda other, name=name: self.done.append(("wait", name, other.label))

    @contextlib.contextmanager
    def use(self, stream):
        before, self.now = self.now, stream.label
        yield
        self.now = before

    def layer(self, n, count, fails=None):
        for k in range(count):
            if k == fails:
                raise MemoryError
            self.done.append(("run", self.now, n, k))
            yield

    def run(self, layers, count, **fails):
        generators = [self.layer(n, count, **(fails if n == 0 else {})) for n in range(layers)]
        with mock.patch.object(order, "side_streams", lambda device, n: [self.streams[i] for i in range(n)]), \
                mock.patch.object(torch.cuda, "current_stream", lambda device: self.streams["caller"]), \
                mock.patch.object(torch.cuda, "stream", self.use):
            order.run_diagonals(generators, count, lambda n, k: self.done.append(("before", self.now, n, k)),
                                torch.device("cuda"))


@pytest.mark.parametrize("layers, count", [(1, 3), (2, 1), (2, 5), (3, 2), (4, 7)])
def test_every_chunk_waits_for_its_input(layers, count):
    """Each action comes after all that it needs, by the order within its stream and by waits."""
    fake = FakeStreams(layers)
    fake.run(layers, count)
    after = {name: set() for name in fake.streams}      # {stream: what its next action comes after}
    after["caller"].add("set up")
    for kind, name, *of in fake.done:
        if kind == "wait":
            after[name] |= after[of[0]]
            continue
        n, k = of
        assert name == n
        needs = {"set up"} | {("run", n - 1, i) for i in range(k + 1) if n} | {("run", n, i) for i in range(k)}
        assert needs <= after[name], (kind, n, k)
        # it comes after no more than that, so layer n + 1 and later chunks overlap with it
        assert not any(i > n or i == n and j > k or i < n and j > k + n - i for _, i, j in after[name] - {"set up"})
        if kind == "run":
            after[name].add(("run", n, k))
    assert after["caller"] >= {("run", n, k) for n in range(layers) for k in range(count)}
    ran = [tuple(of) for kind, _, *of in fake.done if kind == "run"]
    assert [n + k for n, k in ran] == sorted(n + k for n in range(layers) for k in range(count))


def test_the_caller_waits_after_an_exception():
    fake = FakeStreams(2)
    with pytest.raises(MemoryError):
        fake.run(2, 3, fails=1)
    assert fake.done[-2:] == [("wait", "caller", 0), ("wait", "caller", 1)]


def test_launches_are_diagonal():
    """Forward goes from the first layer and step to the last, backward the other way. No launch needs another one of
    the same diagonal."""
    launched = []

    def launch(kernel, plan, grid, *args, waits, **constants):
        if kernel.__name__ not in BEFORE_LOOPS:
            at = [n for n, name in enumerate(kernel.arg_names) if name == "first"][0]
            launched.append((kernel.__name__, args[at]))

    layer = make(6, 9, 3, keep_every=2)
    with harness.interpreter(), overlapping(4), mock.patch.object(harness.interpreted_launch, "launch_kernel", launch):
        layer(torch.randn(8, 3, 6))[0].sum().backward()
    forward = [0, 0, 4, 0, 4, 4]                            # layers 0 | 1 0 | 2 1 | 2
    backward = [6, 6, 4, 6, 4, 2, 4, 2, 0, 2, 0, 0]         # layers 2 | 1 2 | 0 1 2 | 0 1 2 | 0 1 | 0
    assert launched == [*(("forward_resident", n) for n in forward), *(("backward_resident", n) for n in backward)]


@pytest.fixture
def large():
    """(a layer that by default runs as a wavefront on a GPU, its input)."""
    torch.manual_seed(1)
    layer = triton_lstm.LSTM(64, 128, 3, dropout=0.3).cuda().bfloat16()
    return layer, torch.randn(600, 16, 64, device="cuda", dtype=torch.bfloat16)


def on_gpu(layer, x):
    x = x.detach().requires_grad_()
    layer.zero_grad()
    torch.cuda.manual_seed(3)
    y, (h, c) = layer(x)
    (y.float().square().sum() + h.float().sum() + c.float().sum()).backward()
    return dict(y=y, h=h, c=c, dx=x.grad, **{name: p.grad for name, p in layer.named_parameters()})


@pytest.mark.gpu
def test_gpu_equals_layer_by_layer(large):
    layer, x = large
    with mock.patch.object(wavefront, "run_diagonals", wraps=order.run_diagonals) as runs:
        got, again = on_gpu(layer, x), on_gpu(layer, x)
    assert runs.call_count == 4
    with mock.patch.object(wavefront, "why_not", lambda *args: "for comparison"):
        want = on_gpu(layer, x)
    for name in want:
        assert torch.equal(got[name], again[name]), name
        # cuBLAS may round products over fewer rows differently.
        assert error(got[name], want[name].double()) < 0.01, name


@pytest.mark.gpu
def test_gpu_on_another_stream_with_memory_reused(large):
    """If a stream did not wait for another, memory that is freed and filled again would give wrong results."""
    layer, x = large
    want = on_gpu(layer, x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(10):
            got = on_gpu(layer, x)
            for _ in range(4):
                torch.full_like(x, float("nan"))
            for name in want:
                assert torch.equal(got[name], want[name]), name
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.gpu
def test_gpu_graph(large):
    layer, x = large
    layer.eval()
    want = on_gpu(layer, x)
    static = x.clone().requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()

    def train():
        y, (h, c) = layer(static)
        (y.float().square().sum() + h.float().sum() + c.float().sum()).backward()
        return y

    with torch.cuda.stream(side):
        for _ in range(3):
            train()
    torch.cuda.current_stream().wait_stream(side)
    layer.zero_grad()
    static.grad = None
    with torch.cuda.graph(graph):
        y = train()
    for scale in (0.5, 1.):
        static.data.copy_(x * scale)
        for t in (static, *layer.parameters()):
            t.grad.zero_()
        graph.replay()
    torch.cuda.synchronize()
    assert error(y, want["y"].double()) < 1e-6 and error(static.grad, want["dx"].double()) < 1e-6
    for name, p in layer.named_parameters():
        assert error(p.grad, want[name].double()) < 1e-6, name
