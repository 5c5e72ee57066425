"""The backward split kernel: its PTX, executed on CPU tensors, and its machine code."""
import dataclasses
import re

import pytest
import torch
from triton_lstm.kernels.offline import compile_plan

import harness
from bench.machine_code import read
from problems import Problem
from ptx_emulator import Deadlock
from triton_lstm import make_plan
from triton_lstm.plan import H200

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
DTYPES = [FP16, BF16, FP32]
KERNEL = "backward_split"


def problem(shape, dtype, **change):
    return Problem(*shape, dtype=dtype, tf32=dtype == FP32, **change)


def run(problem, seed=0, arch=90, **layout):
    with harness.emulator(arch, seed=seed, memory="weak"):
        problem.check(problem.ours(plan=problem.split_plan(**layout)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, block_h", [((1, 1, 1, 1, 2), 16), ((3, 3, 4, 5, 1), 16), ((3, 17, 4, 33, 2), 16),
                                            ((3, 3, 2, 33, 1), 32)], ids=str)
def test_small(shape, block_h, dtype):
    run(problem(shape, dtype), block_h=block_h)


@pytest.mark.parametrize("shape, dtype, layout", [
    ((2, 3, 2, 100, 1), BF16, dict(block_h=32)),
    ((3, 40, 3, 33, 2), FP16, dict(tiles=2)),           # four tiles: the third has 8 rows, the last none
    ((5, 40, 2, 20, 1), FP32, dict(tiles=3)),
    ((2, 1, 2, 160, 1), BF16, dict()),                  # each warp has 32 target units
], ids=str)
def test_large(shape, dtype, layout):
    run(problem(shape, dtype), **layout)


def test_ampere():
    run(problem((3, 3, 2, 33, 1), BF16), arch=80)


@pytest.mark.parametrize("change", [dict(ragged=True, resets=True), dict(packed=True), dict(bias=False)], ids=str)
@pytest.mark.parametrize("shape, dtype, layout", [
    ((5, 17, 3, 33, 2), FP16, dict(tiles=2)), ((5, 4, 3, 20, 2), FP32, {})], ids=str)
def test_lengths_resets_packed(shape, dtype, layout, change):
    run(problem(shape, dtype, **change), **layout)


@pytest.mark.parametrize("seed", range(6))
def test_weak_memory(seed):
    """With two or three programs, one or two tiles, and chunks of two steps."""
    run(problem((5, 3 if seed % 2 else 18, 2, 33, 1), DTYPES[seed % 3]), seed, **[{}, {}, dict(tiles=2)][seed // 2])


def test_batches_of_shares(tmp_path):
    """Shares of dh are received in several batches, as if many programs shared R."""
    with harness.edited("split_backward", tmp_path, "BATCH: gl.constexpr = 64", "BATCH: gl.constexpr = 2"):
        run(problem((3, 3, 2, 37, 1), BF16))


def test_wide_batches_of_shares(tmp_path):
    """Likewise, with R in shared memory, where a batch has twice as many shares: two of three."""
    with harness.edited("split_backward", tmp_path, "BATCH: gl.constexpr = 64", "BATCH: gl.constexpr = 1"):
        run(problem((3, 3, 2, 37, 1), BF16), room=0)


class LastState(Problem):
    """A problem in which y has no gradient."""

    def results(self, function, dtype=None):
        found = super().results(lambda *inputs: tuple(function(*inputs)[1:]), dtype)
        return {{"y": "h_n", "h_n": "c_n"}.get(name, name): value for name, value in found.items()}

    def tensors(self):
        inputs, gradients = super().tensors()
        return inputs, gradients[1:]


def test_no_dy():
    run(LastState(5, 3, 2, 20, 1, dtype=BF16))


@pytest.mark.parametrize("shape, dtype, room, change", [
    ((3, 3, 2, 144, 1), BF16, 1 << 14, dict(ragged=True, resets=True)),    # half of R in registers
    ((5, 33, 2, 20, 1), FP32, 0, dict(resets=True)),                        # three groups; the last has one row
], ids=str)
def test_wide_step_flags(shape, dtype, room, change):
    p = problem(shape, dtype, **change)
    plan = p.split_plan(room=room)
    assert plan.wide and len(plan.target_slices) == (2 if room else 1)
    run(p, room=room)


BROKEN = Problem(4, 12, 2, 33, dtype=BF16)


def caught(room=None, **options):
    return harness.caught(BROKEN, BROKEN.split_plan(room=room), seeds=3, memory="weak", **options)


@pytest.mark.parametrize("room", [None, 0])
@pytest.mark.parametrize("old, new", [
    ('"@!p bra THERE;"', '"bra THERE;"'), ("for n in range(total):", "for n in range(total - 1):")],
    ids=["no wait", "part of a wait"])
def test_a_broken_wait_is_caught(old, new, room, tmp_path):
    assert not caught(room)
    with harness.edited("exchange", tmp_path, old, new):
        assert caught(room)


@pytest.mark.parametrize("room", [None, 0])
def test_a_missing_barrier_is_caught(room):
    """A step has one barrier, between the stores of da to shared memory and the products."""
    def edit(ptx):
        head, loop, rest = re.split(r"(ldmatrix)", ptx, maxsplit=1)
        head, barrier, tail = head.rpartition("bar.sync")
        assert barrier
        return head + "// bar.sync" + tail + loop + rest

    assert caught(room, edit=edit, only=[KERNEL])


@pytest.mark.parametrize("room", [None, 0])
def test_a_lost_store_is_caught(room):
    def edit(ptx):
        return re.sub(r"st\.relaxed[^;]*;", "", ptx, count=1)

    with harness.emulator(edit=edit, only=[KERNEL]), pytest.raises(Deadlock):
        BROKEN.ours(plan=BROKEN.split_plan(room=room))


def test_a_lost_part_of_r_is_caught():
    """R in shared memory is stored once, before the time loop."""
    def edit(ptx):
        return re.sub(r"st\.shared[^;]*;", "", ptx, count=1)

    assert caught(0, edit=edit, only=[KERNEL])


@pytest.mark.parametrize("batch, hidden_size, dtype, flagged", [
    (16, 1024, BF16, False), (16, 1024, BF16, True), (16, 512, FP32, False), (16, 768, FP16, False)], ids=str)
def test_machine_code(batch, hidden_size, dtype, flagged):
    """R is in registers, nothing spills, and a step has one barrier. (Before Triton 3.9 it has two, because Triton does
    not distinguish the two buffers.)"""
    plan = make_plan(batch, hidden_size, dtype, limits=dataclasses.replace(H200, cluster=1), schedule="grid")
    assert plan.backward.kind == "split"
    report = read(compile_plan(plan, dtype, flagged=flagged)[KERNEL])
    assert report.time_loop.counts["BAR"] == (1 if harness.TRITON >= (3, 9) else 2) and report.time_loop.counts["LDSM"]
    assert report.time_loop.held == plan.held_bytes and report.time_loop.spills == 0
