"""The forward split kernel: its PTX, executed on CPU tensors, and its machine code."""
import contextlib
import dataclasses
import re

import pytest
import torch
from triton_lstm.kernels.offline import compile_plan

import harness
from bench import residency
from bench.machine_code import read
from problems import EMULATED, PORTABLE, NotFinite, Problem
from ptx_emulator import Deadlock
from triton_lstm import Plan, PlanError, make_plan
from triton_lstm.plan import A100, H200, RTX_4090, check_plan
from triton_lstm.plan.plan import split_slices

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
DTYPES = [FP16, BF16, FP32]
ARCHS = [80, 90]


def problem(shape, dtype, **change):
    return Problem(*shape, dtype=dtype, tf32=dtype == FP32, **change)


def run(problem, arch=90, seed=0, **layout):
    """``layout`` are arguments of ``Problem.split_plan``."""
    with harness.emulator(arch, seed=seed, memory="weak"):
        problem.check(problem.ours(plan=problem.split_plan(**layout)))


@pytest.mark.parametrize("dtype, arch", EMULATED, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 2), (3, 3, 4, 5, 1), (3, 17, 4, 33, 2), (2, 3, 4, 100, 1)], ids=str)
def test_small(shape, dtype, arch):
    run(problem(shape, dtype), arch)


@pytest.mark.parametrize("shape, dtype, arch, layout", [
    ((2, 40, 3, 100, 1), FP16, 80, dict(block_h=32, tiles=2)),          # four programs in a group, two tiles
    ((2, 40, 3, 100, 1), FP32, 90, dict(block_h=32, tiles=3)),
    ((3, 40, 3, 33, 2), BF16, 90, dict(tiles=2)),                       # the last tile has no rows
    ((2, 3, 2, 300, 1), FP16, 90, dict(block_h=32)),                    # a warp multiplies 64 units of h
    ((2, 3, 2, 520, 1), BF16, 80, dict()),                              # slices of 64 and 32 units, with padding
    ((2, 3, 2, 300, 1), FP32, 80, dict()),                              # slices of 32 and 16 units
], ids=str)
def test_large(shape, dtype, arch, layout):
    run(problem(shape, dtype), arch, **layout)


# ``room``: bytes of R in registers, less than R takes
@pytest.mark.parametrize("shape, dtype, arch, layout, change", [
    ((1, 1, 1, 1, 2), FP16, 90, dict(room=0), {}),
    ((3, 17, 4, 33, 2), BF16, 90, dict(room=0), {}),
    ((3, 17, 4, 33, 2), FP32, 90, dict(room=0), {}),
    ((2, 3, 2, 100, 1), FP16, 80, dict(room=0), {}),
    ((2, 3, 2, 272, 1), BF16, 90, dict(room=1 << 15), {}),              # half of R in registers
    ((2, 3, 2, 272, 1), FP16, 80, dict(room=1 << 15), {}),
    ((2, 3, 2, 272, 1), FP32, 90, dict(room=1 << 15), {}),              # a third
    ((2, 3, 2, 272, 1), FP32, 80, dict(room=1 << 16), {}),
    ((2, 1, 2, 520, 1), BF16, 90, dict(room=1 << 15), {}),              # slices of 32 and 64 units
    ((5, 17, 3, 33, 2), FP16, 90, dict(room=0, tiles=2), dict(ragged=True, resets=True)),
    ((5, 4, 3, 20, 2), FP32, 80, dict(room=0), dict(ragged=True, resets=True)),
    ((5, 17, 3, 33, 2), BF16, 90, dict(room=0, tiles=2), dict(packed=True)),
    ((5, 17, 3, 33, 1), FP32, 90, dict(room=0), dict(packed=True)),
], ids=str)
def test_wide(shape, dtype, arch, layout, change):
    p = problem(shape, dtype, **change)
    assert p.split_plan(**layout).wide
    run(p, arch, **layout)


@pytest.mark.parametrize("change", [dict(ragged=True, resets=True), dict(packed=True), dict(bias=False)], ids=str)
@pytest.mark.parametrize("shape, dtype, arch", [((5, 17, 3, 33, 2), FP16, 90), ((5, 4, 3, 20, 2), FP32, 80)], ids=str)
def test_lengths_resets_packed(shape, dtype, arch, change):
    run(problem(shape, dtype, **change), arch)


