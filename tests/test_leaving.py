"""Calls that are recorded to run where this package is not, and code that takes a layer for an nn.LSTM: the results,
natively and on torch's own LSTM, and what is recorded."""
import contextlib
import copy
import inspect
import io
import warnings

import pytest
import torch
from torch.ao.nn.quantized import reference
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import harness
import triton_lstm

I, H = 3, 5
OPTIONS = [dict(), dict(num_layers=2, bidirectional=True, batch_first=True), dict(bias=False, proj_size=2)]


@pytest.fixture(params=["natively", "torch"])
def where(request):
    if request.param == "torch":
        yield
    else:
        with harness.interpreter():
            yield


class Model(torch.nn.Module):
    def __init__(self, lstm):
        super().__init__()
        self.lstm = lstm

    def forward(self, x, h, c):
        y, (h, c) = self.lstm(x, (h, c))
        return y, h, c


def arguments(lstm, T, B):
    D, P = 2 if lstm.bidirectional else 1, lstm.proj_size or H
    return (torch.randn((B, T, I) if lstm.batch_first else (T, B, I)), torch.randn(lstm.num_layers * D, B, P),
            torch.randn(lstm.num_layers * D, B, H))


def make(**options):
    torch.manual_seed(0)
    return triton_lstm.LSTM(I, H, **options).eval()


@contextlib.contextmanager
def quiet():
    """torch says that tracing is deprecated, that sizes of packed sequences become constants, and how it projects."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", "`torch.jit.")     # FutureWarning since torch 2.14
        warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN", UserWarning)
        yield


def close(got, right):
    """Within a few roundings of fp32: torch's own LSTM adds up in another order."""
    for one, other in zip(got, right, strict=True):
        torch.testing.assert_close(torch.as_tensor(one), other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_traced(options, where):
    """A trace holds torch's own LSTM, so it runs anywhere, also over other lengths and batches."""
    model = Model(make(**options))
    with quiet():
        traced, file = torch.jit.trace(model, arguments(model.lstm, 4, 2)), io.BytesIO()
        torch.jit.save(traced, file)
        loaded = torch.jit.load(io.BytesIO(file.getvalue()))
    assert "aten::lstm" in str(traced.inlined_graph) and "triton_lstm::" not in str(traced.inlined_graph)
    for T, B in ((4, 2), (7, 5), (1, 1)):
        given = arguments(model.lstm, T, B)
        close(loaded(*given), model(*given))


def test_a_trace_of_packed_rows(where):
    lstm, x, lengths = make(bidirectional=True).requires_grad_(False), torch.randn(4, 3, I), torch.tensor([4, 2, 1])

    def function(x):
        y, (h, c) = lstm(pack_padded_sequence(x, lengths))
        return y.data, h, c
    with quiet():
        traced = torch.jit.trace(function, x)
    assert "aten::lstm" in str(traced.inlined_graph)
    close(traced(x), function(x))


def test_a_trace_with_lengths_and_resets(where):
    """torch's LSTM has neither, so the trace has the operators of each step."""
    lstm, x = make().requires_grad_(False), torch.randn(4, 3, I)
    reset, lengths = torch.rand(4, 3) < 0.5, torch.tensor([4, 2, 0])

    def function(x, lengths, reset):
        y, (h, c) = lstm(x, lengths=lengths, reset=reset)
        return y, h, c
    with quiet():
        traced = torch.jit.trace(function, (x, lengths, reset))
    assert "triton_lstm::" not in str(traced.inlined_graph)
    lengths, reset = torch.tensor([1, 3, 4]), ~reset
    close(traced(x, lengths, reset), function(x, lengths, reset))


@pytest.mark.filterwarnings("ignore")           # of the exporters, which are deprecated or look for torchvision
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "traced"])
@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_onnx(options, dynamo, where, tmp_path):
    """By either exporter. Only the one that traces follows other lengths and batches, as of an nn.LSTM."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnx onnxruntime onnxscript")
    pytest.importorskip("onnxscript", reason="pip install onnx onnxruntime onnxscript")
    model = Model(make(**options))
    given, names = arguments(model.lstm, 4, 2), ["x", "h", "c"]
    dynamic = {} if dynamo else dict(dynamic_axes=dict(x={0: "a", 1: "b"}, h={1: "batch"}, c={1: "batch"}))
    torch.onnx.export(model, given, tmp_path / "model.onnx", input_names=names, dynamo=dynamo, **dynamic)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for T, B in ((4, 2),) if dynamo else ((4, 2), (7, 5), (1, 1)):
        given = arguments(model.lstm, T, B)
        close(session.run(None, {name: t.numpy() for name, t in zip(names, given)}), model(*given))


def test_export_keeps_the_operator(where):
    """torch.export is for AOTInductor, on a machine with this package. On other devices it holds torch's own LSTM."""
    lstm = make()
    given = (torch.randn(4, 2, I),)
    exported = torch.export.export(lstm, given)
    targets = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert ("triton_lstm.lstm.default" in targets) == triton_lstm.op.interpreted()
    got, right = exported.module()(*given), lstm(*given)
    close((got[0], *got[1]), (right[0], *right[1]))


