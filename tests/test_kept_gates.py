"""``keep_gates``: forward keeps the gates and every c, and backward recomputes nothing. On every kind of plan."""
from unittest import mock

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from triton_lstm.kernels.offline import compile_plan

import harness
import triton_lstm
from bench.machine_code import read
from problems import EMULATED, PORTABLE, Problem
from test_memory import saved
from triton_lstm import Plan, make_plan
from triton_lstm.kernels import sequence
from triton_lstm.plan import H200, keep_every_for, search
from triton_lstm.reference import lstm_reference

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
CLUSTERS = pytest.mark.skipif(harness.TRITON < (3, 9), reason="clusters need Triton 3.9")
PLANS = {
    "portable resident": lambda problem: problem.plan(schedule="resident", keep_every=2),
    "resident": lambda problem: problem.cluster_plan(1),
    "cluster": lambda problem: problem.cluster_plan(2),
    "grid": lambda problem: problem.shared_plan("grid"),
    "streamed": lambda problem: problem.shared_plan("streamed"),
    "split": Problem.split_plan,
    "wgmma": Problem.wgmma_plan,
}


def problem(shape, dtype, **change):
    return Problem(*shape, dtype=dtype, tf32=dtype == FP32, **change)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 2), (4, 3, 4, 5, 1), (5, 17, 3, 33, 2), (3, 3, 4, 100, 1)], ids=str)
def test_shapes(shape, dtype):
    wanted = Problem(*shape, dtype=dtype)
    with harness.interpreter():
        wanted.check(wanted.ours(keep_gates=True, keep_every=2))


@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("change", [dict(ragged=True, resets=True), dict(packed=True), dict(bias=False), dict(P=3)],
                         ids=str)
def test_lengths_resets_packed_projection(change, D):
    wanted = Problem(5, 4, 3, 20, D, **change)
    with harness.interpreter():
        wanted.check(wanted.ours(keep_gates=True, keep_every=2))


@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("change", [dict(), dict(packed=True)], ids=str)
def test_chunks_of_forward_and_backward_need_not_agree(change, D):
    """Forward goes through 3 steps at a time, backward through 2, of 7."""
    wanted = Problem(7, 4, 3, 20, D, **change)
    with harness.interpreter(), mock.patch.object(Plan, "forward_steps", lambda plan, T, element: 3):
        wanted.check(wanted.ours(keep_gates=True, keep_every=2))


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[CLUSTERS] * (kind == "cluster")) for kind in PLANS])
@pytest.mark.parametrize("dtype, arch", EMULATED, ids=str)
@pytest.mark.parametrize("shape", [(3, 17, 4, 33, 2)], ids=str)
def test_every_kind(shape, dtype, arch, kind):
    wanted = problem(shape, dtype)
    with harness.emulator(90 if kind in ("cluster", "wgmma") else arch, memory="weak"):
        wanted.check(wanted.ours(plan=PLANS[kind](wanted), keep_gates=True))


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[CLUSTERS] * (kind == "cluster")) for kind in PLANS])
@pytest.mark.parametrize("change", [dict(ragged=True, resets=True), dict(packed=True)], ids=str)
def test_every_kind_with_lengths_resets_packed(change, kind):
    wanted = problem((4, 4, 3, 20, 2), BF16, **change)
    with harness.emulator(90, memory="weak"):
        wanted.check(wanted.ours(plan=PLANS[kind](wanted), keep_gates=True))


@pytest.mark.parametrize("kind", ["resident", pytest.param("cluster", marks=CLUSTERS), "grid"])
@pytest.mark.parametrize("shape, dtype, change, keep_gates", [
    ((1, 1, 1, 1, 2), BF16, dict(), True), ((3, 17, 4, 33, 2), FP16, dict(), True),
    ((3, 17, 4, 33, 2), FP32, dict(), False), ((5, 3, 4, 60, 1), BF16, dict(bias=False), False),
    ((5, 4, 3, 20, 2), BF16, dict(ragged=True, resets=True), True),
    ((5, 4, 3, 20, 2), FP32, dict(ragged=True, resets=True), False), ((4, 17, 3, 20, 2), FP32, dict(packed=True), True),
    ((4, 17, 3, 20, 2), BF16, dict(packed=True), False)], ids=str)
def test_loops_that_compute_the_coefficients(shape, dtype, change, keep_gates, kind):
    wanted = problem(shape, dtype, **change)
    arch = 80 if kind != "cluster" and keep_gates else 90
    with mock.patch.object(Plan, "derives_coefficients", True), harness.emulator(arch, memory="weak"):
        wanted.check(wanted.ours(plan=PLANS[kind](wanted), keep_gates=keep_gates))


