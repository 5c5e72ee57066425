"""``python -m triton_lstm``: its cases, its worker processes, and the faults that it remembers."""
import dataclasses
import json
import os
import subprocess
import sys
import time
import warnings
from unittest import mock

import pytest
import torch
from triton_lstm.kernels.offline import compile_plan

import harness
import triton_lstm.__main__ as command
from problems import PORTABLE
from triton_lstm import cachefile, check, faults, op, runner
from triton_lstm.plan import A100, H200, Plan, PlanError, candidates, check_plan, make_plan

OLDER = dataclasses.replace(H200, cluster=1)        # a Hopper GPU with Triton 3.6, which compiles no clusters
FULL = dataclasses.replace(H200, cluster=16)

WORKER = """
import json, os, signal, sys, time
say = lambda **found: print(json.dumps(found), flush=True)
say(ready=True)
for line in sys.stdin:
    what = line.strip()
    if what == "hang": time.sleep(100)
    if what == "exit": print("out of luck", file=sys.stderr); sys.stderr.flush(); os._exit(3)
    if what == "crash": os.kill(os.getpid(), signal.SIGSEGV)
    if what == "slow": time.sleep(0.3)
    if what == "fatal": say(outcome="trapped", record="r", fatal=True, pid=os.getpid())
    else: say(outcome="wrong" if what == "wrong" else "right", pid=os.getpid())
"""


def run_fake(lines, seconds=30., share=1., worker=WORKER, **options):
    cases = [(line, line) for line in lines]
    return {case: found for case, found, _ in runner.run(cases, [sys.executable, "-c", worker], seconds, share,
                                                         **options)}


def test_whatever_happens_the_rest_goes_on():
    lines = ["a", "hang", "b", "exit", "c", "crash", "wrong", "fatal", "d"]
    found = run_fake(lines, share=1.)
    assert list(found) == lines
    assert found["hang"] == dict(outcome="hung", message="no answer in 1.0 s")
    assert found["exit"] == dict(outcome="died", message="exit code 3: out of luck")
    assert found["crash"] == dict(outcome="died", message="SIGSEGV")
    assert found["wrong"]["outcome"] == "wrong" and found["fatal"]["record"] == "r"
    assert "fatal" not in found["fatal"]
    pids = [found[name]["pid"] for name in ("a", "b", "c", "wrong", "fatal", "d")]
    # A worker serves until it dies. That of "c" dies of "crash"; that of "wrong" also serves "fatal" and is then ended.
    assert pids[3] == pids[4] and len(set(pids)) == 5
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_time_is_over():
    found = run_fake(["a", "hang", "b", "c"], seconds=2., share=10.)
    assert found["a"]["outcome"] == "right"
    assert [found[name]["outcome"] for name in ("hang", "b", "c")] == ["not reached"] * 3


def test_a_worker_that_does_not_start():
    began = time.monotonic()
    found = run_fake(["a", "b"], worker="import time; time.sleep(100)", start=0.5)
    assert all(of == dict(outcome="hung", message="the worker did not start in time") for of in found.values())
    assert time.monotonic() - began < 20
    found = run_fake(["a"], worker="raise SystemExit('no torch')")
    assert found["a"] == dict(outcome="died", message="exit code 1: no torch")


@pytest.mark.parametrize("limits, missing", [
    (FULL, set()), (OLDER, {"cluster 2", "cluster 4", "cluster 8", "cluster 16"}),
    (dataclasses.replace(A100, cluster=1), {"cluster 2", "cluster 4", "cluster 8", "cluster 16", "wgmma"}),
    (PORTABLE, {"cluster 2", "cluster 4", "cluster 8", "cluster 16", "wgmma", "resident", "split", "wide split"}),
    (None, set(check.VARIANTS) - {"portable resident"})], ids=["Hopper", "Triton 3.6", "Ampere", "portable", "none"])
def test_cases_of_a_device(limits, missing):
    cases = check.cases(limits)
    assert {case.kind for case in cases if not case.runs} == missing
    assert all(case.reason for case in cases if not case.runs)
    assert {case.dtype for case in cases if case.kind == op.STEP} == set(check.DTYPES)
    for case in cases:
        assert check.Case.decode(case.encode()) == case
        if not case.plan:
            continue
        plan = Plan.decode(case.plan)
        check_plan(plan, limits)
        assert plan.variant == case.kind
        assert plan.precision == {"fp16": "native", "bf16": "native", "tf32": "tf32", "fp32": "tf32x3"}[case.dtype]
        if case.kind not in ("portable resident", "resident"):
            assert plan.programs > 1
    kinds = {case.kind for case in cases if case.plan}
    for kind in kinds:
        whats = {case.what for case in cases if case.kind == kind}
        assert {"one step", "layer", "gates", "lengths", "packed"} <= whats
        assert limits is None or {"graph", "reuse"} <= whats
    for case in cases:
        if case.what.startswith("many rows") and case.plan:
            assert Plan.decode(case.plan).backward.derives_coefficients
    if limits is not None:
        assert {"zoneout", "stream", "wavefront", "two processes"} <= {case.what for case in cases if case.plan} | (
            {"wavefront"} if "split" in missing else set())


