"""Reads from machine code what the compiler made of the kernels: nothing spills, and R stays where the plan says."""
import re

import pytest
import torch
from triton_lstm.kernels.launch import BEFORE_LOOPS
from triton_lstm.kernels.offline import compile_plan

from bench.correctness import dtype_of
from bench.machine_code import read
from bench.workloads import WORKLOADS
from problems import PORTABLE
from test_cluster import check_compiled as check_cluster
from test_split import check_compiled as check_split
from test_wgmma import check_compiled as check_wgmma
from triton_lstm import make_plan
from triton_lstm.plan import A100, B200, H200, RTX_3090, RTX_4090, RTX_5090

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
OPERAND = {"native": 2, "tf32": 4, "tf32x3": 8}        # bytes of an element of a product's operand, in registers


def check(plan, dtype, arch, limits):
    if plan.kind == "wgmma":
        check_wgmma(plan, dtype)
        check(plan.backward, dtype, arch, limits)
        return
    if plan.kind == "split":
        check_split(plan, dtype, arch)
        return
    if plan.gluon:
        check_cluster(plan, dtype, arch, limits)
        return
    for name, kernel in compile_plan(plan, dtype, arch).items():
        report = read(kernel)
        loop = report.time_loop
        # Streamed plans of 32 rows may spill a few registers: 7 with Triton 3.9, 11 with Triton 3.6. With smaller
        # blocks of R they would spill none, but take a quarter longer (H=1150 and 2048).
        few = 12 if plan.schedule == "streamed" and plan.block_b == 32 else 0
        # Where 64 registers receive shares of dh and 128 hold R, seven to ten registers with addresses spill. Receiving
        # the shares in two batches would avoid that, but cost another trip through L2.
        if name == "backward_grid" and plan.programs * plan.block_b * plan.block_h >= 1 << 14:
            few = 12
        assert loop.spills <= few, f"{name}: {loop.counts}"
        assert report.shared <= limits.shared_memory, name
        if name in BEFORE_LOOPS:
            continue
        assert loop.counts["HMMA"] > 0, name
        if plan.schedule != "streamed":
            assert loop.held >= plan.held_bytes, f"{name}: {loop.held} of {plan.held_bytes} bytes of R in registers"
        # LDSM loads operands of products from shared memory, 512 bytes for a warp. Every warp loads the whole first
        # operand (h or the four da of 16 or 32 rows). Conversions between layouts may add 14 in the resident kernels
        # and 2 in the grid kernels. That is fewer than loads of R would add, which are at least 16 and 4.
        first = plan.held if "forward" in name else 4 * (plan.held if plan.schedule == "resident" else plan.block_h)
        if plan.schedule != "streamed":
            slack = 14 if plan.schedule == "resident" else 2
            allowed = first * OPERAND[plan.precision] * plan.block_b / 512 + slack
            assert loop.counts["LDSM"] <= allowed, f"{name}: {loop.counts}"
        # Loads from device memory, if rows are aligned to 16 bytes, which is the most that a thread loads at once.
        if plan.schedule == "grid" and plan.hidden_size * dtype.itemsize % 16 == 0:
            threads = 32 * plan.num_warps
            tile = -(-plan.block_b * plan.block_h // threads)         # loads of a tile of the program's own units
            if name == "forward_grid":                      # pre-activations of four gates, c, and h
                loads = 5 * tile + sum(-(-plan.block_b * width * dtype.itemsize // (16 * threads))
                                       for _, width in plan.r_slices)
            else:                                           # coefficients, dy, dc, and dh or its shares
                loads = (9 + plan.programs) * tile
            assert loop.counts["LDG"] <= loads + 1, f"{name}: {loop.counts}"


def workload_plans():
    """The plans of the workloads in their own type, except those that compile to the same kernels as an earlier one."""
    plans = {}
    for w in WORKLOADS:
        for limits in (H200, PORTABLE):
            plan = make_plan(w.batch, w.hidden_size, dtype_of(w.dtype), w.directions, limits=limits)
            key = (w.hidden_size, w.dtype, plan.kind, plan.block_h)         # directions change only strides
            plans.setdefault(key, pytest.param(plan, dtype_of(w.dtype), id=f"{w.name}-{plan.kind}"))
    return list(plans.values())


@pytest.mark.parametrize("plan, dtype", workload_plans())
def test_every_workload(plan, dtype):
    check(plan, dtype, 90, H200)


@pytest.mark.parametrize("hidden_size, dtype", [(128, BF16), (128, FP16), (256, BF16), (1024, FP16), (1150, BF16)],
                         ids=str)
def test_other_types(hidden_size, dtype):
    for limits in (H200, PORTABLE):
        check(make_plan(64, hidden_size, dtype, limits=limits), dtype, 90, limits)


@pytest.mark.parametrize("hidden_size, batch", [(33, 16), (64, 16), (100, 1024), (256, 16), (512, 64)])
def test_exact_fp32(hidden_size, batch):
    check(make_plan(batch, hidden_size, FP32, tf32=False), FP32, 90, H200)


SAMPLE = [(64, BF16, 1), (128, FP16, 1), (100, FP32, 2), (512, BF16, 1), (640, FP32, 1), (1024, BF16, 2)]


LIMITS = {80: A100, 86: RTX_3090, 89: RTX_4090, 100: B200, 120: RTX_5090}


@pytest.mark.parametrize("arch, hidden_size, dtype, directions", [
    (arch, *layer) for arch, sample in ((80, SAMPLE), (86, SAMPLE[2::3]), (89, SAMPLE[::2]), (100, SAMPLE[1::2]),
                                           (120, SAMPLE[1::3])) for layer in sample],
                         ids=str)
def test_sample_of_other_architectures(arch, hidden_size, dtype, directions):
    limits = LIMITS[arch]
    check(make_plan(16, hidden_size, dtype, directions, limits=limits), dtype, arch, limits)


def test_a_new_length_or_batch_compiles_nothing():
    """With other T and B, but the same tiling, a plan launches the same kernels."""
    from triton_lstm.kernels import offline, sequence
    found = []

    def collect(kernel, plan, grid, *args, waits, **constants):
        found.append((kernel.__name__, offline.compile_launch(kernel, plan, args, waits, constants, 90)[0].hash))

    for T, B in ((1, 1), (2, 3), (16, 16), (17, 5), (64, 8)):
        for H, schedule in ((32, "resident"), (160, "grid")):
            plan = make_plan(B, H, BF16, schedule=schedule, keep_every=64)
            tensor = lambda *shape: torch.empty(shape, dtype=BF16, device="meta")
            x, w, r, state = tensor(T, B, 8), tensor(1, 4 * H, 8), tensor(1, 4 * H, H), tensor(1, B, H)
            y, h, c, *kept = sequence.forward(x, w, r, None, state, state, None, plan, True, launcher=collect)
            sequence.backward(y, h, c, x, w, r, None, state, state, None, y, *kept, plan, [True] * 6, launcher=collect)
    assert len(set(found)) == 3 * 2, sorted(set(found))


@pytest.mark.parametrize("flagged", [False, True])
@pytest.mark.parametrize("batch, hidden_size, dtype", [(16, 256, BF16), (64, 512, FP32), (128, 1024, FP16),
                                                       (16, 33, BF16)], ids=str)
def test_state_in_memory_stays_with_its_thread(batch, hidden_size, dtype, flagged):
    """Programs that share R keep c and dc in memory from step to step, with no barrier between store and load. So the
    thread that stores an element must load it: both have the same pointers in the same layout."""
    plan = make_plan(batch, hidden_size, dtype, limits=PORTABLE, schedule="grid")
    kernels = compile_plan(plan, dtype, 90, flagged=flagged)
    for name, state in (("forward_grid", "c_prev"), ("backward_grid", "dc")):
        text = kernels[name].asm["ttgir"]
        loaded = re.findall(rf"%{state}_\d+ = tt\.load (%{state}_\d+)", text)
        assert len(loaded) == 1 and len(re.findall(rf"tt\.store {loaded[0]},", text)) == 1, name