@pytest.mark.parametrize("name, old, new, keep_gates", [
    ("portable_backward", " c = f * c + i * g", " c = f * c", False),
    ("cluster_backward", "near_tanh(f * c + i * g), c)", "near_tanh(f * c), c)", True),
    ("cluster_forward", "i, f, g, o, H)", "i, f, o, g, H)", True)], ids=["states", "coefficients", "gates"])
def test_a_broken_kernel_is_noticed(name, old, new, keep_gates, tmp_path):
    wanted = problem((3, 17, 4, 33, 2), FP16)
    with harness.edited(name, tmp_path, old, new), mock.patch.object(Plan, "derives_coefficients", True), \
            harness.emulator(90), pytest.raises(AssertionError):
        wanted.check(wanted.ours(plan=wanted.cluster_plan(1), keep_gates=keep_gates))


def test_exact_fp32_that_computes_the_coefficients():
    """In three TF32 products, whose loop has the exact activations. In the interpreter, then in the emulator."""
    wanted = Problem(4, 5, 3, 33, 2, resets=True, ragged=True)
    for way in (harness.interleaved(1), harness.emulator(90, memory="weak")):
        with mock.patch.object(Plan, "derives_coefficients", True), way:
            wanted.check(wanted.ours(plan=wanted.shared_plan("grid"), keep_gates=True))


def test_which_loops_compute_the_coefficients():
    """Those of one CTA, of clusters and of portable grid plans, from 32,768 units in all rows on."""
    for batch, derives in ((255, False), (256, True)):
        plan = make_plan(batch, 128, BF16, limits=H200)
        assert plan.kind == "resident" and plan.derives_coefficients == derives
        assert ("coefficients" in compile_plan(plan, BF16, 90, keep_gates=True)) == (not derives)
        assert ("states" if derives else "coefficients") in compile_plan(plan, BF16, 90)
    assert make_plan(128, 1024, FP16, limits=H200).backward.derives_coefficients
    assert not make_plan(640, 128, BF16, limits=PORTABLE).derives_coefficients


def test_saturated_gates():
    """The loop computes 1 - f of a gate near 1, and 1 - tanh^2 near 0, with as many digits as the kernel does."""
    x, w, r, b = torch.zeros(2, 16, 1), torch.zeros(1, 64, 1), torch.zeros(1, 64, 16), torch.zeros(1, 64)
    b[0] = torch.tensor([4., 7., 3., 5.]).repeat_interleave(16)
    state = torch.zeros(1, 16, 16), torch.full((1, 16, 16), 2.)
    found = []
    for dtype in (torch.float64, BF16):
        inputs = [t.to(dtype).requires_grad_() for t in (x, w, r, b, *state)]
        with mock.patch.object(Plan, "derives_coefficients", True), harness.emulator(90):
            y = (lstm_reference(*inputs)[0] if dtype == torch.float64 else
                 triton_lstm.lstm(*inputs[:4], inputs[4:], keep_gates=True)[0])
            found.append(torch.autograd.grad(y.sum(), inputs[3:]))
    for exact, ours in zip(*found):
        assert ((ours.double() - exact).abs() <= 0.01 * exact.abs()).all()


def test_several_tiles():
    """The places of the gates are those of the tile, not of the program."""
    wanted = problem((2, 40, 3, 33, 1), BF16)
    for plan in (wanted.split_plan(tiles=2), wanted.shared_plan("grid", multiprocessors=1)):
        assert plan.tiles > 1
        with harness.emulator(90, memory="weak"):
            wanted.check(wanted.ours(plan=plan, keep_gates=True))
    wanted = problem((2, 140, 3, 33, 1), FP16)
    with harness.emulator(90, memory="weak"):
        wanted.check(wanted.ours(plan=wanted.wgmma_plan(tiles=2), keep_gates=True))


def test_zoneout():
    """The masks of a step do not depend on which program computes its coefficients. It is never the loop."""
    x, w, r = torch.randn(5, 3, 4), torch.randn(40, 4) / 3, torch.randn(40, 10) / 3
    found = []
    with harness.interpreter(), mock.patch.object(Plan, "derives_coefficients", True):
        for keep_gates in (False, True):
            torch.manual_seed(1)
            leaves = [t.clone().requires_grad_() for t in (x, w, r)]
            y, _ = triton_lstm.lstm(*leaves, zoneout=(0.3, 0.4), keep_gates=keep_gates, keep_every=2)
            found.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
    for recomputed, kept in zip(*found):
        torch.testing.assert_close(kept, recomputed)