@pytest.mark.parametrize("seed", range(12))
def test_weak_memory(seed):
    """With three programs, one or two tiles, and chunks of two steps."""
    run(problem((5, 3 if seed % 2 else 20, 2, 40, 1), DTYPES[seed % 3]), ARCHS[seed // 6], seed, tiles=2 - seed % 2)


@pytest.mark.parametrize("seed", range(6))
def test_wide_weak_memory(seed):
    """Likewise, with R in shared memory."""
    run(problem((5, 3 if seed % 2 else 20, 2, 40, 1), DTYPES[seed % 3]), 90, seed, room=0, tiles=2 - seed % 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nans_arrive(dtype):
    run(NotFinite(4, 4, 2, 33, dtype=dtype, tf32=dtype == FP32))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_wide_nans_arrive(dtype):
    run(NotFinite(4, 4, 2, 33, dtype=dtype, tf32=dtype == FP32), room=0)


BROKEN = Problem(4, 12, 2, 33, dtype=BF16)          # has rows in both halves of a tile


def caught(room=None, **options):
    return harness.caught(BROKEN, BROKEN.split_plan(room=room), seeds=4, memory="weak", **options)


@pytest.mark.parametrize("room", [None, 0])
@pytest.mark.parametrize("wait, broken", [("@!", ""), ("vote.sync.any", "vote.sync.all")],
                         ids=["no wait", "a wait for any"])
def test_a_broken_wait_is_caught(wait, broken, room):
    """Edits the loop of a wait in the PTX. Threads of a warp wait for h of two programs."""
    def edit(ptx):
        start, end = ptx.index("LOOK:"), ptx.index("bra LOOK")
        assert wait in ptx[start:end]
        return ptx[:start] + ptx[start:end].replace(wait, broken) + ptx[end:]

    assert not caught(room)
    assert caught(room, edit=edit, only=["forward_split"])


@pytest.mark.parametrize("which, room", [(-1, None), (-2, None), (-1, 0), (-2, 0)])
def test_a_missing_barrier_is_caught(which, room):
    """A step has two barriers: before the products of the warps are added up, and before the next products overwrite
    them."""
    def edit(ptx):
        at = [m.start() for m in re.finditer(r"bar\.sync", ptx)][which]
        return ptx[:at] + "//" + ptx[at:]

    assert caught(room, edit=edit, only=["forward_split"])


@pytest.mark.parametrize("room", [None, 0])
def test_a_lost_store_is_caught(room):
    def edit(ptx):
        return re.sub(r"st\.relaxed[^;]*;", "", ptx, count=1)

    with harness.emulator(edit=edit, only=["forward_split"]), pytest.raises(Deadlock):
        BROKEN.ours(plan=BROKEN.split_plan(room=room))


def test_a_lost_part_of_r_is_caught():
    """R in shared memory is stored once, before the time loop."""
    def edit(ptx):
        return re.sub(r"st\.shared[^;]*;", "", ptx, count=1)

    assert caught(0, edit=edit, only=["forward_split"])


def check_compiled(plan, dtype, arch=90, flagged=False):
    """In both time loops R is in registers, in a wide plan a part of it, and a step has at most two barriers. Nothing
    spills. Only a wide plan may spill one word, because its R fills the registers. R in shared memory is read once a
    step, 512 bytes by a warp at a time. In backward every warp reads the four da of 16 rows likewise."""
    kernels = compile_plan(plan, dtype, arch, flagged=flagged)
    for name in ("forward_split", *["backward_split"] * (plan.backward.kind == "split")):
        report = read(kernels[name])
        loop = report.time_loop
        assert loop.spills <= (plan.variant == "wide split") and loop.counts["BAR"] <= 2, name
        # backward has less padding
        least = min(plan.register_bytes, 4 * plan.block_h * plan.hidden_size * dtype.itemsize)
        assert loop.held >= (plan.register_bytes if "forward" in name else least), name
        assert report.shared <= plan.shared_bytes
        target = 4 * plan.block_h * dtype.itemsize              # bytes of R, for one target
        held = target * sum(width for _, width in plan.target_slices) if "backward" in name else plan.held_bytes
        first = 16 * target if "backward" in name else 0
        assert loop.counts["LDSM"] == max(held - plan.register_room, 0) / (512 * plan.num_warps) + first / 512, name
        assert kernels[name].metadata.num_ctas == 1 and kernels[name].metadata.launch_cooperative_grid


@pytest.mark.parametrize("arch, hidden_size, dtype", [
    *[(arch, *of) for arch in (80, 90) for of in ((256, BF16), (640, FP16), (1024, BF16), (512, FP32), (1150, BF16))],
    (89, 640, FP16), (89, 512, FP32)], ids=str)
def test_machine_code(hidden_size, dtype, arch):
    limits = {80: A100, 89: RTX_4090, 90: dataclasses.replace(H200, cluster=1)}[arch]
    plan = make_plan(16, hidden_size, dtype, limits=limits)
    assert plan.kind == "split"
    check_compiled(plan, dtype, arch)
    if arch == 90:
        check_compiled(plan, dtype, arch, flagged=True)


@pytest.mark.parametrize("batch, hidden_size, dtype", [(100, 2048, BF16), (80, 1150, FP32)], ids=str)
def test_wide_plans(batch, hidden_size, dtype):
    """R lies in registers and shared memory. The bounds of both loops are lower than those of the streamed plans."""
    plan, streamed = (make_plan(batch, hidden_size, dtype, limits=limits) for limits in (H200, PORTABLE))
    assert plan.variant == plan.backward.variant == "wide split" and streamed.kind == "streamed"
    assert plan.register_bytes == 96 * 1024 and plan.shared_bytes <= H200.shared_memory
    assert plan.held_bytes == 4 * 16 * plan.held * dtype.itemsize and plan.held >= hidden_size
    assert "of R in the registers and shared memory of each program" in str(plan)
    assert Plan.decode(plan.encode()) == plan
    check_compiled(plan, dtype)
    check_compiled(plan, dtype, flagged=True)
    ours, others = compile_plan(plan, dtype), compile_plan(streamed, dtype)
    for loop, of in (("forward", streamed), ("backward", streamed.backward)):
        bound = residency.step_cycles(plan, read(ours[f"{loop}_split"]))
        assert bound < residency.step_cycles(of, read(others[f"{loop}_grid"])), loop


def test_instructions_of_a_step():
    """At H=1024 in bf16 there are 64 programs of 16 units, and each of the eight warps of a program has 64 products."""
    plan = make_plan(16, 1024, BF16, limits=H200)
    loop = read(compile_plan(plan, BF16)["forward_split"]).time_loop
    assert (plan.programs, plan.block_h, loop.counts["HMMA"]) == (64, 16, 64)
    assert loop.instructions <= 500


def test_plan():
    plan = make_plan(16, 1024, BF16, limits=H200)
    assert (plan.kind, plan.schedule, plan.gluon, plan.num_warps) == ("split", "grid", True, 8)
    assert plan.r_slices == ((0, 128),) and plan.held == 1024 and plan.looks[1] == (128, 128) and len(plan.looks) == 8
    assert plan.held_bytes == plan.register_bytes == 4 * 16 * 1024 * 2 and plan.shared_bytes == 8 * 16 * 64 * 4
    assert plan.backward is plan and Plan.decode(plan.encode()) == plan and not plan.multiplies_input(1)
    assert plan.target_slices == ((0, 512), (512, 512))
    padded = make_plan(16, 600, FP16, limits=H200)
    assert padded.kind == "split" and padded.r_slices == ((0, 64), (64, 32))
    assert padded.held == 768 and padded.padded_programs == 48
    assert padded.target_slices == ((0, 512), (512, 128))
    assert "128 KiB of R in the registers" in str(plan) and "split it among their warps" in str(plan)
    # Clusters are chosen where they fit, because they exchange faster. Exact fp32 has only portable kernels.
    assert make_plan(16, 512, BF16, limits=dataclasses.replace(H200, cluster=16)).schedule == "cluster"
    assert make_plan(16, 512, BF16, limits=A100).kind == "split"
    assert not make_plan(16, 256, FP32, limits=H200, tf32=False).gluon


@pytest.mark.parametrize("change, message", [
    (dict(num_warps=4, r_slices=((0, 256),)), "got 4 and 16"), (dict(block_h=64), "got 8 and 64"),
    (dict(r_slices=((0, 64), (64, 16), (80, 64))), "four threads take 64 bytes"),
    (dict(block_h=32), "262144 bytes of R do not fit the registers"),
    (dict(register_room=1 << 18), "registers hold 131072 bytes of R at most, got 262144"),
    (dict(register_room=1 << 16), "slices of R in registers come first"),
    (dict(register_room=0, r_slices=split_slices(1024, "native", 16, 0), hidden_size=1000, programs=63), None),
    (dict(hidden_size=2200, programs=138, r_slices=split_slices(2200, "native", 16, 98304), register_room=98304),
     "138 programs of 16 units wait for each other"),
])
def test_check(change, message):
    plan = dataclasses.replace(make_plan(16, 1024, BF16, limits=H200), **change)
    with pytest.raises(PlanError, match=message) if message else contextlib.nullcontext():
        check_plan(plan, H200)
