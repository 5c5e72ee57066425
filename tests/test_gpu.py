"""The kernels on a CUDA device: results, as in the tests without one, and what only a device can show."""
import dataclasses
import shutil
import subprocess
import sys

import pytest
import torch

import triton_lstm
from bench import floors, instrument, providers, sweep
from bench.rows import BASELINES, CUDNN_GRAPH, OURS
from bench.workloads import Case
from problems import BUDGET, Problem, error, floor
from triton_lstm import replay
from triton_lstm.plan import Limits, check_plan, make_plan

pytestmark = [pytest.mark.gpu,
              pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk")]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [  # T, B, I, H, D
    (1, 1, 1, 1, 1), (1, 3, 4, 5, 2), (3, 17, 1, 1, 2), (7, 3, 5, 5, 1), (40, 17, 6, 33, 1), (50, 3, 6, 33, 2),
    (30, 3, 9, 100, 1), (20, 17, 4, 100, 2), (64, 64, 128, 128, 1), (33, 16, 96, 96, 2), (70, 3, 40, 192, 2),
    (100, 40, 256, 256, 1), (64, 100, 64, 400, 1), (30, 300, 32, 512, 1), (20, 16, 640, 640, 2), (40, 64, 128, 1024, 1),
    (10, 17, 64, 1150, 1), (8, 5, 64, 2048, 1),
]


@pytest.fixture(params=[True, False], ids=["tf32", "ieee"])
def tf32(request):
    """torch's switch for TF32 in nn.LSTM, on and off."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = request.param
    yield request.param
    torch.backends.cudnn.allow_tf32 = before


def cuda(*shape, dtype=torch.float32, tf32=False, **options):
    return Problem(*shape, dtype=dtype, tf32=tf32, device="cuda", **options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp32(shape, tf32):
    problem = cuda(*shape, tf32=tf32)
    problem.check(problem.ours())


@pytest.mark.gpu_first
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_16_bit(shape, dtype):
    problem = cuda(*shape, dtype=dtype)
    problem.check(problem.ours())


@pytest.mark.gpu_first
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("schedule", ["resident", "grid", "streamed"])
def test_every_schedule(schedule, dtype):
    problem = cuda(50, 70, 30, 60, 2, dtype=dtype, tf32=torch.backends.cudnn.allow_tf32)
    limits = dataclasses.replace(Limits.of("cuda"), cluster=0)
    plan = (problem.plan(schedule="resident", limits=limits, keep_every=16) if schedule == "resident" else
            problem.shared_plan(schedule, limits.multiprocessors, keep_every=16))
    problem.check(problem.ours(plan=plan))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("flagged", [dict(ragged=True), dict(resets=True), dict(ragged=True, resets=True),
                                   dict(packed=True)], ids=" ".join)
@pytest.mark.parametrize("shape", [(20, 5, 4, 33, 2), (12, 17, 6, 100, 1), (10, 6, 8, 300, 2), (6, 5, 8, 1150, 1)],
                         ids=str)
def test_lengths_and_resets(shape, flagged, dtype):
    problem = cuda(*shape, dtype=dtype, tf32=torch.backends.cudnn.allow_tf32, **flagged)
    problem.check(problem.ours(keep_every=4))


def test_packed_sequences_do_not_synchronise():
    layer = triton_lstm.LSTM(8, 64, 2, bidirectional=True).cuda()
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(n, 8) for n in (40, 30, 30, 2)]).to("cuda")
    for mode in ("default", "error"):           # the first call compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            layer(packed)[0].data.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("flagged", [{}, dict(packed=True), dict(ragged=True, resets=True)], ids=" ".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_of_32_rows(dtype, flagged):
    problem = cuda(10, 150, 8, 100, 2, dtype=dtype, tf32=torch.backends.cudnn.allow_tf32, **flagged)
    plan = dataclasses.replace(problem.shared_plan("grid"), groups=2, tiles=3, block_b=32)
    problem.check(problem.ours(plan=plan))


def cluster_plan(problem, ctas):
    """The problem's plan for the cluster kernels. Skips the test if clusters of ``ctas`` CTAs do not run here."""
    plan, limits = problem.cluster_plan(ctas, keep_every=16), Limits.of("cuda")
    if ctas > limits.cluster:
        pytest.skip(f"clusters of {limits.cluster} CTAs at most")
    check_plan(plan, limits)
    return plan


@pytest.mark.gpu_first
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, ctas", [
    ((1, 1, 1, 1, 2), 1), ((40, 17, 6, 33, 2), 1), ((64, 64, 32, 64, 1), 1), ((1, 1, 1, 1, 2), 2), ((3, 3, 4, 5, 1), 2),
    ((40, 17, 6, 33, 2), 2), ((50, 3, 6, 100, 2), 2), ((50, 70, 6, 100, 1), 4), ((50, 20, 30, 200, 2), 8),
    ((70, 300, 20, 300, 1), 16), ((70, 40, 20, 512, 2), 16)], ids=str)
