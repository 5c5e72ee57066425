"""The cluster kernels: their PTX, executed on CPU tensors, and their machine code. A cluster of one CTA is a resident
plan."""
import dataclasses
import re
from unittest import mock

import pytest
import torch
from triton_lstm.kernels.launch import BEFORE_LOOPS
from triton_lstm.kernels.offline import compile_plan

import harness
import triton_lstm
from bench.machine_code import read
from problems import EMULATED, Problem
from ptx_emulator import EmulatorError
from triton_lstm import Plan, make_plan
from triton_lstm.plan import A100, H200, RTX_4090
from triton_lstm.plan.plan import FUSED_INPUTS

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
DTYPES = [FP16, BF16, FP32]
CLUSTERS = pytest.mark.skipif(harness.TRITON < (3, 9), reason="clusters need Triton 3.9")
# Barriers in a step of a program of one CTA, by whether there are step flags. Triton before 3.9 inserts a second
# barrier, which is not needed.
BARRIERS = {False: 1 if harness.TRITON >= (3, 9) else 2, True: 2}
ONE_BARRIER = pytest.mark.skipif(BARRIERS[False] == 2, reason="before Triton 3.9 one of two barriers is not needed")


def problem(shape, dtype):
    return Problem(*shape, dtype=dtype, tf32=dtype == FP32)


def run(problem, ctas, arch=90, fused=False, **options):
    """``fused`` says whether the time loop computes the input product too. The plan would decide by the number of
    inputs, which is small in all of these problems."""
    with harness.emulator(arch, **options), mock.patch.object(Plan, "multiplies_input", lambda plan, inputs: fused):
        problem.check(problem.ours(plan=problem.cluster_plan(ctas)))


@pytest.mark.parametrize("dtype, arch", EMULATED, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 2), (3, 3, 4, 5, 1), (3, 17, 4, 33, 2), (2, 3, 4, 64, 1)], ids=str)
def test_one_cta(shape, dtype, arch):
    run(problem(shape, dtype), 1, arch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_cta_on_sm_89(dtype):
    run(problem((2, 3, 4, 33, 2), dtype), 1, 89)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 4, 100, 1), (3, 17, 3, 128, 1)], ids=str)
def test_one_cta_large(shape, dtype, arch):
    run(problem(shape, dtype), 1, arch)


@CLUSTERS
@pytest.mark.parametrize("shape, dtype, ctas", [
    ((1, 1, 1, 1, 2), FP16, 2), ((1, 1, 1, 1, 2), FP32, 4), ((3, 3, 4, 5, 1), BF16, 2), ((3, 3, 4, 5, 1), FP32, 2),
    ((3, 17, 4, 33, 2), BF16, 2), ((3, 17, 4, 33, 2), FP32, 2), ((3, 3, 4, 33, 1), FP16, 4),
    ((2, 3, 4, 33, 1), BF16, 8), ((3, 3, 4, 100, 1), FP16, 2), ((3, 3, 4, 100, 1), BF16, 4),
    ((3, 3, 4, 100, 1), FP32, 8), ((2, 3, 4, 256, 1), BF16, 8), ((2, 3, 2, 300, 1), FP16, 16),
], ids=str)
def test_cluster(shape, dtype, ctas):
    run(problem(shape, dtype), ctas)


@pytest.mark.parametrize("change", [dict(), dict(bias=False), dict(ragged=True, resets=True), dict(packed=True)],
                         ids=str)
@pytest.mark.parametrize("shape, dtype, ctas, arch", [
    ((1, 1, 1, 1, 2), FP16, 1, 80), ((3, 17, 5, 33, 2), BF16, 1, 90), ((4, 3, 16, 64, 1), FP32, 1, 90),
    pytest.param((4, 17, 3, 33, 2), FP32, 2, 90, marks=CLUSTERS),
    pytest.param((3, 3, 16, 100, 1), BF16, 4, 90, marks=CLUSTERS)], ids=str)
def test_few_inputs(shape, dtype, ctas, arch, change):
    """With few inputs x W^T is computed in the time loop."""
    run(dataclasses.replace(problem(shape, dtype), **change), ctas, arch, fused=True)


