"""``tune``: what is measured, chosen, remembered and used. Times are made up, as if a GPU had been measured."""
import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
import threading
import time
import warnings
from unittest import mock

import pytest
import torch
from torch._subclasses import FakeTensorMode

import harness
import triton_lstm
import triton_lstm.__main__ as command
from problems import PORTABLE
from triton_lstm import backends, check, contest, explanation, make_plan, op, tuned, tuning
from triton_lstm.plan import H200, Plan, PlanError, check_plan, combined, contenders, step_cycles
from triton_lstm.tuned import BACKWARD, FLAGS, FORWARD, LOOPS, PACKED, TRAINING, Call, Entry

FULL = dataclasses.replace(H200, cluster=16)
GPU = torch.device("cuda", 0)
CALL = Call("bfloat16", "native", 512, 1, 64)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The path of the file, in a folder of its own."""
    monkeypatch.setenv("TRITON_LSTM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuned, "_own", {})
    monkeypatch.setattr(tuning, "_noticed", set())
    tuned.read_again()
    yield tmp_path / "cache" / tuned.FILE
    tuned.read_again()


@pytest.fixture
def here(monkeypatch):
    """Every device is a GPU with the limits of an H200."""
    monkeypatch.setattr(tuned, "place", lambda device: "here")
    monkeypatch.setattr(op, "limits_of", functools.lru_cache(lambda device: FULL))
    monkeypatch.setattr(op, "avoided", lambda device: frozenset())
    monkeypatch.setattr(explanation, "no_kernels", lambda device: None)


class Machine:
    """In the place of the processes that compile and measure. ``us`` gives the time of a plan's loop, ``bad`` outcomes
    other than "right" by variant."""

    def __init__(self, us=None, bad=None):
        self.us = us or (lambda loop, plan: step_cycles(plan, 132, None if loop == TRAINING else loop))
        self.bad = bad or {}
        self.compiled, self.asked = [], []

    def ask(self, question):
        question = contest.Question.decode(question.encode())
        self.asked.append(question)
        plans = [Plan.decode(text) if text else None for text in question.plans]
        if question.what == "time":
            return dict(outcome="timed", us=[self.us(question.loop, plan) for plan in plans])
        of_loop = plans[1] and (plans[1].backward if question.loop == BACKWARD else plans[1])
        return self.bad.get((question.loop, of_loop and of_loop.variant), dict(outcome="right"))

    @contextlib.contextmanager
    def measuring(self):
        def compiled(jobs, device):
            self.compiled += jobs
            yield from jobs
        with mock.patch.object(tuning, "compiled", compiled), \
                mock.patch.object(tuning, "why_not", lambda device: None), \
                mock.patch.object(tuning, "worker", lambda device: contextlib.nullcontext(self.ask)):
            yield self


def by_kind(times, otherwise=9.):
    """Made-up microseconds by (loop, variant)."""
    return lambda loop, plan: times.get((loop, (plan.backward if loop == BACKWARD else plan).variant), otherwise)


def found_of(call=CALL):
    return tuned.known(GPU).calls[str(call)]


def automatic(batch=64, hidden_size=512, dtype=torch.bfloat16, **options):
    return op.on_device(batch, hidden_size, dtype, 1, GPU, **options)[0]


def entry(plan, name="a", **us):
    return Entry(plan.encode(), name, us or {name: 1.})


# What is remembered

def test_remembered_by_later_processes(cache, here):
    plan = contenders(64, 512, torch.bfloat16, limits=FULL)[FORWARD][1]
    assert tuned.known(GPU) is None and not cache.exists()
    tuned.remember("here", CALL, {FORWARD: entry(plan, "b", a=3., b=1.5)})
    tuned.remember("there", CALL, {FORWARD: entry(plan)})
    tuned.remember("here", CALL, {BACKWARD: entry(plan.backward)})
    tuned._own.clear()                      # as in another process
    tuned.read_again()
    assert found_of() == {FORWARD: entry(plan, "b", a=3., b=1.5), BACKWARD: entry(plan.backward)}
    assert found_of()[FORWARD].gain == 0.5 and list(cache.parent.iterdir()) == [cache]
    assert json.loads(cache.read_text())["format"] == tuned.FORMAT
    triton_lstm.tune.clear()
    assert tuned.known(GPU) is None and not cache.exists()
    triton_lstm.tune.clear()                # of nothing


def test_the_file_is_read_once(here):
    tuned.remember("here", CALL, {FORWARD: entry(make_plan(64, 512, torch.bfloat16))})
    with mock.patch.object(tuned.cachefile, "read", wraps=tuned.cachefile.read) as read:
        for _ in range(3):
            automatic()
            automatic(16)
        assert read.call_count == 1
        tuned.read_again()
        automatic()
        assert read.call_count == 2


GOOD = {"plan": make_plan(64, 512, torch.bfloat16).encode(), "chosen": "a", "us": {"a": 1.}}
ODD = [json.dumps({**json.loads(GOOD["plan"]), **change}) for change in (
    dict(num_warps="8"), dict(r_slices=[[0, "16"]]), dict(gates_steps="x"),
    dict(backward_plan={**json.loads(GOOD["plan"]), "tiles": 1.5}))]


@pytest.mark.parametrize("text", [
    "{", "[]", "{}", '{"format": 0, "plans": {}}', '{"format": 1}', '{"format": 1, "plans": {"here": 3}}',
    *[json.dumps(dict(format=1, plans={"here": {str(CALL): {loop: {**GOOD, **change}}}})) for loop, change in [
        *[(FORWARD, dict(plan=text)) for text in ("{}", *ODD, 3)], ("sideways", {}), *[(FORWARD, change) for change in (
            dict(us={}), dict(us={"a": "1"}), dict(us={"a": -1}), dict(chosen="b"), dict(more=1))]]]])
def test_a_broken_file_is_ignored(cache, here, text):
    cache.parent.mkdir()
    cache.write_text(text)
    with pytest.warns(UserWarning, match="ignores .*plans.json") as told:
        for _ in range(3):
            assert automatic() == make_plan(64, 512, torch.bfloat16, limits=FULL)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned.remember("here", CALL, {FORWARD: entry(make_plan(64, 512, torch.bfloat16))})
    tuned._own.clear()
    tuned.read_again()
    assert set(found_of()) == {FORWARD}


def test_a_folder_that_cannot_be_written(cache, here):
    """What was measured is used all the same, in this process."""
    cache.parent.write_text("a file")
    with pytest.warns(UserWarning, match="cannot write .*plans.json"):
        tuned.remember("here", CALL, {FORWARD: entry(make_plan(64, 512, torch.bfloat16))})
        assert set(found_of()) == {FORWARD}
    with pytest.warns(UserWarning, match="cannot remove"):
        triton_lstm.tune.clear()


WRITER = """
import sys, torch
from triton_lstm import make_plan, tuned
who, count = sys.argv[1], int(sys.argv[2])
entry = tuned.Entry(make_plan(64, 512, torch.bfloat16).encode(), "a", {"a": 1.})
print("ready", flush=True)
sys.stdin.readline()
for n in range(count):
    tuned.remember("here", tuned.Call("bfloat16", "native", n, 1, 16, who), {"forward": entry})
