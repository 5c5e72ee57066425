"""``bench.loops``, which times the time loops of all candidates, and ``bench.fit``, which fits the cost model to these
times. Without a GPU."""
import csv
import dataclasses
import math
import statistics
import sys
from unittest import mock

import pytest
import torch

import harness
from bench import __main__ as command
from bench import fit, loops, residency
from bench.workloads import WORKLOADS
from triton_lstm import make_plan
from triton_lstm.plan import H200, Plan, check_plan, cost, step_cycles

RESULTS = command.RESULTS
LOOPS_WORKER = """
import json, sys, time
say = lambda **found: print(json.dumps(found), flush=True)
say(ready=True)
for n, line in enumerate(sys.stdin):
    if n == 2: time.sleep(100)
    say(status="ok" if n else "wrong", error=0.5, us_p20=1., us_median=2., us_p80=3., exchange_us=0.5)
"""
FACTS = dict(gpu="GPU", capability=[9, 0], limits=dataclasses.asdict(dataclasses.replace(H200, cluster=16)))


def test_candidates_of_all_workloads():
    limits = dataclasses.replace(H200, cluster=16)
    found = loops.all_candidates(limits)
    named = {w.name for w in WORKLOADS}
    chosen = [c for c in found if c.chosen]
    assert found[:len(chosen)] == chosen and {c.workload for c in chosen} == named and len(chosen) == 2 * len(named)
    assert len(set(found)) == len(found) and {c.plan.kind for c in found} == {
        "resident", "cluster", "grid", "split", "wgmma", "streamed"}
    assert not any(c.plan.kind == "wgmma" for c in found if c.loop == "backward")
    for c in found:
        check_plan(c.plan, limits)
        assert c.plan.keep_every == loops.STEPS and loops.Candidate.decode(c.encode()) == c


def test_loops_are_written_as_they_come(tmp_path):
    found = [c for c in loops.all_candidates(dataclasses.replace(H200, cluster=16)) if c.workload == "flashrnn_768"][:4]
    path = tmp_path / "loops.csv"
    code = loops.run(path, 60, FACTS, [sys.executable, "-c", LOOPS_WORKER], found, share=1.)
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert code == 1 and [row["status"] for row in rows] == ["wrong", "ok", "hung: no answer in 1.0 s", "wrong"]
    trapped = loops.row(found[0], dict(outcome="trapped", message="CUDA", record="forward_grid, group 0"), FACTS, "3.9")
    assert trapped["status"] == "trapped: forward_grid, group 0" and trapped["us_median"] is None
    assert rows[1]["us_median"] == "2.0" and rows[1]["loop"] == "backward" and rows[1]["chosen"] == "1"
    assert Plan.decode(rows[1]["encoded"]) == found[1].plan
    cycles = step_cycles(found[1].plan, H200.multiprocessors, "backward")
    assert float(rows[1]["predicted_us"]) == pytest.approx(cycles / H200.mhz)


@pytest.mark.parametrize("loop", ["forward", "backward"])
def test_a_loop_is_compared_and_runs_by_itself(loop):
    """In the emulator, on a small layer, and without timing."""
    w = dataclasses.replace(WORKLOADS[0], name="small", batch=3, input_size=4, hidden_size=33, directions=1)
    calls = []

    def clock(of, device):
        def timed(function, kernel, *args, **options):
            calls.append(kernel.__name__)
            function(kernel, *args, **options)
        of[0](timed)
        return [[4., 8., 80.]]
    with mock.patch.object(loops, "WORKLOADS", [w]), mock.patch.object(loops, "STEPS", 4), harness.emulator():
        plan = dataclasses.replace(make_plan(3, 33, torch.float32, limits=dataclasses.replace(H200, cluster=1)),
                                   keep_every=4)
        candidate = loops.Candidate("small", "fp32", loop, True, plan)
        loops.problem.cache_clear()
        found = loops.measure(candidate, torch.device("cpu"), clock)
        with mock.patch.object(loops, "TOLERANCE", dict(tf32=1e-9)):
            assert loops.measure(candidate, torch.device("cpu"))["status"] == "wrong"
        loops.problem.cache_clear()
    assert found["status"] == "ok" and 0 < found["error"] < 1e-2 and found["us_median"] == 2
    assert calls == [f"{loop}_cluster"]



