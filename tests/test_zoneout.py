"""Zoneout: the masks, the kernels against the equations with the same masks, and the layer's interface."""
import contextlib
import copy
import dataclasses
import pickle
from unittest import mock

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from triton_lstm.kernels.launch import BEFORE_LOOPS
from triton_lstm.kernels.offline import compile_plan

import harness
import triton_lstm
import triton_lstm.plan.plan
from bench import machine_code
from problems import BUDGET, PORTABLE, Problem, _Tf32Matmul, error, floor
from test_double_backward import second
from test_memory import backward_peak, saved
from triton_lstm.functional import draw_seed
from triton_lstm.op import on_device
from triton_lstm.plan import H200
from triton_lstm.reference import lstm_reference, philox, zoneout_shares

RATES = (0.3, 0.2)


def seed_of(n):
    """The seed that a call draws after ``torch.manual_seed(n)``. Leaves the generator in this state."""
    torch.manual_seed(n)
    seed = draw_seed("cpu")
    torch.manual_seed(n)
    return seed


def reference(problem, zoneout, **options):
    """A function that computes the equations with zoneout from the problem's inputs."""
    def function(x, *rest):
        keep = zoneout_shares(zoneout, problem.T, problem.B, problem.D, problem.H, x)
        return lstm_reference(x, *rest, **problem.lengths_and_reset(), keep=keep, **options)
    return function


def check(problem, path, plan=None, rates=RATES, training=True, **options):
    """The error of every result is at most BUDGET times that of the equations in the same type, with the same masks."""
    zoneout = (seed_of(3) if training else None, *rates)
    exact = problem.results(reference(problem, zoneout), torch.float64)
    if problem.tf32:
        torchs = problem.results(reference(problem, zoneout, multiply=_Tf32Matmul.apply), torch.float64)
    else:
        torchs = problem.results(reference(problem, zoneout))
    torch.manual_seed(3)
    with path:
        ours = problem.ours(plan=plan, zoneout=rates, training=training, **options)
    for name, right in exact.items():
        allowed = BUDGET * max(error(torchs[name], right), floor(right, problem.dtype, problem.tf32))
        assert ours[name].shape == right.shape and ours[name].dtype == problem.dtype
        assert error(ours[name], right) <= allowed, name
    return ours


def test_philox_is_the_published_one():
    """Known answers from the library of its authors, for zeros, ones and the digits of pi, with 7 and 10 rounds."""
    def words(counter, key, rounds):
        seed = key[1] << 32 | key[0]
        seed = torch.tensor([seed - (seed >> 63 << 64)])
        return [f"{word.item():08x}" for word in philox(seed, *(torch.tensor([n]) for n in counter), rounds)]
    ones, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
    assert words((0,) * 4, (0, 0), 7) == ["5f6fb709", "0d893f64", "4f121f81", "4f730a48"]
    assert words((0,) * 4, (0, 0), 10) == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    assert words((ones,) * 4, (ones, ones), 10) == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]
    assert words(pi[:4], pi[4:], 10) == ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"]


def test_rates_and_independence():
    """The share of ones in a mask, and of ones that independent masks have in common, is right within 5 standard
    deviations."""
    T, B, D, H = 50, 20, 2, 100
    for rate in (0.1, 0.5):
        h, c = zoneout_shares((seed_of(0), rate, rate), T, B, D, H, torch.zeros(0))
        other, _ = zoneout_shares((seed_of(1), rate, rate), T, B, D, H, torch.zeros(0))
        assert h.shape == c.shape == (D, T, B, H) and set(h.unique().tolist()) == {0., 1.}
        assert ((h.mean() - rate).abs() < 5 * (rate * (1 - rate) / h.numel()) ** 0.5)
        pairs = [(h, c), (h, other), (h[0], h[1]), (h[:, 1:], h[:, :-1]), (h[:, :, 1:], h[:, :, :-1]),
                 (h[..., 1:], h[..., :-1]), (c[0], c[1]), (c[:, 1:], c[:, :-1]), (c[..., 1:], h[..., :-1])]
        both = rate ** 2
        for a, b in pairs:
            assert ((a * b).mean() - both).abs() < 5 * (both * (1 - both) / a.numel()) ** 0.5
    assert [s.mean() for s in zoneout_shares((seed_of(0), 0, 1), T, B, D, H, torch.zeros(0))] == [0, 1]


