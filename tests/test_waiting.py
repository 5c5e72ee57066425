"""A program that waits too long leaves a record and traps, and the user is told who waited for what."""
import os
import re
import subprocess
import sys
from unittest import mock

import pytest
import torch

import harness
import triton_lstm
from problems import Problem
from ptx_emulator import Trap
from triton_lstm.kernels import waiting

BF16 = torch.bfloat16
SMALL = Problem(4, 17, 2, 33, D=2, dtype=BF16)
# {kernel whose programs wait for each other: function of a problem that makes its plan}
PLANS = dict(forward_grid=lambda p: p.shared_plan("grid"), backward_grid=lambda p: p.shared_plan("grid"),
             forward_wgmma=lambda p: p.wgmma_plan(block_h=8),
             forward_split=lambda p: p.split_plan(), backward_split=lambda p: p.split_plan())
STREAMED = dict.fromkeys(("forward_grid", "backward_grid"), lambda p: p.shared_plan("streamed"))
WIDE = dict.fromkeys(("forward_split", "backward_split"), lambda p: p.split_plan(room=0))


@pytest.fixture(autouse=True)
def records():
    """New records (SLOTS, FIELDS) for each test."""
    fresh = torch.zeros(waiting.SLOTS, waiting.FIELDS, dtype=torch.int32)
    with mock.patch.dict(waiting._records, {torch.device("cpu"): fresh}, clear=True):
        yield fresh


def mute(program):
    """An edit of PTX after which the program with this first index sends nothing."""
    def edit(ptx):
        body = ptx.index("{", ptx.index(".entry"))
        test = f".reg .pred mute; .reg .b32 me; mov.u32 me, %ctaid.x; setp.eq.u32 mute, me, {program};"
        head, rest = ptx[:body + 1], ptx[body + 1:]
        assert "st.relaxed.gpu" in rest
        return head + "\n" + test + "\n" + re.sub(r"st\.relaxed\.gpu", "@!mute st.relaxed.gpu", rest)
    return edit


@pytest.mark.parametrize("kernel, make_plan", [*PLANS.items(), *STREAMED.items(), *WIDE.items()])
def test_a_wait_for_a_mute_program_ends_with_a_record(kernel, make_plan, records):
    """Each turn of the emulator takes 10 ms, so the limit of 10 s is 1000 turns."""
    plan = make_plan(SMALL)
    with harness.emulator(edit=mute(1), only=[kernel], turn_ns=10 ** 7), pytest.raises(Trap, match="trap, CTA"):
        SMALL.ours(plan=plan)
    loop = plan.backward if "backward" in kernel else plan
    found = records[records[:, 0] != 0]
    assert len(found) and all(waiting.KERNELS[number] == kernel for number in found[:, 0].tolist())
    for _, program, group, direction, programs, step, tile, thread in found.tolist():
        assert records[program + programs * (group + loop.groups * direction)].any()
        assert 0 <= program < programs == loop.programs and 0 <= group < loop.groups and 0 <= direction < 2
        # the others stop at the first step at which they need something from the mute program
        assert step == (SMALL.T - 2 if "backward" in kernel else 1) and 0 <= tile < loop.tiles
        assert 0 <= thread < 32 * loop.num_warps
    text = waiting.wait_report()
    assert f"{kernel}, group 0, direction" in text and f"{loop.programs} programs:" in text
    assert ("shares of dh after step 2" if "backward" in kernel else "waited for h before step 1") in text


def lose(kernel):
    """An edit of PTX that removes one of the stores that other programs wait for."""
    def edit(ptx):
        stores = list(re.finditer(r"st\.relaxed[^;]*;", ptx))
        store = stores[-1 if "grid" in kernel else 0]
        return ptx[:store.start()] + ptx[store.end():]
    return edit


@pytest.mark.parametrize("kernel", PLANS)
def test_a_wait_for_a_lost_store_ends_with_a_record(kernel, records):
    """Without a clock the emulator reports a deadlock, as in ``test_a_lost_store_is_caught``."""
    plan = PLANS[kernel](SMALL)
    with harness.emulator(edit=lose(kernel), only=[kernel], turn_ns=10 ** 7), pytest.raises(Trap, match="trap, CTA"):
        SMALL.ours(plan=plan)
    found = records[records[:, 0] != 0]
    assert len(found) and {waiting.KERNELS[number] for number in found[:, 0].tolist()} == {kernel}
    # what is sent in the first step is missing, so no program gets further
    assert set(found[:, 5].tolist()) == {SMALL.T - 2 if "backward" in kernel else 1}
    assert kernel in waiting.wait_report()


@pytest.mark.parametrize("kernel", PLANS)
def test_waits_that_end_leave_nothing(kernel, records):
    with harness.emulator(seed=3):
        SMALL.check(SMALL.ours(plan=PLANS[kernel](SMALL)))
    assert not records.any() and waiting.wait_report() is None


