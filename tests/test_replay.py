"""Recordings of calls: when there is one, that it computes the same bits, and what it must not assume."""
import ctypes
import gc
import inspect
import re
import threading
import types
import weakref
from unittest import mock

import pytest
import torch

import harness
import triton_lstm
from problems import assert_apart
from test_eager import LAYERS, SEQUENCES, B, H, I, T, arguments, gradients
from triton_lstm import replay
from triton_lstm.kernels import launch as compiled_launch

KINDS = [("padded", False, True), ("padded", True, False), ("lengths", False, False), ("resets", True, True),
         ("both", False, True)]     # sequences, whether a state is given, keep_gates
WAYS = [(options, *KINDS[n % 5]) for n, options in enumerate(LAYERS)]


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """The third call is written down."""
    monkeypatch.setattr(replay, "FIRST", 2)


class Counted:
    """A context that counts the recordings that were ``made`` and how often they ``runs``."""

    def __enter__(self):
        self.runs = self.made = 0
        real = replay.Recorder.recording

        def recording(recorder, results):
            assert recorder.why_not is None, recorder.why_not
            function = real(recorder, results)
            self.made += 1

            def run(*args):
                self.runs += 1
                return function(*args)
            return run
        self._patch = mock.patch.object(replay.Recorder, "recording", recording)
        self._patch.__enter__()
        return self

    def __exit__(self, *error):
        self._patch.__exit__(*error)


def without_recordings():
    return mock.patch.object(replay, "run", lambda function, call, how, tensors, given=0: function(call, how, *tensors))


def changed(layer, x, hx, n):
    """New values in the place of those of inputs and weights."""
    torch.manual_seed(100 + n)
    with torch.no_grad():
        for tensor in (x, *(hx or ()), *layer.parameters()):
            tensor.copy_(torch.randn(tensor.shape))