@pytest.mark.parametrize("hidden_size, dtype", [(64, FP16), (128, BF16), (64, FP32), (128, FP32), (512, BF16)], ids=str)
def test_few_inputs_neither_spill_nor_lose_r(hidden_size, dtype):
    plan = make_plan(16, hidden_size, dtype, limits=H200)
    if plan.schedule not in ("resident", "cluster"):
        pytest.skip("clusters need Triton 3.9")
    with mock.patch.object(Plan, "multiplies_input", lambda plan, inputs: True):
        loop = read(compile_plan(plan, dtype, inputs=FUSED_INPUTS)["forward_cluster"]).time_loop
    assert loop.spills == 0
    assert loop.held >= plan.register_bytes


@CLUSTERS
@pytest.mark.parametrize("dtype, change", [(BF16, dict()), (FP32, dict(ragged=True, resets=True)),
                                           (BF16, dict(packed=True))], ids=str)
def test_gradient_of_the_bias(dtype, change):
    """Its sums of da in the loop, over chunks and tiles of rows, are those of da afterwards but for their order."""
    small = dataclasses.replace(problem((5, 17, 3, 33, 2), dtype), **change)
    plan, found = small.cluster_plan(4), []
    assert plan.backward.adds_up_da and plan.backward.groups == 2
    for adds in (True, False):
        with harness.emulator(), mock.patch.object(Plan, "adds_up_da", adds):
            found.append(small.ours(plan=plan))
    added, summed = (results.pop("db") for results in found)
    torch.testing.assert_close(added, summed)
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@CLUSTERS
def test_gradients_of_a_layers_biases():
    """They have memory of their own, and a layer without biases has none."""
    torch.manual_seed(0)
    for bias in (True, False):
        ours, x = triton_lstm.LSTM(3, 72, bias=bias, bidirectional=True), torch.randn(3, 17, 3)
        exact = torch.nn.LSTM(3, 72, bias=bias, bidirectional=True, dtype=torch.float64)
        exact.load_state_dict(ours.state_dict())
        with harness.emulator(), mock.patch.object(triton_lstm.layer, "runs_kernels", lambda x, dtype: True), \
                mock.patch.object(triton_lstm.op, "tf32_allowed", lambda: True), \
                mock.patch.object(triton_lstm.eager._Layers, "apply", wraps=triton_lstm.eager._Layers.apply) as applied:
            ours(x)[0].square().sum().backward()
        assert applied.call_args[0][0].plan.backward.adds_up_da
        exact(x.double())[0].square().sum().backward()
        for name, parameter in ours.named_parameters():
            want = exact.get_parameter(name).grad
            assert (parameter.grad - want).norm() < 2e-3 * want.norm(), name        # products in TF32
        assert len({p.grad.untyped_storage().data_ptr() for p in ours.parameters()}) == len([*ours.parameters()])


@CLUSTERS
@pytest.mark.parametrize("seed", range(6))
def test_cluster_in_weak_memory(seed):
    run(Problem(5, 3, 2, 40, dtype=BF16), 2 << seed % 2, seed=seed, memory="weak")


@pytest.mark.parametrize("ctas, dtype, arch, flagged", [
    (1, FP16, 80, dict(ragged=True, resets=True)), (1, FP32, 90, dict(ragged=True, resets=True)),
    pytest.param(2, BF16, 90, dict(ragged=True), marks=CLUSTERS),
    pytest.param(2, FP16, 90, dict(resets=True), marks=CLUSTERS),
    pytest.param(4, FP32, 90, dict(ragged=True, resets=True), marks=CLUSTERS)], ids=str)
def test_lengths_and_resets(ctas, dtype, arch, flagged):
    run(Problem(5, 4, 3, 20, 2, dtype=dtype, tf32=dtype == FP32, **flagged), ctas, arch, memory="weak")


