"""The PTX of every portable kernel, executed on CPU tensors: what the compiler made of the kernels is still right.

Races, accesses outside a buffer and deadlocks raise. Kernels for sm_80 and sm_90 have different instructions.
"""
import dataclasses

import pytest
import torch

import harness
from problems import EMULATED, Problem

ARCHS = [80, 90]


def run(problem, arch, plan, memory="sc"):
    with harness.emulator(arch, seed=1, memory=memory):
        problem.check(problem.ours(plan=plan))


@pytest.mark.parametrize("dtype, arch", EMULATED, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 2), (3, 3, 4, 5, 1), (3, 17, 4, 33, 2), (2, 3, 4, 64, 1)], ids=str)
def test_resident(shape, dtype, arch):
    problem = Problem(*shape, dtype=dtype)
    run(problem, arch, problem.plan(schedule="resident", keep_every=2))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("shape", [(3, 3, 4, 96, 1), (2, 3, 4, 100, 1)], ids=str)
def test_resident_large(shape, arch):
    problem = Problem(*shape, dtype=torch.bfloat16)
    run(problem, arch, problem.plan(schedule="resident", keep_every=2))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("schedule", ["resident", "grid", "streamed"])
def test_tf32(schedule, arch):
    problem = Problem(3, 3, 4, 40, D=2, tf32=True)
    plan = problem.plan(schedule=schedule, keep_every=2) if schedule == "resident" else problem.shared_plan(schedule)
    run(problem, arch, plan)


@pytest.mark.parametrize("dtype, arch", EMULATED, ids=str)
@pytest.mark.parametrize("shape, schedule", [
    ((3, 1, 1, 1, 2), "grid"), ((2, 3, 4, 5, 1), "grid"), ((3, 17, 4, 33, 2), "grid"), ((2, 3, 2, 160, 1), "grid"),
    ((3, 17, 4, 33, 2), "streamed"), ((2, 3, 4, 100, 1), "streamed")], ids=str)
def test_shared(shape, schedule, dtype, arch):
    problem = Problem(*shape, dtype=dtype)
    run(problem, arch, problem.shared_plan(schedule))


@pytest.mark.parametrize("H, block_h, dtype", [(60, 64, torch.float32), (60, 32, torch.float32),
                                               (100, 64, torch.bfloat16), (100, 32, torch.bfloat16)], ids=str)
def test_wide_programs(H, block_h, dtype):
    """As in plans for large batches, programs have more units and groups have several tiles."""
    problem = Problem(2, 33, 3, H, dtype=dtype)
    run(problem, 90, dataclasses.replace(problem.shared_plan("grid"), block_h=block_h, programs=-(-H // block_h),
                                         groups=1, tiles=3))


@pytest.mark.parametrize("shape", [(3, 3, 4, 33, 1)], ids=str)
@pytest.mark.parametrize("schedule", ["grid", "streamed"])
def test_fp32_in_weak_memory(shape, schedule):
    problem = Problem(*shape)
    run(problem, 90, problem.shared_plan(schedule), memory="weak")