@pytest.mark.parametrize("options, sequences, state, keep_gates", WAYS, ids=str)
def test_same_bits(options, sequences, state, keep_gates):
    """New numbers in every call, and the results of earlier calls stay as they are."""
    layer, x, hx, call = arguments(options, sequences, state)
    layer.keep_gates = keep_gates
    with harness.interpreter(), Counted() as counted:
        for n in range(replay.FIRST + 3):
            changed(layer, x, hx, n)
            got = gradients(layer, x, hx, call)
            assert counted.runs == 2 * max(n - replay.FIRST, 0)
            if n < replay.FIRST:
                continue
            with without_recordings():
                right = gradients(layer, x, hx, call)
            for name, tensor in right.items():
                assert torch.equal(got[name], tensor) and got[name].stride() == tensor.stride(), name
                assert tensor.isfinite().all()
            assert got["y"].abs().max() > 0 and got["weight_hh_l0"].abs().max() > 0 or options.get("dropout") == 1
            assert_apart(got)
            if n == replay.FIRST + 1:
                first, values = got, {name: tensor.clone() for name, tensor in got.items()}
    assert all(torch.equal(first[name], values[name]) for name in values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits(dtype):
    layer, x, hx, call = arguments(dict(num_layers=2, bidirectional=True), "lengths", True, dtype)
    with harness.interpreter(), Counted() as counted:
        for n in range(replay.FIRST + 2):
            changed(layer, x, hx, n)
            got = gradients(layer, x, hx, call)
    assert counted.runs == 2
    with harness.interpreter(), without_recordings():
        right = gradients(layer, x, hx, call)
    assert all(torch.equal(got[name], right[name]) for name in right)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("sequences", SEQUENCES)
def test_without_gradients(sequences, mode):
    """Batch sizes of packed rows decide which operators run, so these have no recording."""
    layer, x, hx, call = arguments(dict(num_layers=3), sequences, True)
    with harness.interpreter(), mode(), Counted() as counted:
        for n in range(replay.FIRST + 3):
            changed(layer, x, hx, n)
            got = call()
        with without_recordings():
            right = call()
    assert counted.runs == (0 if sequences == "packed" else 2)
    assert torch.equal(got[0].data, right[0].data) and all(map(torch.equal, got[1], right[1]))


def test_chunks_that_recompute_the_gates():
    """Several chunks in both directions, with a plan of the layer's own."""
    torch.manual_seed(0)
    layer, x = triton_lstm.LSTM(I, H, 2, bidirectional=True), torch.randn(T, B, I, requires_grad=True)
    layer.plan = triton_lstm.make_plan(B, H, torch.float32, 2, limits=None, keep_every=2)
    with harness.interpreter(), Counted() as counted:
        for n in range(replay.FIRST + 2):
            changed(layer, x, None, n)
            got = gradients(layer, x, None, lambda: layer(x))
        with without_recordings():
            right = gradients(layer, x, None, lambda: layer(x))
    assert counted.runs == 2
    assert all(torch.equal(got[name], right[name]) for name in right)


@pytest.mark.parametrize("which", ["y", "h_n", "c_n", "y and c_n", "the same for h_n and c_n"])
def test_gradients_of_some_outputs(which):
    """Which outputs have gradients decides what backward runs; one tensor may be the gradient of two outputs."""
    layer, x, hx, call = arguments(dict(num_layers=2), "padded", True)

    def found():
        layer.zero_grad()
        x.grad = hx[0].grad = None
        y, (h_n, c_n) = call()
        loss = dict(y=y, h_n=h_n, c_n=c_n).get(which)
        if loss is None:
            loss = h_n + c_n if "same" in which else torch.cat([y.flatten(), c_n.flatten()])
        loss.sum().backward() if "same" in which else loss.sin().sum().backward()
        return [x.grad, hx[0].grad, *(p.grad for p in layer.parameters())]

    with harness.interpreter():
        for n in range(replay.FIRST + 2):
            changed(layer, x, hx, n)
            got = found()
        with without_recordings():
            right = found()
    assert all(map(torch.equal, got, right)) and got[0].abs().max() > 0


def test_outputs_with_gradients_may_change_between_calls():
    layer, x, hx, call = arguments(dict(), "padded", False)

    def found(n):
        layer.zero_grad()
        y, (h_n, c_n) = call()
        (y.sin().sum() if n % 2 else h_n.cos().sum() + y[0].sum()).backward()
        return [p.grad for p in layer.parameters()]

    with harness.interpreter(), Counted() as counted:
        for n in range(4 * replay.FIRST + 8):
            changed(layer, x, hx, n)
            got = found(n)
            with without_recordings():
                right = found(n)
            assert all(map(torch.equal, got, right))
    assert counted.made == 3            # forward; backward with and without gradients of h_n


def test_strides_of_the_input_and_of_the_gradient():
    """The same sizes with other strides, in turns."""
    torch.manual_seed(0)
    layer = triton_lstm.LSTM(I, H)
    inputs = [torch.randn(T, B, I), torch.randn(B, T, I).transpose(0, 1), torch.randn(T, B, 2 * I)[..., ::2],
              torch.randn(1, B, I).expand(T, B, I), torch.randn(T * B * I + 1)[1:].view(T, B, I)]
    upstream = [torch.randn(T, B, H), torch.randn(B, T, H).transpose(0, 1), torch.randn(1, 1, H).expand(T, B, H)]

    def found(x, dy):
        layer.zero_grad()
        x = x.detach().requires_grad_()
        layer(x)[0].backward(dy)
        return [x.grad, *(p.grad for p in layer.parameters())]

    with harness.interpreter(), Counted() as counted:
        pairs = [(x, upstream[0]) for x in inputs] + [(inputs[0], dy) for dy in upstream[1:]]
        for _ in range(replay.FIRST + 2):
            got = [found(x, dy) for x, dy in pairs]
        assert counted.runs > 10
        with without_recordings():
            right = [found(x, dy) for x, dy in pairs]
    assert all(torch.equal(a, b) for ours, theirs in zip(got, right) for a, b in zip(ours, theirs))


def test_no_rows():
    layer, x = triton_lstm.LSTM(I, H, 2, bidirectional=True), torch.randn(T, 0, I, requires_grad=True)
    with harness.interpreter(), Counted() as counted:
        for _ in range(replay.FIRST + 2):
            y, (h_n, c_n) = layer(x)
            y.sum().backward()
    assert counted.runs == 2 and y.shape == (T, 0, 2 * H) and h_n.shape == c_n.shape == (4, 0, H)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in layer.parameters()) and x.grad.shape == x.shape


