"""One step (T = 1) without gradients: the kernel, which calls take it, and CUDA graphs of it."""
import contextlib
import copy
from unittest import mock

import pytest
import torch

import harness
import triton_lstm
import triton_lstm.graphed
from bench.machine_code import read
from problems import BUDGET, Problem, assert_apart, error, floor
from ptx_emulator import EmulatorError
from triton_lstm import faults, layer, op
from triton_lstm.kernels import offline
from triton_lstm.plan.search import precision_for

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAMES = "y", "h_n", "c_n"


def kernel(problem, halves=False):
    """{name: tensor} of the kernel alone. halves: the bias is given as two, as nn.LSTM has it."""
    (x, w, r, b, h0, c0), _ = problem.tensors()
    bias = lambda d: (None, None) if b is None else (b[d] / 2, b[d] / 2) if halves else (b[d], None)
    weights = [(w[d], r[d], *bias(d)) for d in range(problem.D)]
    precision = precision_for(x.dtype, op.tf32_allowed())
    return dict(zip(NAMES, op.sequence.one_step(x, weights, h0, c0, h0.shape, problem.D, precision)))


def check(problem, got):
    exact, torchs = problem.exact(), problem.torch()
    for name in NAMES:
        right = exact[name]
        assert got[name].shape == right.shape and got[name].dtype == problem.dtype, name
        allowed = BUDGET * max(error(torchs[name], right), floor(right, problem.dtype, problem.tf32))
        assert error(got[name], right) <= allowed, f"{name}: {error(got[name], right):.2e}, allowed {allowed:.2e}"
    assert_apart(got)


@contextlib.contextmanager
def counted():
    """The launches inside, as (kernel, plan)."""
    found, launches = [], harness.interpreted_launch.launch_kernel

    def count(kernel, plan, *args, **options):
        found.append((kernel.__name__, plan))
        launches(kernel, plan, *args, **options)
    with harness.interpreter(), mock.patch.object(harness.interpreted_launch, "launch_kernel", count):
        yield found


SHAPES = [(1, 1, 1, 1), (3, 7, 5, 2), (17, 5, 33, 2), (1, 33, 100, 1), (17, 3, 100, 2), (35, 130, 20, 1)]   # B, I, H, D


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interpreted(shape, dtype):
    B, I, H, D = shape
    problem = Problem(1, B, I, H, D, dtype)
    with harness.interpreter():
        check(problem, kernel(problem))
        check(problem, kernel(problem, halves=True))