"""


def test_processes_that_write_at_once_lose_nothing(cache):
    count, root = 40, os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, who, str(count)], stdin=subprocess.PIPE, text=True,
                                stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root}) for who in "ab"]
    for process in writers:
        assert process.stdout.readline() == "ready\n"
    for process in writers:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in writers:
        assert process.wait() == 0
        process.stdin.close()
        process.stdout.close()
    assert set(tuned.everything()["here"]) == {str(Call("bfloat16", "native", n, 1, 16, who))
                                               for n in range(count) for who in "ab"}
    assert list(cache.parent.iterdir()) == [cache]


# The plan of a call

def remember(call=CALL, forward=1, backward=1):
    """Remember the contenders of these numbers, and return them."""
    of = contenders(call.batch, call.hidden_size, call.torch_dtype, call.directions, limits=FULL,
                    tf32=call.precision == "tf32")
    chosen = of[FORWARD][forward], of[BACKWARD][backward]
    tuned.remember("here", call, {FORWARD: entry(chosen[0]), BACKWARD: entry(chosen[1])})
    return chosen


def test_the_remembered_plan_is_the_automatic_one(here):
    before = automatic()
    forward, backward = remember()
    plan = automatic()
    assert forward.variant != before.variant and backward.variant != before.backward.variant
    assert (plan.variant, plan.backward.variant) == (forward.variant, backward.variant)
    assert plan == combined(forward, backward) and plan.keep_every == backward.keep_every
    check_plan(plan, FULL)
    assert automatic(keep_every=7) == combined(forward, dataclasses.replace(backward, keep_every=7))
    triton_lstm.tune.clear()
    assert automatic() == before


def test_of_one_loop_the_other_is_by_arithmetic(here):
    of = contenders(64, 512, torch.bfloat16, limits=FULL)
    tuned.remember("here", CALL, {BACKWARD: entry(of[BACKWARD][1])})
    assert automatic() == combined(of[FORWARD][0], of[BACKWARD][1])
    triton_lstm.tune.clear()
    tuned.remember("here", CALL, {FORWARD: entry(of[FORWARD][2])})
    assert of[FORWARD][2].kind == "wgmma" and automatic() == of[FORWARD][2]


def test_which_calls_are_alike(here):
    forward, _ = remember(dataclasses.replace(CALL, batch=32))
    for batch, alike in ((16, False), (17, True), (31, True), (32, True), (33, False)):
        plan = automatic(batch)
        assert plan.batch == plan.backward.batch == batch and (plan.variant == forward.variant) == alike
        check_plan(plan, FULL)
    arithmetic = make_plan(32, 512, torch.bfloat16, limits=FULL).variant
    for options in (dict(sequences=FLAGS), dict(sequences=PACKED), dict(dtype=torch.float16), dict(hidden_size=500),
                    dict(dtype=torch.float32), dict(zoneout=True)):
        plan = automatic(32, **options)
        zoned = make_plan(32, 512, torch.bfloat16, limits=FULL, zoneout=True).variant
        assert plan.variant == (zoned if options.get("zoneout") else arithmetic), options
    assert op.on_device(32, 512, torch.bfloat16, 2, GPU)[0].variant == arithmetic


def test_tf32_and_exact_products_are_different_calls(here, monkeypatch):
    monkeypatch.setattr(op, "tf32_allowed", lambda: True)
    forward, _ = remember(Call("float32", "tf32", 300, 1, 16))
    assert automatic(16, 300, torch.float32).variant == forward.variant
    monkeypatch.setattr(op, "tf32_allowed", lambda: False)
    assert automatic(16, 300, torch.float32).precision == "tf32x3"


@pytest.mark.parametrize("why", ["limits", "avoided", "another layer"])
def test_a_plan_that_is_not_possible_any_more(here, monkeypatch, why):
    forward, backward = remember()
    plan = combined(forward, backward)
    message = "needs? compute capability 8.0, .*9.0"
    if why == "limits":
        monkeypatch.setattr(op, "limits_of", lambda device: PORTABLE)
    elif why == "avoided":
        avoid = frozenset({(backward.variant, "backward", "native")})
        monkeypatch.setattr(op, "avoided", lambda device: avoid)
        message = "found split backward wrong"
    else:
        tuned.remember("here", CALL, {FORWARD: entry(make_plan(64, 500, torch.bfloat16))})
        message = "for another layer"
    with pytest.warns(UserWarning, match=f"ignores the plan that was measured for H=512.*{message}") as told:
        for _ in range(3):
            assert automatic() == make_plan(64, 512, torch.bfloat16, limits=op.limits_of(GPU), avoid=op.avoided(GPU))
    assert len(told) == 1 and automatic() != plan


def test_layers_and_functions_take_it(here):
    """Eagerly, by the operator as compiled graphs see it, and in backward; with lengths it is another call."""
    call = Call("float16", "native", 33, 1, 16)
    forward, backward = remember(call)
    assert (forward.variant, backward.variant) == ("cluster 2", "cluster 2")
    of = contenders(16, 33, torch.float16, limits=FULL)
    split = next(plan for plan in of[FORWARD] if plan.kind == "split")
    grid = next(plan for plan in of[BACKWARD] if plan.kind == "grid")
    tuned.remember("here", call, {FORWARD: entry(split), BACKWARD: entry(grid)})
    tuned.remember("here", dataclasses.replace(call, sequences=FLAGS), {FORWARD: entry(of[FORWARD][0])})
    layer = triton_lstm.LSTM(4, 33).half()
    x = torch.randn(3, 5, 4, dtype=torch.float16)
    w, r, b = layer.weight_ih_l0, layer.weight_hh_l0, (layer.bias_ih_l0 + layer.bias_hh_l0).detach()
    state = torch.zeros(1, 5, 33, dtype=torch.float16)
    operator = lambda *more: op.lstm_op(x, w[None], r[None], b[None], state, state, *more, "", 64, True)
    with harness.emulator():
        kernels = []
        real = op.sequence.launch.launch_kernel
        record = lambda kernel, *args, **options: (kernels.append(kernel.__name__), real(kernel, *args, **options))
        with mock.patch.object(op, "limits_of", lambda device: FULL), \
                mock.patch.object(triton_lstm.layer, "runs_kernels", lambda x, dtype: True), \
                mock.patch.object(op.sequence.launch, "launch_kernel", record):
            for run in (lambda: layer(x)[0], lambda: triton_lstm.lstm(x, w, r, b)[0], lambda: operator(None, None)[0]):
                run().sum().backward()
                assert [name for name in kernels if name != "coefficients"] == ["forward_split", "backward_grid"]
                kernels.clear()
            lengths = torch.tensor([3, 3, 1, 2, 3])
            with torch.no_grad():
                layer(x, lengths=lengths)
                triton_lstm.lstm(x, w, r, b, lengths=lengths)
    assert kernels == ["write_flags", "forward_cluster"] * 2


def explain(layer, *shape, dtype=torch.bfloat16):
    with FakeTensorMode():
        x = torch.empty(shape, dtype=dtype, device="cuda:0")
    with mock.patch.object(triton_lstm.explanation.Limits, "of", lambda device: FULL), \
            mock.patch.object(triton_lstm.explanation, "avoided", op.avoided):
        return triton_lstm.explain(layer, x).splitlines()


def test_explain_says_where_a_plan_comes_from(here, monkeypatch):
    layer = triton_lstm.LSTM(8, 512).bfloat16()
    assert explain(layer, 50, 60, 8)[2] == (
        "  chosen by arithmetic, by predicted cycles; triton_lstm.tune measures which is the fastest")
    of = contenders(64, 512, torch.bfloat16, limits=FULL)
    tuned.remember("here", CALL, {FORWARD: Entry(of[FORWARD][1].encode(), "b", dict(a=3., b=1.5)),
                                  BACKWARD: entry(of[BACKWARD][0])})
    text = explain(layer, 50, 60, 8)
    assert "split: H=512 B=60" in text[1]
    assert text[3:5] == ["  measured, forward: 3.00 us a step a, 1.50 us a step b (chosen)",
                         "  measured, backward: 1.00 us a step a (chosen)"]
    monkeypatch.setattr(op, "avoided", lambda device: frozenset({("split", "forward", "native")}))
    with pytest.warns(UserWarning, match="ignores the plan"):
        text = explain(layer, 50, 60, 8)
    assert text[2] == ("  chosen by arithmetic: what was measured is not possible any more: the check found split "
                       "forward wrong")
    layer.plan = make_plan(60, 512, torch.bfloat16)
    assert explain(layer, 50, 60, 8)[2] == "  given, as layer.plan"


# What is measured

@pytest.mark.parametrize("batch, H, dtype", [(16, 64, torch.float16), (64, 512, torch.bfloat16),
                                             (1024, 512, torch.float16), (16, 300, torch.float32),
                                             (16, 2048, torch.bfloat16)])
def test_contenders(batch, H, dtype):
    """The present plan first, the best of each kind, and otherwise nothing that is predicted to be much slower."""
    found, chosen = contenders(batch, H, dtype, limits=FULL), make_plan(batch, H, dtype, limits=FULL)
    assert found[FORWARD][0] == chosen and found[BACKWARD][0] == chosen.backward
    for loop, plans in found.items():
        assert 2 <= len(plans) == len(set(plans)) <= 5
        cost = [step_cycles(plan, 132, loop) for plan in plans]
        kinds = [plan.kind for plan in plans]
        for n, plan in enumerate(plans):
            check_plan(plan, FULL)
            assert kinds.index(plan.kind) == n or cost[n] <= 2 * min(cost)
        fits = {plan.kind for plan in triton_lstm.plan.candidates(batch, H, dtype, limits=FULL)
                if loop == FORWARD or plan.kind != "wgmma"}
        assert len(fits) <= 5 and set(kinds) == fits
    assert all(plan.backward == chosen.backward for plan in found[FORWARD])
    avoid = frozenset({(found[FORWARD][1].variant, "forward", chosen.precision)})
    fewer = contenders(batch, H, dtype, limits=FULL, avoid=avoid)
    assert found[FORWARD][1].variant not in {plan.variant for plan in fewer[FORWARD]}


def test_the_fastest_of_each_loop_is_chosen(here):
    us = by_kind({(FORWARD, "wgmma"): 2., (FORWARD, "cluster 16"): 5., (BACKWARD, "grid"): 3.})
    with Machine(us).measuring() as machine:
        tuning.measure([CALL], LOOPS, GPU, pytest.fail)
    plan = automatic()
    assert (plan.variant, plan.backward.variant) == ("wgmma", "grid")
    forward = found_of()[FORWARD]
    assert forward.us[forward.chosen] == 2. and "wgmma" in forward.chosen and forward.gain == 0.6
    assert next(iter(forward.us)).startswith("cluster 16") and len(forward.us) == 5
    # each is checked before any is timed, and everything is compiled before that
    for loop in LOOPS:
        whats = [question.what for question in machine.asked if question.loop == loop]
        assert whats == ["check"] * (len(whats) - 1) + ["time"]
    assert len(machine.compiled) == 5
    of_jobs = [Plan.decode(json.loads(job)[0]) for job in machine.compiled]
    compiled = {FORWARD: {plan.variant for plan in of_jobs}, BACKWARD: {plan.backward.variant for plan in of_jobs}}
    for question in machine.asked:
        of_loop = [Plan.decode(text) for text in question.plans]
        assert question.loop == TRAINING or {plan.backward.variant if question.loop == BACKWARD else plan.variant
                                             for plan in of_loop} <= compiled[question.loop]


def test_a_small_gain_changes_nothing(here):
    for times, variant in (({(FORWARD, "split"): 8.9}, "cluster 16"), ({(FORWARD, "split"): 8.8}, "split")):
        with Machine(by_kind(times)).measuring():
            tuning.measure([CALL], [FORWARD], GPU, pytest.fail)
        assert automatic().variant == variant
        triton_lstm.tune.clear()


@pytest.mark.parametrize("found", [
    dict(outcome="wrong", message="y is off by 0.3"), dict(outcome="died", message="SIGSEGV"),
    dict(outcome="trapped", message="CUDA error", record="forward_split, group 0"),
    dict(outcome="hung", message="60 s"), dict(outcome="failed to compile", message="no")],
    ids=lambda found: found["outcome"])
def test_a_bad_candidate_is_out(here, found):
    """It is neither timed nor chosen, and is told about; the others are measured."""
    said = []
    with Machine(by_kind({(FORWARD, "split"): 1., (FORWARD, "grid"): 2.}), {(FORWARD, "split"): found}).measuring():
        tuning.measure([CALL], [FORWARD], GPU, said.append)
    assert automatic().variant == "grid" and len(found_of()[FORWARD].us) == 4
    assert len(said) == 1 and "split, 32 x 4 x 1 programs" in said[0] and "left out: " + found["outcome"] in said[0]
    assert all(part in said[0] for part in found.values())


def test_if_the_present_plan_fails_nothing_is_chosen(here):
    said = []
    with Machine(bad={(FORWARD, "cluster 16"): dict(outcome="hung")}).measuring():
        tuning.measure([CALL], [FORWARD, BACKWARD], GPU, said.append)
    assert set(found_of()) == {BACKWARD} and len(said) == 1 and "cluster 16" in said[0]
    triton_lstm.tune.clear()
    machine = Machine()
    machine.ask = lambda question: dict(outcome="right" if question.what == "check" else "hung")
    with machine.measuring():
        tuning.measure([CALL], [FORWARD], GPU, said.append)
    assert tuned.known(GPU) is None and "not timed: hung" in said[-1]


def kept(us, directions=1, batch=64, H=512):
    """(keep_every, gates_steps) of the plan after whole calls took ``us`` by what is kept: a number of steps, or
    "gates"."""
    triton_lstm.tune.clear()
    call = Call("bfloat16", "native", H, directions, batch)

    def of(loop, plan):
        return 1. if loop != TRAINING else us["gates" if plan.keeps_gates(contest.STEPS) else plan.keep_every]
    with Machine(of).measuring() as machine:
        tuning.measure([call], LOOPS, GPU, pytest.fail)
    plan = op.on_device(batch, H, torch.bfloat16, directions, GPU)[0]
    assert plan.backward.keep_every == plan.keep_every
    timed = [Plan.decode(text) for text in machine.asked[-1].plans]
    assert machine.asked[-1].loop == TRAINING and len(timed) == len(us)
    return plan.keep_every, plan.gates_steps


def test_what_backward_keeps_is_measured(here):
    """1024 steps are the default, for keeping the gates of a sequence and for recomputing."""
    assert kept({"gates": 1., 1024: 2., 32: 3., 16: 4.}) == (1024, None)
    assert kept({"gates": 2., 1024: 1., 32: 3., 16: 4.}) == (1024, 0)
    assert kept({"gates": 1., 1024: 3., 32: 3., 16: 2.}) == (16, 1024)
    assert kept({"gates": 2., 1024: 3., 32: 1., 16: 2.}) == (32, 0)
    assert kept({"gates": 2., 1024: 1.99, 32: 1.98, 16: 1.97}) == (1024, None)
    # two directions keep the gates of ``keep_every`` steps at a time
    assert kept({"gates": 1., 512: 2.}, directions=2) == (512, None)
    # 64 steps are more than may be kept
    assert kept({32: 2., 16: 3.}, batch=2048) == (32, None)
    assert kept({32: 3., 16: 2.}, batch=2048) == (16, 32)


def test_plans_with_fewer_steps_keep_as_much(here):
    plan = dataclasses.replace(make_plan(64, 512, torch.bfloat16), keep_every=16, gates_steps=1024)
    assert plan.keeps_gates(1024) and not plan.keeps_gates(1025) and not plan.keeps_gates(600, layers=2)
    assert not dataclasses.replace(plan, gates_steps=0).keeps_gates(1)
    assert plan.compiled_as == make_plan(64, 512, torch.bfloat16).compiled_as and Plan.decode(plan.encode()) == plan


# ``tune``

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = triton_lstm.LSTM(4, 33), triton_lstm.LSTM(33, 20, bidirectional=True)

    def forward(self, x, lengths=None):
        return self.b(self.a(x, lengths=lengths)[0])[0]


@contextlib.contextmanager
def on_gpu():
    """Calls take CPU tensors, and compute nothing."""
    def forward(x, w, r, b, h0, c0, flags, plan, save, batch_sizes=None, *args, **kwargs):
        y = x.new_zeros(*x.shape[:-1], plan.directions * plan.hidden_size)
        return y, h0.clone(), c0.clone(), x.new_zeros(0), x.new_zeros(0)
    with harness.emulator(), mock.patch.object(op, "limits_of", lambda device: FULL), \
            mock.patch.object(triton_lstm.layer, "runs_kernels", lambda x, dtype: dtype != torch.float64), \
            mock.patch.object(op.sequence, "forward", forward):
        yield


def test_tune_measures_the_calls_of_a_model(here, capsys):
    model = Model()
    inputs = [torch.zeros(7, 5, 4), (torch.zeros(9, 17, 4), torch.ones(17, dtype=torch.int64)),
              dict(x=torch.zeros(2, 16, 4))]        # the last one is as the first
    with on_gpu(), Machine().measuring() as machine:
        assert triton_lstm.tune(model, inputs) is None
        a, b = Call("float32", "tf32", 33, 1, 16), Call("float32", "tf32", 20, 2, 16)
        ragged, wide = dataclasses.replace(a, batch=32, sequences=FLAGS), dataclasses.replace(b, batch=32)
        assert set(tuned.known(GPU).calls) == {str(call) for call in (a, b, ragged, wide)}
        assert all(set(loops) == set(LOOPS) for loops in tuned.known(GPU).calls.values())
        text = capsys.readouterr().out
        assert text.splitlines()[0].split("  ")[0] == "call" and text.count(" %\n") == 12
        assert f"{a}  forward" in text and "0 %" in text
        count = len(machine.asked)
        triton_lstm.tune(model, inputs)             # all is known
        assert len(machine.asked) == count and capsys.readouterr().out == text
        packed = torch.nn.utils.rnn.pack_sequence([torch.zeros(n, 4) for n in (3, 2)])
        with torch.no_grad():
            triton_lstm.tune(model.a, packed)
        assert set(found_of(dataclasses.replace(a, sequences=PACKED))) == {FORWARD}
        assert "packed  forward" in capsys.readouterr().out
        options = json.loads(machine.compiled[-1])[2]
        assert options["packed"] and not options["flagged"] and options["zoneout"] is None
        triton_lstm.tune(triton_lstm.LSTM(4, 33, zoneout=0.1), torch.zeros(3, 2, 4))
        assert "tf32, padded, zoneout" in capsys.readouterr().out
    assert tuned.recorded is None


def test_where_there_is_nothing_to_measure(here, monkeypatch):
    layer, x = triton_lstm.LSTM(4, 6), torch.zeros(3, 2, 4)
    with pytest.raises(ValueError, match="nothing to measure: no call"):
        triton_lstm.tune(layer, x)                          # on the CPU
    with pytest.raises(ValueError, match="empty list"):
        triton_lstm.tune(layer, [])
    with on_gpu():
        with pytest.raises(ValueError, match="nothing to measure: no call"), warnings.catch_warnings():
            warnings.simplefilter("ignore")                 # torch's own LSTM computes
            triton_lstm.tune(triton_lstm.LSTM(4, 6).double(), x.double())
        monkeypatch.setattr(tuned, "place", lambda device: None)
        with pytest.raises(ValueError, match="measured on CUDA devices, got cpu"):
            triton_lstm.tune(layer, x)
        with pytest.raises(RuntimeError, match="at work already"):
            triton_lstm.tune(lambda x: triton_lstm.tune(layer, x), x)
    with harness.interpreter(), pytest.raises(ValueError, match="interpreter"):
        triton_lstm.tune(layer, x)
    with pytest.raises(TypeError, match="unexpected"):
        triton_lstm.tune(layer, dict(input=x, unexpected=1))
    assert tuned.recorded is None


def test_when_nothing_is_measured(here, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert tuning.why_not(GPU) is None
    assert torch.func.grad(lambda x: x * ("torch.func" in tuning.why_not(GPU)))(torch.tensor(3.)) == 1
    with mock.patch.object(torch.compiler, "is_compiling", lambda: True):
        assert "torch.compile" in tuning.why_not(GPU)
    with FakeTensorMode():
        assert "dispatch mode" in tuning.why_not(GPU)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "captured" in tuning.why_not(GPU)
    with on_gpu(), pytest.raises(RuntimeError, match="captured"):
        triton_lstm.tune(triton_lstm.LSTM(4, 6), torch.zeros(3, 2, 4))


@pytest.mark.parametrize("faster", ["torch", "ours", "wrong"])
def test_allow_torch(here, capsys, recwarn, faster):
    """A layer then uses torch's own LSTM for such calls, after one warning; everything else goes on."""
    layer, x = triton_lstm.LSTM(4, 33), torch.zeros(7, 5, 4)
    call, whole = Call("float32", "tf32", 33, 1, 16), "whole training"
    of = lambda loop, plan: 2. if plan else 1. if faster != "ours" else 3.
    bad = {(whole, None): dict(outcome="wrong")} if faster == "wrong" else {}
    triton_lstm.functional._told.clear()
    with on_gpu(), Machine(of, bad).measuring() as machine:
        triton_lstm.tune(layer, [x, dict(input=x, lengths=torch.ones(5, dtype=torch.int64))], allow_torch=True)
        entry, out = found_of(call)[whole], capsys.readouterr().out
        assert (entry.chosen == "torch's own LSTM") == (faster == "torch") and f"  {whole}  " in out
        assert (len(entry.us), "left out" in out) == ((1, True) if faster == "wrong" else (2, False))
        assert set(found_of(dataclasses.replace(call, sequences=FLAGS))) == set(LOOPS)
        with mock.patch.object(triton_lstm.layer._TorchLSTM, "forward", autospec=True,
                               side_effect=triton_lstm.layer._TorchLSTM.forward) as theirs:
            for _ in range(2):
                layer(x)
            assert theirs.call_count == (2 if faster == "torch" else 0)
            with torch.no_grad():
                layer(x)
            layer(x, lengths=torch.ones(5, dtype=torch.int64))
            layer(torch.zeros(7, 17, 4))
            triton_lstm.lstm(x, *[p.detach() for p in list(layer.parameters())[:2]])
            assert theirs.call_count == (2 if faster == "torch" else 0)
        count = len(machine.asked)
        triton_lstm.tune(layer, x, allow_torch=True)
        assert len(machine.asked) == count
    told = [str(warning.message) for warning in recwarn]
    assert len(told) == (faster == "torch") and all("it was measured to be faster in whole training" in t for t in told)
    if faster == "torch":
        text = explain(layer, 7, 5, 4, dtype=torch.float32)
        assert "  measured, whole training: 2.00 us a step triton_lstm, 1.00 us a step torch's own LSTM (chosen), " \
            "which computes such calls in eager mode" in text