@pytest.mark.parametrize("path, schedule", [("interpreter", "resident"), ("interleaved", "grid"), ("sm_80", "resident"),
                                            ("sm_90", "resident"), ("sm_80", "grid"), ("sm_90", "grid")])
def test_masks_of_kernels_and_torch_are_the_same_bits(path, schedule):
    """In forward, the mask of h shows where y repeats. In backward, masks are the last two coefficients, in 3
    chunks."""
    problem, found = Problem(7, 18, 3, 33, 2), {}
    T, B, D, H = problem.T, problem.B, problem.D, problem.H
    plan = (problem.plan(schedule=schedule, keep_every=3) if schedule == "resident" else
            problem.shared_plan(schedule, keep_every=3))
    context = (harness.interpreter() if path == "interpreter" else harness.interleaved(1) if path == "interleaved" else
               harness.emulator(int(path[3:])))
    seed = seed_of(3)
    with context:
        launch = triton_lstm.op.sequence.launch
        run = launch.launch_kernel

        def record(kernel, plan, grid, *args, **options):
            run(kernel, plan, grid, *args, **options)
            if kernel is launch.COEFFICIENTS:
                coef, S, first = args[3], args[5], args[7]
                found[first] = coef[:D * S * B].view(D, S, B, 8, H).clone()
        with mock.patch.object(launch, "launch_kernel", record):
            ours = problem.ours(plan=plan, zoneout=RATES)
    want_h, want_c = zoneout_shares((seed, *RATES), T, B, D, H, torch.zeros(0))
    assert sorted(found) == [0, 3, 6]
    for first, coef in found.items():
        S = coef.shape[1]
        for d, lo in ((0, first), (1, T - first - S)):
            assert torch.equal(coef[d, :, :, 6], want_h[d, lo:lo + S])
            assert torch.equal(coef[d, :, :, 7], want_c[d, lo:lo + S])
    forward, reverse = ours["y"].chunk(2, -1)
    assert torch.equal((forward[1:] == forward[:-1]).float(), want_h[0, 1:])
    assert torch.equal((reverse[:-1] == reverse[1:]).float(), want_h[1, :-1])


@pytest.mark.parametrize("training", [True, False], ids=["drawn", "expected"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 2), (5, 3, 4, 5, 2), (6, 17, 3, 33, 1), (3, 3, 4, 100, 2)], ids=str)
def test_resident(shape, dtype, training):
    check(Problem(*shape, dtype=dtype), harness.interpreter(), training=training, keep_every=2)


@pytest.mark.parametrize("flagged", [dict(), dict(ragged=True), dict(resets=True), dict(ragged=True, resets=True)],
                         ids=" ".join)
@pytest.mark.parametrize("training", [True, False], ids=["drawn", "expected"])
def test_lengths_and_resets(flagged, training):
    problem = Problem(6, 4, 3, 20, 2, **flagged)
    check(problem, harness.interpreter(), training=training, keep_every=3)
    plan = problem.shared_plan("grid", keep_every=3)
    check(problem, harness.interleaved(2), plan, training=training)
    assert plan.programs == 2


@pytest.mark.parametrize("dtype, arch, training, flagged", [
    (torch.bfloat16, 90, True, dict()), (torch.float16, 80, True, dict(ragged=True, resets=True)),
    (torch.float32, 90, False, dict(ragged=True, resets=True))], ids=str)
@pytest.mark.parametrize("schedule", ["resident", "grid", "streamed"])
def test_emulated(schedule, dtype, training, flagged, arch):
    """The compiled kernels in the emulator, with weak memory and programs in random order."""
    problem = Problem(5, 4, 3, 20, 2, dtype=dtype, **flagged)
    plan = (problem.plan(schedule="resident", keep_every=2) if schedule == "resident" else
            problem.shared_plan(schedule, keep_every=2))
    check(problem, harness.emulator(arch, seed=1, memory="weak"), plan, training=training)


@pytest.mark.parametrize("schedule", ["resident", "grid"])
def test_tf32_keeps_what_it_keeps_exactly(schedule):
    """h is rounded to TF32 for products, but not where a unit keeps it."""
    problem = Problem(4, 3, 4, 40, D=2, tf32=True, ragged=True)
    plan = problem.plan(schedule=schedule, keep_every=2) if schedule == "resident" else problem.shared_plan(schedule)
    check(problem, harness.emulator(90), plan)
    with harness.emulator(90):
        ours = problem.ours(plan=plan, zoneout=1)
    _, _, _, _, h0, c0 = problem.tensors()[0]
    assert torch.equal(ours["h_n"], h0) and torch.equal(ours["c_n"], c0)


