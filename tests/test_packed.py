"""Packed sequences, in every kernel: only rows that exist are computed, and nothing is padded."""
import dataclasses
from unittest import mock

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton_lstm.kernels.offline import compile_plan
from triton_lstm.kernels.rows import step_flags

import harness
import triton_lstm
from bench import machine_code
from problems import EMULATED, PORTABLE, Problem
from test_cluster import CLUSTERS
from test_double_backward import second
from test_step_flags import layers
from triton_lstm import make_plan
from triton_lstm.kernels import sequence
from triton_lstm.plan import H200

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SHAPES = [  # T, B, I, H, D
    (1, 3, 4, 5, 2), (6, 1, 3, 1, 2), (7, 4, 5, 5, 1), (5, 17, 1, 33, 2), (4, 3, 4, 100, 2),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [[6, 4, 4, 1], [3, 6, 1, 6], [4, 4, 4], [5]], ids=str)
@pytest.mark.parametrize("with_state", [False, True])
def test_packed_sequences(lengths, with_state, dtype):
    """For sorted and unsorted sequences, results and indices are those of nn.LSTM, and states are in the caller's
    order. A fallback would warn."""
    theirs, ours = layers(3, 7, 2, bidirectional=True, batch_first=True)
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    rows = [torch.randn(n, 3).to(dtype).requires_grad_() for n in lengths]
    hx = [torch.randn(4, len(lengths), 7).to(dtype).requires_grad_() for _ in range(2)]
    results = []
    for lstm, path in ((theirs, torch.enable_grad), (ours, harness.interpreter)):
        packed = pack_sequence(rows, enforce_sorted=lengths == sorted(lengths, reverse=True))
        with path():
            y, state = lstm(packed, tuple(hx) if with_state else None)
            (y.data.square().sum() + sum(s.sin().sum() for s in state)).backward()
        leaves = [*rows, *(hx if with_state else ()), *lstm.parameters()]
        results.append([y.data, *state, *(leaf.grad for leaf in leaves)])
        for leaf in leaves:
            leaf.grad = None
        assert isinstance(y, PackedSequence) and isinstance(state, tuple)
        for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
            kept, given = getattr(y, name), getattr(packed, name)
            assert kept is given or torch.equal(kept, given)
    # Sums of some tens of terms are rounded at other places: in bf16 by four units in the last place.
    tolerance = dict(atol=1e-5, rtol=1e-5) if dtype == torch.float32 else dict(atol=4e-2, rtol=2e-2)
    for got, want in zip(results[1], results[0]):
        torch.testing.assert_close(got, want, **tolerance)


def test_wrong_packed_input_raises_as_nn_lstm_does():
    packed = pack_sequence([torch.randn(4, 5), torch.randn(2, 5)])
    good = pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    for x, hx in ((packed, None), (good, (torch.zeros(1, 3, 4),) * 2), (good, (torch.zeros(1, 2, 5),) * 2)):
        messages = []
        for lstm in layers(3, 4):
            with harness.interpreter(), pytest.raises(RuntimeError) as caught:
                lstm(x, hx)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


def test_dropout_between_layers():
    """With p = 1 nothing is random: the input of the second layer is zero."""
    packed = pack_sequence([torch.randn(n, 3) for n in (5, 3, 3)])
    theirs, ours = layers(3, 7, 2, dropout=1.)
    with harness.interpreter():
        y, _ = ours(packed)
    torch.testing.assert_close(y.data, theirs(packed)[0].data)


def test_autocast():
    packed = pack_sequence([torch.randn(n, 3) for n in (5, 3, 3)])
    _, ours = layers(3, 7)
    with harness.interpreter():
        with torch.autocast("cpu", torch.bfloat16):
            y, (h_n, _) = ours(packed)
        want, _ = ours.bfloat16()(packed.to(torch.bfloat16))
    assert y.data.dtype == h_n.dtype == torch.bfloat16 and torch.equal(y.data, want.data)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_resident(shape, dtype):
    problem = Problem(*shape, dtype=dtype, packed=True)
    with harness.interpreter():
        problem.check(problem.ours(keep_every=2))


