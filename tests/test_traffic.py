"""Launches and bytes of a call, as ``bench.traffic`` counts them: a change that adds one shows here."""
import dataclasses

import pytest

from bench.traffic import count
from bench.workloads import WORKLOADS

BY_NAME = {workload.name: workload for workload in WORKLOADS}


@pytest.mark.parametrize("name, kept, recomputed", [
    ("pufferlib_breakout", ((6, 7), (253, 420)), ((6, 10), (169, 736))),
    ("r2d2", ((6, 7), (281, 546)), ((6, 10), (189, 903))),
    ("cleanrl_atari", ((7, 9), (11, 26)), ((7, 11), (8, 36))),
    ("crnn_ocr", ((11, 20), (347, 673)), ((11, 30), (245, 1087))),
    ("tft_electricity", ((6, 8), (119, 292)), ((6, 10), (79, 395))),
], ids=lambda value: value if isinstance(value, str) else "")
def test_launches_and_megabytes(name, kept, recomputed):
    """(forward, backward) launches and then megabytes of a training step. All of these keep the gates by default."""
    for keep_gates, (launches, megabytes) in ((None, kept), (False, recomputed)):
        found = count(BY_NAME[name], keep_gates)
        assert tuple(sum(n.values()) for n, _ in found.values()) == launches
        assert tuple(round(moved / 1e6) for _, moved in found.values()) == megabytes


def test_launches_with_lengths():
    """Where rows end is computed once for both layers, and only the first layer masks x."""
    found = count(dataclasses.replace(BY_NAME["crnn_ocr"], sequences="ragged"))
    assert [sum(launches.values()) for launches, _ in found.values()] == [24, 28]


def test_several_chunks_of_programs_that_exchange_h():
    found = count(BY_NAME["tfgridnet_intra"])
    assert [sum(launches.values()) for launches, _ in found.values()] == [37, 34]
    assert [round(moved / 1e6) for _, moved in found.values()] == [1659, 7101]


def test_bytes_by_hand():
    """One layer whose backward has one chunk: the coefficients, the loop, three products and the sum of the loop's
    sums of da.
    The state before is zero."""
    launches, moved = count(BY_NAME["tft_electricity"], True)["backward"]
    workload = BY_NAME["tft_electricity"]
    T, B, I, H = workload.steps, workload.batch, workload.input_size, workload.hidden_size
    units, weights = T * B * H, 4 * H * (I + H + 1)
    assert launches == dict(kernels=2, products=3, operators=3)
    loops = units * (4 * 4 + 4 + 24) + units * (24 + 4 + 16)            # the coefficients, then the loop
    da = 4 * units * 4
    products = 3 * da + 4 * (2 * T * B * I + units)                     # dW, dR, dx
    assert loops + products <= moved <= loops + products + da + 4 * 4 * (weights + 6 * B * H)
