"""The sweep without a GPU: providers on the CPU with known times, the CSV file, reports from it, and pictures."""
import dataclasses
import itertools
import math
import subprocess
import sys
import time
import types
from unittest import mock

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_lstm.kernels.offline import no_gpu

import harness
import ptx_emulator
import triton_lstm
from bench import __main__ as command
from bench import compare, correctness, floors, instrument, plots, providers, report, rows, sweep, targets, workloads
from bench.rows import BASELINES, CUDNN, OURS, PACKED, RESET_LOOP, Environment, Row
from bench.workloads import Case
from problems import PORTABLE
from triton_lstm import make_plan
from triton_lstm.kernels import exchange
from triton_lstm.plan import H200, RTX_4090, step_cycles

HERE = Environment("a GPU", "2.0", "9", "3.6.0", "abc1234", "2026-01-02T03:04")
CASES = [Case("grid", mode, dtype, 3, 4, hidden, hidden) for mode in ("forward", "train") for dtype in ("fp16", "fp32")
         for hidden in (8, 16)]
EFFORT = sweep.Effort(sample_ms=10)


class Instrument:
    """A stand-in for a GPU, on which every provider takes a known time, which grows a little with each call."""
    device, multiprocessors, multiply_adds = "cpu", H200.multiprocessors, H200.multiply_adds

    def __init__(self, times):
        self.times, self.order = times, []

    def sample(self, call, stream=False):
        call()
        self.order.append(call.provider)
        return self.times[call.provider] * (1 + self.order.count(call.provider) / 1000)

    def peak_bytes(self, call):
        call()
        return 1000 * self.times[call.provider]

    def synchronize(self):
        pass

    release = synchronize

    def clocks(self):
        return 1500, 2500


class Floors:
    def step_us(self, plan, case, sm_mhz):
        return 2.5, 1.

    def gemm_tflops(self, dtype):
        return 500.


def nn_lstm(problem):
    return problem.runs(problem.layer(torch.nn.LSTM))


class Wrong(torch.nn.LSTM):
    """An LSTM whose y is wrong by a tenth."""
    def forward(self, x, hx=None):
        y, state = super().forward(x, hx)
        return 1.1 * y, state


def run(path, ours=nn_lstm, cases=CASES, gpu=None, **options):
    """Measures our provider, at 1 ms, and torch's, at 3 ms, into ``path``. Returns (rows, exit code)."""
    gpu = gpu or Instrument({OURS: 1., CUDNN: 3.})
    code = sweep.run(path, cases, {OURS: ours, CUDNN: nn_lstm}, gpu, Floors(), HERE, EFFORT, **options)
    return rows.load(path), code


# Cases

def test_workloads():
    assert len({w.name for w in workloads.WORKLOADS}) == len(workloads.WORKLOADS) == 25
    for w in workloads.WORKLOADS:
        case = w.case()
        assert min(case.batch, case.steps, case.input_size, case.hidden_size, case.layers) >= 1
        assert case.directions in (1, 2) and case.dtype in workloads.DTYPES and case.mode in workloads.MODES
        assert case.sequences in workloads.SEQUENCES and w.source
    openunmix = next(w for w in workloads.WORKLOADS if w.name == "openunmix")
    assert openunmix.case("bf16") == Case("openunmix", "train", "bf16", 16, 255, 512, 256, 3, 2, "padded", 0.4)
    assert openunmix.case(mode="stream").steps == 1


def test_sweeps_have_each_case_once_and_every_workload():
    for name in ("quick", "record", "full"):
        cases = getattr(workloads, name)()
        assert len(set(cases)) == len(cases)
    record, full = workloads.record(), workloads.full()
    assert {w.case(dtype) for w in workloads.WORKLOADS for dtype in workloads.DTYPES} <= set(record) <= set(full)
    grid = {(c.hidden_size, c.batch, c.steps) for c in full if c.workload == "grid" and c.mode == "train"}
    assert grid == set(itertools.product(workloads.HIDDEN_SIZES, workloads.BATCHES, workloads.STEPS))
    # each target has cases that it is measured by
    measured = [Row(c, name, HERE, "ok", ms_median=1., peak_bytes=1) for c in record
                for name in (OURS, BASELINES[c.sequences])]
    assert all(target.values for target in targets.targets(measured))


def test_lengths_are_spread_over_the_steps():
    case = Case("grid", "train", "fp32", 5, 9, 8, 8, sequences="ragged")
    assert sorted(case.lengths) == [1, 3, 5, 7, 9] and case.lengths == case.lengths and case.tokens == 25
    assert dataclasses.replace(case, sequences="padded").tokens == 45
    assert dataclasses.replace(case, batch=1).lengths == (9,)


def test_flop():
    case = Case("grid", "forward", "fp32", 3, 5, 7, 11, layers=2, directions=2)
    multiply_adds = 3 * 5 * 2 * 4 * 11 * ((7 + 11) + (22 + 11))
    assert case.flop == 2 * multiply_adds and dataclasses.replace(case, mode="train").flop == 6 * multiply_adds


@pytest.mark.parametrize("sizes, algorithm", [
    (dict(hidden_size=192), "PERSIST_STATIC_SMALL_H"), (dict(hidden_size=192, mode="train"),
                                                        "PERSIST_STATIC_SMALL_H / STANDARD"),
    (dict(hidden_size=128, mode="train", dtype="bf16"), "PERSIST_STATIC_SMALL_H"),
    (dict(hidden_size=256), "PERSIST_STATIC"), (dict(hidden_size=1024, batch=128), "PERSIST_STATIC"),
    (dict(hidden_size=256, dtype="bf16"), "STANDARD"), (dict(hidden_size=1152), "STANDARD"),
    (dict(hidden_size=256, batch=136), "STANDARD"), (dict(hidden_size=256, batch=12), "STANDARD"),
    (dict(hidden_size=256, input_size=64), "STANDARD"), (dict(hidden_size=320), "STANDARD"),
    (dict(hidden_size=256, layers=2), "STANDARD"), (dict(hidden_size=256, directions=2), "STANDARD"),
    (dict(hidden_size=64, sequences="ragged"), "STANDARD")])
def test_cudnn_algorithm(sizes, algorithm):
    """Compared with the rules of torch's RNN.cpp, applied by hand."""
    case = Case("grid", "forward", "fp16", 64, 10, 128, 256)
    assert dataclasses.replace(case, **sizes).cudnn_algorithm == algorithm


# Providers, on the CPU

def results_of(case, make):
    problem = providers.Problem.of(case, "cpu")
    run = sweep.Run("a provider", make, problem)
    exact = correctness.exact_results(problem.weights, problem.x, problem.dy, problem.runs)
    return run, run.results(), exact


@pytest.mark.parametrize("name, sequences, layers", [(CUDNN, "padded", 2), (PACKED, "ragged", 2),
                                                     (RESET_LOOP, "resets", 2), ("compiled loop", "padded", 2),
                                                     ("compiled loop", "resets", 1)])