def test_cluster(shape, ctas, dtype):
    problem = cuda(*shape, dtype=dtype, tf32=True)
    if dtype == torch.float32 and not torch.backends.cudnn.allow_tf32:
        pytest.skip("nn.LSTM does not use TF32")
    problem.check(problem.ours(plan=cluster_plan(problem, ctas)))


@pytest.mark.parametrize("shape, ctas, dtype", [((50, 200, 20, 256, 1), 2, torch.bfloat16),
                                                ((50, 200, 20, 512, 1), 8, torch.float16),
                                                ((50, 200, 20, 512, 1), 16, torch.float32)], ids=str)
def test_r_in_registers_and_shared_memory(shape, ctas, dtype):
    problem = cuda(*shape, dtype=dtype, tf32=True)
    plan = cluster_plan(problem, ctas)
    assert plan.held_bytes > plan.register_bytes
    problem.check(problem.ours(plan=plan))


@pytest.mark.gpu_first
@pytest.mark.parametrize("flagged", [{}, dict(packed=True), dict(ragged=True, resets=True)], ids=" ".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, layout", [
    ((1, 1, 1, 1, 2), dict(block_h=8)), ((40, 17, 6, 33, 2), dict(block_h=8)), ((30, 70, 6, 100, 1), dict(warps=8)),
    ((20, 300, 6, 100, 2), dict(block_h=32, tiles=2)), ((20, 128, 16, 640, 1), dict()),
    ((12, 500, 16, 256, 1), dict(block_h=32, warps=8, tiles=2))], ids=str)
def test_wgmma(shape, layout, dtype, flagged):
    limits = Limits.of("cuda")
    if not limits.wgmma:
        pytest.skip("the wgmma kernels need compute capability 9.0")
    if dtype == torch.float32 and not torch.backends.cudnn.allow_tf32:
        pytest.skip("nn.LSTM does not use TF32")
    problem = cuda(*shape, dtype=dtype, tf32=True, **flagged)
    plan = problem.wgmma_plan(**layout, keep_every=16)
    check_plan(plan, limits)
    problem.check(problem.ours(plan=plan))


@pytest.mark.gpu_first
@pytest.mark.parametrize("flagged", [{}, dict(packed=True), dict(ragged=True, resets=True)], ids=" ".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, layout", [
    ((1, 1, 1, 1, 2), dict()), ((40, 17, 6, 33, 2), dict()), ((30, 70, 6, 100, 1), dict(block_h=32)),
    ((20, 300, 6, 100, 2), dict(tiles=4)), ((20, 16, 16, 512, 2), dict()), ((12, 100, 16, 256, 1), dict(tiles=3)),
    ((40, 17, 6, 33, 2), dict(room=0)), ((12, 33, 16, 300, 1), dict(room=1 << 15))],       # wide
    ids=str)
def test_split(shape, layout, dtype, flagged):
    limits = Limits.of("cuda")
    if not limits.cluster:
        pytest.skip("the split kernels do not run on this GPU with this Triton")
    if dtype == torch.float32 and not torch.backends.cudnn.allow_tf32:
        pytest.skip("nn.LSTM does not use TF32")
    problem = cuda(*shape, dtype=dtype, tf32=True, **flagged)
    plan = problem.split_plan(**layout, keep_every=16)
    check_plan(plan, limits)
    problem.check(problem.ours(plan=plan))


def test_clusters_take_turns():
    """There may be more clusters than run at the same time, because a cluster waits for no other."""
    problem = cuda(20, 16 * 150, 8, 100, 1, dtype=torch.bfloat16)
    problem.check(problem.ours(plan=cluster_plan(problem, 4)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(40, 17, 6, 33, 1), (64, 64, 128, 128, 1), (70, 3, 40, 192, 2),
                                   (30, 300, 32, 512, 1)], ids=str)
def test_portable(shape, dtype):
    """The portable kernels, which automatic plans do not choose on this device."""
    problem = cuda(*shape, dtype=dtype, tf32=torch.backends.cudnn.allow_tf32)
    limits = dataclasses.replace(Limits.of("cuda"), cluster=0)
    problem.check(problem.ours(plan=problem.plan(limits=limits)))


def test_more_steps_than_cudnn_takes():
    """cuDNN takes at most 65,535 steps."""
    torch.manual_seed(0)
    theirs, ours = torch.nn.LSTM(3, 8), triton_lstm.LSTM(3, 8).cuda()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(70_000, 2, 3)
    x_cuda = x.cuda().requires_grad_()
    y = ours(x_cuda)[0]
    y[-1].sum().backward()
    x = x.double().requires_grad_()
    want = theirs.double()(x)[0]
    want[-1].sum().backward()
    assert error(y.cpu(), want) < 1e-3          # TF32
    assert error(x_cuda.grad[-50:].cpu(), x.grad[-50:]) < 5e-3


