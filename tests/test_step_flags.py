"""Lengths and resets, and the step flags that kernels get for them: in the layer, and in every kernel of plain
Triton."""
import contextlib
import dataclasses
from unittest import mock

import pytest
import torch
from triton_lstm.kernels.launch import BEFORE_LOOPS
from triton_lstm.kernels.offline import compile_plan
from triton_lstm.kernels.rows import step_flags

import harness
import triton_lstm
from bench import machine_code
from problems import PORTABLE, Problem
from triton_lstm import make_plan

FLAGGED = [dict(ragged=True), dict(resets=True), dict(ragged=True, resets=True)]


def layers(*args, **kwargs):
    """nn.LSTM, and our LSTM with the same weights."""
    torch.manual_seed(0)
    theirs, ours = torch.nn.LSTM(*args, **kwargs), triton_lstm.LSTM(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def per_step(lstm, x, reset, state):
    """A loop over steps that zeroes the state where an episode begins, like reinforcement-learning code."""
    outputs = []
    for x_t, begins in zip(x, reset):
        state = tuple(s * ~begins[None, :, None] for s in state)
        y, state = lstm(x_t[None], state)
        outputs.append(y)
    return torch.cat(outputs), state


@pytest.mark.parametrize("where", ["kernels", "torch"])
def test_lengths_are_nn_lstm_packed(where):
    """Lengths give the results of nn.LSTM on packed sequences: two layers, both directions, batch first, unsorted
    lengths."""
    theirs, ours = layers(3, 7, 2, bidirectional=True, batch_first=True)
    x, lengths = torch.randn(5, 6, 3), torch.tensor([3, 6, 1, 6, 4])
    hx = torch.randn(4, 5, 7), torch.randn(4, 5, 7)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    y, state = theirs(packed, hx)
    y = torch.nn.utils.rnn.pad_packed_sequence(y, batch_first=True)[0]
    x[torch.arange(6) >= lengths[:, None]] = float("nan")       # padding has no influence
    x.requires_grad_()
    with harness.interpreter() if where == "kernels" else torch.enable_grad():
        got, got_state = ours(x, hx, lengths=lengths)
        got.square().sum().backward()
    y.square().sum().backward()
    for a, b in zip((got, *got_state), (y, *state)):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-6)
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-5)
    assert x.grad.isfinite().all() and (x.grad[torch.arange(6) >= lengths[:, None]] == 0).all()


@pytest.mark.parametrize("batch_first", [False, True])
def test_resets_are_the_loop_that_users_write(batch_first):
    theirs, ours = layers(3, 7, 2, batch_first=batch_first)
    theirs.batch_first = False
    x, reset = torch.randn(8, 5, 3), torch.rand(8, 5) < 0.3
    hx = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    y, state = per_step(theirs, x, reset, hx)
    y.sum().backward()
    turn = (lambda t: t.transpose(0, 1)) if batch_first else lambda t: t
    with harness.interpreter():
        got, got_state = ours(turn(x), hx, reset=turn(reset))
        got.sum().backward()
    for a, b in zip((turn(got), *got_state), (y, *state)):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-6)
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-5)


def test_no_gradient_crosses_a_reset():
    _, ours = layers(3, 4, bidirectional=True)
    x = torch.randn(6, 1, 3, requires_grad=True)
    h0 = torch.randn(2, 1, 4, requires_grad=True)
    reset = torch.zeros(6, 1, dtype=torch.bool)
    reset[2] = reset[4] = True
    with harness.interpreter():
        y, _ = ours(x, (h0, torch.zeros(2, 1, 4)), reset=reset)
        y[2:4].sum().backward()
    assert (x.grad[[0, 1, 4, 5]] == 0).all() and (x.grad[2:4] != 0).all() and (h0.grad == 0).all()