def test_several_tiles():
    problem = Problem(4, 50, 3, 20, ragged=True, resets=True)
    plan = dataclasses.replace(problem.shared_plan("grid"), programs=2, block_h=16, groups=2, tiles=2)
    check(problem, harness.interleaved(seed=4), plan)
    plan = dataclasses.replace(plan, groups=1, tiles=2, block_b=32)
    check(problem, harness.emulator(90, seed=4), plan)


@pytest.mark.parametrize("schedule", ["resident", "grid"])
def test_rates_of_one_and_zero(schedule):
    """With rate 1 states and their gradients pass unchanged. With rate 1 for c only, c stays c0. With rate 0 results
    are those without zoneout."""
    problem = Problem(5, 3, 4, 20, 2)
    plan = problem.plan(schedule="resident") if schedule == "resident" else problem.shared_plan("grid")
    (_, _, _, _, h0, c0), (dy, dh_n, dc_n) = problem.tensors()
    for training in (True, False):
        with harness.interleaved(1):
            ours = problem.ours(plan=plan, zoneout=1., training=training)
        assert torch.equal(ours["y"], torch.cat(list(h0), -1).expand(5, 3, 40))
        assert torch.equal(ours["h_n"], h0) and torch.equal(ours["c_n"], c0)
        assert all((ours[name] == 0).all() for name in ("dx", "dw", "dr", "db"))
        torch.testing.assert_close(ours["dh0"], dh_n + torch.stack(dy.sum(0).chunk(2, -1)))
        assert torch.equal(ours["dc0"], dc_n)
        ours = check(problem, harness.interleaved(1), plan, rates=(0., 1.), training=training)
        assert torch.equal(ours["c_n"], c0)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with harness.interleaved(1):
        plain, ours = problem.ours(plan=plan), problem.ours(plan=plan, zoneout=(0, 0))
    assert all(torch.equal(plain[name], ours[name]) for name in plain)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("reset_at", [None, 2])
def test_what_is_kept_over_step_flags(reset_at):
    """With rate 1 the state is h0 until a reset, and then zero. After the end of a row y is zero; h_n and c_n are the
    state at the end."""
    problem, lengths = Problem(5, 2, 3, 7), torch.tensor([5, 3])
    x, w, r, b, h0, c0 = problem.tensors()[0]
    reset = torch.zeros(5, 2, dtype=torch.bool)
    if reset_at is not None:
        reset[reset_at] = True
    with harness.interpreter():
        y, (h_n, c_n) = triton_lstm.lstm(x, w, r, b, (h0, c0), lengths=lengths, reset=reset, zoneout=1.)
    for t in range(5):
        kept = torch.zeros_like(h0[0]) if reset_at is not None and t >= reset_at else h0[0]
        assert torch.equal(y[t], kept * (t < lengths)[:, None])
    assert torch.equal(h_n, h0 * (reset_at is None)) and torch.equal(c_n, c0 * (reset_at is None))


def test_eval_is_the_expectation_of_a_step():
    """2,000 rows take one step from the same state. The mean over rows is the result of eval mode, within 5 standard
    deviations of the mean: (r (1 - r) / rows)^1/2 times the difference between the old and the new state."""
    rows, H = 2000, 9
    x, w, r, b, h0, c0 = Problem(1, 1, 3, H).tensors()[0]
    call = lambda rows, **options: triton_lstm.lstm(x.expand(1, rows, 3), w, r, b, tuple(
        s.expand(1, rows, H).contiguous() for s in (h0, c0)), **options)[1]
    torch.manual_seed(0)
    with harness.interpreter():
        drawn, expected = call(rows, zoneout=RATES), call(1, zoneout=RATES, training=False)
        new = call(1)
    for rate, kept, fresh, mean, want in zip(RATES, (h0, c0), new, drawn, expected):
        bound = 5 * (rate * (1 - rate) / rows) ** 0.5 * (kept - fresh).abs() + 1e-6
        assert ((mean.mean(1, keepdim=True) - want).abs() <= bound).all()
        torch.testing.assert_close(want, rate * kept + (1 - rate) * fresh)
        assert ((mean == kept) | ((mean - fresh).abs() < 1e-6)).all()