# ``backends.benchmark``

def test_benchmark_measures_at_the_first_call(here, monkeypatch):
    layer, x, machine = triton_lstm.LSTM(4, 33), torch.zeros(7, 5, 4), Machine()
    call = Call("float32", "tf32", 33, 1, 16)
    assert backends.benchmark is False
    with on_gpu(), machine.measuring():
        layer(x)
        assert not machine.asked
        monkeypatch.setattr(backends, "benchmark", True)
        with torch.no_grad():
            layer(x)
        assert {question.loop for question in machine.asked} == {FORWARD}
        layer(x)                                    # the others, now that there are gradients
        assert set(found_of(call)) == set(LOOPS)
        count = len(machine.asked)
        layer(x)
        layer(torch.zeros(3, 16, 4))                # other numbers of steps and rows are the same call
        triton_lstm.lstm(x, *[p.detach() for p in list(layer.parameters())[:2]])
        assert len(machine.asked) == count
        triton_lstm.lstm(torch.zeros(3, 17, 4), *[p.detach() for p in list(layer.parameters())[:2]])
        assert len(machine.asked) > count and machine.asked[-1].call == dataclasses.replace(call, batch=32)


def test_benchmark_goes_on_where_nothing_can_be_measured(here, monkeypatch):
    monkeypatch.setattr(backends, "benchmark", True)
    monkeypatch.setattr(tuning, "measure", mock.Mock(side_effect=OSError("no process")))
    with on_gpu(), mock.patch.object(tuning, "why_not", lambda device: None):
        with pytest.warns(UserWarning, match="could not measure plans for H=33 B=16 .*no process") as told:
            for _ in range(2):
                assert triton_lstm.LSTM(4, 33)(torch.zeros(3, 5, 4))[0].shape == (3, 5, 33)
    assert len(told) == 1