@pytest.mark.parametrize("mode", ["forward", "train"])
def test_providers_compute_the_lstm(name, sequences, layers, mode):
    case = Case("grid", mode, "fp32", 5, 7, 6, 10, layers, 1 if sequences == "resets" else 2, sequences, 0.)
    with mock.patch.object(torch, "compile", lambda function: function):       # it needs a C++ compiler
        _, found, exact = results_of(case, providers.PROVIDERS[name])
    assert set(found) == set(exact) and correctness.error(found, exact) < 1e-5
    assert (f"dweight_hh_l{layers - 1}" in found) == (mode == "train")


def test_the_reference_of_ragged_rows_and_resets_is_a_run_of_each_piece_alone():
    for sequences in ("ragged", "resets"):
        problem = providers.Problem.of(Case("grid", "forward", "fp32", 9, 19, 3, 5, sequences=sequences), "cpu")
        exact = correctness.exact_results(problem.weights, problem.x, None, problem.runs)
        lstm = torch.nn.LSTM(3, 5).double()
        lstm.load_state_dict(problem.weights.state_dict())
        for b, length in enumerate(problem.case.lengths):
            starts = [0] + [t for t in range(1, 19) if problem.reset is not None and problem.reset[t, b]]
            for start, end in zip(starts, [*starts[1:], length]):
                y, (h, c) = lstm(problem.x[start:end, b:b + 1].double())
                torch.testing.assert_close(exact["y"][start:end, b], y[:, 0].detach())
            torch.testing.assert_close(exact["c_n"][:, b], c[:, 0].detach())
            assert (exact["y"][length:, b] == 0).all()
        assert problem.reset is None or problem.reset[1:].any()


def test_torchrl_and_flashrnn_are_called_by_their_interface():
    """The packages need a GPU. Functions in torch, with their signatures and shapes, stand in for them."""
    def lstm_triton(x, hidden, cell, w_ih, w_hh, b_ih, b_hh, is_init):
        B, T, _ = x.shape
        h, c, outputs = hidden[:, 0], cell[:, 0], []
        for t in range(T):
            keep = ~is_init[:, t, None]
            h, c = providers._step(x[:, t] @ w_ih.t() + b_ih + b_hh, h * keep, c * keep, w_hh)
            outputs.append(h)
        return torch.stack(outputs, 1), None, h, c

    def flashrnn(Wx, R, b, function, backend, dtype):
        assert (function, backend, dtype) == ("lstm", "triton_fused", "float32") and Wx.is_contiguous()
        B, T, _, _, H = Wx.shape
        h, c, states = Wx.new_zeros(B, H), Wx.new_zeros(B, H), []
        for t in range(T):
            h, c = providers._step((Wx[:, t] + b).reshape(B, 4 * H), h, c, R.reshape(4 * H, H))
            states.append(torch.stack([h, c]))
        states = torch.stack(states, 2)[:, :, :, None]
        return states, states[:, :, -1:]

    modules = {"torchrl.modules.tensordict_module._rnn_triton": types.SimpleNamespace(lstm_triton=lstm_triton),
               "flashrnn": types.SimpleNamespace(flashrnn=flashrnn)}
    with mock.patch.object(providers.importlib.util, "find_spec"), \
            mock.patch.object(providers.importlib, "import_module", modules.__getitem__):
        for name, sequences in (("TorchRL", "padded"), ("TorchRL", "resets"), ("FlashRNN", "padded")):
            _, found, exact = results_of(Case("grid", "train", "fp32", 5, 7, 6, 10, sequences=sequences),
                                         providers.PROVIDERS[name])
            assert set(found) == set(exact) and correctness.error(found, exact) < 1e-5
        with pytest.raises(providers.Unavailable, match="one layer"):
            results_of(Case("grid", "train", "fp32", 5, 7, 6, 10, layers=2), providers.PROVIDERS["FlashRNN"])


@pytest.mark.parametrize("name, change, reason", [
    ("FlashRNN", {}, "not installed"), (PACKED, {}, "for ragged"), (CUDNN, dict(sequences="ragged"), "for padded"),
    ("cuDNN graph", {}, "need a GPU"), ("compiled loop", dict(sequences="ragged"), "padded"),
    ("compiled loop", dict(steps=2000), "1024 steps"), ("compiled loop", dict(dropout=.5, layers=2), "dropout")])
def test_unavailable_providers_say_why(name, change, reason):
    with pytest.raises(providers.Unavailable, match=reason):
        providers.PROVIDERS[name](providers.Problem.of(
            dataclasses.replace(Case("grid", "train", "fp32", 2, 3, 4, 5), **change), "cpu"))


def test_ours_is_not_timed_where_torch_would_compute():
    with mock.patch.object(providers, "on_device", return_value=(None, "too large")), \
            pytest.raises(providers.Unavailable, match="too large"):
        providers.PROVIDERS[OURS](providers.Problem.of(CASES[0], "cpu"))


@pytest.mark.parametrize("name, sequences", [(OURS, "ragged"), (OURS, "resets"), (f"{OURS} packed", "ragged")])
def test_ours_computes_lengths_and_resets(name, sequences):
    case = Case("grid", "train", "fp32", 5, 7, 6, 10, sequences=sequences)
    with mock.patch.object(providers, "on_device", return_value=(make_plan(5, 10, torch.float32, limits=None), None)), \
            harness.interpreter():
        run, found, exact = results_of(case, providers.PROVIDERS[name])
    assert getattr(run.layer, "lstm", run.layer).timed_plan.hidden_size == 10 and set(found) == set(exact)
    assert correctness.error(found, exact) < 1e-2


def test_ours_runs_by_the_schedule_that_its_name_has():
    with mock.patch.object(providers, "on_device", return_value=(make_plan(3, 8, torch.float16), None)), \
            mock.patch.object(providers.Limits, "of", return_value=triton_lstm.plan.H200):
        for schedule in ("resident", "grid"):
            layer = providers.PROVIDERS[f"{OURS} {schedule}"](providers.Problem.of(CASES[0], "cpu"))
            assert isinstance(layer, triton_lstm.LSTM) and layer.plan.schedule == schedule
            assert layer.keep_gates and layer.timed_plan is layer.plan
        for name, keep_gates in ((OURS, None), (providers.RECOMPUTE, False)):
            layer = providers.PROVIDERS[name](providers.Problem.of(CASES[0], "cpu"))
            assert layer.plan is None and layer.keep_gates is keep_gates and layer.timed_plan.schedule == "resident"
        with pytest.raises(providers.Unavailable, match="all of R fits on the chip"):
            providers.PROVIDERS[f"{OURS} streamed"](providers.Problem.of(CASES[0], "cpu"))


