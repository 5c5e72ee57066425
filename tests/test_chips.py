"""GPUs beside the H100: which kernels run on which, and that the compiled kernels are right there too.

Machine code for them is read in ``test_compiled.py``. ``pytest --arch`` runs the lists of other files for them.
"""
import re
import subprocess
import sys
import warnings
from unittest import mock

import pytest
import torch
from triton_lstm.kernels.offline import compile_plan

import harness
import triton_lstm
import triton_lstm.__main__ as command
from bench import residency
from bench.workloads import WORKLOADS
from problems import Problem
from triton_lstm import check, op
from triton_lstm.plan import (
    A100,
    B200,
    H200,
    RTX_3090,
    RTX_4090,
    RTX_5090,
    Limits,
    PlanError,
    candidates,
    step_cycles,
)
from triton_lstm.plan.cost import UNCERTAINTY
from triton_lstm.plan.limits import AMD, none_on

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
CLUSTERS = pytest.mark.skipif(harness.TRITON < (3, 9), reason="clusters need Triton 3.9")


@pytest.mark.parametrize("capability, version, multiprocessors, cluster, wgmma, multiply_adds", [
    ((8, 0), (3, 6), 108, 1, False, 1024), ((8, 6), (3, 9), 84, 1, False, 512), ((8, 7), (3, 9), 16, 1, False, 1024),
    ((8, 9), (3, 9), 142, 1, False, 512), ((9, 0), (3, 6), 132, 1, True, 1280), ((9, 0), (3, 8), 132, 1, True, 1280),
    ((9, 0), (3, 9), 132, 16, True, 1280), ((9, 0), (3, 10), 114, 8, True, 1280),
    ((10, 0), (3, 8), 148, 1, False, 1280), ((10, 0), (3, 9), 148, 16, False, 1280),
    ((10, 3), (3, 9), 74, 8, False, 1280), ((12, 0), (3, 9), 188, 1, False, 512), ((12, 1), (3, 9), 48, 1, False, 512),
    ((9, 0), (3, 5), 132, 0, False, 1280), ((11, 0), (3, 9), 20, 0, False, 1280)], ids=str)
def test_kernels_of_a_gpu(capability, version, multiprocessors, cluster, wgmma, multiply_adds):
    limits = Limits.like(capability, multiprocessors, 101376, 2000, version)
    assert limits == Limits(multiprocessors, 101376, cluster, 2000, wgmma, multiply_adds)


def test_limits_come_from_the_device():
    device = mock.Mock(major=8, minor=6, multi_processor_count=72, shared_memory_per_block_optin=101376,
                       clock_rate=1695000)
    device.name = "NVIDIA A10"
    with mock.patch.object(torch.cuda, "get_device_properties", lambda of: device):
        assert Limits.of("cuda") == Limits(72, 101376, 1, 1695, False, 512)
        device.name = "NVIDIA GeForce RTX 3060"
        del device.clock_rate
        assert Limits.of("cuda") == Limits(72, 101376, 1, Limits.mhz, False, 256)


def problem(dtype, **change):
    return Problem(**{**dict(T=3, B=3, I=4, H=33, D=2, dtype=dtype, tf32=dtype == FP32), **change})


# Kernels for 10.0, 10.3, 12.0 and 12.1 are the same PTX (test_ptx_is_the_same), so 12.0 has fewer cases here.
@pytest.mark.parametrize("arch, kind, dtype", [
    (86, "resident", FP16), (86, "split", FP32), (86, "wide split", BF16), (86, "portable resident", BF16),
    (86, "grid", FP16), (86, "streamed", FP32), (100, "resident", BF16), (100, "split", FP16),
    (100, "wide split", FP32), (100, "portable resident", FP32), (100, "grid", BF16), (100, "streamed", FP16),
    pytest.param(100, "cluster", BF16, marks=CLUSTERS), (120, "resident", FP32), (120, "split", BF16)], ids=str)
def test_emulated(arch, kind, dtype):
    of = problem(dtype)
    plan = {"resident": lambda: of.cluster_plan(1), "cluster": lambda: of.cluster_plan(2), "split": of.split_plan,
            "wide split": lambda: of.split_plan(room=0), "grid": lambda: of.shared_plan("grid"),
            "streamed": lambda: of.shared_plan("streamed"),
            "portable resident": lambda: of.plan(schedule="resident", keep_every=2)}[kind]()
    with harness.emulator(arch, seed=1, memory="weak"):
        of.check(of.ours(plan=plan))


@pytest.mark.parametrize("kind, archs", [("split", (103, 120, 121)),
                                         pytest.param("cluster", (103,), marks=CLUSTERS)], ids=["split", "cluster"])
def test_ptx_is_the_same(kind, archs):
    """What runs in the emulator for 10.0 is what runs on 10.3, 12.0 and 12.1."""
    def code(arch):     # without what tells the target and the lines of the source
        return {name: re.sub(r"(?m)^\s*(//|\.(target|file|loc)\b).*\n", "", kernel.asm["ptx"].split("\t.section")[0])
                for name, kernel in compile_plan(plan, FP16, arch).items()}
    plan = problem(FP16).split_plan() if kind == "split" else problem(FP16).cluster_plan(2)
    right = code(100)
    assert len(right) == 3 and all("mma.sync" in text for name, text in right.items() if kind in name)
    for arch in archs:
        assert code(arch) == right, arch
    assert code(90) != right


class OnGPU(torch.Tensor):
    """A CPU tensor that says that it is on a GPU."""
    is_cuda = True