def test_benchmark_never_measures_inside_of_others(here, monkeypatch):
    """torch.func, torch.compile and capture take what is known."""
    monkeypatch.setattr(backends, "benchmark", True)
    monkeypatch.setattr(tuning, "measure", lambda *args: pytest.fail("measured"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    layer, x = triton_lstm.LSTM(4, 33), torch.zeros(3, 5, 4)
    weights = [p.detach() for p in list(layer.parameters())[:2]]
    with on_gpu():
        layer(x)                                                        # captured
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        torch.func.vmap(lambda x: triton_lstm.lstm(x, *weights)[0])(x[None])
        torch.func.vmap(lambda x: layer(x)[0])(x[None])
        with torch.no_grad():
            compiled = torch.compile(lambda x: triton_lstm.lstm(x, *weights)[0], backend="eager", fullgraph=True)
            assert compiled(x).shape == (3, 5, 33)


@pytest.mark.parametrize("value, on", [("", False), ("0", False), ("1", True), ("yes", None)])
def test_environment(monkeypatch, value, on):
    monkeypatch.setenv("TRITON_LSTM_BENCHMARK", value)
    if on is None:
        with pytest.raises(ValueError, match="must be 0 or 1, got 'yes'"):
            backends._from_environment()
    else:
        assert backends._from_environment() is on


def test_one_measures_and_the_others_read(here):
    """Of two that come at the same time; two threads stand for two ranks, as each opens the lock by itself."""
    machine = Machine()
    ask, busy, most = machine.ask, [], []

    def slowly(question):
        busy.append(question)
        most.append(len(busy))
        time.sleep(0.02)
        busy.remove(question)
        return ask(question)
    machine.ask = slowly
    with machine.measuring():
        threads = [threading.Thread(target=tuning.measure, args=([CALL], [FORWARD], GPU, print)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(machine.asked) == 6 and max(most) == 1


def test_what_another_process_has_measured_meanwhile_is_read(here, cache, monkeypatch):
    of, machine = contenders(64, 512, torch.bfloat16, limits=FULL), Machine()
    real = tuned.cachefile.locked

    @contextlib.contextmanager
    def locked(name):
        if name is not None:                # the other one had the lock, and has written
            entry = dict(plan=of[FORWARD][1].encode(), chosen="a", us={"a": 1.})
            cache.write_text(json.dumps(dict(format=1, plans={"here": {str(CALL): {FORWARD: entry}}})))
        with real(name):
            yield
    cache.parent.mkdir()
    monkeypatch.setattr(tuned.cachefile, "locked", locked)
    assert automatic().variant == of[FORWARD][0].variant
    with machine.measuring():
        tuning.measure([CALL], [FORWARD], GPU, pytest.fail)
        assert not machine.asked and automatic().variant == of[FORWARD][1].variant
        tuning.measure([CALL], LOOPS, GPU, pytest.fail)     # what it has not measured is
    assert {question.loop for question in machine.asked} == {BACKWARD, TRAINING}
    assert Plan.decode(machine.asked[-1].plans[0]).variant == of[FORWARD][1].variant        # what is known goes on


# The processes that compile and measure

@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(contest, "STEPS", 3)
    yield
    for cached in (contest.problem, contest._forward, contest._layer):
        cached.cache_clear()


@pytest.mark.parametrize("sequences", [tuned.PADDED, FLAGS, PACKED])
@pytest.mark.parametrize("loop", LOOPS)
def test_right_and_wrong_candidates(small, loop, sequences):
    """In the emulator: real kernels are compared, and a backward loop alone is timed without what comes before."""
    call, cpu = Call("float16", "native", 33, 1, 16, sequences), torch.device("cpu")
    of = contenders(16, 33, torch.float16, limits=FULL)
    plans = of[BACKWARD if loop == BACKWARD else FORWARD]
    present, other = plans[0], next(plan for plan in plans if plan.kind == "split")
    if loop == TRAINING:
        other = dataclasses.replace(present, keep_every=2, gates_steps=0)
    both = present.encode(), other.encode()
    ask = lambda what: contest.answer(contest.Question(call, loop, what, both).encode(), cpu)
    timed = []

    def clock(calls, device):
        for of_call in calls:
            of_call(lambda function, *args, **kwargs: (timed.append(args), function(*args, **kwargs))[1])
        return [[3., 30., 6.], [9., 12., 90.]]
    with harness.emulator(), mock.patch.object(contest, "clock", clock):
        assert ask("check") == dict(outcome="right")
        assert ask("time") == dict(outcome="timed", us=[2., 4.])
        names = [args[0].__name__ if args else "both" for args in timed]
        assert names == (["both"] * 2 if loop == TRAINING else [f"{loop}_cluster", f"{loop}_split"])
        name = "backward" if loop == BACKWARD else "forward"
        real = getattr(op.sequence, name)

        def off(*args, **kwargs):       # of the second plan
            found = real(*args, **kwargs)
            if other in args:
                found[0].mul_(1.1)
            return found
        with mock.patch.object(op.sequence, name, off):
            found = ask("check")
    assert found["outcome"] == "wrong" and f"{'dx' if loop == BACKWARD else 'y'} is off by 0.1" in found["message"]
    with mock.patch.object(contest, "compute", side_effect=RuntimeError("CUDA error")):
        assert ask("check")["fatal"]


def test_zoneout_in_two_directions(small):
    """Both plans draw the same masks."""
    call, cpu = Call("float16", "native", 33, 2, 16, zoneout=True), torch.device("cpu")
    plans = contenders(16, 33, torch.float16, 2, limits=FULL, zoneout=True)[FORWARD]
    other = next(plan for plan in plans if plan.kind == "grid")
    assert plans[0].kind == "portable resident"
    with harness.emulator():
        for loop in (FORWARD, TRAINING):
            question = contest.Question(call, loop, "check", (plans[0].encode(), other.encode()))
            assert contest.answer(question.encode(), cpu) == dict(outcome="right")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sequences, directions", [(tuned.PADDED, 2), (PACKED, 1)])
def test_whole_calls(small, training, sequences, directions):
    """Of our layer and of torch's, with the same weights: in the emulator both give the same."""
    call, cpu = Call("float32", "tf32", 33, directions, 16, sequences), torch.device("cpu")
    loop, plan = tuned.WHOLE[training], make_plan(16, 33, torch.float32, directions, limits=H200)
    question = contest.Question(call, loop, "check", (plan.encode(), "")).encode()
    real, computed = torch.nn.LSTM.forward, []
    with harness.emulator(), mock.patch.object(triton_lstm.layer, "runs_kernels", lambda x, dtype: True):
        assert contest.answer(question, cpu) == dict(outcome="right")
        names = contest.results(call, loop, plan, plan, cpu)
        assert set(names) == {"y", "h_n", "c_n"} | ({"dx", "dh0", "dc0", *(
            f"d{name}" for name, _ in torch.nn.LSTM(1, 1, bidirectional=directions == 2).named_parameters())}
            if training else set())

        def off(self, x, hx):
            computed.append(1)
            y, (h_n, c_n) = real(self, x, hx)
            return y, (h_n, c_n * 1.1)
        with mock.patch.object(torch.nn.LSTM, "forward", off):
            found = contest.answer(question, cpu)
    assert computed == [1] and found["outcome"] == "wrong" and "c_n is off by 0.1" in found["message"]


def test_clock(monkeypatch):
    """Candidates take turns, and of several launches of a call the times are added."""
    now, order = [0.], []

    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            self.at = now[0]

        def elapsed_time(self, other):          # milliseconds
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: now.__setitem__(0, now[0] + 100))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    def call(name, launches, milliseconds):
        def run(timed):
            order.append(name)
            for _ in range(launches):
                timed(lambda: now.__setitem__(0, now[0] + milliseconds))
        return run
    found = contest.clock([call("a", 2, 3.), call("b", 1, 5.)], GPU)
    assert found == [[6000.] * contest.SAMPLES, [5000.] * contest.SAMPLES] and order == ["a", "b"] * contest.SAMPLES


def test_compiled_by_processes(tmp_path, monkeypatch):
    """Into Triton's cache, without a GPU. What does not compile stops nothing."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    plan = make_plan(16, 16, torch.float16, limits=PORTABLE)
    jobs = list(tuning.jobs(Call("float16", "native", 16, 1, 16), {FORWARD: [plan], BACKWARD: [plan]}, LOOPS))
    broken = json.dumps([dataclasses.replace(plan, r_slices=((0, 3),)).encode(), "float16", json.loads(jobs[0])[2]])
    assert len(list(tuning.compiled([broken, *jobs], GPU))) == 2
    names = {path.name.split(".")[0] for path in (tmp_path / "triton").rglob("*.cubin")}
    assert names == {"forward_resident", "backward_resident", "coefficients"}


WORKER = """
import json, os, sys
say = lambda **found: print(json.dumps(found), flush=True)
say(ready=True)
for line in sys.stdin:
    if json.loads(line)["loop"] == "die": os._exit(3)
    say(outcome="right", pid=os.getpid(), limit=os.environ["TRITON_LSTM_WAIT_LIMIT"])
"""


def test_the_process_that_measures_is_started_again(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.delenv("TRITON_LSTM_WAIT_LIMIT", raising=False)
    monkeypatch.setattr(check, "child", lambda *command: ([sys.executable, "-c", WORKER], dict(os.environ)))
    with tuning.worker(GPU) as ask:
        found = [ask(contest.Question(CALL, loop, "check", ("",))) for loop in ("a", "b", "die", "c")]
    assert found[0] == found[1] != found[3] and found[2]["outcome"] == "died" and found[0]["limit"] == "2"
    for n in (0, 3):
        with pytest.raises(ProcessLookupError):
            os.kill(found[n]["pid"], 0)


@pytest.mark.parametrize("installed", [True, False])
def test_progress(monkeypatch, installed):
    bar = mock.MagicMock()
    monkeypatch.setitem(sys.modules, "tqdm", mock.Mock(tqdm=bar) if installed else None)
    with tuning.progress(7) as step:
        step()
    assert bar.called == installed and (not installed or bar.call_args.kwargs["total"] == 7)


def test_command(here, capsys, cache):
    assert command.main(["tuned"]) == 0
    assert f"No plan was measured: there is none in {cache}" in capsys.readouterr().out
    plan = make_plan(64, 512, torch.bfloat16)
    tuned.remember("H100, driver 13000", CALL, {FORWARD: entry(plan, "b", a=3., b=1.5)})
    assert command.main(["tuned"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "H100, driver 13000"
    assert lines[2].startswith(f"{CALL}  forward  a ")
    assert lines[2].split()[-6:] == ["a", "3.00", "b", "1.50", "50", "%"]


def test_no_plan_no_contenders(here):
    with pytest.raises(PlanError):
        contenders(3, 512, torch.bfloat16, limits=dataclasses.replace(FULL, multiprocessors=1))


@pytest.mark.gpu
def test_on_a_gpu(capsys):
    """What was measured is used, and computes what the plan by arithmetic does."""
    layer, x = triton_lstm.LSTM(24, 72).cuda(), torch.randn(9, 5, 24, device="cuda")
    with torch.no_grad():
        before = layer(x)[0]
        triton_lstm.tune(layer, x)
        after = layer(x)[0]
    found = tuned.known(x.device).calls[str(Call("float32", "tf32", 72, 1, 16))]
    assert set(found) == {FORWARD} and all(us > 0 for us in found[FORWARD].us.values()) and len(found[FORWARD].us) > 1
    assert "left out" not in capsys.readouterr().out
    assert check.relative_error(after, before.double()) < check.TOLERANCE["tf32"]
    assert f"  measured, forward: {found[FORWARD]}" in triton_lstm.explain(layer, x).splitlines()