@pytest.mark.parametrize("schedule", ["resident", "grid"])
def test_chunks_have_the_same_masks(schedule, monkeypatch):
    """For any chunks of forward and backward, gradients are right, and h is kept at exactly the same places. Other bits
    of h may differ, because the CPU's GEMM rounds differently at other sizes."""
    problem = Problem(7, 3, 3, 20, 2, ragged=True)
    results = []
    for keep_every, forward_bytes in ((1, 1 << 28), (3, 1), (64, 1)):
        monkeypatch.setattr(triton_lstm.plan.plan, "FORWARD_BYTES", forward_bytes)
        plan = (problem.plan(schedule="resident", keep_every=keep_every) if schedule == "resident" else
                problem.shared_plan("grid", keep_every=keep_every))
        assert plan.forward_steps(7, 4) == min(7, keep_every if forward_bytes == 1 else 7)
        y = check(problem, harness.interleaved(5), plan)["y"]
        results.append(y[1:] == y[:-1])
    assert results[0].any() and all(torch.equal(kept, results[0]) for kept in results)


def test_nothing_of_the_masks_is_kept():
    """Besides what is saved without zoneout, the seed is saved, in eight bytes. Backward allocates two more
    coefficients."""
    T, B, I, H, D = 40, 3, 5, 10, 2
    plan = triton_lstm.make_plan(B, H, torch.float32, D, limits=None, keep_every=8)
    for rates in (0.1, (0.1, 0.), (0., 0.1)):
        assert saved(T, B, I, H, D, torch.float32, 8, zoneout=rates) == plan.saved_bytes(T) + 8
    assert saved(T, B, I, H, D, torch.float32, 8, zoneout=0.1, training=False) == plan.saved_bytes(T)
    plan = triton_lstm.make_plan(17, 20, torch.float32, 2, limits=PORTABLE, keep_every=8)
    zoneout = (torch.zeros(1, dtype=torch.int64), *RATES)
    peaks = [backward_peak(plan, T, I, zoneout=zoneout) for T in (16, 64)]          # of several chunks
    assert peaks[1] <= peaks[0] <= plan.backward_bytes(64, I, 4, zoneout=True)
    assert peaks[0] - backward_peak(plan, 16, I) == 8 * 17 * 2 * 20 * 2 * 4


@pytest.mark.parametrize("training", [True, False], ids=["drawn", "expected"])
@pytest.mark.parametrize("problem", [
    Problem(5, 3, 4, 7, 2), Problem(4, 2, 3, 5, 1, bias=False, ragged=True, resets=True),
    Problem(4, 2, 3, 5, 2, torch.bfloat16)], ids=str)
def test_double_backward(problem, training):
    """Second derivatives have the masks of the first ones, and at most BUDGET times the error of the equations in the
    same type."""
    function = reference(problem, (seed_of(3) if training else None, *RATES))
    right, theirs = second(problem, function, torch.float64), second(problem, function, problem.dtype)

    def ours(x, w, r, b, h0, c0):
        y, (h_n, c_n) = triton_lstm.lstm(x, w, r, b, (h0, c0), keep_every=2, zoneout=RATES, training=training,
                                         **problem.lengths_and_reset())
        return y, h_n, c_n
    torch.manual_seed(3)
    with harness.interpreter():
        got = second(problem, ours, problem.dtype)
    assert got.keys() == right.keys()
    for name, want in right.items():
        assert error(got[name], want) <= BUDGET * max(error(theirs[name], want), floor(want, problem.dtype)), name


def layers_by_equations(layer, x, hx, rates, lengths):
    """y, h_n and c_n of an LSTM in float64, from x (T, B, I). Each of its layers draws its own seed."""
    D, (T, B, _), states = 1 + layer.bidirectional, x.shape, []
    for k in range(layer.num_layers):
        weights = [getattr(layer, name).detach().double() for name in layer._flat_weights_names]
        w, r, b, _ = layer._stacked(weights, k, torch.float64)
        seed = draw_seed("cpu") if layer.training else None
        keep = zoneout_shares((seed, *rates), T, B, D, layer.hidden_size, x.double())
        h0, c0 = (s[k * D:(k + 1) * D].double() for s in hx)
        x, *state = lstm_reference(x.double(), w, r, b, h0, c0, lengths, keep=keep)
        states.append(state)
    return x, *(torch.cat(s) for s in zip(*states))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("options", [dict(), dict(num_layers=2, bidirectional=True, batch_first=True)], ids=str)