@pytest.mark.parametrize("keep_every", [1, 3, 6, 64])
def test_chunks_of_steps(keep_every):
    problem = Problem(6, 4, 4, 10, 2, packed=True)
    with harness.interpreter():
        problem.check(problem.ours(keep_every=keep_every))


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("shape, schedule", [((7, 4, 3, 20, 2), "grid"), ((4, 17, 3, 33, 1), "grid"),
                                             ((4, 1, 3, 33, 2), "streamed"), ((5, 4, 2, 33, 2), "streamed")], ids=str)
def test_shared(shape, schedule, dtype):
    problem = Problem(*shape, dtype=dtype, packed=True)
    with harness.interleaved(seed=1):
        problem.check(problem.ours(plan=problem.shared_plan(schedule)))


def test_several_tiles_a_group():
    problem = Problem(3, 50, 3, 20, 2, packed=True)
    plan = dataclasses.replace(problem.shared_plan("grid"), programs=2, block_h=16, groups=2, tiles=2)
    with harness.interleaved(seed=2):
        problem.check(problem.ours(plan=plan))


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("schedule", ["resident", "grid"])
def test_forward_in_pieces(schedule, tf32, monkeypatch):
    monkeypatch.setattr("triton_lstm.plan.plan.FORWARD_BYTES", 1)
    problem = Problem(7, 4, 3, 20, 2, tf32=tf32, packed=True)
    plan = problem.plan(limits=None, keep_every=2) if schedule == "resident" else problem.shared_plan(schedule)
    with harness.interleaved(seed=3):
        problem.check(problem.ours(plan=plan))


@pytest.mark.parametrize("dtype, arch", EMULATED, ids=str)
@pytest.mark.parametrize("schedule", ["resident", "grid", "streamed"])
def test_emulated(schedule, dtype, arch):
    """The compiled kernels in the emulator, with weak memory. An access to a row that does not exist would raise."""
    problem = Problem(5, 4, 3, 20, 2, dtype=dtype, tf32=dtype == FP32, packed=True)
    plan = (problem.plan(schedule="resident", keep_every=2) if schedule == "resident" else
            problem.shared_plan(schedule, keep_every=2))
    with harness.emulator(arch, seed=1, memory="weak"):
        problem.check(problem.ours(plan=plan))


@pytest.mark.parametrize("ctas, arch", [(1, 80), (1, 90), pytest.param(2, 90, marks=CLUSTERS),
                                        pytest.param(4, 90, marks=CLUSTERS)])
@pytest.mark.parametrize("shape, dtype", [((5, 4, 3, 33, 2), FP32), ((5, 17, 3, 64, 1), FP16),
                                          ((4, 3, 2, 20, 2), BF16)], ids=str)
def test_cluster(shape, dtype, ctas, arch):
    problem = Problem(*shape, dtype=dtype, tf32=dtype == FP32, packed=True)
    with harness.emulator(arch, seed=1, memory="weak"):
        problem.check(problem.ours(plan=problem.cluster_plan(ctas)))


@pytest.mark.parametrize("schedule, ctas", [("resident", 0), ("grid", 0), ("cluster", 1)])
def test_other_gradients(schedule, ctas):
    """dy may have strides of zero, and may be missing."""
    problem = Problem(4, 3, 3, 20, 2, packed=True)
    plan = (problem.cluster_plan(1) if ctas else problem.plan(schedule="resident", keep_every=2)
            if schedule == "resident" else problem.shared_plan(schedule))
    packed = pack_sequence([torch.randn(n, 3) for n in (4, 2, 1)])
    theirs, ours = layers(3, 20, bidirectional=True)
    with mock.patch.object(triton_lstm.op, "tf32_allowed", lambda: True), harness.emulator(80):
        ours.plan = dataclasses.replace(plan, precision="tf32") if ctas else plan
        for loss in (lambda y, state: y.data.sum(), lambda y, state: state[1].sum()):
            for layer in (theirs, ours):
                layer.zero_grad()
                loss(*layer(packed)).backward()
            for a, b in zip(ours.parameters(), theirs.parameters()):
                torch.testing.assert_close(a.grad, b.grad, atol=5e-3 if ctas else 1e-5, rtol=1e-2 if ctas else 1e-5)