def test_dropout_is_off_for_the_check_only():
    case = Case("grid", "train", "fp32", 2, 3, 4, 5, layers=2, dropout=0.5)
    seen = []

    def make(problem):
        lstm = providers.PROVIDERS[CUDNN](problem)
        lstm.register_forward_hook(lambda module, *_: seen.append(module.dropout))
        return lstm
    run, found, exact = results_of(case, make)
    assert correctness.error(found, exact) < 1e-5
    run()
    assert seen == [0., 0.5]


# What a run measures

def test_a_run_measures_checks_and_writes(tmp_path):
    gpu = Instrument({OURS: 1., CUDNN: 3.})
    found, code = run(tmp_path / "a.csv", gpu=gpu)
    assert code == 0 and [(r.case, r.provider) for r in found] == [(c, p) for c in CASES for p in (OURS, CUDNN)]
    for row in found:
        assert row.status == "ok" and 0 < row.error < 1e-2 and row.environment == HERE and row.first_call_s > 0
        assert 1 < row.ms_median / {OURS: 1., CUDNN: 3.}[row.provider] < 1.2
        assert row.ms_p20 < row.ms_median < row.ms_p80 and row.samples == (10 if row.provider == OURS else 5)
        assert (row.sm_mhz, row.memory_mhz, row.gemm_tflops) == (1500, 2500, 500.)
        assert (row.peak_bytes is not None) == (row.saved_bytes is not None) == (row.case.mode == "train")
        assert row.us_per_step == pytest.approx(250 * row.ms_median)
        assert row.tokens_per_s == pytest.approx(12000 / row.ms_median)
        assert row.gemm_share == pytest.approx(row.case.flop / row.ms_median / 1e9 / 500)
    # One call each as warm-up, then rounds, every other one in the opposite order. cuDNN has enough after five.
    assert gpu.order[:12] == [OURS, CUDNN] + [OURS, CUDNN, CUDNN, OURS] * 2 + [OURS, CUDNN]
    assert gpu.order[12:17] == [OURS] * 5


def test_slow_calls_are_timed_twice(tmp_path):
    found, _ = run(tmp_path / "a.csv", cases=CASES[:1], gpu=Instrument({OURS: 1., CUDNN: 1001.}))
    assert [row.samples for row in found] == [10, 2]


def test_the_plan_of_ours_has_a_floor(tmp_path):
    def planned(problem):
        layer = nn_lstm(problem)
        layer.timed_plan = make_plan(3, 8, torch.float16)
        return layer
    ours, theirs = run(tmp_path / "a.csv", planned, CASES[:1])[0]
    assert (ours.floor_us, ours.exchange_us, ours.plan) == (2.5, 1., "resident 1 x 1")
    cycles = step_cycles(make_plan(3, 8, torch.float16), 132, "forward")
    assert ours.predicted_us == pytest.approx(cycles / ours.sm_mhz, rel=1e-5)       # the file has six digits
    assert theirs.floor_us is None and theirs.plan == ""


def test_the_gpu_knows_what_the_stand_in_knows(monkeypatch):
    """Its properties are those of an RTX 4090 here."""
    properties = types.SimpleNamespace(major=8, minor=9, multi_processor_count=128, clock_rate=2_520_000,
                                       shared_memory_per_block_optin=101376, name="NVIDIA GeForce RTX 4090",
                                       L2_cache_size=1 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(instrument.Gpu, "device", "cpu")
    gpu = instrument.Gpu()
    known = {name for name in vars(Instrument) if not name.startswith("_")} - {"sample", "peak_bytes"}
    assert known >= {"device", "multiprocessors", "multiply_adds"} and all(hasattr(gpu, name) for name in known)
    assert (gpu.multiprocessors, gpu.multiply_adds) == (128, RTX_4090.multiply_adds)


def test_a_wrong_result_gets_no_time(tmp_path):
    found, code = run(tmp_path / "a.csv", lambda problem: problem.layer(Wrong))
    assert code == 1
    for row in found:
        assert (row.status == "wrong") == (row.provider == OURS) == (row.ms_median is None)
        assert row.provider != OURS or row.error == pytest.approx(0.1, rel=0.1)
    assert report.untimed(found).count("WRONG") == len(CASES) and "geometric" in report.report(found)


@pytest.mark.parametrize("raised, status", [(providers.Unavailable("too large"), "too large"),
                                            (RuntimeError("a\nb"), "failed: RuntimeError: a b"),
                                            (torch.OutOfMemoryError("full"), "failed: OutOfMemoryError: full")])
def test_what_does_not_run_says_why_and_the_run_goes_on(tmp_path, raised, status):
    found, code = run(tmp_path / "a.csv", mock.Mock(side_effect=raised))
    assert {(row.provider, row.status) for row in found} == {(OURS, status), (CUDNN, "ok")}
    assert code == status.startswith("failed") and status in report.untimed(found)


def test_a_reference_that_does_not_fit_says_so(tmp_path):
    with mock.patch.object(sweep, "exact_results", side_effect=torch.OutOfMemoryError):
        found, code = run(tmp_path / "a.csv", cases=CASES[:1])
    assert code == 0 and [row.status for row in found] == ["the float64 reference does not fit in memory"] * 2


def test_an_interrupted_run_keeps_its_rows_and_goes_on(tmp_path):
    path = tmp_path / "a.csv"
    gpu = Instrument({OURS: 1., CUDNN: 3.})
    with mock.patch.object(gpu, "clocks", side_effect=[(1, 2)] * 2 + [KeyboardInterrupt]):
        found, code = run(path, gpu=gpu)
    assert code == 130 and len(found) == 4
    again, code = run(path)
    assert code == 0 and again[:4] == found and len(again) == 2 * len(CASES)
    gpu = Instrument({})
    assert run(path, gpu=gpu)[0] == again and gpu.order == []         # nothing is measured twice


def test_a_run_ends_with_its_time(tmp_path, capsys):
    clock = types.SimpleNamespace(monotonic=itertools.count(step=10.).__next__, perf_counter=time.perf_counter)
    with mock.patch.object(sweep, "time", clock):
        found, code = run(tmp_path / "a.csv", seconds=25)
    assert code == 0 and len({row.case for row in found}) == 2
    assert "6 of 8 cases were left out after 25 seconds" in capsys.readouterr().out


def test_saved_bytes_are_what_autograd_keeps_beyond_weights_input_and_output():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(3))

        def forward(self, x):
            hidden = (self.w * x).exp()             # saves w, x and the result of exp
            return hidden[:1].clone() * x.sigmoid(), None

    x = torch.ones(5, 3)
    # 60 bytes of exp's result; 12 of the copied row; 60 of sigmoid's result, which is saved twice and counts once
    assert sweep.saved_bytes(Layer(), x) == 132