def test_fx_traces_a_leaf(where):
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = torch.nn.ModuleDict({"lstm": make()})

        def forward(self, x, reset):
            y, state = self.encoder["lstm"](x, reset=reset)
            return self.encoder["lstm"](torch.relu(y)[..., :I], state)[0]
    model = Two()
    traced = torch.fx.symbolic_trace(model)
    nodes = [node for node in traced.graph.nodes if node.op == "call_module"]
    assert [node.target for node in nodes] == ["encoder.lstm", "encoder.lstm"]
    assert traced.encoder.lstm is model.encoder["lstm"] and "reset" in nodes[0].kwargs and not nodes[1].kwargs
    x, reset = torch.randn(6, 2, I), torch.rand(6, 2) < 0.3
    assert torch.equal(traced(x, reset), model(x, reset))


@pytest.mark.filterwarnings("ignore:`torch.jit.script")
def test_script_says_what_to_do(where):
    model, given = Model(make()), (torch.randn(4, 2, I), torch.randn(1, 2, H), torch.randn(1, 2, H))
    with pytest.raises(RuntimeError, match=r"call triton_lstm.to_torch\(model\) before"):
        torch.jit.script(model)
    assert type(model.lstm) is triton_lstm.LSTM
    right = model(*given)
    triton_lstm.to_torch(model)
    close(torch.jit.script(model)(*given), right)


@pytest.mark.filterwarnings("ignore:`torch.jit.script")
def test_a_script_module_says_what_to_do(where):
    """A class of TorchScript compiles its layer itself. torch's own message then shows the line that says it."""
    def scripted(layer):
        class Scripted(torch.jit.ScriptModule):
            def __init__(self):
                super().__init__()
                self.lstm = layer

            @torch.jit.script_method
            def forward(self, x: PackedSequence) -> tuple[PackedSequence, tuple[torch.Tensor, torch.Tensor]]:
                return self.lstm(x)
        return Scripted()

    layer, packed = make(num_layers=2), pack_padded_sequence(torch.randn(4, 3, I), torch.tensor([4, 2, 1]))
    with pytest.raises(torch.jit.frontend.NotSupportedError, match=r"call triton_lstm.to_torch\(layer\) before"):
        scripted(layer)
    y, state = layer(packed)
    triton_lstm.to_torch(layer)
    got, got_state = scripted(layer)(packed)
    close([got.data, *got_state], [y.data, *state])


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, .* are deprecated:UserWarning")
def test_a_layer_beside_its_reference_quantized_module(where):
    """The module of torch.ao that computes with rounded weights: by our layer with the same weights assigned."""
    def rounded(weight):
        return torch.quantize_per_tensor(weight, 0.05, 5, torch.qint8).dequantize()
    torch.manual_seed(0)
    layer, x = make(num_layers=2, bidirectional=True), torch.randn(4, 2, I)
    weights = [name for name in layer._flat_weights_names if name.startswith("weight")]
    how = dict(qscheme=torch.per_tensor_affine, dtype=torch.qint8, scale=0.05, zero_point=5, is_decomposed=False)
    quantized = reference.LSTM.from_float(layer, dict.fromkeys(weights, how) | dict(is_decomposed=False))
    before = layer(x)[0]
    layer._flat_weights = [rounded(w.detach()) if name in weights else w
                           for name, w in zip(layer._flat_weights_names, layer._flat_weights)]
    (y, state), (want, want_state) = layer(x), quantized(x)
    close([y, *state], [want, *want_state])
    assert (y - before).abs().max() > 1e-3