def test_unbatched_resets():
    theirs, ours = layers(3, 4)
    x, reset = torch.randn(5, 3), torch.tensor([False, True, False, False, True])
    y, _ = per_step(theirs, x[:, None], reset[:, None], (torch.zeros(1, 1, 4),) * 2)
    with harness.interpreter():
        torch.testing.assert_close(ours(x, reset=reset)[0], y[:, 0], atol=2e-6, rtol=2e-6)


def test_lengths_beyond_the_steps_count_as_the_nearest():
    _, ours = layers(3, 4)
    x = torch.randn(4, 3, 3)
    with harness.interpreter():
        a, b = (ours(x, lengths=torch.tensor(lengths))[0] for lengths in ([9, -2, 2], [4, 0, 2]))
    assert torch.equal(a, b) and (a[:, 1] == 0).all()


@pytest.mark.parametrize("options, error, message", [
    (dict(lengths=[1, 2]), TypeError, "lengths must be a tensor, got list"),
    (dict(lengths=torch.ones(3, dtype=torch.long)), ValueError, r"lengths must have the shape \(2,\), got \(3,\)"),
    (dict(lengths=torch.ones(2)), ValueError, "lengths must be integers, got torch.float32"),
    (dict(reset=torch.ones(5, 2)), ValueError, "reset must be bool, got torch.float32"),
    (dict(reset=torch.ones(2, 5, dtype=torch.bool)), ValueError, r"reset must have the shape \(5, 2\), got \(2, 5\)")])
@pytest.mark.parametrize("computing", [harness.interpreter, contextlib.nullcontext], ids=["natively", "torch"])
def test_bad_lengths_and_resets(options, error, message, computing):
    with computing(), pytest.raises(error, match=message):
        triton_lstm.LSTM(3, 4)(torch.randn(5, 2, 3), **options)


@pytest.mark.parametrize("computing", [harness.interpreter, contextlib.nullcontext], ids=["natively", "torch"])
def test_lengths_need_padded_input(computing):
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(3, 3)])
    with computing(), pytest.raises(ValueError, match="padded input, got PackedSequence"):
        triton_lstm.LSTM(3, 4)(packed, lengths=torch.tensor([2]))


def test_step_flags_by_hand():
    """Row 0 has 3 of 4 steps, with a reset at step 1. Row 1 has none."""
    lengths, reset = torch.tensor([3, 0]), torch.zeros(4, 2, dtype=torch.bool)
    reset[1] = reset[3] = True
    live, fresh, start, end, before, cut = 1, 2, 4, 8, 16, 32
    flags = step_flags(4, 2, 2, lengths, reset, "cpu")
    assert flags.dtype == torch.uint8 and flags[:, :, 1].eq(0).all()
    assert flags[0, :, 0].tolist() == [live | cut, live | fresh, live | end, 0]
    # The reverse direction takes steps 3, 2, 1, 0: the row begins at 2, and a new piece begins at 0.
    assert flags[1, :, 0].tolist() == [live | fresh, live | cut, live | start, before]


def kernel_and_operators(T, B, D, kind):
    """Step flags of random lengths, rows of each time and resets, by the kernel and by torch's operators."""
    torch.manual_seed(T + B)
    lengths = torch.randint(-1, T + 2, (B,)) if "lengths" in kind else None
    sizes = torch.randint(0, B + 1, (T,)).sort(descending=True)[0] if "sizes" in kind else None
    reset = torch.rand(B, T).lt(0.3).t() if "resets" in kind else None        # as the layer transposes it
    with mock.patch.object(torch, "empty", lambda *shape, **options: torch.full(shape, 255, **options)):
        ours = triton_lstm.op.sequence.step_flags(T, B, D, lengths, sizes, reset, torch.device("cpu"))
    if sizes is not None:
        lengths = (torch.arange(B) < sizes[:, None]).sum(0)
    return ours, step_flags(T, B, D, lengths, reset, "cpu")