@pytest.mark.parametrize("H", [64, 300])
def test_deterministic(H):
    problem = cuda(60, 50, 20, H, 2)
    first, second = problem.ours(), problem.ours()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu_first
@pytest.mark.parametrize("H", [64, 300])
def test_cuda_graph(H):
    """A graph is captured once and replayed on other input. Each replay must first reset what programs exchange."""
    layer = triton_lstm.LSTM(20, H).cuda().half()
    x = torch.randn(30, 17, 20, device="cuda", dtype=torch.half, requires_grad=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            layer(x)[0].sum().backward()
    torch.cuda.current_stream().wait_stream(side)
    layer.zero_grad()
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)[0]
        y.sum().backward()
    for seed in range(3):
        fresh = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).half().cuda()
        with torch.no_grad():
            x.copy_(fresh)
            x.grad.zero_()
        graph.replay()
        leaf = fresh.clone().requires_grad_()
        want = layer(leaf)[0]
        assert torch.equal(y, want)
        want.sum().backward()
        assert torch.equal(x.grad, leaf.grad)


@pytest.mark.parametrize("options, masked", [(dict(), False), (dict(num_layers=2, dropout=0.3), True),
                                             (dict(num_layers=2, bidirectional=True), False)], ids=str)
@pytest.mark.parametrize("H", [pytest.param(64, marks=pytest.mark.gpu_first), 300, 640])
def test_calls_of_sizes_that_come_again(H, options, masked):
    """They run a recording, in whatever stream the caller is, and compute the same bits."""
    torch.manual_seed(0)
    layer, stream = triton_lstm.LSTM(20, H, **options).cuda(), torch.cuda.Stream()
    masks = dict(lengths=torch.tensor([30, 7, 0, 30, 1], device="cuda")) if masked else {}
    inputs, found = torch.randn(2, 30, 5, 20, device="cuda"), []
    for n in range(replay.FIRST + 6):
        layer.zero_grad()
        x = inputs[n % 2].clone().requires_grad_()
        torch.manual_seed(1)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream if n % 3 else torch.cuda.current_stream()):
            y, state = layer(x, **masks)
            (y.sin().sum() + state[0].cos().sum()).backward()
        torch.cuda.synchronize()
        found.append([y, *state, x.grad, *(p.grad for p in layer.parameters())])
        assert all(map(torch.equal, found[n], found[n % 2])), n
    assert not torch.equal(found[0][0], found[1][0])


def test_other_stream():
    problem = cuda(50, 20, 10, 200)
    want = problem.ours()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = problem.ours()
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second CUDA device")
    layer = triton_lstm.LSTM(4, 200).to("cuda:1")
    y = layer(torch.randn(5, 3, 4, device="cuda:1"))[0]
    assert y.device.index == 1 and y.isfinite().all()