def test_assigned_flat_weights_are_computed_with(where):
    """As nn.LSTM does for code that assigns a list of weights, until a weight or the list is assigned again."""
    theirs, ours = torch.nn.LSTM(I, H), triton_lstm.LSTM(I, H)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 2, I)
    for layer in (theirs, ours):
        layer._flat_weights = [2 * w.detach() for w in layer._flat_weights]
    close([ours(x)[0]], [theirs(x)[0]])
    assert not torch.allclose(ours(x)[0], torch.func.functional_call(make(), ours.state_dict(), x)[0])
    close([copy.deepcopy(ours)(x)[0]], [copy.deepcopy(theirs)(x)[0]])           # copies have forgotten it
    for layer in (theirs, ours):
        layer.weight_hh_l0 = torch.nn.Parameter(layer.weight_hh_l0.detach().clone())
    close([ours(x)[0]], [theirs(x)[0]])
    assert ours._given_weights is None
    for layer in (theirs, ours):
        layer._flat_weights = [2 * w.detach() for w in layer._flat_weights]
    for layer in (theirs, ours):
        layer.to(torch.float64).to(torch.float32)
    close([ours(x)[0]], [theirs(x)[0]])
    assert ours._flat_weights[1] is ours.weight_hh_l0 and ours._given_weights is None
    for layer in (theirs, ours):
        layer._flat_weights = [2 * w.detach() for w in layer._flat_weights]
    triton_lstm.to_torch(ours)
    close([ours(x)[0]], [theirs(x)[0]])


def test_wrong_flat_weights():
    layer = make()
    with pytest.raises(ValueError, match="must be the 4 tensors of .*weight_ih_l0.*, got 1"):
        layer._flat_weights = [layer.weight_ih_l0]
    assert layer._flat_weights[0] is layer.weight_ih_l0


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning")
@pytest.mark.filterwarnings("ignore:triton_lstm.LSTM uses torch's own LSTM. torch.nn.utils computes:UserWarning")
def test_gradients_of_each_sample(where):
    theirs, ours = torch.nn.LSTM(I, H, batch_first=True), triton_lstm.LSTM(I, H, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, I)
    with torch.backends.mkldnn.flags(enabled=False):            # whose LSTM has no such gradients
        for layer in (theirs, ours):
            call_for_per_sample_grads(layer, batch_size=2)(x)[0].square().sum().backward()
    close([p.grad_sample for p in ours.parameters()], [p.grad_sample for p in theirs.parameters()])
    assert ours.weight_hh_l0.grad_sample.shape == (2, 4 * H, H)


def test_an_editor_sees_the_arguments():
    """Those of nn.LSTM, in its order, and their defaults."""
    ours = inspect.signature(triton_lstm.LSTM).parameters
    theirs = inspect.signature(torch.nn.RNNBase).parameters
    assert list(ours) == [*list(theirs)[1:], "zoneout"] and next(iter(theirs)) == "mode"
    assert all(ours[name].default == theirs[name].default for name in list(theirs)[1:])
