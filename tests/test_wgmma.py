"""The wgmma kernel: its PTX, executed on CPU tensors, and its machine code."""
import dataclasses
import re

import pytest
import torch
from triton_lstm.kernels.offline import compile_plan

import harness
from bench.machine_code import read
from problems import NotFinite, Problem
from ptx_emulator import Deadlock
from triton_lstm import Plan, PlanError, make_plan
from triton_lstm.plan import A100, H200, candidates, check_plan, step_cycles

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
DTYPES = [FP16, BF16, FP32]


def problem(shape, dtype, **change):
    return Problem(*shape, dtype=dtype, tf32=dtype == FP32, **change)


def run(problem, seed=0, **layout):
    """``layout`` are arguments of ``Problem.wgmma_plan``."""
    with harness.emulator(90, seed=seed, memory="weak"):
        problem.check(problem.ours(plan=problem.wgmma_plan(**layout)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, block_h", [((1, 1, 1, 1, 2), 8), ((3, 3, 4, 5, 1), 8), ((3, 17, 4, 33, 2), 16)],
                         ids=str)
def test_small(shape, block_h, dtype):
    run(problem(shape, dtype), block_h=block_h)


@pytest.mark.parametrize("shape, dtype, layout", [
    ((2, 70, 3, 100, 1), BF16, dict(block_h=32, warps=8)),              # two warp groups in each of four programs
    ((2, 140, 3, 100, 1), FP32, dict(block_h=16, warps=8, tiles=2)),
    ((3, 140, 3, 33, 2), FP16, dict(block_h=16, tiles=2)),              # four tiles: the third has 12 rows
    ((2, 3, 2, 160, 1), FP16, dict(block_h=64)),                        # one slice of R
    ((2, 17, 2, 200, 1), FP32, dict(block_h=32)),                       # two slices
    ((2, 1, 1, 520, 1), BF16, dict(block_h=32)),                        # two slices and one of half the width
], ids=str)
def test_large(shape, dtype, layout):
    run(problem(shape, dtype), **layout)


def test_computed_addresses_of_r(tmp_path):
    """A loop computes the addresses of slices of R after the third. Here it starts after the first, because a small R
    has no more than two slices."""
    first = "FIRST: gl.constexpr = "
    with harness.edited("wgmma_forward", tmp_path, first + "3", first + "1"):
        run(problem((2, 3, 2, 200, 1), FP32), block_h=32)


@pytest.mark.parametrize("change", [dict(ragged=True, resets=True), dict(packed=True), dict(bias=False)], ids=str)
@pytest.mark.parametrize("shape, dtype", [((5, 17, 3, 33, 2), FP16), ((5, 4, 3, 20, 2), FP32)], ids=str)
def test_lengths_resets_packed(shape, dtype, change):
    run(problem(shape, dtype, **change), block_h=8)


@pytest.mark.parametrize("seed", range(12))
def test_weak_memory(seed):
    """With three to five programs, one or two tiles or warp groups, and chunks of two steps."""
    layout = [dict(block_h=8), dict(block_h=16), dict(block_h=16, tiles=2), dict(block_h=16, warps=8)][seed % 4]
    run(problem((5, 3 if seed % 4 < 2 else 66, 2, 33, 1), DTYPES[seed % 3]), seed, **layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nans_arrive(dtype):
    run(NotFinite(4, 4, 2, 33, dtype=dtype, tf32=dtype == FP32))


BROKEN = Problem(4, 12, 2, 33, dtype=BF16)          # has rows in both halves of the 16 of a warp


def caught(**options):
    return harness.caught(BROKEN, BROKEN.wgmma_plan(block_h=8), seeds=4, memory="weak", **options)


@pytest.mark.parametrize("old, new", [
    ('"@!p bra THERE;"', '"bra THERE;"'), ("range(4, count, 2)", "range(4, count // 2, 2)")],
    ids=["no wait", "half a wait"])
def test_a_broken_wait_is_caught(old, new, tmp_path):
    assert not caught()
    with harness.edited("exchange", tmp_path, old, new):
        assert caught()


def test_a_missing_barrier_is_caught():
    """The kernel has one barrier, between the stores of R to shared memory and the time loop."""
    def edit(ptx):
        assert len(re.findall(r"bar\.sync", ptx)) == 1
        return ptx.replace("bar.sync", "// bar.sync")

    assert caught(edit=edit, only=["forward_wgmma"])


def test_a_lost_store_is_caught():
    def edit(ptx):
        return re.sub(r"st\.relaxed[^;]*;", "", ptx, count=1)

    with harness.emulator(edit=edit, only=["forward_wgmma"]), pytest.raises(Deadlock):
        BROKEN.ours(plan=BROKEN.wgmma_plan())


def check_compiled(plan, dtype, flagged=False):
    """The forward time loop has no barrier and no load from shared memory, because wgmma reads R there. Nothing spills,
    except a few registers if there are step flags."""
    kernel = compile_plan(plan, dtype, flagged=flagged)["forward_wgmma"]
    report = read(kernel)
    counts = report.time_loop.counts
    assert counts["HGMMA"] == plan.held // (16 if dtype.itemsize == 2 else 8)
    assert not counts["BAR"] and not counts["LDS"] and not counts["LDSM"] and not counts["STS"]
    assert report.time_loop.spills <= (counts.total() / 50 if flagged or harness.TRITON < (3, 9) else 0)
    assert report.shared == plan.shared_bytes <= H200.shared_memory
    assert kernel.metadata.num_ctas == 1 and kernel.metadata.launch_cooperative_grid


@pytest.mark.parametrize("batch, hidden_size, dtype", [(1024, 512, BF16), (16, 1024, FP32), (4096, 256, FP32)], ids=str)
def test_machine_code(batch, hidden_size, dtype):
    """At H=1024 a wide split plan is chosen instead."""
    limits = dataclasses.replace(H200, cluster=1)
    plan = min((plan for plan in candidates(batch, hidden_size, dtype, limits=limits) if plan.kind == "wgmma"),
               key=lambda plan: step_cycles(plan, limits.multiprocessors, "forward"))
    assert (plan == make_plan(batch, hidden_size, dtype, limits=limits)) == (hidden_size != 1024)
    check_compiled(plan, dtype)
    check_compiled(plan, dtype, flagged=True)


def test_plan():
    plan = make_plan(128, 1024, FP16, limits=H200)
    assert (plan.kind, plan.schedule, plan.gluon, plan.block_b, plan.num_warps) == ("wgmma", "grid", True, 64, 4)
    assert plan.launched <= 132 and plan.held_bytes == 4 * plan.block_h * 1024 * 2 == plan.shared_bytes
    assert plan.backward.kind != "wgmma" and plan.backward.backward is plan.backward
    assert plan.backward == make_plan(128, 1024, FP16, limits=dataclasses.replace(H200, cluster=0))
    assert plan.backward_bytes(64, 8, 2) == plan.backward.backward_bytes(64, 8, 2)
    assert Plan.decode(plan.encode()) == plan
    assert not plan.multiplies_input(1)
    assert "128 KiB of R in the shared memory" in str(plan) and "backward grid" in str(plan)
    # R in fp32 at H=640 does not fit the registers of all multiprocessors. For few rows a wide split plan is cheaper.
    assert make_plan(512, 640, FP32, limits=H200).kind == "wgmma"
    assert make_plan(512, 640, FP32, limits=dataclasses.replace(H200, wgmma=False)).variant == "wide split"
    assert make_plan(16, 640, FP32, limits=H200).variant == "wide split"
    assert make_plan(128, 1024, FP32, limits=H200, tf32=False).kind != "wgmma"
    assert make_plan(128, 1024, FP16, limits=A100).kind != "wgmma"
    assert make_plan(16, 512, BF16, limits=dataclasses.replace(H200, cluster=16)).backward_plan is None


@pytest.mark.parametrize("change, message", [
    (dict(backward_plan=None), "no plan of the same layer's backward loop: None"),
    (dict(keep_every=7), "no plan of the same layer's backward loop"),
    (dict(num_warps=8), "got 64 rows and 8 warps"),
    (dict(block_b=96, num_warps=6), "got 96 rows and 6 warps"),
    (dict(block_h=24), "8, 16, 32 or 64 units, got 24"),
    (dict(r_slices=((0, 1024),)), "512 bytes of a row at a time"),
    (dict(precision="tf32x3"), "no exact fp32"),
    (dict(groups=1), "hold fewer than 128 batch rows"),
    (dict(programs=3), "3 programs of 16 units hold fewer than 1024"),
])
def test_check(change, message):
    plan = make_plan(128, 1024, FP16, limits=H200)
    with pytest.raises(PlanError, match=re.escape(message)):
        check_plan(dataclasses.replace(plan, **change), H200)


def test_limits():
    plan = make_plan(128, 1024, FP16, limits=H200)
    for limits, message in ((dataclasses.replace(H200, wgmma=False), "compute capability 9.0"),
                            (dataclasses.replace(H200, cluster=0), "the wgmma kernels need"),
                            (dataclasses.replace(H200, multiprocessors=100), "128 programs of 16 units wait"),
                            (dataclasses.replace(H200, shared_memory=100000), "131072 bytes of R")):
        with pytest.raises(PlanError, match=message):
            check_plan(plan, limits)


def test_zoneout_has_portable_kernels_only():
    small = Problem(3, 3, 4, 33, dtype=BF16)
    with harness.emulator(), pytest.raises(ValueError, match="no zoneout"):
        small.ours(plan=small.wgmma_plan(), zoneout=(0.1, 0.1))