@pytest.fixture
def amd():
    """torch for AMD GPUs, which it calls CUDA too."""
    op.no_kernels.cache_clear()
    with mock.patch.object(torch.version, "hip", "6.4"), mock.patch.object(triton_lstm.functional, "_told", set()):
        yield
    op.no_kernels.cache_clear()


def test_amd(amd):
    """torch's own LSTM computes, after one warning of whatever is called first."""
    theirs, ours = torch.nn.LSTM(4, 5, 2), triton_lstm.LSTM(4, 5, 2)
    ours.load_state_dict(theirs.state_dict())
    x, cell, single = torch.randn(3, 2, 4), triton_lstm.LSTMCell(4, 5), triton_lstm.LSTM(4, 5)
    with pytest.warns(UserWarning, match="uses torch's own LSTM: .* do not run on AMD GPUs") as told:
        y, (h_n, c_n) = ours(x.as_subclass(OnGPU))
        y.sum().backward()
        with torch.no_grad():
            single.step(x[0].as_subclass(OnGPU))
            cell(x[0].as_subclass(OnGPU))
        ours(x.as_subclass(OnGPU), lengths=torch.tensor([3, 1]))
        triton_lstm.lstm(x.as_subclass(OnGPU), theirs.weight_ih_l0, theirs.weight_hh_l0)
    assert len(told) == 1
    for got, right in zip((y, h_n, c_n), (lambda y, s: (y, *s))(*theirs(x))):
        assert torch.equal(got.as_subclass(torch.Tensor), right)
    assert "\ntorch's own LSTM computes: the kernels contain" in triton_lstm.explain(ours, x.as_subclass(OnGPU))
    with pytest.raises(PlanError, match="AMD"):
        Limits.of("cuda")


def test_amd_is_told_at_import():
    script = "import torch; torch.version.hip = {}; import triton_lstm"
    said = [subprocess.run([sys.executable, "-c", script.format(hip)], stderr=subprocess.PIPE, text=True, check=True)
            .stderr.splitlines() for hip in ("None", "'6.4'")]
    assert "do not run on AMD GPUs" not in "".join(said[0])
    assert said[1][0] == f"triton_lstm uses torch's own LSTM: {AMD}"


def test_amd_is_told(amd, capsys):
    with mock.patch.object(torch.cuda, "is_available", lambda: True), \
            mock.patch.object(torch.cuda, "get_device_name", lambda device: "MI300X"):
        facts = check.facts()
    assert facts["gpu"] is None
    command.about(facts)
    assert "GPU: MI300X: torch's own LSTM computes, because the kernels contain" in capsys.readouterr().out


def test_older_gpus():
    """Triton's compiler would end the process where it cannot compile for such a GPU."""
    for (major, minor), none in (((7, 5), True), ((7, 0), True), ((8, 0), False), ((13, 0), False)):
        device = mock.Mock(major=major, minor=minor)
        with mock.patch.object(torch.cuda, "get_device_properties", lambda of, device=device: device):
            reason = none_on("cuda")
            assert reason == (f"the kernels need compute capability 8.0, the GPU has {major}.{minor}" if none else None)
            if none:
                op.limits_of.cache_clear()
                assert op.on_device(1, 8, FP16, 1, torch.device("cuda")) == (None, reason)


def test_no_warning_on_a_cpu(amd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        triton_lstm.LSTM(4, 5)(torch.randn(3, 2, 4))


def test_plans_of_other_gpus():
    kinds = lambda batch, H, limits: triton_lstm.make_plan(batch, H, BF16, limits=limits).variant
    assert [kinds(16, 64, limits) for limits in (A100, RTX_3090, B200, RTX_5090)] == ["resident"] * 4
    # The products of one multiprocessor of a GeForce take 4 x 16 x 128 x 128 / 256 = 4096 cycles a step.
    assert [kinds(16, 128, limits) for limits in (A100, RTX_3090, B200, RTX_5090)] == [
        "resident", "split", "resident", "split"]
    assert [kinds(16, 512, limits) for limits in (A100, RTX_3090, RTX_5090)] == ["split"] * 3
    if harness.TRITON >= (3, 9):
        assert kinds(16, 512, B200) == "cluster 16"
    assert kinds(512, 1024, H200) == "wgmma" != kinds(512, 1024, B200)


def test_uncertainty():
    """What ``explain`` says of its cycles: recomputed for the workload whose ratio is the worst, and for another."""
    named = {w.name: w for w in WORKLOADS}
    ratios = residency.model_ratios(residency.read_plans([named["isaac_ppo"], named["nam_audio"]], 80), 80)
    assert len(ratios) == 4 and all(1 / UNCERTAINTY <= ratio <= UNCERTAINTY for ratio in ratios.values()), ratios
    assert min(ratios.values()) == pytest.approx(1 / UNCERTAINTY, rel=0.1)


def test_products_of_a_geforce_take_longer():
    """All kinds take about as long as their products at least; of the two loops of a plan one may be predicted to take
    15 % less (``cost.LOOP_SHARE``)."""
    for dtype, H in ((BF16, 33), (BF16, 128), (BF16, 512), (FP32, 1150), (BF16, 2048)):
        for plan in candidates(300, H, dtype, limits=RTX_4090):
            for loop in ("forward", "backward"):
                slow, fast = (step_cycles(plan, 128, loop, rate) for rate in (256, 1024))
                units = H if plan.kind == "portable resident" or plan.programs == 1 else plan.block_h
                rate = 256 if plan.precision == "native" else 128
                least = plan.tiles * 4 * plan.block_b * min(units, H) * H / rate
                assert slow >= max(0.85 * least, fast), (plan, loop)