def test_pre_activations_are_kept_as_they_are():
    """``gates`` are x W^T + b + h R^T of each step, direction by direction, and ``kept`` is c before each step."""
    wanted = Problem(3, 2, 4, 5, 2)
    (x, w, r, b, h0, c0), _ = wanted.tensors()
    plan = make_plan(2, 5, FP32, 2, limits=None, tf32=False, keep_every=8)
    with harness.interpreter():
        y, _, _, kept, gates = harness.interpreted_sequence.forward(x, w, r, b, h0, c0, None, plan, True,
                                                                    keep_gates=True)
    gates = gates.view(2, 3, 2, 20)
    for d in range(2):
        h, c = h0[d], c0[d]
        for s, time in enumerate(range(3) if d == 0 else reversed(range(3))):
            torch.testing.assert_close(kept[s, d], c)
            a = x[time] @ w[d].t() + b[d] + h @ r[d].t()
            torch.testing.assert_close(gates[d, time], a)
            i, f, g, o = a.chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = y[time, :, 5 * d:5 * d + 5]


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("T", [1, 4, 7])
def test_saved_bytes(T, dtype):
    B, H, D = 3, 10, 2
    plan = make_plan(B, H, dtype, D, limits=None, keep_every=4)
    formula = plan.saved_bytes(T, dtype.itemsize)
    assert formula == D * B * H * T * (4 + 4 * dtype.itemsize)
    assert saved(T, B, 5, H, D, dtype, 4, keep_gates=True) == formula
    # by default a short sequence keeps the gates, and one that is told how often to keep c does not
    assert saved(T, B, 5, H, D, dtype, None) == formula
    assert saved(T, B, 5, H, D, dtype, 4) == plan.saved_bytes(T) < formula