def test_layer(options, kernels, training):
    """Each layer draws its own masks. Devices without kernels draw the same ones."""
    torch.manual_seed(0)
    layer = triton_lstm.LSTM(4, 7, zoneout=RATES, **options).train(training)
    x, lengths = torch.randn(6, 3, 4), torch.tensor([2, 6, 5])
    layers = layer.num_layers * (1 + layer.bidirectional)
    hx = torch.randn(layers, 3, 7), torch.randn(layers, 3, 7)
    turn = (lambda t: t.transpose(0, 1)) if layer.batch_first else lambda t: t
    for given in (None, lengths):
        torch.manual_seed(3)
        right = layers_by_equations(layer, x, hx, RATES, given)
        torch.manual_seed(3)
        with harness.interpreter() if kernels else torch.enable_grad():
            y, state = layer(turn(x), hx, **({} if given is None else dict(lengths=given)))
        for got, want in zip((turn(y), *state), right):
            torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=2e-6)


def test_packed_sequences_and_single_rows():
    torch.manual_seed(0)
    layer = triton_lstm.LSTM(3, 5, bidirectional=True, zoneout=0.4)
    rows = [torch.randn(n, 3) for n in (6, 4, 1)]
    padded = torch.nn.utils.rnn.pad_sequence(rows)
    for context in (harness.interpreter, torch.enable_grad):
        with context():
            torch.manual_seed(3)
            want, want_state = layer(padded, lengths=torch.tensor([6, 4, 1]))
            torch.manual_seed(3)
            packed, state = layer(torch.nn.utils.rnn.pack_sequence(rows))
            assert torch.equal(torch.nn.utils.rnn.pad_packed_sequence(packed)[0], want)
            assert all(map(torch.equal, state, want_state))
            torch.manual_seed(3)
            want = layer(padded[:, :1])[0]
            torch.manual_seed(3)
            assert torch.equal(layer(padded[:, 0])[0], want[:, 0])


def test_seeds():
    """Random numbers are drawn as for dropout: a seed determines the masks, each call draws new ones, and eval draws
    none."""
    layer, x = triton_lstm.LSTM(4, 9, num_layers=2, zoneout=0.5), torch.randn(5, 3, 4)
    with harness.interpreter():
        torch.manual_seed(1)
        first, second_ = layer(x)[0], layer(x)[0]
        torch.manual_seed(1)
        assert torch.equal(layer(x)[0], first) and torch.equal(layer(x)[0], second_)
        assert not torch.equal(first, second_)
        torch.manual_seed(2)
        assert not torch.equal(layer(x)[0], first)
        layer.eval()
        state = torch.get_rng_state()
        assert torch.equal(layer(x)[0], layer(x)[0])
        assert torch.equal(torch.get_rng_state(), state)
        layer.zoneout = 0.
        plain = torch.nn.LSTM(4, 9, num_layers=2)
        plain.load_state_dict(layer.state_dict())
        torch.testing.assert_close(layer(x)[0], plain(x)[0])


def test_steps_in_eval_are_the_sequence():
    torch.manual_seed(0)
    layer, x = triton_lstm.LSTM(4, 7, num_layers=2, zoneout=RATES).eval(), torch.randn(5, 3, 4)
    with harness.interpreter():
        y, want = layer(x)
        state = None
        for t in range(5):
            y_t, state = layer.step(x[t], state)
            torch.testing.assert_close(y_t, y[t])
    torch.testing.assert_close(state, want)


def test_gates_have_the_cells_of_eval():
    torch.manual_seed(0)
    layer, x = triton_lstm.LSTM(4, 7, bidirectional=True, zoneout=RATES), torch.randn(5, 3, 4)
    hx = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    state = torch.get_rng_state()
    with harness.interpreter():
        forward, reverse = triton_lstm.gates(layer, x, hx)
        _, (_, c) = layer.eval()(x, hx)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(torch.stack([forward.c[-1], reverse.c[0]]), c.detach())


def test_interface():
    """repr, copies, old pickles without zoneout, and errors."""
    layer = triton_lstm.LSTM(4, 5, zoneout=RATES)
    assert repr(layer) == "LSTM(4, 5, zoneout=(0.3, 0.2))" and repr(triton_lstm.LSTM(4, 5)) == "LSTM(4, 5)"
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.zoneout == RATES
    del layer.__dict__["zoneout"]
    old = pickle.loads(pickle.dumps(layer))
    assert old.zoneout == 0 and repr(old) == "LSTM(4, 5)"
    with pytest.raises(NotImplementedError, match=r"LSTM\(\.\.\., zoneout=\.\.\.\) and its method step"):
        triton_lstm.LSTMCell(4, 5, zoneout=0.1)
    with pytest.raises(ValueError, match="zoneout with proj_size=2 is not implemented"):
        triton_lstm.LSTM(4, 5, proj_size=2, zoneout=0.1)