def made_up(path, values, noise=0.):
    """Writes a CSV file of loops, with the times that the cost model predicts if its constants are ``values``."""
    found = loops.all_candidates(dataclasses.replace(H200, cluster=16))
    with open(path, "w", newline="") as file, fit.trying(values):
        writer = csv.DictWriter(file, loops.FIELDS)
        writer.writeheader()
        for n, c in enumerate(found):
            us = step_cycles(c.plan, H200.multiprocessors, c.loop) / H200.mhz
            us *= 20 if n % 25 == 3 else 1 + noise * (n % 3 - 1)          # outliers
            writer.writerow(loops.row(c, dict(status="failed" if n % 30 == 7 else "ok", us_median=us), FACTS, "3.9"))


def test_fit_finds_the_constants_that_made_the_rows(tmp_path, capsys):
    # Constants whose effect no other constant has.
    values = {("SPLIT_STEP", ("tf32", "forward")): 2000., ("L2_EXCHANGE", None): 2000.,
              ("GLUON_STEP", ("tf32", "backward")): 1300.}
    before = {constant: fit.get(constant) for constant in fit.CONSTANTS}
    made_up(tmp_path / "loops.csv", values, 0.02)
    found = fit.fit(fit.load(tmp_path / "loops.csv"))
    for constant, value in values.items():
        assert found[constant] == pytest.approx(value, rel=0.15), constant
    assert {constant: fit.get(constant) for constant in fit.CONSTANTS} == before
    assert command.main(["fit", str(tmp_path / "loops.csv")]) == 0
    text = capsys.readouterr().out
    assert "SPLIT_STEP[('tf32', 'forward')]" in text and "fitted to loops.csv" in text
    assert "plans that would change" in text
    old, new = (float(line.split("differ by ")[1].split("%")[0]) for line in text.splitlines() if "differ by" in line)
    assert new < 5 < old


def test_fit_to_machine_code(capsys):
    named = {w.name: w for w in WORKLOADS}
    some = [named["cleanrl_atari"], named["nam_audio"]]
    before = {constant: fit.get(constant) for constant in fit.CONSTANTS}
    with mock.patch.object(residency, "WORKLOADS", some), mock.patch.object(fit, "WORKLOADS", some):
        assert command.main(["fit", "--arch", "80"]) == 0
    text = capsys.readouterr().out
    assert "# fitted to bounds from machine code, 4 loops" in text and "EXCHANGE" not in text
    old, new = (float(line.split("most ")[1].split("%")[0]) for line in text.splitlines() if "differ by" in line)
    assert new <= old and {constant: fit.get(constant) for constant in fit.CONSTANTS} == before


def test_bounds_of_the_committed_plans():
    """What bench/NOTES.md says of the cost model and of the plans that it prefers. The file has bounds from machine
    code; it is data, and a change of the kernels does not change it."""
    with open(RESULTS / "bounds.csv", newline="") as file:
        found = [(row, Plan.decode(row["plan"]), residency.LIMITS[int(row["arch"])]) for row in csv.DictReader(file)]
    rows = [(residency.one_wave(plan), row["loop"], float(row["cycles"]), limits) for row, plan, limits in found]
    with fit.trying(fit.WITHOUT_EXCHANGE):
        off = list(map(abs, fit.residuals(rows)))
    assert len(off) == 800 and math.exp(statistics.mean(off)) == pytest.approx(1.117, abs=0.003)
    assert math.exp(max(off)) <= cost.UNCERTAINTY
    calls = {}
    for row, plan, limits in found:
        if row["group"] == "cheapest":
            cycles = float(row["cycles"])
            if plan.exchanges:
                cycles = cost._with_exchange(plan, cycles / plan.tiles)
            else:
                cycles += cost.CLUSTER_EXCHANGE if plan.programs > 1 else 0
                cycles *= cost._waves(plan, limits.multiprocessors)
            calls.setdefault((row["arch"], row["workload"], row["loop"]), []).append(
                (fit.predicted(plan, row["loop"], limits), cycles))
    for arch, share in (("80", 1.010), ("89", 1.028), ("90", 1.), ("100", 1.007)):
        chosen = [min(of)[1] / min(cycles for _, cycles in of) for key, of in calls.items() if key[0] == arch]
        assert len(chosen) > 30 and statistics.mean(chosen) == pytest.approx(share, abs=1e-3), arch


def test_fit_of_nothing(tmp_path, capsys):
    (tmp_path / "loops.csv").write_text("status,us_median\nfailed,\n")
    assert command.main(["fit", str(tmp_path / "loops.csv")]) == 1
    assert "no measured loop" in capsys.readouterr().out
