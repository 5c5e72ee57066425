"""``explain``: the numbers of the plan, the reasons against other plans, and nothing about a plan that does not run."""
import dataclasses

import pytest
import torch

import triton_lstm
from triton_lstm.plan import A100, H200, SCHEDULES, Limits, step_cycles

CHIP = Limits(132, 232448)


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def explain(H, x, limits=CHIP, **options):
    with torch.device("meta"):
        return triton_lstm.explain(triton_lstm.LSTM(64, H, **options), x, limits)


def test_grid():
    """All numbers are computed by hand. R has 4 x 512 x 512 x 2 bytes; c is saved before steps 1024 and 2048.

    A step takes 1500 + 512 + 0.3 (16 x 16 x (4 x 512 / 1280 + 0.5) + 16 x 512 x 2 / 32) + 1000 cycles. The
    streamed plan has 64 units in a program and reads R of 320 units in 10 passes over 32 each. Forward takes as long,
    with 64 instead of the second 16, and 10 x 250 more. Backward takes 1400 + 10 x 475 x 2 ** 0.5 + 1000. The text
    has the mean of both."""
    plan = triton_lstm.make_plan(64, 512, torch.bfloat16, limits=CHIP)
    assert (plan.schedule, plan.keep_every) == ("grid", 1024)
    assert explain(512, meta(2300, 64, 64), num_layers=2).splitlines() == [
        "LSTM(64, 512, num_layers=2) on T=2300, B=64 in bfloat16, planned for the given limits: 132 multiprocessors, "
        "227 KiB of shared memory a program",
        f"2 layer(s), each by {plan}",
        "  chosen by arithmetic, by predicted cycles",
        "  R takes 2 MiB a direction",
        "  4 group(s) of programs a direction share the rows, 1 tile(s) of 16 rows each",
        "  layers run one after the other: 256 programs of all layers do not run side by side on 132 multiprocessors",
        "  launches of the time loop a layer: 3 forward, 3 backward",
        "  a step of a layer's time loop: 3327 cycles predicted, 1.68 us at 1980 MHz",
        "  cycles: up to 2.1 times more or less than bounds from machine code; nothing is measured",
        "  training recomputes the gates: 256 KiB saved a layer, 411.3 MiB of workspace in backward; keeping them "
        "would take 862.5 MiB and 283.3 MiB",
        "  not resident: 2097152 bytes of R do not fit the registers of a program, which hold 131072 beside what a "
        "step needs",
        "  not cluster: the cluster kernels need compute capability 8.0, 8.6, 8.7, 8.9, 9.0, 10.0, 10.3, 12.0 or 12.1 "
        "and Triton 3.6",
        "  not streamed: possible, with 8 programs for an R and 1 tile(s) of rows each, 160 KiB of R read from L2 by a "
        "program at every step: 7714 cycles predicted, 3327 as planned"]


@pytest.mark.parametrize("H, schedule", [(128, "resident"), (512, "grid"), (2048, "streamed")])
def test_each_schedule(H, schedule):
    """The text contains str(plan), and a line for each other schedule."""
    text = explain(H, meta(100, 16, 64))
    assert f"1 layer(s), each by {triton_lstm.make_plan(16, H, torch.bfloat16, limits=CHIP)}" in text
    assert f"each by {'portable ' * (schedule == 'resident')}{schedule}: " in text
    for other in SCHEDULES:
        assert (f"\n  not {other}: " in text) == (other != schedule)
    assert ("read from L2 every step" in text) == (schedule == "streamed")
    assert ("; resident is taken wherever it fits" in text) == (schedule == "resident")


def test_one_step():
    """It says so where a call without gradients needs no plan."""
    said = "without gradients this one step is one launch a layer"
    assert said in explain(128, meta(1, 16, 64)) and said in explain(20000, meta(1, 16, 64))
    assert said not in explain(128, meta(2, 16, 64)) and said not in explain(128, meta(1, 16, 64), zoneout=0.1)