@pytest.mark.parametrize("kind", ["lengths", "sizes", "resets", "lengths resets", "sizes resets"])
def test_the_kernel_writes_what_the_operators_do(kind):
    for T, B, D in ((1, 1, 1), (1, 3, 2), (2, 1, 2), (5, 17, 1), (5, 17, 2), (33, 40, 2)):
        with harness.interpreter():
            ours, expected = kernel_and_operators(T, B, D, kind)
        assert ours.dtype == torch.uint8 and torch.equal(ours, expected), (T, B, D)
    with harness.emulator():
        ours, expected = kernel_and_operators(5, 17, 2, kind)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("old, new", [
    ("last, START, 0", "last, 0, 0"), ("fresh_after, FRESH, 0", "fresh, FRESH, 0"),
    ("time + 1 < length", "time < length"), ("sizes_ptr + time - 1", "sizes_ptr + time"), ("row * reset_row", "row")])
def test_a_broken_kernel_of_step_flags_is_noticed(old, new, tmp_path):
    kind = "sizes resets" if "sizes" in old else "lengths resets"
    with harness.edited("rows", tmp_path, old, new), harness.emulator():
        ours, expected = kernel_and_operators(5, 17, 2, kind)
    assert not torch.equal(ours, expected)


@pytest.mark.parametrize("old, new, kind", [
    ("goes_on &= (flags & START) == 0", "goes_on &= True", dict(ragged=True)),
    ("reads &= (flags & FRESH) == 0", "reads &= True", dict(resets=True)),
    ("row < tl.where(inside, from_count, 0)", "row < from_count", dict(packed=True)),
    ("time - 1, time + 1)\n    inside", "time - 1, time - 1)\n    inside", dict(resets=True))])
def test_a_broken_kernel_of_h_before_each_step_is_noticed(old, new, kind, tmp_path):
    """It decides the gradient of R and, where gates are recomputed, all others."""
    problem = Problem(5, 4, 3, 20, 2, dtype=torch.float16, **kind)
    plan = problem.plan(schedule="resident", keep_every=2)
    with harness.edited("portable_backward", tmp_path, old, new):
        assert harness.caught(problem, plan, seeds=1)
    with harness.emulator():
        problem.check(problem.ours(plan=plan))


@pytest.mark.parametrize("schedule, arch", [("resident", 80), ("grid", 80), ("grid", 90), ("streamed", 90)])
@pytest.mark.parametrize("flagged", FLAGGED, ids=" ".join)
def test_emulated(schedule, flagged, arch):
    """The compiled kernels in the emulator, with weak memory and programs in random order."""
    problem = Problem(5, 4, 3, 20, 2, dtype=torch.float16, **flagged)
    plan = (problem.plan(schedule="resident", keep_every=2) if schedule == "resident" else
            problem.shared_plan(schedule, keep_every=2))
    with harness.emulator(arch, seed=1, memory="weak"):
        problem.check(problem.ours(plan=plan))


@pytest.mark.parametrize("dtype, hidden_size", [(torch.bfloat16, 128), (torch.bfloat16, 512), (torch.float32, 256)],
                         ids=str)
def test_flagged_loops_neither_spill_nor_lose_r(dtype, hidden_size):
    plan = make_plan(64, hidden_size, dtype, limits=PORTABLE)
    for name, kernel in compile_plan(plan, dtype, 90, flagged=True).items():
        if name in ("previous", "write_flags"):         # which have no loop
            assert machine_code.read(kernel).stack == 0
            continue
        loop = machine_code.read(kernel).time_loop
        assert loop.spills == 0
        assert name in BEFORE_LOOPS or loop.held == plan.held_bytes


def test_more_rows_than_a_tile_and_several_tiles():
    problem = Problem(4, 50, 3, 20, ragged=True, resets=True)
    plan = dataclasses.replace(problem.shared_plan("grid"), programs=2, block_h=16, groups=2, tiles=2)
    with harness.interleaved(seed=4):
        problem.check(problem.ours(plan=plan))