@pytest.mark.parametrize("zoneout", [-0.1, 1.5, float("nan"), (0.1, 2), (0.1,), (0.1, 0.2, 0.3)], ids=str)
@pytest.mark.parametrize("computing", [harness.interpreter, contextlib.nullcontext], ids=["natively", "torch"])
def test_wrong_rates(zoneout, computing):
    x, w, r = torch.zeros(3, 2, 4), torch.zeros(20, 4), torch.zeros(20, 5)
    layer = triton_lstm.LSTM(4, 5)
    layer.zoneout = zoneout
    for call in (lambda: triton_lstm.LSTM(4, 5, zoneout=zoneout), lambda: triton_lstm.lstm(x, w, r, zoneout=zoneout),
                 lambda: layer(x)):
        with computing(), pytest.raises(ValueError, match="zoneout must be a probability or a pair of them"):
            call()


def test_conversion():
    model = torch.nn.ModuleList([torch.nn.LSTM(3, 4), triton_lstm.LSTM(3, 4, zoneout=0.1)])
    assert triton_lstm.convert(model).swapped == ["0"] and model[0].zoneout == 0
    result = triton_lstm.to_torch(model)
    assert result.swapped == ["0"] and result.left == {"1": "zoneout=0.1: torch's own LSTM has none"}
    model[1].zoneout = 0.
    assert triton_lstm.to_torch(model).swapped == ["1"]
    assert type(model[1]) is torch.nn.LSTM and "zoneout" not in vars(model[1])


def test_plans_are_portable():
    """With zoneout automatic plans have portable kernels only, other plans are refused, and ``explain`` says so."""
    with mock.patch.object(triton_lstm.op, "limits_of", lambda device: H200):
        for H in (32, 128):     # one CTA holds R at these sizes, so no clusters are needed
            assert on_device(16, H, torch.bfloat16, 1, torch.device("cpu"))[0].gluon
            plan, _ = on_device(16, H, torch.bfloat16, 1, torch.device("cpu"), zoneout=True)
            assert plan == triton_lstm.make_plan(16, H, torch.bfloat16, limits=PORTABLE) and not plan.gluon
    x, layer = torch.empty(5, 16, 4, dtype=torch.bfloat16, device="meta"), triton_lstm.LSTM(4, 128, zoneout=0.1)
    text = triton_lstm.explain(layer, x, H200)
    assert text.startswith("LSTM(4, 128, zoneout=0.1) on T=5") and "each by portable resident: " in text
    assert "  not cluster: the cluster kernels have no zoneout" in text
    layer.plan = triton_lstm.make_plan(16, 128, torch.bfloat16)
    assert "layer.plan cannot run: the resident kernels have no zoneout" in triton_lstm.explain(layer, x, H200)
    assert triton_lstm.explain(layer, x.double(), H200).endswith("torch operators compute step by step: torch.float64")
    problem = Problem(3, 3, 4, 20, dtype=torch.float16)
    names = set()
    with harness.emulator(90):
        run = harness.compiled_launch.launch_kernel
        with mock.patch.object(harness.compiled_launch, "launch_kernel", lambda kernel, *args, **options: (
                names.add(kernel.__name__), run(kernel, *args, **options))):
            check(problem, torch.enable_grad())
        with pytest.raises(triton_lstm.PlanError, match="the resident kernels have no zoneout"):
            problem.ours(plan=problem.plan(limits=H200), zoneout=0.1)
    assert names == {"forward_resident", "coefficients", "backward_resident"}


@pytest.mark.parametrize("batch, hidden_size, dtype", [(16, 128, torch.bfloat16), (16, 64, torch.float32),
                                                       (64, 512, torch.bfloat16), (1024, 512, torch.bfloat16),
                                                       (64, 256, torch.float32)], ids=str)