class Largest(TorchDispatchMode):
    """``elements`` is {type: number of elements of the largest tensor that an operator has returned}."""

    def __init__(self):
        super().__init__()
        self.elements = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for t in tree_leaves(results):
            if isinstance(t, torch.Tensor):
                self.elements[t.dtype] = max(self.elements.get(t.dtype, 0), t.untyped_storage().nbytes() // t.itemsize)
        return results


@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("schedule", ["resident", "grid"])
def test_nothing_is_padded(schedule, D):
    """One sequence of 64 steps and 15 of one step have 79 rows. No tensor is larger than these need, so all are smaller
    than padded x. Only the slots for h between programs have whole tiles. The kernels allocate nothing."""
    T, B, I, H, rows = 64, 16, 40, 20, 79
    plan = make_plan(B, H, BF16, D, limits=PORTABLE, schedule=schedule, keep_every=8)
    tensor = lambda *shape: torch.randn(shape, dtype=BF16)
    arguments = tensor(rows, I), tensor(D, 4 * H, I), tensor(D, 4 * H, H), tensor(D, 4 * H)
    sizes = torch.tensor([B] + [1] * (T - 1))
    run = lambda *args, **kwargs: None
    with Largest() as largest:
        flags = step_flags(T, B, D, (torch.arange(B) < sizes[:, None]).sum(0), None, "cpu")
        state = tensor(D, B, H), tensor(D, B, H)
        y, h_n, c_n, *kept = sequence.forward(*arguments, *state, flags, plan, True, sizes, launcher=run)
        dx, *_ = sequence.backward(y, h_n, c_n, *arguments, *state, flags, y, *kept, plan, [True] * 6, sizes,
                                   launcher=run)
    assert y.shape == (rows, D * H) and dx.shape == (rows, I)
    slots = T * D * plan.groups * plan.tiles * plan.block_b * plan.padded_programs * plan.block_h
    travels = slots if schedule == "grid" else 0
    needed = max(D * rows, plan.keep_every * B) * 4 * H
    assert largest.elements[BF16] <= max(needed, travels) and needed < T * B * I
    chunk = B + plan.keep_every - 1 + (plan.keep_every if D == 2 else 0)
    weights = 4 * D * H * max(I, H)
    shares = 2 * D * plan.groups * plan.tiles * plan.padded_programs * plan.programs * plan.block_b * plan.block_h
    assert largest.elements[FP32] <= max(chunk * 6 * H, kept[0].numel(), weights, shares if schedule == "grid" else 0)


@pytest.mark.parametrize("dtype, hidden_size", [(BF16, 128), (BF16, 512), (FP32, 256)], ids=str)
@pytest.mark.parametrize("limits", [PORTABLE, H200], ids=["portable", "cluster"])
def test_loops_neither_spill_nor_lose_r(limits, dtype, hidden_size):
    """Loops over packed rows spill nothing, and keep as much of R in registers as loops with step flags."""
    plan = make_plan(64, hidden_size, dtype, limits=limits)
    flagged = compile_plan(plan, dtype, 90, flagged=True)
    for name, kernel in compile_plan(plan, dtype, 90, packed=True).items():
        if name in ("previous", "write_flags"):         # which have no loop
            assert machine_code.read(kernel).stack == 0
            continue
        loop = machine_code.read(kernel).time_loop
        assert loop.spills == 0, name
        assert loop.held == machine_code.read(flagged[name]).time_loop.held, name


@pytest.mark.parametrize("outputs", [(0, 1, 2), (0,), (1, 2)])
def test_second_derivatives(outputs):
    """Second derivatives are those of the padded batch with lengths."""
    problem = Problem(4, 3, 3, 5, 2, packed=True)

    def packed(x, *inputs):
        live = torch.arange(problem.T)[:, None] < problem.lengths_and_reset()["lengths"]
        y, (h_n, c_n) = triton_lstm.lstm(x[live], *inputs[:3], inputs[3:], batch_sizes=live.sum(1), keep_every=2)
        return y.new_zeros(problem.T, problem.B, y.shape[1]).index_put((live,), y), h_n, c_n

    def padded(x, *inputs):
        y, (h_n, c_n) = triton_lstm.lstm(x, *inputs[:3], inputs[3:], **problem.lengths_and_reset())
        return y, h_n, c_n

    want = second(problem, padded, torch.float64, outputs)      # computed by the equations
    with harness.interpreter():
        got = second(problem, packed, FP32, outputs)
    for name, right in want.items():
        torch.testing.assert_close(got[name].double(), right, atol=1e-4, rtol=1e-4)


def test_vmap_over_sequences():
    w, r, x = torch.randn(2, 20, 3), torch.randn(2, 20, 5), torch.randn(2, 6, 3)
    call = lambda x, w, r: triton_lstm.lstm(x, w, r, batch_sizes=torch.tensor([3, 2, 1]))[0]
    with harness.interpreter():
        got = torch.func.vmap(call)(x, w, r)
        assert torch.equal(got, torch.stack([call(*member) for member in zip(x, w, r)]))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")    # by dynamo's graph break
@pytest.mark.parametrize("with_state", [False, True])
def test_compiled(with_state):
    """torch.compile breaks the graph where the host reads the batch size; results are the same."""
    _, ours = layers(3, 7, bidirectional=True)
    packed = pack_sequence([torch.randn(n, 3) for n in (5, 3, 3)])
    hx = (torch.randn(2, 3, 7), torch.randn(2, 3, 7)) if with_state else None
    compiled = torch.compile(ours, backend="aot_eager")
    results = []
    with harness.interpreter():
        for layer in (ours, compiled):
            ours.zero_grad()
            y, state = layer(packed, hx)
            (y.data.square().sum() + sum(s.sin().sum() for s in state)).backward()
            results.append([y.data.detach(), *state, *(p.grad.clone() for p in ours.parameters())])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


@pytest.mark.parametrize("where", ["kernels", "torch"])
def test_the_function(where):
    """``lstm`` with batch_sizes gives the same results with the kernels, without them, and in float64."""
    x, w, r, b = torch.randn(6, 3), torch.randn(2, 20, 3), torch.randn(2, 20, 5), torch.randn(2, 20)
    call = lambda *inputs: triton_lstm.lstm(*inputs, batch_sizes=torch.tensor([3, 2, 1]))
    want, want_state = call(*(t.double() for t in (x, w, r, b)))
    with harness.interpreter() if where == "kernels" else torch.enable_grad():
        y, state = call(x, w, r, b)
    for a, b in zip((y, *state), (want, *want_state)):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")     # opcheck of torch 2.14
def test_operators_pass_torchs_own_checks():
    tensors = [torch.randn(6, 4), torch.randn(1, 20, 4), torch.randn(1, 20, 5), torch.randn(1, 20),
               torch.randn(1, 3, 5), torch.randn(1, 3, 5)]
    with harness.interpreter():
        flags = step_flags(3, 3, 1, torch.tensor([3, 2, 1]), None, "cpu")
        torch.library.opcheck(triton_lstm.op.lstm_op, (*(t.requires_grad_() for t in tensors), flags,
                                                       torch.tensor([3, 2, 1]), "", 2, True))


@pytest.mark.parametrize("change, error, message", [
    (dict(batch_sizes=[3, 2, 1]), TypeError, "batch_sizes must be a tensor, got list"),
    (dict(batch_sizes=torch.tensor([3., 2, 1])), ValueError, "batch_sizes must be integers, got torch.float32"),
    (dict(batch_sizes=torch.tensor([[3, 2, 1]])), ValueError, r"batch_sizes must have the shape \(T,\), got \(1, 3\)"),
    (dict(batch_sizes=torch.tensor([3, 2, 1], device="meta")), ValueError, "batch_sizes must be on the CPU, got meta"),
    (dict(batch_sizes=torch.tensor([2, 3, 1])), ValueError, "must fall from the 2 rows .* the 6 of x"),
    (dict(batch_sizes=torch.tensor([3, 2])), ValueError, "must fall from the 3 rows .* the 6 of x"),
    (dict(batch_sizes=torch.tensor([4, 3, -1])), ValueError, "must fall from the 4 rows .* the 6 of x"),
    (dict(hx=(torch.zeros(1, 4, 5),) * 2), ValueError, "must fall from the 4 rows .* the 6 of x"),
    (dict(x=torch.zeros(3, 2, 3)), ValueError, r"x must have the shape \(N, I\), got \(3, 2, 3\)"),
    (dict(lengths=torch.tensor([3, 2, 1])), ValueError, "lengths and reset are for padded input"),
], ids=str)
def test_wrong_arguments(change, error, message):
    arguments = dict(x=torch.zeros(6, 3), weight_ih=torch.zeros(20, 3), weight_hh=torch.zeros(20, 5),
                     batch_sizes=torch.tensor([3, 2, 1]))
    with harness.interpreter(), pytest.raises(error, match=message):
        triton_lstm.lstm(**(arguments | change))