@pytest.mark.gpu_first
@pytest.mark.parametrize("options", [dict(), dict(num_layers=3, bidirectional=True, batch_first=True, bias=False)],
                         ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer(options, dtype):
    torch.manual_seed(0)
    theirs = torch.nn.LSTM(30, 70, **options).cuda().to(dtype)
    ours = triton_lstm.LSTM(30, 70, **options).cuda().to(dtype)
    exact = torch.nn.LSTM(30, 70, **options).cuda().double()
    ours.load_state_dict(theirs.state_dict())
    exact.load_state_dict(theirs.state_dict())
    x = torch.randn(20, 24, 30, device="cuda", dtype=dtype)
    results = []
    for module in (theirs, ours, exact):
        leaf = x.to(next(module.parameters()).dtype).requires_grad_()
        y, (h, c) = module(leaf)
        (y.square().sum() + h.sum() + c.sum()).backward()
        results.append([y, h, c, leaf.grad, *(p.grad for p in module.parameters())])
    for want, got, right in zip(*results):
        assert got.shape == want.shape and got.stride() == want.stride()
        assert error(got, right) <= BUDGET * max(error(want, right), floor(right, dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype):
    layer = triton_lstm.LSTM(6, 40, num_layers=2).cuda()
    x = torch.randn(9, 3, 6, device="cuda")
    with torch.autocast("cuda", dtype):
        y = layer(x)[0]
    y.float().square().sum().backward()
    exact = torch.nn.LSTM(6, 40, num_layers=2).cuda().double()
    exact.load_state_dict(layer.state_dict())
    assert y.dtype == dtype and error(y, exact(x.double())[0]) < 0.02
    assert layer.weight_hh_l0.grad.dtype == torch.float32


def test_compile_full_graph():
    model = torch.nn.ModuleDict(dict(lstm=triton_lstm.LSTM(6, 200), head=torch.nn.Linear(200, 2))).cuda()
    loss = lambda x: model["head"](model["lstm"](x)[0]).square().sum()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for T in (5, 9):
        x = torch.randn(T, 3, 6, device="cuda")
        gradients = []
        for function in (loss, compiled):
            model.zero_grad()
            function(x).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_peak_memory():
    """Besides dx and what the caller holds, a call takes what is saved and the larger of the two workspaces."""
    T, B, I, H, dtype = 512, 64, 256, 256, torch.bfloat16
    layer = triton_lstm.LSTM(I, H).cuda().to(dtype)
    x = torch.randn(T, B, I, device="cuda", dtype=dtype, requires_grad=True)
    dy = torch.randn(T, B, H, device="cuda", dtype=dtype)
    layer(x)[0].backward(dy)
    layer.zero_grad(), setattr(x, "grad", None)
    plan = triton_lstm.make_plan(B, H, dtype, limits=Limits.of("cuda"))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    layer(x)[0].backward(dy)
    peak = torch.cuda.max_memory_allocated() - before
    forward = plan.forward_steps(T, 2) * B * 4 * H * 2
    bound = T * B * (H + I) * 2 + plan.saved_bytes(T) + max(forward, plan.backward_bytes(T, I, 2)) + 2**22
    assert peak <= bound, (peak, bound)


def test_impossible_plan_raises_before_the_launch():
    problem = cuda(5, 16, 4, 64)
    many = Limits.of("cuda").multiprocessors + 1
    with pytest.raises(triton_lstm.PlanError, match=f"{many * 4} programs wait"):
        problem.ours(plan=dataclasses.replace(problem.shared_plan("grid"), groups=many))


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_sanitizer(tool):
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("needs compute-sanitizer, of the CUDA toolkit")
    code = """
import torch, triton_lstm
for H, dtype in ((33, torch.half), (160, torch.half), (70, torch.float)):
    layer = triton_lstm.LSTM(5, H, bidirectional=True).cuda().to(dtype)
    layer(torch.randn(4, 17, 5, device="cuda", dtype=dtype))[0].sum().backward()
torch.cuda.synchronize()
"""
    result = subprocess.run([program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code],
                            capture_output=True, text=True)
    if "not supported" in result.stdout.lower():
        pytest.skip(f"compute-sanitizer cannot run here: {result.stdout.strip().splitlines()[0]}")
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.parametrize("mode, sequences", [("forward", "padded"), ("train", "padded"), ("stream", "padded"),
                                             ("train", "ragged"), ("train", "resets")])
def test_benchmark(mode, sequences):
    """Every provider that can run a small case is timed, CUDA graphs included, and figures have the right magnitude."""
    gpu = instrument.Gpu()
    case = Case("grid", mode, "bf16", 16, 1 if mode == "stream" else 20, 64, 64, sequences=sequences)
    rows = {row.provider: row for row in sweep.measure(case, providers.PROVIDERS, gpu, floors.Floors(gpu),
                                                       instrument.environment(), sweep.EFFORTS["quick"])}
    assert set(rows) == set(providers.PROVIDERS)
    failed = {name: row.status for name, row in rows.items() if row.status == "wrong" or row.status[:6] == "failed"}
    assert not failed
    baseline = rows[BASELINES[sequences]]
    assert baseline.status == "ok" and 0.001 < baseline.ms_median < 100 and baseline.sm_mhz
    if sequences == "padded":
        for name in (OURS, f"{OURS} graph", CUDNN_GRAPH, f"{OURS} resident"):
            assert rows[name].status == "ok" and 0.001 < rows[name].ms_median < 100
        assert 0 < rows[OURS].floor_us < 10 and 10 < rows[OURS].gemm_tflops < 3000
        assert mode != "train" or 0 < rows[OURS].saved_bytes <= rows[OURS].peak_bytes


def test_floors():
    measured, limits = floors.Floors(instrument.Gpu()), Limits.of("cuda")
    few, many = (make_plan(16, 16 * n, torch.bfloat16, schedule="grid", limits=floors.PORTABLE) for n in (2, 64))
    assert 0.5 < measured.launch_us() < 50
    assert 0.1 < measured.exchange_us(few, "bf16") < measured.exchange_us(many, "bf16") * 1.5 < 50
    if limits.wgmma:
        groups = make_plan(128, 1024, torch.bfloat16, schedule="grid", limits=limits)
        assert groups.kind == "wgmma" and 0.1 < measured.exchange_us(groups, "bf16") < 50
    if limits.cluster > 1:
        cluster = make_plan(16, 256, torch.bfloat16, schedule="cluster", limits=limits)
        assert 0.05 < measured.exchange_us(cluster, "bf16") < 10