def case_of(kind, what, dtype="fp16", limits=FULL):
    return next(case for case in check.cases(limits) if (case.kind, case.what, case.dtype) == (kind, what, dtype))


@pytest.mark.parametrize("kind, what, dtype", [
    ("resident", "layer", "fp16"), ("split", "lengths", "bf16"), ("wide split", "lengths", "bf16"),
    ("wgmma", "one step", "fp16"), ("grid", "zoneout", "bf16"), ("one step", "layer", "bf16"),
    ("one step", "layer", "fp32"), ("streamed", "packed", "bf16"), ("portable resident", "layers", "tf32"),
    ("grid", "gates", "tf32")])
def test_a_right_kernel_is_right(kind, what, dtype):
    """In the emulator. It is the same as on a GPU, except for timing."""
    case = case_of(kind, what, dtype, OLDER)
    with harness.emulator():
        found = check.run(case, torch.device("cpu"))
    assert found["outcome"] == "right" and 0 < found["error"] <= found["allowed"], found


def test_a_wrong_result_tells_where():
    case = case_of("resident", "layer")
    right = check.exact(case)
    got = {name: t.clone() for name, t in right.items()}
    assert check.compare(case, got, right) == dict(outcome="right", error=0., allowed=1e-2)
    got["y"][3, 5, 7] += 100
    got["dr"][0, 2, 1:3] = torch.nan
    found = check.compare(case, got, right)
    assert found["outcome"] == "wrong" and set(found["where"]) == {"y", "dr"}
    assert found["where"]["y"]["first"] == [3, 5, 7] and found["where"]["dr"]["first"] == [0, 2, 1]
    assert found["where"]["y"]["share"] == pytest.approx(1 / right["y"].numel())
    json.dumps(found)


def test_exceptions_are_outcomes():
    case = case_of("resident", "layer")
    cpu = torch.device("cpu")

    def outcome(error, record=None):
        with mock.patch.object(check, "measure", side_effect=error), \
                mock.patch.object(check, "wait_report", lambda: record):
            return check.run(case, cpu)
    assert outcome(RuntimeError("Triton Error [CUDA]: out of resources")) == dict(
        outcome="failed to launch", message="RuntimeError: Triton Error [CUDA]: out of resources", fatal=True)
    found = outcome(RuntimeError("CUDA error: unspecified launch failure"), "forward_grid, group 0")
    assert found["outcome"] == "trapped" and found["record"] == "forward_grid, group 0" and found["fatal"]
    compiling = type("CompilationError", (Exception,), dict(__module__="triton.compiler.errors"))
    assert outcome(compiling("no")) == dict(outcome="failed to compile", message="CompilationError: no", fatal=False)
    assert outcome(PlanError("CUDA")) == dict(outcome="failed to launch", message="PlanError: CUDA", fatal=False)


