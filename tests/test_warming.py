"""``warm``: which kernels it compiles, and that launches find them."""
import dataclasses
from unittest import mock

import pytest
import torch

import triton_lstm
from triton_lstm import make_plan, warming
from triton_lstm.plan import H200

GPU = torch.device("cuda", 0)


def jobs(layers, batch=16, dtype=None, lengths=False):
    with mock.patch.object(triton_lstm.op, "limits_of", lambda device: H200), \
            mock.patch.object(triton_lstm.op, "avoided", lambda device: frozenset()):
        return warming.jobs_of(layers, batch, dtype, GPU, lengths)


def test_each_plan_once():
    """Widths that the time loop does not multiply make no kernels of their own, equal layers neither. Kernels that keep
    the gates and kernels that do not are both compiled, unless a layer never keeps them."""
    deep = triton_lstm.LSTM(100, 64, num_layers=3, bidirectional=True).bfloat16()
    few = triton_lstm.LSTM(8, 64).bfloat16()
    found = jobs([deep, few, triton_lstm.LSTM(200, 64, bidirectional=True).bfloat16()])
    assert found == [
        (plan, torch.bfloat16, dict(flagged=False, zoneout=None, inputs=inputs, keep_gates=keep_gates))
        for plan, inputs in ((make_plan(16, 64, torch.bfloat16, 2), 64), (make_plan(16, 64, torch.bfloat16), 8))
        for keep_gates in (False, True)]
    assert found[2][0].multiplies_input(8)
    few.keep_gates = False
    assert jobs([few]) == found[2:3]
    few.keep_gates = True
    assert jobs([few]) == found[2:]


def test_options_reach_the_compiler():
    zoned, own = triton_lstm.LSTM(100, 64, zoneout=0.1), triton_lstm.LSTM(100, 64)
    own.plan = dataclasses.replace(make_plan(16, 64, torch.float16), keep_every=7)
    found = jobs([zoned, own], dtype=torch.float16, lengths=True)
    (plan, dtype, options), _, (of_own, _, _) = found       # calls with a plan of their own keep no gates
    assert dtype == torch.float16
    assert options == dict(flagged=True, zoneout="drawn", inputs=64, keep_gates=False)
    assert plan == make_plan(16, 64, torch.float16, zoneout=True) and of_own == own.plan
    own.keep_gates = True
    assert [options["keep_gates"] for _, _, options in jobs([own])] == [False, True]
    assert jobs([triton_lstm.LSTM(3, 4).double(), triton_lstm.LSTM(3, 20000, device="meta")]) == []  # torch computes


def test_warm():
    """It compiles for the layers' device, and tells of what fails."""
    model = torch.nn.Sequential(triton_lstm.LSTM(100, 64), torch.nn.Linear(64, 3))
    compiled = []

    def compile_apart(jobs, arch, seconds):
        compiled.append((jobs, arch, seconds))
        yield jobs[0], OSError("no compiler")
    weight = mock.Mock(device=GPU, dtype=torch.float32)
    with pytest.raises(ValueError, match="layers are on cpu"):
        triton_lstm.warm(model, 16)
    del model[0]._parameters["weight_hh_l0"]
    model[0].__dict__["weight_hh_l0"] = weight
    plan = make_plan(16, 64, torch.float32)
    with mock.patch.object(warming, "compile_apart", compile_apart), \
            mock.patch.object(torch.cuda, "get_device_capability", lambda device: (9, 0)), \
            mock.patch.object(triton_lstm.op, "limits_of", lambda device: H200), \
            mock.patch.object(triton_lstm.op, "avoided", lambda device: frozenset()), \
            mock.patch.object(triton_lstm.op, "no_kernels", lambda device: None), \
            pytest.warns(UserWarning, match="could not compile .*no compiler"):
        assert triton_lstm.warm(model, 16, seconds=5.) == [plan]
    options = dict(flagged=False, zoneout=None, inputs=64)
    assert compiled == [([(plan, torch.float32, dict(options, keep_gates=kept)) for kept in (False, True)], 90, 5.)]
    with pytest.raises(ValueError, match="no triton_lstm.LSTM in Linear"):
        triton_lstm.warm(torch.nn.Linear(2, 3), 16)


@pytest.mark.gpu
def test_the_first_call_finds_what_was_compiled():
    """Triton's cache has all kernels: the first call compiles none."""
    import triton
    layer = triton_lstm.LSTM(24, 72).cuda()
    triton_lstm.warm(layer, 5)
    hits = []
    x = torch.randn(3, 5, 24, device="cuda", requires_grad=True)
    with mock.patch.object(triton.knobs.compilation, "listener",
                           lambda src, metadata, metadata_group, times, cache_hit: hits.append(cache_hit)):
        layer(x)[0].sum().backward()
    assert hits and all(hits)