def test_the_default():
    """Gates are kept where backward would recompute the steps of all layers in one chunk."""
    for plan in (make_plan(64, 512, BF16), make_plan(4096, 256, FP32), make_plan(1, 5, FP16, 2)):
        assert plan.keeps_gates(plan.keep_every) and not plan.keeps_gates(plan.keep_every + 1)
        assert plan.keeps_gates(plan.keep_every // 2, 2) and not plan.keeps_gates(plan.keep_every // 2, 3)


@pytest.mark.parametrize("batch, hidden_size", [(1, 5), (64, 512), (4096, 256), (128, 1024)])
def test_memory_is_at_most_doubled(batch, hidden_size):
    """What is saved and the workspace together, wherever gates are kept by default."""
    for dtype in (FP32, BF16):
        plan = make_plan(batch, hidden_size, dtype)
        assert plan.keep_every == keep_every_for(batch, hidden_size, 1, plan.backward.derives_coefficients)
        for T in (1, 7, plan.keep_every):
            keeping, recomputing = (
                plan.saved_bytes(T, dtype.itemsize if keeps else None)
                + plan.backward_bytes(T, 16, dtype.itemsize, keep_gates=keeps) for keeps in (True, False))
            assert keeping <= 2 * recomputing


def products(keep_gates, layers=1, D=1):
    """How many products of matrices a forward and backward pass of 6 steps takes."""
    count = 0

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal count
            count += function._schema.name.split("::")[1].rstrip("_") in ("mm", "addmm", "bmm", "baddbmm", "linear")
            return function(*args, **(kwargs or {}))

    x, w, r, state = torch.randn(6, 3, 4), torch.randn(D, 40, 4), torch.randn(D, 40, 10), torch.randn(D, 3, 10)
    plan = make_plan(3, 10, FP32, D, limits=PORTABLE, keep_every=3)
    nothing = lambda *args, **kwargs: None
    with Products():
        y, h, c, *kept = sequence.forward(x, w, r, None, state, state, None, plan, True, launcher=nothing,
                                          keep_gates=keep_gates)
        sequence.backward(y, h, c, x, w, r, None, state, state, None, y, *kept, plan, [True] * 6, launcher=nothing)
    return count


def test_backward_recomputes_nothing():
    """Of each chunk of 3 steps, backward has products for dx and dW, and for dR one for h0 and one for the other h. It
    would recompute gates by as many for R, and one for W."""
    assert products(True) == 1 + 2 * 2 + 3
    assert products(False) == 1 + 2 * 2 + 3 + 2 * 1 + 3


@pytest.mark.parametrize("num_layers, kept", [(1, True), (2, True), (3, False)])
def test_a_layer_decides_for_all_its_layers(num_layers, kept):
    layer, x = triton_lstm.LSTM(4, 6, num_layers), torch.randn(7, 2, 4)
    real = harness.interpreted_sequence.forward_chunks
    triton_lstm.op.plan_or_reason.cache_clear()
    with (harness.interpreter(), mock.patch.object(search, "KEEP_EVERY", 16),
          mock.patch.object(harness.interpreted_sequence, "forward_chunks", side_effect=real) as forward):
        layer(x)
        assert [call.kwargs["keep_gates"] for call in forward.call_args_list] == [kept] * num_layers
        for layer.keep_gates in (True, False):
            forward.reset_mock()
            layer(x)
            assert [call.kwargs["keep_gates"] for call in forward.call_args_list] == [layer.keep_gates] * num_layers
    triton_lstm.op.plan_or_reason.cache_clear()


def test_users_of_the_graph():
    """backward twice, with retain_graph, and gradients of gradients, give what they give with recomputed gates."""
    x, layer = torch.randn(4, 2, 3), triton_lstm.LSTM(3, 5)
    found = []
    with harness.interpreter():
        for layer.keep_gates in (False, True):
            leaf = x.clone().requires_grad_()
            y = layer(leaf)[0].sin().sum()
            first, = torch.autograd.grad(y, leaf, retain_graph=True)
            again, = torch.autograd.grad(y, leaf, create_graph=True)
            assert torch.equal(first, again)
            found.append((first, *torch.autograd.grad(again.square().sum(), leaf)))
    for recomputed, kept in zip(*found):
        torch.testing.assert_close(kept, recomputed)


def test_compiled():
    """A compiled layer keeps the gates if it is told to."""
    ours = triton_lstm.LSTM(3, 5, 2, bidirectional=True)
    ours.keep_gates = True
    torch._dynamo.reset()
    traced = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    with harness.interpreter():
        for T, B in ((4, 3), (6, 2)):
            x = torch.randn(T, B, 3)
            gradients = [torch.autograd.grad(f(x)[0].square().sum(), list(ours.parameters())) for f in (traced, ours)]
            assert all(map(torch.equal, *gradients))
    torch._dynamo.reset()


def test_compiled_by_default():
    """A compiled layer decides by the number of steps, as one that is not: up to 16 steps of two layers together. torch
    makes a graph for each side, because an empty tensor is special to it, and none for other lengths."""
    ours = triton_lstm.LSTM(3, 5, 2)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    traced = torch.compile(ours, fullgraph=True, dynamic=True, backend=counter)
    real, results, graphs = harness.interpreted_sequence.forward_chunks, [], []
    triton_lstm.op.plan_or_reason.cache_clear()
    with (harness.interpreter(), mock.patch.object(triton_lstm.functional, "KEEP_EVERY", 16),
          mock.patch.object(search, "KEEP_EVERY", 16),
          mock.patch.object(harness.interpreted_sequence, "forward_chunks", side_effect=real) as forward):
        for T, B, kept in ((4, 2, True), (9, 4, False), (8, 6, True), (12, 7, False)):
            x = torch.randn(T, B, 3)
            for call in (traced, ours):
                forward.reset_mock()
                y, (h, c) = call(x)
                gradients = torch.autograd.grad(y.square().sum() + (h * c).sum(), list(ours.parameters()))
                assert [of.kwargs["keep_gates"] for of in forward.call_args_list] == [kept] * 2, T
                results.append((y, h, c, *gradients))
            for got, want in zip(*results[-2:]):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
            graphs.append(counter.frame_count)
    triton_lstm.op.plan_or_reason.cache_clear()
    torch._dynamo.reset()
    assert [n - graphs[0] for n in graphs] == [0, 1, 1, 1]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")     # opcheck of torch 2.14
@pytest.mark.parametrize("gates_steps", [0, 2, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_operator_passes_torchs_own_checks(packed, gates_steps):
    """Of 3 steps, with gates kept for up to as many as ``gates_steps``."""
    inputs = [t.requires_grad_() for t in Problem(3, 2, 4, 5, 2).tensors()[0]]
    sizes, flags = None, None
    if packed:
        from triton_lstm.kernels.rows import step_flags
        sizes, flags = torch.tensor([2, 1, 1]), step_flags(3, 2, 2, torch.tensor([3, 1]), None, "cpu")
        inputs[0] = torch.randn(4, 4, requires_grad=True)
    with harness.interpreter():
        torch.library.opcheck(triton_lstm.op.lstm_op, (*inputs, flags, sizes, "", 2, True, gates_steps))


@pytest.mark.parametrize("batch, hidden_size, dtype, kind", [
    (16, 128, BF16, "resident"), (16, 512, BF16, "cluster"), (16, 1024, BF16, "split"), (128, 1024, FP16, "wgmma"),
    (64, 512, FP32, "cluster"), (16, 1024, FP32, "split"), (4096, 256, FP32, "wgmma")],
    ids=str)
def test_machine_code(batch, hidden_size, dtype, kind):
    """Keeping the gates adds four stores of each unit to a step of forward, and no spills."""
    if kind == "cluster" and harness.TRITON < (3, 9):
        pytest.skip("clusters need Triton 3.9")
    plan = make_plan(batch, hidden_size, dtype, limits=H200)
    assert plan.kind == kind
    loops = []
    for keep_gates in (False, True):
        kernels = compile_plan(plan, dtype, 90, keep_gates=keep_gates)
        loops.append(read(next(kernel for name, kernel in kernels.items() if name.startswith("forward"))).time_loop)
    without, kept = loops
    assert kept.spills <= without.spills
    assert kept.counts["STG"] > without.counts["STG"]