def test_loops_neither_spill_nor_lose_r(batch, hidden_size, dtype):
    """Tested with masks that are drawn. In eval mode kernels compute less."""
    plan = triton_lstm.make_plan(batch, hidden_size, dtype, limits=PORTABLE)
    for name, kernel in compile_plan(plan, dtype, 90, zoneout="drawn").items():
        loop = machine_code.read(kernel).time_loop
        # test_compiled.py explains why this kernel spills a few registers; the coefficients of zoneout add some
        few = 13 if name == "backward_grid" and plan.programs * plan.block_b * plan.block_h >= 1 << 14 else 0
        assert loop.spills <= few
        assert name in BEFORE_LOOPS or loop.held == plan.held_bytes


def test_compile_full_graph():
    """The seed is a tensor in the graph. Masks are those of eager mode. Another length or batch compiles nothing
    new."""
    torch.manual_seed(1)
    layer, graphs = triton_lstm.LSTM(6, 9, num_layers=2, bidirectional=True, zoneout=RATES), []

    def compiler(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)
    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
    model = torch.compile(lambda x: layer(x)[0].square().sum(), fullgraph=True, dynamic=True, backend=backend)
    with harness.interpreter():
        for T, B in ((5, 3), (7, 3), (2, 4)):
            x, results = torch.randn(T, B, 6), []
            for function in (model, lambda x: layer(x)[0].square().sum()):
                layer.zero_grad()
                torch.manual_seed(3)
                function(x).backward()
                results.append([p.grad.clone() for p in layer.parameters()])
            for got, want in zip(*results):
                torch.testing.assert_close(got, want)
    assert len(graphs) == 2, "one forward and one backward graph"
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")     # opcheck of torch 2.14
@pytest.mark.parametrize("drawn", [True, False])
def test_operator_passes_torchs_own_checks(drawn):
    x, w, r, b, h0, c0 = (t.requires_grad_() for t in Problem(3, 2, 4, 5).tensors()[0])
    with harness.interpreter():
        torch.library.opcheck(triton_lstm.op.lstm_op, (x, w, r, b, h0, c0, None, None, "", 2, True, 0,
                                                       seed_of(0) if drawn else None, *RATES))


def test_functional_transforms():
    """Gradients and Jacobians by torch.func are those of autograd. vmap needs its argument ``randomness``, as for
    dropout."""
    x, w, r, b, h0, c0 = Problem(3, 2, 4, 5).tensors()[0]
    call = lambda x, w=w: triton_lstm.lstm(x, w, r, b, (h0, c0), zoneout=0.5)[0]
    with harness.interpreter():
        torch.manual_seed(3)
        got = torch.func.jacrev(lambda x: call(x).sum(0))(x)
        torch.manual_seed(3)
        want = torch.autograd.functional.jacobian(lambda x: call(x).sum(0), x)
        torch.testing.assert_close(got, want)
        members = w.expand(3, *w.shape)
        with pytest.raises(RuntimeError, match="randomness"):
            torch.func.vmap(call, (None, 0))(x, members)
        torch.manual_seed(3)
        same = torch.func.vmap(call, (None, 0), randomness="same")(x, members)
        torch.manual_seed(3)
        assert all(torch.equal(y, same[0]) for y in (*same, call(x)))
        different = torch.func.vmap(call, (None, 0), randomness="different")(x, members)
        assert not any(torch.equal(different[n], different[n - 1]) for n in range(3))

        def loss(w):
            return torch.func.vmap(call, (None, 0), randomness="different")(x, w).square().sum()
        torch.manual_seed(3)
        got = torch.func.grad(loss)(members.clone())
        torch.manual_seed(3)
        leaf = members.clone().requires_grad_()
        want, = torch.autograd.grad(loss(leaf), leaf)
        torch.testing.assert_close(got, want)
        assert not torch.allclose(got[0], got[1])


@pytest.mark.gpu
@pytest.mark.parametrize("H", [33, 300])
def test_on_a_gpu(H):
    """Masks on a GPU are those of the equations. A CUDA graph draws new ones in each replay."""
    layer, x = triton_lstm.LSTM(4, H, zoneout=RATES).cuda(), torch.randn(6, 5, 4, device="cuda")
    torch.manual_seed(3)
    seed = draw_seed("cuda").cpu()
    torch.manual_seed(3)
    y = layer(x)[0]
    want, _ = zoneout_shares((seed, *RATES), 6, 5, 1, H, torch.zeros(0))
    assert torch.equal((y[1:] == y[:-1]).float().cpu(), want[0, 1:])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        y = layer(x)[0]
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(first, y)