@CLUSTERS
def test_r_beyond_the_registers():
    """With half as many registers for R, half of a small R is in shared memory."""
    small = Problem(3, 3, 2, 128, dtype=BF16)
    plan = small.cluster_plan(2)
    with mock.patch.object(Plan, "register_bytes", plan.held_bytes // 2), harness.emulator(seed=2):
        assert all(kernel.metadata.shared >= plan.held_bytes // 2 for name, kernel in compile_plan(plan, BF16).items()
                   if name not in BEFORE_LOOPS)
        small.check(small.ours(plan=plan))


@CLUSTERS
@pytest.mark.parametrize("name, old, new", [
    ("forward", "mbarrier.wait(bars.index(s % 2), s // 2 % 2)", "pass"),
    ("forward", "received.index(s % 2)", "received.index(0)"),
    ("forward", "mbarrier.wait(bars.index(S % 2), S // 2 % 2)", "pass"),
    ("backward", "mbarrier.wait(bars.index(n % 2), n // 2 % 2)", "pass"),
    ("backward", "shares.index(n % 2)", "shares.index(0)"),
], ids=["wait", "one buffer", "last wait", "backward wait", "backward one buffer"])
def test_a_broken_exchange_is_caught(name, old, new, tmp_path):
    broken = Problem(6, 3, 2, 33, dtype=BF16)
    with harness.edited(f"cluster_{name}", tmp_path, old, new):
        assert harness.caught(broken, broken.cluster_plan(2), seeds=8)


def remove(pattern, count=1):
    return lambda ptx: re.sub(pattern, "", ptx, count=count)


@CLUSTERS
@pytest.mark.parametrize("kernel", ["forward_cluster", "backward_cluster"])
@pytest.mark.parametrize("edit", [
    remove(r"barrier\.cluster\.arrive\.aligned;\s+barrier\.cluster\.wait\.aligned;"),
    remove(r"st\.async[^;]*;"),
    lambda ptx: re.sub(r"(expect_tx[^;]*, )(\d+);", lambda m: f"{m[1]}{int(m[2]) // 2};", ptx),
], ids=["start", "store", "bytes"])
def test_a_broken_exchange_in_ptx_is_caught(kernel, edit):
    broken = Problem(4, 3, 2, 33, dtype=BF16)
    assert harness.caught(broken, broken.cluster_plan(2), seeds=8, edit=edit, only=[kernel])


@pytest.mark.parametrize("kernel", ["forward_cluster", "backward_cluster"])
@pytest.mark.parametrize("flagged, which", [(True, 0), (True, 1), pytest.param(False, 0, marks=ONE_BARRIER)])
def test_a_missing_cta_barrier_is_caught(kernel, flagged, which):
    """Removes a barrier of a step; these are the last ones in the PTX."""
    def edit(ptx):
        at = [m.start() for m in re.finditer(r"bar\.sync", ptx)][-1 - which]
        return ptx[:at] + "//" + ptx[at:]

    broken = Problem(4, 3, 2, 33, dtype=BF16, ragged=flagged)
    with harness.emulator(edit=edit, only=[kernel]), pytest.raises(EmulatorError):
        broken.ours(plan=broken.cluster_plan(1))


@ONE_BARRIER
@pytest.mark.parametrize("kernel, buffer", [("forward_cluster", 16 * 64 * 2), ("backward_cluster", 16 * 4 * 64 * 2)])
def test_one_barrier_needs_two_buffers(kernel, buffer):
    def edit(ptx):      # clears the bit in which the addresses of the two buffers differ
        ptx, count = re.subn(rf"(and\.b32 [^;]*, ){buffer};", r"\g<1>0;", ptx)
        assert count == 2
        return ptx

    broken = Problem(4, 3, 2, 33, dtype=BF16)
    with harness.emulator(edit=edit, only=[kernel]), pytest.raises(EmulatorError):
        broken.ours(plan=broken.cluster_plan(1))


@pytest.mark.parametrize("T", [1, 2, 5, 6])
def test_one_cta_in_weak_memory(T):
    """With even and odd numbers of steps, because two buffers take turns."""
    for dtype in DTYPES:
        run(Problem(T, 3, 2, 33, dtype=dtype, tf32=dtype == FP32), 1, seed=T, memory="weak")


def check_compiled(plan, dtype, arch, limits, flagged=False):
    """Nothing spills, R is where the plan says, and a step has no more barriers and loads than it needs."""
    for name, kernel in compile_plan(plan, dtype, arch, flagged).items():
        report = read(kernel)
        if name in ("previous", "write_flags"):         # which have no loop
            assert report.stack == 0
            continue
        if name in BEFORE_LOOPS:
            assert report.time_loop.spills == 0
            continue
        loop = report.time_loop
        threads = 32 * kernel.metadata.num_warps
        assert loop.spills == 0, f"{name}: {loop.counts}"
        assert report.shared <= min(plan.shared_bytes, limits.shared_memory), name
        forward = name == "forward_cluster"
        barriers = BARRIERS[flagged] if plan.programs == 1 else 3 if forward else 4
        assert loop.counts["BAR"] <= barriers, f"{name}: {loop.counts}"
        # Bytes of R in registers. Padding counts only in backward: in forward the compiler knows that it is zero.
        size, units = dtype.itemsize, plan.block_h * plan.programs
        along, across = min(128 // size, units), 4 * plan.block_h if forward else units
        parts = -(-plan.hidden_size // along) if forward else 4 * plan.block_h // along
        in_registers = min(parts, plan.register_bytes // (along * across * size))
        padding = parts * along - plan.hidden_size if forward else 0
        assert loop.held >= (in_registers * along - padding) * across * size, f"{name}: {loop.held} bytes of R"
        # LDSM loads 512 bytes for a warp. Each warp loads the whole first operand. The warps divide the rest of R, and
        # the shares of dh, among themselves.
        shared = (parts - in_registers) * along * across * size + (0 if forward or plan.programs == 1 else 64 * units)
        allowed = (16 * parts * along * size + shared / kernel.metadata.num_warps) / 512
        assert loop.counts["LDSM"] <= max(1, allowed), f"{name}: {loop.counts}"
        if plan.hidden_size * size % 16 == 0 and not flagged:
            own = 8 * plan.block_h // threads       # adjacent units that a thread has, in each of two rows
            narrow, wide = 2 * -(-own * size // 16), 2 * -(-own * 4 // 16)
            # backward: six coefficients, or four gates and c; and dy
            backward = (4 * narrow + wide if plan.derives_coefficients else 6 * wide) + narrow
            assert loop.counts["LDG"] == (4 * narrow if forward else backward), f"{name}: {loop.counts}"


@pytest.mark.parametrize("arch, limits", [(80, A100), (89, RTX_4090), (90, H200)], ids=["sm_80", "sm_89", "sm_90"])
@pytest.mark.parametrize("H, dtype, directions", [(33, BF16, 2), (64, FP32, 1), (128, FP16, 1)], ids=str)
def test_compiled_for_one_cta(H, dtype, directions, arch, limits):
    plan = make_plan(17, H, dtype, directions, limits=limits, schedule="resident")
    assert plan.gluon and plan.programs == 1
    check_compiled(plan, dtype, arch, limits)


@CLUSTERS
@pytest.mark.parametrize("H, dtype, batch", [(128, FP32, 16), (256, BF16, 16), (256, BF16, 4096), (400, FP16, 16),
                                             (512, BF16, 16), (512, FP16, 1024), (512, FP32, 64)], ids=str)
def test_compiled_for_a_cluster(H, dtype, batch):
    plan = make_plan(batch, H, dtype, limits=dataclasses.replace(H200, wgmma=False))
    assert plan.schedule == "cluster"
    check_compiled(plan, dtype, 90, H200)


@CLUSTERS
@pytest.mark.parametrize("H, dtype", [(128, BF16), (256, FP32), (512, BF16)], ids=str)
def test_compiled_for_lengths_and_resets(H, dtype):
    check_compiled(make_plan(64, H, dtype), dtype, 90, H200, flagged=True)


def test_instructions_of_a_step():
    """At H = 128 in bf16. The portable kernels have 730 and 1,250 instructions, and at least 16 barriers."""
    compiled = compile_plan(make_plan(16, 128, BF16), BF16)
    forward, backward = (read(compiled[name]).time_loop for name in ("forward_cluster", "backward_cluster"))
    assert forward.instructions <= 360 and forward.counts["BAR"] <= BARRIERS[False]
    assert backward.instructions <= 360 and backward.counts["BAR"] <= BARRIERS[False]