def test_autocast():
    """A recording runs without autocast, whose types the layer has chosen already. Weight gradients of several chunks
    are added up in fp32, which autocast would not leave so."""
    torch.manual_seed(0)
    layer, x = triton_lstm.LSTM(I, H), torch.randn(T, B, I)
    layer.plan = triton_lstm.make_plan(B, H, torch.bfloat16, limits=None, keep_every=2)

    def found():
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, _ = layer(x)
            y.float().sin().sum().backward()
        return [y, *(p.grad for p in layer.parameters())]

    with harness.interpreter(), Counted() as counted:
        for _ in range(replay.FIRST + 2):
            got = found()
        with without_recordings():
            right = found()
    assert counted.runs == 2 and got[0].dtype == torch.bfloat16 and all(map(torch.equal, got, right))


def test_kernels_get_aligned_tensors():
    """Triton compiles other kernels for tensors that do not begin at a multiple of 16 bytes. Operators take any, so x
    may lie anywhere where only the input product reads it."""
    torch.manual_seed(0)
    layer, memory = triton_lstm.LSTM(I, H), torch.randn(3, 1000)
    x, h, c = ((memory[n, :T * B * I].view(T, B, I), memory[n, 1:T * B * I + 1].view(T, B, I)) if n == 0 else
               (memory[n, :B * H].view(1, B, H), memory[n, 1:B * H + 1].view(1, B, H)) for n in range(3))
    assert [t.data_ptr() % 16 for pair in (x, h, c) for t in pair] == [0, 4] * 3

    def runs(*shifts):
        before, hx = counted.runs, (h[shifts[1]], c[shifts[2]])
        got = layer(x[shifts[0]], hx)
        with without_recordings():
            right = layer(x[shifts[0]], hx)
        assert torch.equal(got[0], right[0]) and all(map(torch.equal, got[1], right[1]))
        return counted.runs - before

    with harness.interpreter(), torch.no_grad(), Counted() as counted:
        for shift in [(1, 0, 0), (0, 1, 0), (0, 0, 1)]:
            for _ in range(replay.FIRST + 2):
                assert runs(*shift) == 0
        assert counted.made == 0
        assert [runs(0, 0, 0), runs(0, 0, 0)] == [0, 1]
        assert [runs(1, 0, 0), runs(0, 1, 0)] == [1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kernels_get_contiguous_tensors(dtype):
    """A state and a weight with other strides than in the call that was written down: kernels read R and h0. Operators
    read the others."""
    torch.manual_seed(0)
    layer, x = triton_lstm.LSTM(I, H).to(dtype), torch.randn(T, B, I, dtype=dtype)
    plain = [torch.randn(1, B, H, dtype=dtype) for _ in range(2)]
    strided = [torch.randn(1, H, B, dtype=dtype).transpose(1, 2) for _ in range(2)]
    weights = [(weight, torch.nn.Parameter(torch.randn(weight.shape[::-1], dtype=dtype).t()))
               for weight in (layer.weight_ih_l0, layer.weight_hh_l0)]

    def runs(hx, w, r):
        layer.weight_ih_l0, layer.weight_hh_l0 = weights[0][w], weights[1][r]
        before, got = counted.runs, layer(x, hx)
        with without_recordings():
            right = layer(x, hx)
        assert torch.equal(got[0], right[0]) and all(map(torch.equal, got[1], right[1]))
        return counted.runs - before

    with harness.interpreter(), torch.no_grad(), Counted() as counted:
        assert [runs(tuple(plain), 0, 0) for _ in range(replay.FIRST + 2)] == [0] * (replay.FIRST + 1) + [1]
        assert [runs((plain[0], strided[1]), 0, 0), runs((strided[0], plain[1]), 0, 0)] == [0, 0]
        assert [runs(tuple(plain), 1, 0), runs(tuple(plain), 0, 1), runs(tuple(plain), 0, 0)] == [1, 0, 1]


@pytest.mark.parametrize("tied", [("weight_hh_l0", "weight_hh_l1"), ("bias_ih_l0", "bias_hh_l0")], ids=str)
def test_tied_weights(tied):
    """A call with tied weights is not written down: a recording tells tensors apart by what they are, so two that are
    one would be one for the next call too. It can run what another call has written."""
    torch.manual_seed(0)
    layer, x = triton_lstm.LSTM(H, H, 2), torch.randn(T, B, H, requires_grad=True)

    def found():
        layer.zero_grad()
        layer(x)[0].sin().sum().backward()
        return [p.grad for p in layer.parameters()]

    apart = layer.get_parameter(tied[0])
    with harness.interpreter(), Counted() as counted:
        for tie, runs_recordings in (True, False), (False, True), (True, True):
            setattr(layer, tied[0], layer.get_parameter(tied[1]) if tie else apart)
            runs = counted.runs
            for _ in range(replay.FIRST + 2):
                got = found()
            assert (counted.runs > runs) == runs_recordings
            with without_recordings():
                right = found()
            assert all(map(torch.equal, got, right))


def test_a_replaced_weight_takes_effect_at_once():
    torch.manual_seed(0)
    layer, x = triton_lstm.LSTM(I, H, 2), torch.randn(T, B, I)
    with harness.interpreter(), torch.no_grad(), Counted() as counted:
        for n in range(replay.FIRST + 6):
            if n % 3 == 0:
                layer.weight_hh_l1 = torch.nn.Parameter(torch.randn(4 * H, H))
            elif n % 3 == 1:
                layer.bias_ih_l0.data = torch.randn(4 * H)
            else:
                layer.weight_ih_l0.data = torch.randn(I, 4 * H).t()         # with strides of its own
            got = layer(x)
            with without_recordings():
                right = layer(x)
            assert torch.equal(got[0], right[0]) and all(map(torch.equal, got[1], right[1]))
    assert counted.runs == 0        # a weight that is no matrix in a row of memory
    layer.flatten_parameters()
    layer.weight_ih_l0.data = layer.weight_ih_l0.data.contiguous()
    with harness.interpreter(), torch.no_grad(), Counted() as counted:
        for _ in range(2):
            layer(x)
    assert counted.runs == 1


def test_dropout_draws_anew():
    layer, x, _, _ = arguments(dict(num_layers=2, dropout=0.5), "padded", False)
    found = []
    with harness.interpreter(), Counted() as counted:
        for n in range(replay.FIRST + 4):
            torch.manual_seed(min(n, replay.FIRST + 2))
            found.append(layer(x)[0])
        assert counted.runs == 3
        layer.eval()
        assert not torch.equal(layer(x)[0], found[-1])
    same = [torch.equal(a, b) for a, b in zip(found, found[1:])]
    assert same == [False] * (replay.FIRST + 2) + [True]


def test_several_steps_of_an_optimizer():
    """With accumulation and clipping, in turns with the same layer without recordings."""
    torch.manual_seed(0)
    layers = [triton_lstm.LSTM(I, H, 2) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    optimizers = [torch.optim.Adam(layer.parameters(), lr=0.05) for layer in layers]
    data, losses = torch.randn(5, T, B, I), []
    with harness.interpreter(), Counted() as counted:
        for x, more in zip(data, data.flip(0)):
            for layer, optimizer in zip(layers, optimizers):
                optimizer.zero_grad()
                for part in (x, more):
                    if layer is layers[0]:
                        loss = layer(part)[0].square().mean()
                    else:
                        with without_recordings():
                            loss = layer(part)[0].square().mean()
                    loss.backward()
                torch.nn.utils.clip_grad_norm_(layer.parameters(), 0.1)
                optimizer.step()
                losses.append(loss.item())
    assert counted.runs > 8 and losses[0::2] == losses[1::2] and losses[-1] < losses[0]
    assert all(map(torch.equal, layers[0].parameters(), layers[1].parameters()))


def test_backward_twice_and_second_derivatives():
    layer, x, hx, call = arguments(dict(num_layers=2), "padded", True)
    with harness.interpreter():
        for _ in range(replay.FIRST + 2):
            gradients(layer, x, hx, call)
        loss = call()[0].sin().sum()
        first, = torch.autograd.grad(loss, x, retain_graph=True)
        second, = torch.autograd.grad(loss, x, retain_graph=True)
        graph, = torch.autograd.grad(loss, x, create_graph=True)
        assert torch.equal(first, second) and torch.equal(first, graph)
        penalty = torch.autograd.grad(graph.square().sum(), layer.weight_hh_l0)
        assert penalty[0].abs().max() > 0


def test_saved_tensors_that_a_hook_replaces():
    """As those that torch.autograd.graph.save_on_cpu brings back."""
    layer, x, hx, call = arguments(dict(num_layers=2, bidirectional=True), "padded", False)
    with harness.interpreter(), Counted() as counted:
        right = gradients(layer, x, hx, call)
        for _ in range(replay.FIRST + 2):
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
                got = gradients(layer, x, hx, call)
        assert counted.runs > 0
    assert all(torch.equal(got[name], right[name]) for name in right)


def test_memory_is_let_go_as_without_a_recording():
    """While a layer runs, what layers before the last computed is not there any more."""
    layer, _, _, call = arguments(dict(num_layers=4), "padded", True)
    seen = []
    launched = harness.interpreted_launch.launch_kernel

    def launch_kernel(kernel, plan, grid, *args, **constants):
        alive = sum(tensor() is not None for tensor in seen)
        seen.append(weakref.ref(args[4].untyped_storage()))         # y
        counts.append(alive)
        # copies, because the interpreter holds what the last launch was given
        launched(kernel, plan, grid, *[a.clone() if isinstance(a, torch.Tensor) else a for a in args], **constants)

    with harness.interpreter(), torch.no_grad(), Counted() as counted, mock.patch.object(
            harness.interpreted_launch, "launch_kernel", launch_kernel):
        for n in range(replay.FIRST + 2):
            seen.clear()
            counts = []
            y, state = call()
            gc.collect()
            # the general way still holds x, which the input products of a layer have read
            assert counts == ([0, 1, 1, 1] if n <= replay.FIRST else [0] * 4), n
    assert counted.runs == 1


def test_nothing_is_held_by_a_recording():
    """Neither inputs nor results."""
    layer, x, hx, call = arguments(dict(num_layers=2), "padded", True)
    with harness.interpreter(), Counted() as counted:
        for _ in range(replay.FIRST + 2):
            got = gradients(layer, x, hx, call)
        assert counted.runs == 2
    held = [weakref.ref(t.untyped_storage()) for t in (*got.values(), x, *hx, *layer.parameters())]
    del layer, x, hx, call, got
    gc.collect()
    assert not any(storage() is not None for storage in held)


@pytest.mark.parametrize("reason", ["an error", "too long", "unknown tensor", "unknown value"])
def test_what_cannot_be_recorded(reason):
    """An error is the caller's, and the next call is written down. The others run without a recording for ever."""
    layer, x = triton_lstm.LSTM(I, H), torch.randn(T, B, I)
    real, count = replay.Recorder.launch, 0

    def launch(self, *args, **options):
        nonlocal count
        count += 1
        if reason == "an error":
            raise torch.OutOfMemoryError("no memory")
        if reason == "unknown tensor":
            with torch._C.DisableTorchFunction():
                unseen = torch.ones(2)
            unseen.add_(1)
        if reason == "unknown value":
            torch.ones(1).item()
        real(self, *args, **options)

    made = []
    recording = replay.Recorder.recording

    def recorded(recorder, results):
        made.append(recording(recorder, results))
        return made[-1]

    with harness.interpreter(), torch.no_grad(), mock.patch.object(replay.Recorder, "recording", recorded), \
            mock.patch.object(replay, "LONGEST", 1 if reason == "too long" else replay.LONGEST):
        right = layer(x)[0]
        with mock.patch.object(replay.Recorder, "launch", launch):
            for n in range(1, replay.FIRST + 3):
                if reason == "an error" and n >= replay.FIRST:
                    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
                        layer(x)
                else:
                    assert torch.equal(layer(x)[0], right)
        assert count == (3 if reason == "an error" else 1) and made == ([] if reason == "an error" else [None])
        assert torch.equal(layer(x)[0], right) and (made[-1] is not None) == (reason == "an error")


def test_threads():
    """They share recordings. While one thread writes a call down, what others compute is not in it."""
    torch.manual_seed(0)
    layer, inputs, found = triton_lstm.LSTM(I, H), [torch.randn(T, B, I) for _ in range(3)], {}
    # the interpreter changes Triton while it runs
    one_at_a_time, real = threading.RLock(), harness.interpreted_launch.launch_kernel

    def launch_kernel(*args, **constants):
        with one_at_a_time:
            return real(*args, **constants)

    def work(n):
        with torch.no_grad():
            found[n] = [layer(inputs[n])[0] for _ in range(replay.FIRST + 20)]

    with harness.interpreter(), Counted() as counted, mock.patch.object(harness.interpreted_launch, "launch_kernel",
                                                                        launch_kernel):
        workers = [threading.Thread(target=work, args=(n,)) for n in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        with torch.no_grad(), without_recordings():
            right = [layer(x)[0] for x in inputs]
    assert counted.runs > 20 and len(found) == 3
    assert all(torch.equal(y, right[n]) for n, ys in found.items() for y in ys)


# -- launches of compiled kernels -------------------------------------------------------------------------------------

@pytest.fixture
def compiled(monkeypatch):
    """Compiled kernels that do nothing, and the arguments of each run: tensors by where they are in memory and by
    strides. Yields (runs, driver, hooks, what pretends that there is a GPU of such limits)."""
    runs = []

    def run_of(kernel):
        def run(*args):
            runs.append((kernel.__name__, *[(t.shape, t.stride(), t.storage_offset(), t.dtype)
                                            if isinstance(t, torch.Tensor) else t for t in args]))
        return run

    def launch_kernel(kernel, plan, grid, *args, waits, **constants):
        made = types.SimpleNamespace(run=run_of(kernel), function=f"function of {kernel.__name__}",
                                     packed_metadata=("metadata",))
        found = compiled_launch.Found(kernel, made, [(p.name, p.default) for p in kernel.params[len(args):]])
        made.run(*(*grid, 1)[:3], driver.stream, made.function, made.packed_metadata, None, None, None, *args,
                 *found.named(plan, constants))
        return found

    driver = types.SimpleNamespace(stream=11, device=0)
    driver.get_current_stream = lambda device: driver.stream
    driver.get_current_device = lambda: driver.device
    hooks = types.SimpleNamespace(launch_enter_hook=types.SimpleNamespace(calls=[]),
                                  launch_exit_hook=types.SimpleNamespace(calls=[]))
    harness._forget_launches()
    monkeypatch.setattr(compiled_launch, "launch_kernel", launch_kernel)
    monkeypatch.setattr(compiled_launch, "driver", types.SimpleNamespace(active=driver))
    monkeypatch.setattr(compiled_launch, "triton", types.SimpleNamespace(knobs=types.SimpleNamespace(runtime=hooks)))

    def pretend_to_have(limits):
        for module in (triton_lstm.functional, triton_lstm.layer):
            monkeypatch.setattr(module, "runs_kernels", lambda x, dtype: True)
        monkeypatch.setattr(triton_lstm.op, "limits_of", lambda device: limits)
    yield runs, driver, hooks, pretend_to_have
    harness._forget_launches()


def test_those_used_last_are_remembered(compiled):
    """A length that comes again and again is, the others are forgotten."""
    compiled[-1](harness.LIMITS[90])
    layer = triton_lstm.LSTM(I, H)
    with torch.no_grad(), Counted() as counted:
        for n in range(compiled_launch.KNOWN + 10):
            layer(torch.randn(2, B, I))
            layer(torch.randn(3 + n, B, I))
        assert (counted.made, counted.runs) == (1, n - 2)
        assert replay._known.cache_info().currsize == compiled_launch.KNOWN
        for _ in range(replay.FIRST):           # the third call of this length
            layer(torch.randn(3, B, I))
        assert counted.made == 1


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("hidden_size, options, sequences", [
    (40, dict(num_layers=2, dropout=0.1), "padded"), (256, dict(bidirectional=True), "padded"),
    (1024, dict(), "resets"), (33, dict(num_layers=2), "lengths"), (1500, dict(bias=False), "padded")], ids=str)
def test_launches_are_those_of_the_general_way(arch, hidden_size, options, sequences, compiled):
    runs, driver, hooks, pretend_to_have = compiled
    torch.manual_seed(0)
    layer = triton_lstm.LSTM(I, hidden_size, **options)
    x = torch.randn(T, B, I, requires_grad=True)
    masks = dict(lengths=torch.tensor([6, 4, 3, 3, 1])) if sequences == "lengths" else dict(
        reset=torch.zeros(T, B, dtype=torch.bool)) if sequences == "resets" else {}
    pretend_to_have(harness.LIMITS[arch])
    found = []
    with Counted() as counted:
        for n in range(replay.FIRST + 4):
            runs.clear()
            driver.stream = 11 + n
            y, (h_n, c_n) = layer(x, **masks)
            (y.sum() + c_n.sum()).backward()
            assert {run[4] for run in runs} == {11 + n}             # the stream
            found.append([run[:4] + run[5:] for run in runs])
    assert counted.runs == 6
    assert len(found[0]) >= 3
    for other in found[1:]:
        assert [len(run) for run in other] == [len(run) for run in found[0]]
        for run, first in zip(other, found[0]):
            # a recording may give the address of a view, which test_kernels_get_addresses_of_views reads
            assert all(now == was or isinstance(was, tuple) and isinstance(now, int) for now, was in zip(run, first))


def test_a_kernel_that_reads_x_gets_it_contiguous(compiled):
    """One of few features in 16 bits. An x that is contiguous already is given as it is."""
    runs, _, _, pretend_to_have = compiled
    pretend_to_have(harness.LIMITS[90])
    layer, launched = triton_lstm.LSTM(I, 40).half(), []
    with torch.no_grad():
        for x in (torch.randn(T, B, I).half(), torch.randn(B, T, I).half().transpose(0, 1)):
            for _ in range(replay.FIRST + 2):
                runs.clear()
                layer(x)
                launched.append(list(runs))
    assert any(isinstance(arg, tuple) and arg[:2] == ((T, B, I), (B * I, I, 1)) for arg in launched[0][0])
    assert all(other == launched[0] for other in launched)


@pytest.fixture
def texts(monkeypatch):
    """The source of each recording that is made."""
    found, real = [], compile
    monkeypatch.setattr(replay, "compile", lambda text, *args: found.append(text) or real(text, *args), raising=False)
    return found


class Interpreted:
    """In the place of a compiled kernel: ``run`` interprets it. Where it is given an address, a tensor with the shape
    and strides of the one that stood there first begins there. ``addresses`` has the names of such arguments."""
    function, packed_metadata, addresses = None, None, set()

    def __init__(self, kernel, grid, plan, args, constants):
        self._kernel, self._grid = kernel, grid
        self._parameters = [(p.name, p.default) for p in inspect.signature(kernel.fn).parameters.values()]
        self._found = compiled_launch.Found(kernel, self, self._parameters[len(args):])
        self._first = [*args, *self._found.named(plan, constants)]

    def run(self, *args):
        given = []
        for (name, _), value, first in zip(self._parameters, args[9:], self._first, strict=True):
            if isinstance(first, torch.Tensor) and isinstance(value, int):
                self.addresses.add(name)
                elements = 1 + sum((size - 1) * stride for size, stride in zip(first.shape, first.stride()))
                memory = (ctypes.c_char * (elements * first.element_size())).from_address(value)
                value = torch.frombuffer(memory, dtype=first.dtype).as_strided(first.shape, first.stride())
            given.append(value)
        self._kernel[self._grid](*given)

    @classmethod
    def launch_kernel(cls, kernel, plan, grid, *args, waits, **constants):
        made = cls(kernel, grid, plan, args, constants)
        made._kernel[grid](*made._first)
        return harness.interpreted_launch.Found(*made._found)


@pytest.fixture
def interpreted(monkeypatch):
    """Compiled kernels are ``Interpreted``."""
    launch = harness.interpreted_launch
    driver = types.SimpleNamespace(get_current_stream=lambda device: 0, get_current_device=lambda: 0)
    harness._forget_launches(harness.interpreted_sequence)
    monkeypatch.setattr(launch, "driver", types.SimpleNamespace(active=driver))
    monkeypatch.setattr(launch, "launch_kernel", Interpreted.launch_kernel)
    monkeypatch.setattr(Interpreted, "addresses", set())
    yield
    harness._forget_launches(harness.interpreted_sequence)


@pytest.mark.parametrize("options, sequences, keep_every, dtype", [
    (dict(num_layers=3), "both", 2, torch.float32), (dict(num_layers=2), "padded", None, torch.float16),
    (dict(num_layers=2, bidirectional=True), "lengths", None, torch.float32),
    (dict(num_layers=2, bidirectional=True, dropout=0.4, bias=False), "resets", 2, torch.float16)], ids=str)
def test_kernels_get_addresses_of_views(options, sequences, keep_every, dtype, interpreted, texts):
    """Same bits, where compiled kernels are interpreted. The views themselves are not made any more."""
    layer, x, hx, call = arguments(options, sequences, False, dtype)
    if keep_every:
        layer.plan = triton_lstm.make_plan(B, H, dtype, 2 if layer.bidirectional else 1, limits=None,
                                           keep_every=keep_every)
    with harness.interpreter(), Counted() as counted:
        for n in range(replay.FIRST + 3):
            changed(layer, x, hx, n)
            got = gradients(layer, x, hx, call)
            if counted.runs:
                with without_recordings():
                    right = gradients(layer, x, hx, call)
                assert all(torch.equal(got[name], right[name]) for name in right)
    assert counted.runs == 4
    assert {"c_ptr", "dh_ptr", "dc_ptr"} <= Interpreted.addresses
    # Nobody needs c, dh and dc of each layer as tensors, and R of two directions only where the gates are recomputed.
    chunks = [re.findall(r"\n    (?:t\d+, )+= k\d+\(t\d+, \d+\)", text) for text in texts]
    assert [len(found) for found in chunks] == [0, int(layer.bidirectional and keep_every is not None)]


def test_memory_of_a_views_type(texts):
    """A view of another type than its root, and one of the same, which the recording then does not make."""
    x = torch.zeros(4)
    with replay.Recorder([x]) as recorder:
        root = x.new_zeros(4)
        made = [root.view(torch.int32).new_empty(3), root[1:].new_empty(2)]
    found = recorder.recording(made)(None, x)
    assert [t.dtype for t in found] == [torch.int32, torch.float32] and [len(t) for t in found] == [3, 2]
    assert "slice" not in texts[0] and texts[0].count(" = ") == 4


def test_an_argument_that_was_a_view_of_another(interpreted):
    """While the call is written down h0 is a view of c0. Later it is not."""
    layer, x, _, _ = arguments(dict(num_layers=2), "padded", False)
    with harness.interpreter(), torch.no_grad(), Counted() as counted:
        for n in range(replay.FIRST + 3):
            torch.manual_seed(n)
            c0 = torch.randn(2, B, H)
            h0 = c0.view_as(c0) if n <= replay.FIRST else torch.randn(2, B, H)
            y, (h_n, c_n) = layer(x, (h0, c0))
            with without_recordings():
                right, (right_h, right_c) = layer(x, (h0, c0))
            assert torch.equal(y, right) and torch.equal(h_n, right_h) and torch.equal(c_n, right_c)
    assert counted.runs == 2


@pytest.mark.parametrize("why", ["another device", "enter hook", "exit hook"])
def test_where_only_the_general_way_launches(why, compiled):
    """It launches on another device than the current one, and calls the hooks of a profiler."""
    runs, driver, hooks, pretend_to_have = compiled
    pretend_to_have(harness.LIMITS[90])
    layer, x = triton_lstm.LSTM(I, H), torch.randn(T, B, I)
    with torch.no_grad(), Counted() as counted:
        for _ in range(replay.FIRST + 2):
            layer(x)
        assert counted.runs == 1
        if why == "another device":
            with mock.patch.object(torch.Tensor, "get_device", lambda tensor: 1):
                for _ in range(replay.FIRST + 3):
                    layer(x)
            assert counted.made == 2
        else:
            getattr(hooks, f"launch_{why.split()[0]}_hook").calls.append(print)
            layer(x)
        assert counted.runs == 1
