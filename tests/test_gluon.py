"""The Gluon kernels: their PTX, executed on CPU tensors, and what the compiler made of them."""
import pytest
import torch

import harness
from problems import Problem

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def run(problem, arch, plan, memory="sc", seed=1):
    with harness.emulator(arch, seed=seed, memory=memory):
        problem.check(problem.ours(plan=plan))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 2), (3, 3, 4, 5, 1), (3, 17, 4, 33, 2), (2, 3, 4, 64, 1), (2, 3, 4, 100, 1)], ids=str)
def test_one_cta(shape, dtype, arch):
    problem = Problem(*shape, dtype=dtype, tf32=dtype == torch.float32)
    run(problem, arch, problem.plan(schedule="resident", keep_every=2))


def cluster_plan(problem, ctas, keep_every=2):
    return problem.plan(schedule="cluster", keep_every=keep_every, limits=dataclasses.replace(H200, multiprocessors=ctas))