def test_the_limit_is_seconds_of_the_clock():
    """Programs wait 0.4 s for one that sleeps first. They trap with a limit of 0.1 s, but not with the default of 10
    s."""
    def late(ptx):
        """Program 0 sleeps for a hundred of its turns, of 4 ms each, before it does anything else."""
        body = ptx.index("{", ptx.index(".entry"))
        sleep = (".reg .pred early; .reg .b32 me; mov.u32 me, %ctaid.x; setp.ne.u32 early, me, 0; @early bra AWAKE;"
                 " mov.u32 me, 100; SLEEP: nanosleep.u32 1; sub.u32 me, me, 1; setp.ne.u32 early, me, 0;"
                 " @early bra SLEEP; AWAKE:")
        return ptx[:body + 1] + "\n" + sleep + "\n" + ptx[body + 1:]

    plan, kernel = SMALL.split_plan(), "forward_split"
    options = dict(edit=late, only=[kernel], turn_ns=4 * 10 ** 6)
    with harness.emulator(**options):
        SMALL.check(SMALL.ours(plan=plan))
    before = triton_lstm.set_wait_limit(0.1)
    try:
        with harness.emulator(**options), pytest.raises(Trap):
            SMALL.ours(plan=plan)
    finally:
        assert triton_lstm.set_wait_limit(before) == 0.1
    assert before == 10


def test_without_a_limit_no_clock_is_read():
    from triton_lstm.kernels.offline import compile_plan
    ptx = lambda: "".join(compiled.asm["ptx"] for compiled in compile_plan(SMALL.split_plan(), BF16).values())
    assert "globaltimer" in ptx() and "trap" in ptx()
    before = triton_lstm.set_wait_limit(float("inf"))
    try:
        assert waiting.limit() is None
        assert "globaltimer" not in ptx() and "trap" not in ptx()
    finally:
        triton_lstm.set_wait_limit(before)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), "soon", None])
def test_a_limit_is_a_positive_number(seconds):
    with pytest.raises(ValueError, match=re.escape(f"a positive number of seconds, or inf for none, got {seconds!r}")):
        triton_lstm.set_wait_limit(seconds)
    assert waiting.limit() == 10 ** 10 >> waiting.TICK_BITS


def test_the_environment_sets_the_limit():
    code = "import triton_lstm; print(triton_lstm.set_wait_limit(1))"
    run = lambda value: subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                                       env={**os.environ, waiting.VARIABLE: value})
    assert run("2.5").stdout == "2.5\n"
    assert "positive number of seconds, or inf for none, got '-3'" in run("-3").stderr


def test_report(records):
    # (kernel, program, group, direction, programs, step, tile, thread)
    rows = [(4, 0, 0, 1, 8, 7, 0, 3), (4, 1, 0, 1, 8, 7, 0, 3), (4, 2, 0, 1, 8, 7, 0, 3), (4, 5, 0, 1, 8, 6, 1, 0),
            (2, 3, 2, 0, 4, -1, 0, 9)]
    records[:5] = torch.tensor(rows)
    assert triton_lstm.wait_report() == """\
backward_grid, group 2, direction 0, 4 programs:
    program 3 waited for shares of dh after step -1 of batch tile 0
    program 0-2 left no record
forward_split, group 0, direction 1, 8 programs:
    program 5 waited for h before step 6 of batch tile 1
    program 0-2 waited for h before step 7 of batch tile 0
    program 3-4, 6-7 left no record"""


def test_an_error_says_who_waited(records):
    """When CUDA reports an error after a trap, the package raises one that explains it."""
    def fails(*args, **kwargs):
        raise RuntimeError("CUDA error: unspecified launch failure")
    with harness.interpreter(), mock.patch.object(harness.interpreted_launch, "launch_kernel", fails):
        with pytest.raises(RuntimeError, match="^CUDA error: unspecified launch failure$"):
            SMALL.ours()
    own = sys.modules[f"{harness.interpreted_launch.__package__}.waiting"]
    records[0] = torch.tensor((1, 0, 0, 0, 3, 2, 0, 0))
    with harness.interpreter(), mock.patch.object(harness.interpreted_launch, "launch_kernel", fails), \
            mock.patch.dict(own._records, {torch.device("cpu"): records}):
        with pytest.raises(RuntimeError, match="(?s)longer than 10 s.*program 0 waited for h before step 2") as raised:
            SMALL.ours()
    assert str(raised.value.__cause__) == "CUDA error: unspecified launch failure"


def test_the_end_of_the_process_says_who_waited():
    """If CUDA reports the error outside of the package, the package prints the explanation when the process ends."""
    code = """
import torch
from triton_lstm.kernels import waiting
waiting.records(torch.device("cpu"))[0] = torch.tensor((1, 2, 0, 0, 3, 5, 0, 0))
raise RuntimeError("CUDA error")"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1 and "program 2 waited for h before step 5 of batch tile 0" in result.stderr
    assert result.stderr.index("RuntimeError: CUDA error") < result.stderr.index("triton_lstm: the programs of")