def test_compile_all_compiles_each_kernel_once():
    cases = [*CASES, *(dataclasses.replace(CASES[0], **change) for change in
                       (dict(steps=99), dict(hidden_size=10 ** 5), dict(sequences="ragged"), dict(sequences="resets")))]

    submitted = []

    def compile_apart(jobs, arch):
        submitted.extend(jobs)
        assert arch == 90
        return ((job, None) for job in jobs)

    with mock.patch.object(sweep, "compile_apart", compile_apart):
        assert sweep.compile_all(cases, triton_lstm.plan.H200, 90) < 60
    # 64 stands for every number of inputs that the time loop does not multiply
    names = "flagged", "inputs", "keep_gates"
    assert [(plan.hidden_size, dtype, *map(options.get, names)) for plan, dtype, options in submitted] == [
        *((H, dtype, False, H if dtype == torch.float16 else 64, keep_gates) for keep_gates in (False, True)
          for dtype in (torch.float16, torch.float32) for H in (8, 16)), (8, torch.float16, True, 8, False)]
    del submitted[:]
    few, many = (dataclasses.replace(CASES[0], hidden_size=64, batch=batch) for batch in (16, 512))
    with mock.patch.object(sweep, "compile_apart", compile_apart):
        sweep.compile_all([few, many, dataclasses.replace(many, batch=1024)], triton_lstm.plan.H200, 90)
    assert [plan.derives_coefficients for plan, _, _ in submitted] == [False, True]


# The file

