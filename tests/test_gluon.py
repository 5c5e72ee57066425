"""The Gluon kernels: their PTX, executed on CPU tensors, and what the compiler made of them."""
import contextlib
import dataclasses
import re

import pytest
import torch
from triton_lstm.kernels.ahead import compile_plan

import harness
from bench.machine_code import read
from problems import Problem, error
from ptx_emulator import EmulatorError
from triton_lstm import PlanError, make_plan
from triton_lstm.plan import A100, H200, HELD_BYTES, NUM_WARPS, Limits

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
DTYPES = [FP16, BF16, FP32]
CLUSTERS = pytest.mark.skipif(harness.TRITON < (3, 9), reason="clusters need Triton 3.9")


def problem(shape, dtype):
    return Problem(*shape, dtype=dtype, tf32=dtype == FP32)


def run(problem, ctas, arch=90, **options):
    with harness.emulator(arch, **options):
        problem.check(problem.ours(plan=problem.gluon_plan(ctas)))


@pytest.mark.parametrize("arch", [80, 89, 90])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 2), (3, 3, 4, 5, 1), (3, 17, 4, 33, 2), (2, 3, 4, 64, 1)], ids=str)
def test_one_cta(shape, dtype, arch):
    run(problem(shape, dtype), 1, arch)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 4, 100, 1), (3, 17, 3, 128, 1)], ids=str)
def test_one_cta_large(shape, dtype, arch):
    run(problem(shape, dtype), 1, arch)


@CLUSTERS
@pytest.mark.parametrize("ctas", [2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 2), (3, 3, 4, 5, 1), (4, 17, 4, 33, 2), (3, 3, 4, 100, 1)], ids=str)
def test_cluster(shape, dtype, ctas):
    run(problem(shape, dtype), ctas, seed=ctas, memory="weak")