@pytest.mark.parametrize("arch, dtype, tf32", [(90, FP32, True), (80, FP32, True), (90, FP32, False), (80, FP16, False),
                                               (89, BF16, False), (90, FP16, False)], ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_emulated(shape, arch, dtype, tf32):
    B, I, H, D = shape
    problem = Problem(1, B, I, H, D, dtype, tf32=tf32)
    with harness.emulator(arch), mock.patch.object(op, "tf32_allowed", lambda: tf32):
        check(problem, kernel(problem))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_without_bias_state_or_y(dtype):
    problem = Problem(1, 5, 6, 20, 2, dtype, bias=False)
    (x, w, r, _, h0, c0), _ = problem.tensors()
    weights = [(w[d], r[d], None, None) for d in range(2)]
    with harness.interpreter():
        check(problem, kernel(problem))
        call = lambda *state, **more: op.sequence.one_step(x, weights, *state, h0.shape, 2, precision_for(
            dtype, op.tf32_allowed()), **more)
        for ours, zeros in zip(call(None, None), call(torch.zeros_like(h0), torch.zeros_like(c0)), strict=True):
            assert torch.equal(ours, zeros)
        y, h_n, _ = call(h0, c0, with_y=False)
        assert y is None and torch.equal(h_n, call(h0, c0)[1])


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_a_row_does_not_depend_on_its_place_or_neighbours(dtype):
    """Bit by bit, and a NaN in one row stays there. Two runs give the same bits."""
    problem = Problem(1, 40, 6, 20, 1, dtype)
    (x, w, r, b, h0, c0), _ = problem.tensors()
    run = lambda x, h0, c0: op.sequence.one_step(x, [(w[0], r[0], b[0], None)], h0, c0, h0.shape, 1,
                                                 precision_for(dtype, op.tf32_allowed()))
    order = torch.randperm(40)
    with harness.emulator():
        right = run(x, h0, c0)
        for t, moved, again in zip(right, run(*(t[:, order] for t in (x, h0, c0))), run(x, h0, c0)):
            assert torch.equal(t[:, order], moved) and torch.equal(t, again)
        x[0, 3, 2], h0[0, 39, 5], c0[0, 20, 7] = torch.nan, torch.inf, torch.nan
        for t, bad in zip(right, run(x, h0, c0)):
            others = [n for n in range(40) if n not in (3, 20, 39)]
            assert torch.equal(t[:, others], bad[:, others])
            assert bad[:, 3].isnan().all() and bad[0, 20].isnan().sum() == 1


@pytest.mark.parametrize("old, new", [
    ("mask=has_row & (k[None, :] < K)", "mask=k[None, :] < K"),         # rows past the last
    ("has_column & (k[:, None] < K)", "has_column"),              # features of the next row of R, or past the last
    ("tl.where(d == 0, r_ptr, reverse_r_ptr)", "r_ptr"), ("+= tl.load(b_hh_ptr", "+= 2 * tl.load(b_hh_ptr"),
], ids=["rows", "features", "direction", "bias"])
def test_a_broken_kernel_is_noticed(old, new, tmp_path):
    problem = Problem(1, 17, 5, 20, 2, FP16)
    with harness.edited("step_forward", tmp_path, old, new), harness.emulator(), \
            pytest.raises((EmulatorError, AssertionError)):
        check(problem, kernel(problem, halves=True))


LAYERS = [dict(), dict(bias=False), dict(num_layers=2), dict(bidirectional=True), dict(num_layers=2, batch_first=True),
          dict(num_layers=2, bidirectional=True), dict(num_layers=2, dropout=0.5)]


@pytest.mark.parametrize("state", [False, True], ids=["zeros", "state"])
@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_layer(options, state):
    """One launch a layer, and the result of the layer with gradients."""
    torch.manual_seed(0)
    lstm = triton_lstm.LSTM(6, 9, **options).eval()
    L, D = lstm.num_layers, 2 if lstm.bidirectional else 1
    x = torch.randn((3, 1, 6) if lstm.batch_first else (1, 3, 6))
    hx = (torch.randn(L * D, 3, 9), torch.randn(L * D, 3, 9)) if state else None
    with counted() as found:
        y, (h, c) = lstm(x, hx)
        assert "forward_step" not in {name for name, _ in found}        # parameters require grad
        del found[:]
        with torch.no_grad():
            got, (got_h, got_c) = lstm(x, hx)
        assert [name for name, _ in found] == ["forward_step"] * L
    for ours, right in ((got, y), (got_h, h), (got_c, c)):
        torch.testing.assert_close(ours, right)
        assert ours.is_contiguous() and not ours.requires_grad
    assert_apart(dict(y=got, h_n=got_h, c_n=got_c))


def test_who_takes_it():
    """step, in place too, cells, the function, calls without a batch, under autocast and with a projection take it;
    calls with gradients, masks, zoneout, a plan or more steps do not."""
    torch.manual_seed(0)
    x, lstm, cell = torch.randn(3, 6), triton_lstm.LSTM(6, 9), triton_lstm.LSTMCell(6, 9)
    frozen = copy.deepcopy(lstm).requires_grad_(False)
    state = torch.zeros(1, 3, 9), torch.zeros(1, 3, 9)
    w, r, b_ih, b_hh = frozen.parameters()
    zoned, projected = triton_lstm.LSTM(6, 9, zoneout=0.1).eval(), triton_lstm.LSTM(6, 9, proj_size=4)
    planned = copy.deepcopy(lstm)
    planned.plan = triton_lstm.make_plan(3, 9, FP32, limits=None)
    ones = torch.ones(3, dtype=torch.int64)

    def autocast():
        with torch.autocast("cpu", torch.bfloat16):
            lstm(x[None])
    takes = [lambda: lstm.step(x), lambda: lstm.step(x, state, inplace=True), lambda: cell(x), lambda: cell(x[0]),
             lambda: triton_lstm.lstm(x[None], w, r, b_ih + b_hh), lambda: lstm(x[:1]), autocast,
             lambda: projected(x[None])]
    others = [lambda: lstm(x[:, None]), lambda: lstm(x[None], lengths=ones), lambda: zoned(x[None]),
              lambda: planned(x[None]), lambda: lstm(x[None], reset=torch.zeros(1, 3, dtype=torch.bool))]
    with counted() as found:
        for call in [*takes, *others]:
            with torch.no_grad():
                call()
            launched = [name for name, _ in found if name != "write_flags"]
            assert (launched == ["forward_step"]) == (call in takes) and len(launched) == 1
            found.clear()
        for call in (lambda: frozen(x[None]), lambda: triton_lstm.lstm(x[None], w, r)):      # nothing requires grad
            call()
            assert found.pop()[0] == "forward_step" and not found
        for call in (lambda: frozen(x[None].requires_grad_()), lambda: cell(x), lambda: lstm.step(x)):
            call()
            assert found.pop()[0] != "forward_step" and not found


def test_weights_are_read_at_each_call():
    torch.manual_seed(0)
    lstm, x = triton_lstm.LSTM(6, 9), torch.randn(1, 3, 6)
    with torch.no_grad(), harness.interpreter():
        before = lstm(x)[0]
        lstm.weight_ih_l0.mul_(2)
        changed = lstm(x)[0]
        lstm.weight_ih_l0 = torch.nn.Parameter(lstm.weight_ih_l0 / 2)
        assert torch.equal(lstm(x)[0], before) and not torch.equal(changed, before)


def test_inputs_of_any_strides():
    torch.manual_seed(0)
    lstm, x = triton_lstm.LSTM(6, 9), torch.randn(6, 3, 1)
    hx = torch.randn(9, 3, 1), torch.randn(9, 3, 1)
    turned = x.permute(2, 1, 0), tuple(s.permute(2, 1, 0) for s in hx)
    with torch.no_grad(), harness.interpreter():
        got, right = lstm(*turned), lstm(turned[0].contiguous(), tuple(s.contiguous() for s in turned[1]))
    assert torch.equal(got[0], right[0]) and all(map(torch.equal, got[1], right[1]))


def test_empty_batch():
    with torch.no_grad(), harness.interpreter():
        y, (h, c) = triton_lstm.LSTM(6, 9)(torch.zeros(1, 0, 6))
    assert y.shape == h.shape == c.shape == (1, 0, 9)


def test_r_need_not_fit():
    """Where no plan fits, one step is computed without a warning."""
    torch.manual_seed(0)
    lstm, x = triton_lstm.LSTM(6, 9), torch.randn(1, 3, 6)
    none = lambda *args: (None, "R is too large")
    with counted() as found, torch.no_grad(), mock.patch.object(op, "on_device", none), \
            mock.patch.object(layer, "on_device", none):
        got = lstm(x)[0]
    assert len(found) == 1
    torch.testing.assert_close(got, torch.nn.LSTM.forward(lstm, x)[0])


def test_many_rows_of_large_layers_go_the_general_way():
    """Where programs of 32 rows and 16 units would read more than ``STEP_BYTES``, in layers, cells and the operator."""
    pays = op.launch.step_pays
    assert pays(1, 1024, 4096, 1, 4)
    # 32 tiles of rows, 32 tiles of units, 96 rows of x or W, and of h or R
    read = lambda features: 32 * 32 * 96 * (features + 512) * 4
    assert read(853) <= op.launch.STEP_BYTES < read(854)
    assert pays(1024, 853, 512, 1, 4) and not pays(1024, 854, 512, 1, 4) and pays(1024, 854, 512, 1, 2)
    torch.manual_seed(0)
    x, lstm, cell = torch.randn(1, 40, 6), triton_lstm.LSTM(6, 9), triton_lstm.LSTMCell(6, 9)
    w, r, b_ih, b_hh = (p.detach() for p in lstm.parameters())
    calls = [lambda: lstm(x), lambda: cell(x[0]), lambda: triton_lstm.lstm(x, w, r, b_ih + b_hh)]
    read = 2 * 1 * 96 * (6 + 9) * 4
    for most, name in ((read, "forward_step"), (read - 1, "forward_resident")):
        op.launch.step_pays.cache_clear()
        with counted() as found, torch.no_grad(), mock.patch.object(op.launch, "STEP_BYTES", most):
            for call in calls:
                call()
        assert [kernel for kernel, _ in found] == [name] * 3
    op.launch.step_pays.cache_clear()


def test_what_the_check_found_wrong_is_avoided():
    lstm, x = triton_lstm.LSTM(6, 9), torch.randn(1, 3, 6)
    avoid = frozenset({(op.STEP, "forward", "tf32x3")})
    with counted() as found, torch.no_grad(), mock.patch.object(op, "avoided", lambda device: avoid):
        lstm(x)
        assert found.pop()[0] == "forward_resident"
        lstm.half()(x.half())
        assert found.pop()[0] == "forward_step"
    with mock.patch.object(faults, "known", lambda device: avoid):
        assert op.avoided(torch.device("cuda")) == avoid


@pytest.mark.parametrize("transform", ["compile", "vmap", "export"])
def test_transforms(transform):
    """They see the operator, which takes the same kernel."""
    torch.manual_seed(0)
    lstm, x = triton_lstm.LSTM(4, 6).requires_grad_(False), torch.randn(1, 3, 4)
    with harness.interpreter():
        right = lstm(x)[0]
        with counted() as found, torch.no_grad():
            if transform == "compile":
                got = torch.compile(lambda x: lstm(x)[0], backend="aot_eager", fullgraph=True)(x)
            elif transform == "export":
                got = torch.export.export(lstm, (x,)).module()(x)[0]
            else:
                got = torch.func.vmap(lambda x: lstm(x)[0])(x.expand(2, 1, 3, 4))[1]
    assert {name for name, _ in found} == {"forward_step"}
    torch.testing.assert_close(got, right)
    torch._dynamo.reset()


def compiled(B, I, H, dtype, precision, arch, D=1, bias=True):
    found, tensor = [], lambda *shape: torch.empty(shape, dtype=dtype, device="meta")
    b = tensor(4 * H) if bias else None
    weights, state = [(tensor(4 * H, I), tensor(4 * H, H), b, b)] * D, tensor(D, B, H)

    def collect(kernel, plan, grid, *args, waits, **constants):
        found.append(offline.compile_launch(kernel, plan, args, waits, constants, arch)[0])
    offline.sequence.one_step(tensor(1, B, I), weights, state, state, state.shape, D, precision, launcher=collect)
    return found[0]


@pytest.mark.parametrize("B, I, H, arch", [
    (1, 33, 100, 90), (17, 33, 100, 90), (1, 512, 512, 90), (17, 512, 512, 90), (17, 1, 2048, 90), (17, 33, 100, 80),
    (17, 33, 100, 100)])
@pytest.mark.parametrize("dtype, precision", [(FP16, "native"), (FP32, "tf32"), (FP32, "tf32x3")], ids=str)
def test_machine_code(dtype, precision, I, H, B, arch):
    """No thread has a stack, so nothing spills. Products are those that all architectures have. Tiles fit any
    architecture's shared memory."""
    kernel = compiled(B, I, H, dtype, precision, arch)
    report = read(kernel)
    assert report.stack == 0 and report.shared <= 49152, report
    assert "mma.sync" in kernel.asm["ptx"]


def test_a_new_batch_compiles_nothing():
    for batches in ((1, 3, 16), (17, 32, 100, 4096)):
        assert len({compiled(B, 20, 40, BF16, "native", 90).hash for B in batches}) == 1


# -- CUDA graphs ------------------------------------------------------------------------------------------------------

def eager(run, device):
    """Stands for ``graphed._capture``: the replay runs everything again, into the same memory."""
    with torch.no_grad():
        y = run()

    @torch.no_grad()
    def replay():
        y.copy_(run())
    return replay, y


@pytest.mark.parametrize("options", [dict(), dict(num_layers=2, batch_first=True)], ids=str)
def test_graphed_step(options):
    torch.manual_seed(0)
    lstm, xs = triton_lstm.LSTM(6, 9, **options), torch.randn(4, 3, 6)
    state = torch.randn(2, lstm.num_layers, 3, 9).unbind()
    before = [s.clone() for s in state]
    with mock.patch.object(triton_lstm.graphed, "_capture", eager), harness.interpreter():
        act = triton_lstm.make_graphed(lstm, xs[0], state)
        assert all(map(torch.equal, state, before))
        with torch.no_grad():
            right, right_state = lstm(xs.transpose(0, 1) if lstm.batch_first else xs, tuple(before))
        if lstm.batch_first:
            right = right.transpose(0, 1)
        for x, y in zip(xs, right):
            torch.testing.assert_close(act(x), y)
        for s, r in zip(state, right_state):
            torch.testing.assert_close(s, r)
        with pytest.raises(ValueError, match=r"graph is for \(3, 6\) in torch.float32 on cpu, got \(2, 6\)"):
            act(xs[0, :2])
        with pytest.raises(ValueError, match="got .* in torch.float16"):
            act(xs[0].half())


def test_graphed_layer():
    torch.manual_seed(0)
    lstm, xs = triton_lstm.LSTM(6, 9, bidirectional=True), torch.randn(4, 3, 6)
    state = tuple(torch.zeros(2, 2, 3, 9).unbind())
    with mock.patch.object(triton_lstm.graphed, "_capture", eager), harness.interpreter(), torch.no_grad():
        right, right_state = lstm(xs)
        again, _ = lstm(xs, right_state)
        for call in (triton_lstm.make_graphed(lstm, xs), triton_lstm.make_graphed(lstm, xs, state)):
            torch.testing.assert_close(call(xs), right)
        torch.testing.assert_close(call(xs), again)


@pytest.mark.parametrize("arguments, kind, message", [
    ((torch.nn.LSTM(6, 9), torch.zeros(3, 6)), TypeError, "triton_lstm.LSTM, got LSTM"),
    ((triton_lstm.LSTM(6, 9), torch.zeros(6)), ValueError, r"got \(6,\)"),
    ((triton_lstm.LSTM(6, 9), torch.zeros(3, 6)), ValueError, "needs a state"),
    ((triton_lstm.LSTM(6, 9), torch.zeros(3, 6), torch.zeros(2, 1, 3, 9).unbind()), RuntimeError, "x is on cpu"),
    ((triton_lstm.LSTM(6, 9), torch.zeros(2, 3, 6)), RuntimeError, "x is on cpu"),
], ids=lambda v: getattr(v, "__name__", None))
def test_graphed_errors(arguments, kind, message):
    with pytest.raises(kind, match=message):
        triton_lstm.make_graphed(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_on_a_gpu(shape, dtype):
    B, I, H, D = shape
    problem = Problem(1, B, I, H, D, dtype, device="cuda", tf32=dtype == FP32)
    check(problem, kernel(problem))


@pytest.mark.gpu
@pytest.mark.parametrize("H", [64, 300])
def test_graphed_on_a_gpu(H):
    torch.manual_seed(0)
    lstm = triton_lstm.LSTM(20, H, num_layers=2).cuda().half()
    xs = torch.randn(30, 17, 20, device="cuda", dtype=FP16)
    state = tuple(torch.zeros(2, 17, H, device="cuda", dtype=FP16) for _ in range(2))
    with torch.no_grad():
        right, right_state = lstm(xs)
    act = triton_lstm.make_graphed(lstm, xs[0], state)
    # The time loop rounds pre-activations of x to fp16 and has an approximate tanh, the kernel for one step does not.
    for x, y in zip(xs, right):
        torch.testing.assert_close(act(x), y, rtol=1e-2, atol=2e-3)
    for s, r in zip(state, right_state):
        torch.testing.assert_close(s, r, rtol=1e-2, atol=2e-3)
    call = triton_lstm.make_graphed(lstm, xs)
    assert torch.equal(call(xs), right)             # the same kernels, bit by bit
    with torch.no_grad():
        lstm.weight_hh_l0.mul_(0.5)                 # in place: the graph reads it
        assert torch.equal(call(xs), lstm(xs)[0])