def test_rows_survive_the_file(tmp_path):
    full = Row(dataclasses.replace(CASES[0], dropout=0.25), OURS, HERE, "ok", 0.001, 1.5, 2., 2.25, 7, 0.5, 10, 20,
               0.75, 0.125, 0.5, 500., 1980, 2619, "grid 4 x 2")
    bare = Row(CASES[1], CUDNN, HERE, 'why, "not"\nthat')
    with rows.Writer(tmp_path / "a.csv") as file:
        file.write(full)
    with rows.Writer(tmp_path / "a.csv") as file:
        file.write(bare)
    assert rows.load(tmp_path / "a.csv") == [full, bare]
    header, line = (tmp_path / "a.csv").read_text().splitlines()[:2]
    named = dict(zip(header.split(","), line.split(",")))
    assert named["us_per_step"] == "500" and named["tokens_per_s"] == "6000"
    assert named["cudnn_algorithm"] == "PERSIST_STATIC_SMALL_H" and named["gpu"] == "a GPU"
    assert named["hidden_size"] == "8"
    (tmp_path / "b.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="b.csv is no CSV file of this benchmark: it lacks .*hidden_size"):
        rows.load(tmp_path / "b.csv")


def test_commit_names_this_repository():
    assert instrument.commit().rstrip("+").isalnum()
    with mock.patch.object(instrument.subprocess, "run", side_effect=OSError):
        assert instrument.commit() == "unknown"


@pytest.mark.parametrize("out, clocks", [("1980, 2619\n", (1980, 2619)), ("[N/A], 2619\n", (None, None))])
def test_clocks(out, clocks):
    with mock.patch.object(torch.cuda, "current_device", return_value=0), \
            mock.patch.object(instrument.subprocess, "run", return_value=mock.Mock(stdout=out)):
        assert instrument.Gpu.clocks(None) == clocks


# What follows from the rows

def timed_rows(cases, ratio, provider=None, **fields):
    """Rows in which ours takes 1 ms and the baseline ``ratio`` ms."""
    return [Row(case, name, HERE, "ok", 1e-4, ms * 0.9, ms, ms * 1.1, **{**fields, **(
        dict(peak_bytes=int(1000 * ms)) if case.mode == "train" else {})})
        for case in cases for name, ms in ((OURS, 1.), (provider or BASELINES[case.sequences], ratio))]


def test_targets():
    cases = workloads.record()
    by_name = lambda ratio: {t.name: t for t in targets.targets(timed_rows(cases, ratio))}
    slow, fast = by_name(1.), by_name(100.)
    named = fast["named workloads, each in its type and mode"]
    assert len(named.values) == 25 and named.figure == pytest.approx(100) and named.verdict == "met"
    assert len(fast["named workloads except those with resets"].values) == 21
    assert all(target.verdict == "met" for target in fast.values())
    assert {name for name, target in slow.items() if target.verdict == "met"} == {
        "every size of the grid, compared with the best of cuDNN"}
    memory = slow["peak memory of training, T >= 64, as a share of cuDNN's"]
    assert memory.figure == pytest.approx(1) and memory.verdict == "MISSED" and memory.at_most
    assert all(t.verdict == "not measured" for t in targets.targets([]))
    assert "MISSED" in targets.table(timed_rows(cases, 1.)) and "not measured" in targets.table([])


def test_the_worst_case_is_named_and_every_case_can_be_asked_for():
    good, bad = (Case("grid", "forward", "bf16", 16, 128, hidden, hidden) for hidden in (256, 512))
    found = timed_rows([good], 4.) + timed_rows([bad], 0.5)
    target = targets.targets(found)[-1]
    assert target.worst == 0.5 and target.figure == 0.5 and target.verdict == "MISSED"
    assert f"0.50x, {bad}" in targets.table(found)


def test_best_of_cudnn_is_of_a_type_no_less_exact():
    case = Case("grid", "forward", "bf16", 16, 128, 256, 256)
    single = dataclasses.replace(case, dtype="fp32")
    found = rows.timed([Row(dataclasses.replace(case, dtype=dtype), name, HERE, "ok", ms_median=ms) for dtype, name, ms
                        in (("fp16", CUDNN, 2.), ("bf16", CUDNN, 3.), ("fp32", CUDNN, 5.), ("fp32", "cuDNN graph", 4.),
                            ("fp32", OURS, 1.))])
    assert rows.best_cudnn(found, case).ms_median == 2 and rows.best_cudnn(found, single).ms_median == 4


def test_compare():
    before = timed_rows(CASES[:3], 3.)
    after = [dataclasses.replace(r, ms_p20=r.ms_p20 / f, ms_median=r.ms_median / f, ms_p80=r.ms_p80 / f)
             for r, f in zip(before[:4], (2., 1., .5, 1.))]
    text = compare.compare(before, after)
    lines = text.splitlines()
    assert [line.split("|")[-2].strip() for line in lines[2:6]] == ["faster", "", "slower", ""]
    assert "2.000" in lines[2] and "1.636 to 2.444" in lines[2]
    assert f"{OURS}: 1.000, the geometric mean of 2 ratios" in text and "2 rows are only in the run before" in text
    assert "only in the run after" not in text and str(HERE) in text


def test_report_has_all_of_it():
    found = timed_rows([w.case() for w in workloads.WORKLOADS], 3., floor_us=1.25, predicted_us=1.5)
    text = report.report(found + [Row(CASES[0], "TorchRL", HERE, "not installed")])
    assert "50 timings" in text and str(HERE) in text and "TorchRL: not installed (1 cases)" in text
    line = next(line for line in text.splitlines() if line.startswith("| flashrnn_768"))
    assert [cell.strip() for cell in line.split("|")[2:8]] == ["0.98", "1.25", "1.50", "2.93", "3.00", "PERSIST_STATIC"]
    assert report.report([]) == "Nothing was measured."


# Pictures

EXTREMES = {"r2d2": 100.69, "flair_lm": 0.985, "fastrnns": 0.03}
LONG = Environment("NVIDIA GeForce RTX 4090 Laptop GPU", "2.13.0.dev20260131+cu130", "91002", "3.9.0+git1234567",
                   "abc1234+", "2026-01-02T03:04")
BY_BATCH = {1: 120., 16: 3., 64: 1.02, 256: 0.98, 1024: 0.03}


def picture_rows():
    """Made-up rows of the cases of a recorded run: wins and losses, a hundredfold and a thirtieth, other providers."""
    found = []
    for n, case in enumerate(workloads.record()):
        ratio = BY_BATCH[case.batch] if case.workload == "grid" else EXTREMES.get(case.workload, 0.8 + n % 24 / 7)
        found += timed_rows([case], ratio, floor_us=500 / case.steps)
    found += [Row(w.case(), name, HERE, "ok", 1e-4, ms, ms, ms) for w in workloads.WORKLOADS
              for name, ms in (("TorchRL", 2.), (f"{OURS} graph", 0.9), ("cuDNN graph", 1.4))]
    return [dataclasses.replace(row, environment=LONG) for row in found]


@pytest.fixture(scope="module")
def pictures():
    found = picture_rows()
    drawn = {name: picture(found) for name, picture in plots.PICTURES.items()}
    drawn["training"] = plots.training({"torch.nn.LSTM": [3., 2., 1.], "triton_lstm.LSTM": [3., 2., 1.]},
                                       {"torch.nn.LSTM": 1e6, "triton_lstm.LSTM": 2e6}, "a caption " * 30)
    drawn["small map"] = plots.heat_map([dataclasses.replace(row, environment=LONG)
                                         for row in timed_rows(CASES[:2], 0.5)])
    for figure in drawn.values():
        figure.draw_without_rendering()
    return drawn


def drawn_texts(figure):
    """[(text, where it is in pixels)] of what can be seen: no labels of panels that are off or of ticks out of view."""
    from matplotlib.text import Text
    unseen = {id(text) for axes in figure.axes if not axes.axison for text in axes.findobj(Text)}
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        unseen |= {id(tick.label1) for tick in axis.majorTicks if not low <= tick.get_loc() <= high}
    return [(text.get_text(), text.get_window_extent()) for text in figure.findobj(Text)
            if text.get_visible() and text.get_text().strip() and id(text) not in unseen]


def lies_in(inner, outer):
    return (inner.x0 >= outer.x0 - 1 and inner.y0 >= outer.y0 - 1 and inner.x1 <= outer.x1 + 1
            and inner.y1 <= outer.y1 + 1)


def bars_of(figure):
    """[(name, speed-up as the bar shows it, its bar, its label)] from the top to the bottom."""
    axes = figure.axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    bars = axes.containers[0].patches
    lines = [(name, bar.get_x() + bar.get_width(), bar, label) for name, bar, label in zip(names, bars, axes.texts)]
    return sorted(lines, key=lambda line: -line[2].get_window_extent().y0)


def hue(color):
    return {plots.BLUE: OURS, plots.ORANGE: CUDNN, plots.GREY: "other"}.get(to_hex(color))


def to_hex(color):
    """Of matplotlib, which is imported where it is used: the tests of the rest run without it."""
    from matplotlib import colors
    return colors.to_hex(color)


def test_every_picture_is_drawn(tmp_path):
    drawn = plots.draw(picture_rows(), tmp_path / "new")
    assert [path.stem for path in drawn] == ["hero", "throughput", "speedup", "workloads", "floor", "memory"]
    for path in drawn:
        harness.assert_drawn(path)


def test_the_same_rows_make_the_same_file(tmp_path):
    import matplotlib
    found = timed_rows([w.case() for w in workloads.WORKLOADS], 2.)
    first, again = (plots.save(plots.hero(found), tmp_path / name) for name in ("a.png", "b.png"))
    with matplotlib.rc_context({"font.size": 20, "savefig.dpi": 50, "lines.linewidth": 9, "axes.grid": True}):
        other = plots.save(plots.hero(found), tmp_path / "c.png")
    assert first.read_bytes() == again.read_bytes() == other.read_bytes()
    assert b"Software" not in first.read_bytes()


def test_hues_are_told_apart_in_grey_and_on_white():
    from matplotlib.colors import to_rgb
    assert plots.luminance("white") == pytest.approx(1) and plots.contrast("black", "white") == pytest.approx(21)
    assert plots.contrast(plots.BLUE, plots.ORANGE) > 2.4
    assert min(plots.contrast(color, "white") for color in (plots.BLUE, plots.ORANGE, plots.GREY)) > 3
    # to eyes without the pigment for green: Machado and others, 2009, of linear red, green and blue
    linear = lambda color: [((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    seen = lambda color: [sum(share * c for share, c in zip(line, linear(color))) for line in (
        (0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881))]
    assert max(abs(a - b) for a, b in zip(seen(plots.BLUE), seen(plots.ORANGE))) > 0.2
    providers = [OURS, f"{OURS} graph", "triton_lstm.LSTM", *BASELINES.values(), "cuDNN graph", "nn.LSTM",
                 "torch.nn.LSTM", "TorchRL", "FlashRNN", "compiled loop"]
    assert [hue(plots.colour(name)) for name in providers] == [OURS] * 3 + [CUDNN] * 6 + ["other"] * 3


def test_ours_and_cudnn_have_one_hue_in_all_pictures(pictures):
    for panel in pictures["throughput"].axes:
        curves = {line.get_label(): hue(line.get_color()) for line in panel.lines if line.get_label()[0] != "_"}
        assert curves == {label: label.split()[0] for label in curves} and {OURS, CUDNN} == set(curves.values())
    for name in ("hero", "workloads"):
        for _, ratio, bar, _ in bars_of(pictures[name]):
            assert hue(bar.get_facecolor()) == (OURS if ratio >= 1 else CUDNN)
            assert bool(bar.get_hatch()) == (ratio < 1)
    # ours takes 1 ms, a step of r2d2 so 1000 / 140 us
    marks = {hue(line.get_color()): line.get_xdata()[0] for line in pictures["floor"].axes[0].lines
             if line.get_ydata()[0] == 0 and line.get_marker() in "oDv^"}
    assert marks == pytest.approx({OURS: 1000 / 140, CUDNN: 100690 / 140, "other": 2000 / 140})
    # r2d2 takes the smallest share of memory
    marks = {(hue(line.get_color()), line.get_marker()): line.get_xdata()[0] for line in
             pictures["memory"].axes[0].lines if line.get_ydata()[0] == 0 and line.get_marker() != "None"}
    assert marks == pytest.approx({(OURS, "o"): 1000 / 2 ** 20, (CUDNN, "D"): 100690 / 2 ** 20})
    losses, rates = pictures["training"].axes
    for color, label in [(line.get_color(), line.get_label()) for line in losses.lines] + [
            (bar.get_facecolor(), label.get_text()) for bar, label in zip(rates.patches, rates.get_xticklabels())]:
        assert hue(color) == (OURS if label == "triton_lstm.LSTM" else CUDNN)


def test_curves_that_lie_on_each_other_are_told_apart(pictures):
    """fp16 and bf16, whose times are the same here; and the losses of both layers."""
    for panel in pictures["throughput"].axes:
        for provider in (OURS, CUDNN):
            half, brain = (next(line for line in panel.lines if line.get_label() == f"{provider} {dtype}")
                           for dtype in ("fp16", "bf16"))
            assert half.get_xydata().tolist() == brain.get_xydata().tolist()
            assert (half.get_linestyle(), brain.get_linestyle()) == ("-", "--")
            assert half.get_linewidth() > 2 * brain.get_linewidth() and half.get_alpha() < 0.6
            assert half.get_markersize() < brain.get_markersize() and brain.get_markerfacecolor() == "none"
            assert panel.lines.index(half) < panel.lines.index(brain)           # the thin one on top
    for dtype in plots.STYLES:                      # and cuDNN's markers show under ours
        ours, theirs = (plots.curve_style(provider, dtype)["markersize"] for provider in (OURS, CUDNN))
        assert theirs >= ours + 3
    assert len({(style["linestyle"], style["marker"]) for style in plots.STYLES.values()}) == 3
    under, above = pictures["training"].axes[0].lines
    assert under.get_linewidth() > 2 * above.get_linewidth() and above.get_linestyle() == "--"


def test_panels_without_a_line_are_left_out():
    cases = [Case("grid", "forward", "fp16", 3, 4, hidden, hidden) for hidden in (8, 16)]
    cases += [Case("grid", "train", "fp16", batch, 4, 8, 8) for batch in (1, 2)]
    figure = plots.throughput(timed_rows(cases, 2.))
    assert [axes.axison for axes in figure.axes] == [True, False, False, True]
    for axes in figure.axes[::3]:
        assert axes.get_ylabel() == "throughput [million tokens per second]"
        assert len([label for label in axes.get_yticklabels() if label.get_visible()]) > 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["triton_lstm fp16", "cuDNN fp16"]


def test_the_scale_of_speedups_is_centred_on_one():
    shades = plots.diverging()
    for ratios, limit in (([1.1, 0.95], 2), ([3., 0.9], 4), ([0.3, 1.1], 4), ([100.69, 0.9], 8), ([0.03], 8)):
        norm = plots.around_one(ratios)
        assert (norm.vmin, norm.vmax) == (1 / limit, limit)
        assert norm(1) == pytest.approx(0.5) and norm(1.5) + norm(1 / 1.5) == pytest.approx(1)
    assert to_hex(shades(0.5)) == "#ffffff" and norm(1000) == 1
    assert [hue(shades(norm(ratio))) for ratio in (8, 1 / 8)] == [OURS, CUDNN]
    (red, _, blue), (lost_red, _, lost_blue) = (shades(norm(ratio))[:3] for ratio in (1.2, 1 / 1.2))
    assert blue > red and lost_red > lost_blue


def test_each_cell_of_the_map_has_its_hue_and_a_legible_label(pictures):
    from matplotlib.patches import Polygon, Rectangle
    figure = pictures["speedup"]
    maps = [axes for axes in figure.axes if axes.get_title()]
    assert len(maps) == 6 and {axes.get_title().split(", T")[0] for axes in maps} == {
        f"{mode}, {dtype}" for mode in ("forward", "training") for dtype in ("fp16", "bf16", "fp32")}
    norm, shades, shown = plots.around_one([120., 0.03]), plots.diverging(), set()
    for axes in maps:
        cells = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
        corners = [tuple(patch.get_xy()[0]) for patch in axes.patches if isinstance(patch, Polygon)]
        assert len(cells) == len(axes.texts) > 1
        for cell, text in zip(cells, axes.texts):
            batch = int(axes.get_yticklabels()[round(text.get_position()[1])].get_text())
            ratio = BY_BATCH[batch]
            shown.add((batch, text.get_text()))
            assert to_hex(cell.get_facecolor()) == to_hex(shades(norm(ratio)))
            assert plots.contrast(text.get_color(), cell.get_facecolor()) >= 4.5
            assert ((cell.get_x(), cell.get_y() + 1) in corners) == (ratio < 1)
            assert lies_in(text.get_window_extent(), cell.get_window_extent())
    assert shown == {(1, "120"), (16, "3.00"), (64, "1.02"), (256, "0.98"), (1024, "0.03")}
    assert "Grey: not measured." in " ".join(figure._supxlabel.get_text().split())
    scale = [label.get_text() for label in figure.axes[-1].get_yticklabels()]
    assert scale == ["1/8", "1/4", "1/2", "1", "2", "4", "8"]


@pytest.mark.parametrize("name", ["hero", "workloads"])
def test_bars_are_sorted_and_their_labels_lie_in_the_frame(pictures, name):
    axes, bars = pictures[name].axes[0], bars_of(pictures[name])
    ratios = [ratio for _, ratio, *_ in bars]
    assert len(bars) == 25 and ratios == sorted(ratios, reverse=True)
    named = {label.split(",")[0].rstrip("*"): (ratio, text.get_text()) for label, ratio, _, text in bars}
    assert {workload: named[workload][0] for workload in EXTREMES} == pytest.approx(EXTREMES)
    assert {workload: named[workload][1] for workload in EXTREMES} == dict(
        hero={"r2d2": "101", "flair_lm": "0.98", "fastrnns": "0.03"},
        workloads={"r2d2": "100.69×", "flair_lm": "0.98×", "fastrnns": "0.03×"})[name]
    for _, ratio, bar, text in bars:
        where, of = text.get_window_extent(), bar.get_window_extent()
        assert lies_in(where, axes.get_window_extent())
        assert where.x0 > of.x1 if ratio >= 1 else where.x1 < of.x0        # beyond the bar's end
    line = next(line for line in axes.lines if list(line.get_xdata()) == [1, 1])
    assert to_hex(line.get_color()) == "#000000" and line.get_linewidth() >= 1
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["triton_lstm is faster", "cuDNN is faster"]


def test_lines_of_floor_and_memory_are_ordered(pictures):
    names = lambda name: [label.get_text().split(",")[0] for label in pictures[name].axes[0].get_yticklabels()]
    assert names("floor") == [label.split(",")[0] for label, *_ in bars_of(pictures["workloads"])]
    column = lambda name: [label.get_text() for label in pictures[name].axes[0].child_axes[0].get_yticklabels()]
    assert column("floor") == ["2.0×"] * 25         # 1 ms a call, of which 0.5 ms are the floor's
    shares = [float(share.rstrip("×")) for share in column("memory")]
    assert shares == sorted(shares) and shares[0] == 0.01 and shares[-1] == pytest.approx(33.33)


def test_every_text_lies_in_its_picture_and_on_no_other(pictures):
    for name, figure in pictures.items():
        texts = drawn_texts(figure)
        assert len(texts) > 10, name
        for text, where in texts:
            assert lies_in(where, figure.bbox), (name, text)
        for (one, a), (other, b) in itertools.combinations(texts, 2):
            apart = a.x1 + 4 < b.x0 or b.x1 + 4 < a.x0 or a.y1 <= b.y0 + 2 or b.y1 <= a.y0 + 2
            assert apart, (name, one, other)


def test_the_picture_for_readme(pictures):
    from matplotlib.text import Text
    figure = pictures["hero"]
    width, height = figure.get_size_inches()
    assert 2 <= width / height <= 3
    assert figure._suptitle.get_text().replace("\n", " ") == (
        f"LSTM layers of 25 published models: speed-up over cuDNN on {LONG.gpu}")
    assert min(text.get_fontsize() for text in figure.findobj(Text)) / 72 * 800 / width >= 10       # pixels, 800 wide
    assert sum(label.endswith("*") for label, *_ in bars_of(figure)) == 4
    assert all(part in figure._supxlabel.get_text().replace("\n", " ") for part in (
        "* resets", f"torch {LONG.torch}", "cuDNN 91002", f"Triton {LONG.triton}", "commit abc1234+", "2026-01-02."))
    mean = lambda wanted: rows.geometric_mean([ratio for label, ratio, *_ in bars_of(figure) if wanted(label)])
    assert figure.axes[0].get_xlabel() == "times as fast as torch.nn.LSTM with cuDNN (geometric mean " \
        f"{mean(lambda label: True):.2f}, without * {mean(lambda label: '*' not in label):.2f})"


def test_the_picture_for_readme_says_what_it_lacks():
    cases = [w.case() for w in workloads.WORKLOADS if w.sequences != "resets"]
    figure = plots.hero(timed_rows(cases[:5], 2.))
    assert figure._suptitle.get_text().startswith("LSTM layers of 5 of 25 published models")
    assert figure.axes[0].get_legend() is None and "*" not in figure._supxlabel.get_text()
    assert figure.axes[0].get_xlabel().endswith("(geometric mean 2.00)")
    other = dataclasses.replace(HERE, gpu="another")
    assert plots.hero(timed_rows(cases[:5], 2.) + [dataclasses.replace(r, environment=other)
                                                   for r in timed_rows(cases[5:], 2.)]) is None
    assert plots.hero(timed_rows(CASES, 2.)) is None and plots.hero([]) is None


@pytest.mark.parametrize("low, high, labels", [
    (0.9, 2.1, ["1", "1.2", "1.4", "1.6", "1.8", "2"]), (0.9, 12., ["1", "1.5", "2", "3", "5", "7", "10"]),
    (0.4, 40., ["0.5", "1", "2", "5", "10", "20"]),
    (0.009, 30000., ["0.01", "0.1", "1", "10", "100", "1,000", "10,000"])])
def test_ticks_are_plain_numbers(low, high, labels):
    from matplotlib.figure import Figure
    panel = Figure().subplots()
    panel.set(xscale="log", xlim=(low, high))
    plots._decimal_ticks(panel.xaxis)
    assert [label.get_text() for label in panel.get_xticklabels()] == labels
    assert len(panel.get_xticks(minor=True)) == 0


def test_labels_of_close_ticks_are_left_out():
    from matplotlib.figure import Figure
    panel = Figure().subplots()
    panel.set_xscale("log")
    for values, labels in ((workloads.HIDDEN_SIZES, "32   64   128   256   512   1024   2048"),
                           ((1, 16, 64, 128, 512, 1024), "1 16   128   1024"), ((16, 64), "16 64")):
        plots._ticks(panel.xaxis, values)
        assert panel.get_xticks().tolist() == list(values)
        shown = [label.get_text() for label in panel.get_xticklabels() if label.get_text()]
        assert shown == labels.split()


def test_pictures_without_figures_are_left_out(tmp_path):
    assert plots.draw([Row(CASES[0], OURS, HERE, "wrong", 0.1)], tmp_path) == []
    assert [path.stem for path in plots.draw(timed_rows(CASES, 2.), tmp_path)] == ["throughput", "speedup"]


def test_plot_and_compare_need_no_torch(tmp_path):
    """Runs both commands in a process that cannot import torch."""
    with rows.Writer(tmp_path / "run.csv") as file:
        for row in timed_rows([w.case() for w in workloads.WORKLOADS], 2., floor_us=1.):
            file.write(row)
    code = "import sys; sys.modules['torch'] = None; from bench.__main__ import main; sys.exit(main(sys.argv[1:]))"
    call = lambda *words: subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True,
                                         cwd=command.RESULTS.parents[1], timeout=120)
    done = call("plot", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "named workloads" in done.stdout
    assert "![workloads](workloads.png)" in (tmp_path / "out" / "report.md").read_text()
    harness.assert_drawn(tmp_path / "out" / "workloads.png")
    done = call("compare", tmp_path / "run.csv", tmp_path / "run.csv")
    assert done.returncode == 0 and f"{OURS}: 1.000" in done.stdout, done.stderr
    done = call("plot", tmp_path / "out")
    assert done.returncode == 1 and "no CSV file in" in done.stderr
    assert call("plot", tmp_path / "none.csv").returncode == 1


def test_recorded_runs_are_drawn_and_their_absence_is_said(tmp_path, capsys):
    with mock.patch.object(command, "RESULTS", tmp_path / "results"):
        (tmp_path / "results" / "a-gpu").mkdir(parents=True)
        command.plot([], tmp_path / "out")
        assert "No run on a GPU is recorded" in capsys.readouterr().out
        with rows.Writer(tmp_path / "results" / "a-gpu" / "run.csv") as file:
            for row in timed_rows([w.case() for w in workloads.WORKLOADS], 2.):
                file.write(row)
        command.plot([], tmp_path / "out")
    for name in ("hero", "workloads"):
        harness.assert_drawn(tmp_path / "out" / "a-gpu" / f"{name}.png")


# Floors

def test_step_floor():
    case = Case("grid", "forward", "bf16", 64, 10, 512, 512)
    plan = make_plan(64, 512, torch.bfloat16, limits=PORTABLE)
    assert (plan.schedule, plan.tiles, plan.block_h) == ("grid", 1, 16)
    tensor, gemm = 16 * 64 * 512 / 1280, 2 * 64 * 2048 * 512 / 700e6
    assert floors.step_floor(plan, case, (1., 9.), 1000, 700, 132) == pytest.approx(tensor / 1000 + 1 + gemm)
    training = dataclasses.replace(case, mode="train")
    assert floors.step_floor(plan, training, (1., 2.), 1000, 700, 132) == pytest.approx(
        2 * tensor / 1000 + 3 + 6 * gemm)
    # forward by the wgmma kernel multiplies 64 rows at the full rate of the tensor cores, backward 32 rows with
    # mma.sync
    groups = make_plan(128, 1024, torch.float16, limits=H200)
    assert groups.kind == "wgmma" and groups.block_b == 64 and groups.tiles == 1 and groups.backward.tiles == 2
    large = Case("grid", "train", "fp16", 128, 10, 1024, 1024)
    units = 4 * 1024 * 64
    assert floors.step_floor(groups, large, (1.5, .5), 1000, math.inf, 132) == pytest.approx(
        (units * groups.block_h / 2048 + units * groups.backward.block_h / 1280) / 1000 + 2)
    # Two layers have two loops. A narrow layer is bound by special functions, a wide one by reads of R.
    layers = dataclasses.replace(case, layers=2, input_size=128)
    assert floors.step_floor(plan, layers, (1., 9.), 1000, 700, 132) == pytest.approx(
        2 * tensor / 1000 + 2 + 1.25 * gemm)
    narrow = make_plan(16, 8, torch.bfloat16, limits=PORTABLE)
    assert floors.step_floor(narrow, Case("grid", "forward", "bf16", 16, 10, 8, 8), (0., 0.), 1000,
                             math.inf, 132) == pytest.approx(16 * 8 * 10 / 16 / 1000)
    wide = make_plan(16, 2048, torch.bfloat16, limits=PORTABLE)
    assert wide.streamed_bytes and floors.step_floor(
        wide, Case("grid", "forward", "bf16", 16, 10, 2048, 2048), (0., 0.), 1000, math.inf, 132) == pytest.approx(
        wide.streamed_bytes / 64 / 1000)
    # 16 clusters of 16 programs run in two waves of 8. A tanh.approx is one special function instead of two.
    clusters = make_plan(256, 512, torch.bfloat16, limits=dataclasses.replace(H200, cluster=16, wgmma=False))
    clusters = dataclasses.replace(clusters, programs=16, block_h=32)
    assert clusters.schedule == "cluster" and clusters.groups == 16
    many = dataclasses.replace(case, batch=256)
    assert floors.step_floor(clusters, many, (1., 9.), 1000, math.inf, 132) == pytest.approx(
        2 * (16 * 4 * 32 * 512 / 1280 / 1000 + 1))
    alone = make_plan(16, 8, torch.bfloat16)
    assert alone.gluon and floors.step_floor(alone, Case("grid", "forward", "bf16", 16, 10, 8, 8), (0., 0.), 1000,
                                             math.inf, 132) == pytest.approx(16 * 8 * 5 / 16 / 1000)


def test_exchanges_end_where_all_have_met():
    """The compiled microbenchmark in the emulator, with programs in random order and weak memory."""
    plan = make_plan(32, 48, torch.bfloat16, schedule="grid", limits=PORTABLE)
    assert (plan.programs, plan.padded_programs, plan.groups) == (3, 4, 2)
    signature = dict(sent_ptr="*bf16", steps="i32") | dict.fromkeys(floors.exchanges.arg_names[2:], "constexpr")
    constants = dict(R_SLICES=plan.r_slices, PADDED_PROGRAMS=plan.padded_programs, BLOCK_H=plan.block_h,
                     BLOCK_B=plan.block_b, INTERPRET=False)
    compiled = triton.compile(ASTSource(floors.exchanges, signature, constants),
                              target=GPUTarget("cuda", 90, 32), options=floors.LAUNCH)
    for seed in range(3):
        sent = torch.empty(8, 2, 16, 64, dtype=torch.bfloat16)
        exchange.fill(sent, plan)
        ptx_emulator.launch(compiled, (3, 2, 1), sent, 5, seed=seed, memory="weak")
        assert (sent[1:6, ..., :48] == 1).all() and sent[6:, ..., :48].isnan().all()
        assert not sent[0].any() and not sent[..., 48:].any()


@pytest.mark.skipif(harness.TRITON < (3, 9), reason="clusters need Triton 3.9")
@pytest.mark.parametrize("dtype, block_h, programs", [(torch.bfloat16, 16, 2), (torch.float32, 32, 4)], ids=str)
def test_clusters_exchange(dtype, block_h, programs):
    """The compiled microbenchmark in the emulator: h arrives unchanged, and without the wait there is a race."""
    h = torch.randn(2, 16, block_h * programs).to(dtype)
    with no_gpu(90):
        compiled = floors.cluster_exchanges.warmup(h, 5, BLOCK_H=block_h, BLOCK_B=16, grid=(1,), num_warps=4,
                                                   num_ctas=programs, enable_fp_fusion=True)
    for seed in range(3):
        after = h.clone()
        ptx_emulator.launch(compiled, (2, 1, 1), after, 5, seed=seed, memory="weak")
        assert torch.equal(after, h)
    hasty = compiled.asm["ptx"].replace("@!complete bra.uni waitLoop;", "")
    with pytest.raises(ptx_emulator.EmulatorError):
        for seed in range(8):
            ptx_emulator.launch(compiled, (2, 1, 1), h, 5, seed=seed, memory="weak", ptx=hasty)


def test_floors_measure_once_and_subtract_the_start():
    class Clock(Instrument):
        def __init__(self):
            self.calls = 0

        def sample(self, call):
            self.calls += 1
            call()
            return launched[-1] * 0.002 + 7 if launched else 0.5

    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda sent, steps, *_, **__: launched.append(steps)

    gpu = Clock()
    with mock.patch.object(floors, "exchanges", Kernel()):
        measured = floors.Floors(gpu)
        case = Case("grid", "forward", "bf16", 64, 10, 512, 512)
        plan = make_plan(64, 512, torch.bfloat16, limits=PORTABLE)
        assert measured.exchange_us(plan, "bf16") == pytest.approx(2)
        calls = gpu.calls
        assert measured.exchange_us(plan, "bf16") == pytest.approx(2) and gpu.calls == calls
        measured.gemm_tflops = lambda dtype: 700
        floor, exchange = measured.step_us(plan, case, 1000)
        assert exchange == pytest.approx(2)
        assert floor == floors.step_floor(plan, case, (exchange, 0.), 1000, 700, 132)
        assert measured.step_us(make_plan(16, 64, torch.bfloat16), case, None) == (None, 0)