def test_compiled_beforehand_is_what_runs():
    case = case_of("split", "lengths", "bf16", OLDER)
    plan, dtype, options = case.compiled()
    assert set(compile_plan(plan, dtype, 90, **options)) == {"write_flags", "forward_split", "previous", "coefficients",
                                                              "backward_split"}
    assert options["flagged"] and not options["packed"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_LSTM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "faults.json"


def test_faults_are_remembered_until_they_are_right(cache, monkeypatch):
    key, other = ("cluster 16", "forward", "native"), ("split", "backward", "tf32")
    assert faults.of("here") == {}
    faults.remember("here", {key: "hung: layer", other: "wrong: packed"}, set())
    faults.remember("there", {key: "died: reuse"}, set())
    assert faults.of("here") == {key: "hung: layer", other: "wrong: packed"} and faults.of("there")[key]
    faults.remember("here", {}, {key})
    assert faults.of("here") == {other: "wrong: packed"} and list(cache.parent.iterdir()) == [cache]
    monkeypatch.delenv("TRITON_LSTM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    assert cachefile.folder() == cache.parent / "triton_lstm" and faults.of("here") == {}


@pytest.mark.parametrize("text", ["{", "[]", '{"here": {"one": "two"}}', '{"here": 3}'])
def test_a_broken_file_is_ignored(cache, text):
    cache.parent.mkdir()
    cache.write_text(text)
    with pytest.warns(UserWarning, match="ignores .*faults.json"):
        assert faults.of("here") == {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        faults.remember("here", {("split", "forward", "native"): "hung: layer"}, set())
    assert faults.of("here") == {("split", "forward", "native"): "hung: layer"}


def test_automatic_plans_keep_away(cache):
    device = torch.device("cuda", 0)
    plan = lambda H=640: op.on_device(16, H, torch.bfloat16, 1, device)[0]
    faults.remember("here", {("split", "forward", "native"): "hung: layer",
                             ("resident", "backward", "native"): "wrong: layer"}, set())
    with mock.patch.object(op, "limits_of", lambda device: OLDER), mock.patch.object(faults, "place", lambda d: "here"):
        faults.known.cache_clear()
        with pytest.warns(UserWarning, match=r"split forward native \(hung: layer\).*python -m triton_lstm check"):
            found = plan()
        assert found.variant != "split" and found.backward.variant == "split"       # no fault is remembered for it
        found = plan(64)
        assert found.variant == "resident" and found.backward.variant == "split"
        everything = {(variant, loop, "native"): "hung: layer" for variant in check.VARIANTS for loop in faults.LOOPS}
        faults.remember("here", everything, set())
        faults.known.cache_clear()
        with pytest.warns(UserWarning):
            none, reason = op.on_device(16, 640, torch.bfloat16, 1, device)
        assert none is None and "known to be wrong here, forward and backward" in reason
    faults.known.cache_clear()
    assert make_plan(16, 640, torch.bfloat16, limits=OLDER).variant == "split"      # make_plan ignores faults


def test_candidates():
    for batch, H, dtype in ((16, 512, torch.bfloat16), (128, 1024, torch.float16), (16, 1024, torch.float32)):
        found = candidates(batch, H, dtype, limits=FULL)
        chosen = make_plan(batch, H, dtype, limits=FULL)
        for plan in found:
            check_plan(plan, FULL)
        assert chosen.backward in found or dataclasses.replace(chosen, backward_plan=None) in found
        # keep_every is that of the backward plan
        both = dict(backward_plan=chosen.backward_plan, keep_every=chosen.keep_every)
        assert any(dataclasses.replace(plan, **both) == chosen for plan in found)


def line(outcome, kind="split", dtype="bf16", what="layer", backward=None, **more):
    return dict(kind=kind, backward_kind=backward or kind, dtype=dtype, what=what, outcome=outcome, forward_us=None,
                backward_us=None, **more)


def test_what_lines_tell(cache):
    found = command.remember("here", [
        line("wrong", where={"dx": {}}), line("right"), line("right", kind="streamed"),
        line("trapped", kind="wgmma", record="forward_wgmma, group 0"),
        line("hung", kind="cluster 4", dtype="tf32"), line("wrong", kind="wgmma", where={"dr": {}}, backward="grid"),
        line("not here", kind="cluster 8"), line("not reached", kind="streamed")])
    assert found == {("split", "backward", "native"): "wrong: layer", ("wgmma", "forward", "native"): "trapped: layer",
                     ("grid", "backward", "native"): "wrong: layer",
                     ("cluster 4", "forward", "tf32"): "hung: layer", ("cluster 4", "backward", "tf32"): "hung: layer"}
    assert faults.of("here") == found
    command.remember("here", [line("right", kind="cluster 4", dtype="tf32"), line("right")])
    assert set(faults.of("here")) == {("wgmma", "forward", "native"), ("grid", "backward", "native")}


def test_table():
    lines = [line("right"), line("hung", what="reuse"), line("right", dtype="fp16"), line("not here", kind="wgmma")]
    lines[0].update(forward_us=1.25, backward_us=2.5)
    text = command.table(lines).splitlines()
    assert text[1].split() == ["split", "1", "right", "hung", "bf16", "1.2", "/", "2.5"]
    assert text[2].split() == ["wgmma", "not", "here"]


def run(*arguments, **environment):
    return subprocess.run([sys.executable, "-m", "triton_lstm", *arguments], capture_output=True, text=True,
                          env={**os.environ, **environment})


def test_without_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    if harness.TRITON < (3, 7):
        pytest.skip("the interpreter of Triton 3.6 needs numpy < 2.4")
    result = run("check", "--kind", "portable resident", "--kind", "wgmma", "--out", str(tmp_path / "lines"))
    lines = [json.loads(text) for text in (tmp_path / "lines").read_text().splitlines()]
    assert result.returncode == 0 and "GPU: none" in result.stdout, result.stdout + result.stderr
    assert "No GPU: the kernels" in result.stdout
    outcomes = {(of["kind"], of["outcome"]) for of in lines}
    assert outcomes == {("portable resident", "right"), ("wgmma", "not here")}
    assert all(of["error"] < of["allowed"] for of in lines if of["outcome"] == "right")
    assert "15 right, 0 not, 0 not reached, 3 not here" in result.stdout


def test_facts_of_a_gpu_are_printed(capsys, cache):
    faults.remember("here", {("split", "forward", "native"): "hung: layer"}, set())
    command.about(dict(gpu="H100", capability=[9, 0], driver=13000, place="here", limits=dataclasses.asdict(FULL)))
    text = capsys.readouterr().out
    assert "GPU: H100, compute capability 9.0, driver for CUDA 13.0, 132 multiprocessors, 227 KiB" in text
    assert "clusters of up to 16" in text and "Avoided: split forward native: hung: layer" in text
    command.about(dict(gpu="H100", capability=[9, 0], driver=13000, place="", limits=dataclasses.asdict(OLDER)))
    assert "no clusters, which need compute capability 9.0, 10.0 or 10.3 and Triton 3.9" in capsys.readouterr().out