def test_bidirectional_fp32_batch_first():
    """Both directions run in one launch, sizes of c and of stored gates are those of both, and the plan is in TF32,
    like nn.LSTM."""
    text = explain(300, meta(20, 3000, 64, dtype=torch.float32), bidirectional=True, batch_first=True)
    plan = triton_lstm.make_plan(20, 300, torch.float32, 2, limits=CHIP)
    assert "T=3000, B=20 in float32" in text and f"{plan}" in text and "x 2 direction(s), tf32" in text
    assert plan.saved_bytes(3000) == 4 * (-(-3000 // plan.keep_every) - 1) * 2 * 20 * 300 > 0
    assert (f"recomputes the gates: {plan.saved_bytes(3000) / 1024:.4g} KiB saved a layer, "
            f"{plan.backward_bytes(3000, 64, 4) / 2**20:.4g} MiB of workspace in backward; keeping them would take "
            f"{3000 * 5 * 20 * 2 * 300 * 4 / 2**20:.4g} MiB and "
            f"{plan.backward_bytes(3000, 64, 4, keep_gates=True) / 2**20:.4g} MiB") in text


def test_projection():
    """R has 2048 x 512 x 2 bytes, although weight_hh is 2048 x 40. Beside gates and c, m is saved: 300 x 64 x 512 x 2
    bytes."""
    text = explain(512, meta(300, 64, 64), proj_size=40)
    plan = triton_lstm.make_plan(64, 512, torch.bfloat16, limits=CHIP)
    assert f"1 layer(s), each by {plan}" in text
    assert "  weight_hh weight_hr, 2048 x 512 in the place of R, takes 2 MiB a direction" in text
    assert f"{300 * 64 * 512 * 2 / 2**20 + 300 * 12 * 64 * 512 / 2**20:.4g} MiB saved a layer, " in text
    assert "recomputing them would take 18.75 MiB and " in text
    layer = triton_lstm.LSTM(4, 1088, proj_size=8)
    layer.plan = triton_lstm.make_plan(2, 1088, torch.bfloat16, limits=CHIP)
    assert f"each by layer.plan, {layer.plan}" in triton_lstm.explain(layer, meta(5, 2, 4), CHIP)


def test_unbatched_and_empty():
    assert "T=9, B=1 in" in explain(70, meta(9, 64), batch_first=True)
    assert "0 forward, 0 backward" in explain(70, meta(0, 3, 64))


def test_a_backward_loop_of_its_own():
    chip = dataclasses.replace(CHIP, cluster=1, wgmma=True)
    text = explain(1024, torch.empty(50, 128, 64, dtype=torch.float16, device="meta"), chip)
    plan = triton_lstm.make_plan(128, 1024, torch.float16, limits=chip)
    assert plan.kind == "wgmma"
    forward, backward = dataclasses.replace(plan, backward_plan=None), plan.backward
    cycles = [step_cycles(forward, 132, "forward"), step_cycles(backward, 132, "backward")]
    for line in (f"1 layer(s), each forward by {forward}", f"  backward by {backward}",
                 "  forward 2 group(s) of programs a direction share the rows, 1 tile(s) of 64 rows each",
                 "  backward 2 group(s) of programs a direction share the rows, 2 tile(s) of 32 rows each",
                 f"  a step of a layer's forward time loop: {cycles[0]:.0f} cycles predicted, "
                 f"{cycles[0] / chip.mhz:.2f} us at {chip.mhz} MHz",
                 f"  a step of a layer's backward time loop: {cycles[1]:.0f} cycles predicted, "
                 f"{cycles[1] / chip.mhz:.2f} us at {chip.mhz} MHz"):
        assert line in text.splitlines(), line


def test_limits():
    """Without limits, and without a GPU, those of an H200 are used. Given limits are used otherwise."""
    layer, x = triton_lstm.LSTM(64, 1024), torch.zeros(5, 16, 64)
    text = triton_lstm.explain(layer, x)
    assert "planned for an H200: 132 multiprocessors" in text
    assert f"{triton_lstm.make_plan(16, 1024, torch.float32, limits=H200).backward}" in text
    text = triton_lstm.explain(layer, x, A100)
    assert "given limits: 108 multiprocessors, 163 KiB" in text
    assert f"{triton_lstm.make_plan(16, 1024, torch.float32, limits=A100)}" in text


def test_torchs_own_lstm():
    """What the kernels do not cover is explained with the text of the layer's warning. nn.LSTM is explained like
    ours."""
    for batch in (1, 64):
        assert explain(1088, meta(5, batch, 64), proj_size=8).endswith(
            "\ntorch's own LSTM computes: proj_size: the product of weight_hh and weight_hr, 4352 x 1088, does not fit "
            "on the chip")
    assert explain(9, meta(5, 3, 64, dtype=torch.float64)).endswith("\ntorch's own LSTM computes: torch.float64")
    tiny = Limits(1, 232448)
    with pytest.raises(triton_lstm.PlanError) as error:
        triton_lstm.make_plan(3, 512, torch.bfloat16, limits=tiny)
    assert explain(512, meta(5, 3, 64), tiny).endswith(f"\ntorch's own LSTM computes: {error.value}")
    theirs, ours = torch.nn.LSTM(64, 70), triton_lstm.LSTM(64, 70)
    assert triton_lstm.explain(theirs, meta(5, 3, 64)) == triton_lstm.explain(ours, meta(5, 3, 64))


def test_a_plan_of_the_layers_own():
    layer = triton_lstm.LSTM(64, 64)
    layer.plan = triton_lstm.make_plan(16, 64, torch.bfloat16, limits=CHIP, schedule="grid", keep_every=7)
    text = triton_lstm.explain(layer, meta(50, 16, 64), CHIP)
    assert f"each by layer.plan, {layer.plan}" in text and "1 forward, 8 backward" in text
    assert "not resident: possible, and chosen where no plan is given" in text
    layer.plan = dataclasses.replace(layer.plan, groups=200)
    assert "\nlayer.plan cannot run: " in triton_lstm.explain(layer, meta(50, 16, 64), CHIP)
    layer.plan = dataclasses.replace(layer.plan, groups=1)
    for other in (meta(50, 15, 64), meta(50, 16, 64, dtype=torch.float32)):
        assert "\nlayer.plan cannot run, it is for another input: grid: " in triton_lstm.explain(layer, other, CHIP)


def test_autocast():
    layer = triton_lstm.LSTM(64, 70)
    with torch.autocast("cpu", torch.bfloat16):
        assert "B=3 in bfloat16" in triton_lstm.explain(layer, torch.zeros(5, 3, 64))


@pytest.mark.parametrize("layer, x, kind, message", [
    (torch.nn.GRU(4, 5), torch.zeros(3, 2, 4), TypeError, "got GRU"),
    (triton_lstm.LSTM(4, 5), [1.], TypeError, "got list"),
    (triton_lstm.LSTM(4, 5), torch.zeros(3, 2, 5), ValueError, r"\(T, B, 4\)"),
    (triton_lstm.LSTM(4, 5), torch.zeros(4), ValueError, r"\(T, B, 4\)"),
], ids=["layer", "input", "width", "dimensions"])
def test_errors(layer, x, kind, message):
    with pytest.raises(kind, match=message):
        triton_lstm.explain(layer, x)


@pytest.mark.gpu
def test_on_a_gpu():
    """With the limits of the device, and the plan that a call takes on it."""
    layer, x = triton_lstm.LSTM(64, 300).cuda(), torch.zeros(5, 3, 64, device="cuda")
    text = triton_lstm.explain(layer, x)
    plan = triton_lstm.op.on_device(3, 300, torch.float32, 1, x.device)[0]
    assert "planned for cuda:0: " in text and f"{plan}" in text
