"""``warm``: which kernels it compiles, and that launches find them."""
import contextlib
import dataclasses
from unittest import mock

import pytest
import torch

import harness
import triton_lstm
from triton_lstm import make_plan, warming
from triton_lstm.kernels import launch, offline
from triton_lstm.plan import H200
from triton_lstm.tuned import FLAGS, PACKED, PADDED

GPU = torch.device("cuda", 0)


def on_h200(avoided=frozenset()):
    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(triton_lstm.op, "limits_of", lambda device: H200))
    stack.enter_context(mock.patch.object(triton_lstm.op, "avoided", lambda device: avoided))
    return stack


def jobs(layers, batch=16, dtype=None, sequences=PADDED):
    with on_h200():
        return warming.jobs_of(layers, batch, dtype, GPU, sequences)


def test_each_plan_once():
    """Widths that the time loop does not multiply make no kernels of their own, equal layers neither. Kernels that keep
    the gates and kernels that do not are both compiled, unless a layer never keeps them."""
    deep = triton_lstm.LSTM(100, 64, num_layers=3, bidirectional=True).bfloat16()
    few = triton_lstm.LSTM(8, 64).bfloat16()
    found = jobs([deep, few, triton_lstm.LSTM(200, 64, bidirectional=True).bfloat16()])
    assert found == [
        (plan, torch.bfloat16, dict(flagged=False, packed=False, zoneout=None, inputs=inputs, keep_gates=keep_gates,
                                    bias=True))
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
    found = jobs([zoned, own], dtype=torch.float16, sequences=FLAGS)
    (plan, dtype, options), _, (of_own, _, _) = found       # calls with a plan of their own keep no gates
    assert dtype == torch.float16
    assert options == dict(flagged=True, packed=False, zoneout="drawn", inputs=64, keep_gates=False, bias=True)
    assert [options["packed"] for _, _, options in jobs([own], dtype=torch.float16, sequences=PACKED)] == [True]
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
    with mock.patch.object(warming, "compile_apart", compile_apart), on_h200(), \
            mock.patch.object(torch.cuda, "get_device_capability", lambda device: (9, 0)), \
            mock.patch.object(triton_lstm.op, "no_kernels", lambda device: None), \
            pytest.warns(UserWarning, match="could not compile .*no compiler"):
        assert triton_lstm.warm(model, 16, seconds=5.) == [plan]
        for given in (dict(lengths=True), dict(packed=True), dict(lengths=True, packed=True)):
            triton_lstm.warm(model, 16, **given)
            found = {kind for _, _, options in compiled.pop()[0][:-1] for kind, asked in options.items()
                     if kind in ("flagged", "packed") and asked}
            assert found == {"flagged" if kind == "lengths" else kind for kind in given}
    options = dict(flagged=False, packed=False, zoneout=None, inputs=64, bias=True)
    step = launch.step_of(16, 100, 64, 1, "tf32"), torch.float32, dict(bias=True)
    assert compiled == [([*((plan, torch.float32, dict(options, keep_gates=kept)) for kept in (False, True)), step],
                         90, 5.)]
    with pytest.raises(ValueError, match="no triton_lstm.LSTM in Linear"):
        triton_lstm.warm(torch.nn.Linear(2, 3), 16)


def test_steps():
    """One step of layers without gradients needs a kernel for each width, type and bias, if the layer uses it."""
    deep, plain = triton_lstm.LSTM(100, 64, num_layers=3, bidirectional=True), triton_lstm.LSTM(8, 64, bias=False)
    others = [triton_lstm.LSTM(8, 64, proj_size=3), triton_lstm.LSTM(8, 64, zoneout=0.1), triton_lstm.LSTM(8, 64)]
    others[2].plan = make_plan(33, 64, torch.bfloat16)
    with on_h200():
        found = warming.steps_of([deep, plain, plain, *others], 33, torch.bfloat16, GPU)
        assert warming.steps_of([plain], 1 << 20, torch.bfloat16, GPU) == []     # where it would read too much
        assert warming.steps_of([plain.double()], 33, None, GPU) == []
    assert found == [(launch.step_of(33, inputs, 64, D, "native"), torch.bfloat16, dict(bias=bias))
                     for inputs, D, bias in ((100, 2, True), (128, 2, True), (8, 1, False))]
    with on_h200({(triton_lstm.op.STEP, "forward", "native")}):
        assert warming.steps_of([deep], 33, torch.bfloat16, GPU) == []


def keys_of(function):
    """Which kernels ``function`` launches, with the types of their arguments and the values of constants."""
    keys, kind = set(), lambda value: getattr(value, "dtype", type(value))

    def collect(kernel, plan, grid, *args, waits, **constants):
        values = sorted((name, kind(value) if isinstance(value, torch.Tensor) else value)
                        for name, value in constants.items())
        keys.add((kernel.__name__, *map(kind, args), *values))
    with mock.patch.object(launch, "launch_kernel", collect):
        function()
    return keys


@pytest.mark.parametrize("bias", [True, False])
def test_one_step_and_flags_are_compiled_as_they_are_launched(bias):
    """The launches that ``warm`` compiles are those of calls: the same arguments are missing, the same are tensors."""
    layer, x = triton_lstm.LSTM(24, 72, bias=bias), torch.randn(1, 5, 24)
    compiled = set()

    def compile_launch(kernel, plan, args, waits, constants, arch):
        compiled.update(keys_of(lambda: launch.launch_kernel(kernel, plan, (), *args, waits=waits, **constants)))
        return None, None
    state = torch.zeros(1, 5, 72), torch.zeros(1, 5, 72)
    with on_h200(), mock.patch.object(offline, "compile_launch", compile_launch):
        (step, dtype, options), = warming.steps_of([layer], 5, None, GPU)
        offline.compile_step(step, dtype, **options)
        assert {name for name, *_ in compiled} == {"forward_step"} and len(compiled) == 2
        offline.compile_plan(make_plan(5, 72, torch.float32), torch.float32, flagged=True)
        offline.compile_plan(make_plan(5, 72, torch.float32), torch.float32, packed=True)

    def calls():
        with torch.no_grad():
            layer(x)
            layer(x, state)
        for lengths, sizes, reset in ((torch.tensor([1] * 5), None, None), (None, torch.tensor([5]), None),
                                      (None, None, torch.ones(1, 5) > 0)):
            triton_lstm.op.sequence.step_flags(1, 5, 1, lengths, sizes, reset, x.device)
    with mock.patch.object(triton_lstm.layer, "runs_kernels", lambda *args: True):
        launched = keys_of(calls)
    assert len(launched) == 5 and launched <= compiled


@pytest.mark.parametrize("H", [72, 320])
@pytest.mark.parametrize("bias", [True, False])
def test_loops_are_compiled_as_they_are_launched(bias, H):
    """In a small cluster the backward loop adds up the gradient of the bias, if there is one."""
    layer, x = triton_lstm.LSTM(100, H, bias=bias), torch.randn(3, 5, 100, requires_grad=True)
    compiled = set()

    def compile_launch(kernel, plan, args, waits, constants, arch):
        compiled.update(keys_of(lambda: launch.launch_kernel(kernel, plan, (), *args, waits=waits, **constants)))
        return None, None
    found = jobs([layer], 5)
    with mock.patch.object(offline, "compile_launch", compile_launch):
        for plan, dtype, options in found:
            offline.compile_plan(plan, dtype, **options)
    assert found[0][0].backward.adds_up_da == (H == 72 and harness.TRITON >= (3, 9))
    assert found == jobs([layer, triton_lstm.LSTM(100, H, bias=bias)], 5)

    def calls():
        y, _ = layer(x)
        y.backward(torch.ones_like(y))
    with on_h200(), mock.patch.object(triton_lstm.layer, "runs_kernels", lambda *args: True):
        launched = keys_of(calls)
    assert {name.split("_")[0] for name, *_ in launched} >= {"forward", "backward"} and launched <= compiled


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
        with torch.no_grad():
            layer(x[:1])
    assert hits and all(hits)
