"""Eager calls of a layer: which ones go the short way, and that it computes the same as the operator, bit by bit."""
import dataclasses
import weakref
from unittest import mock

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import harness
import triton_lstm
from problems import assert_apart
from triton_lstm import eager, make_plan

T, B, I, H = 6, 5, 4, 6
LAYERS = [dict(), dict(bias=False), dict(num_layers=2), dict(bidirectional=True), dict(batch_first=True),
          dict(num_layers=2, bidirectional=True), dict(num_layers=3, bidirectional=True, bias=False),
          dict(num_layers=3, dropout=0.4), dict(num_layers=2, dropout=1.)]
SEQUENCES = ["padded", "lengths", "resets", "both", "packed"]


def arguments(options, sequences, state, dtype=torch.float32):
    """A layer and the arguments of a call."""
    torch.manual_seed(0)
    layer = triton_lstm.LSTM(I, H, **options).to(dtype)
    D = 2 if layer.bidirectional else 1
    x = torch.randn((B, T, I) if layer.batch_first else (T, B, I), dtype=dtype).requires_grad_()
    hx = tuple(torch.randn(layer.num_layers * D, B, H, dtype=dtype).requires_grad_() for _ in range(2))
    masks, lengths = {}, torch.tensor([6, 4, 3, 3, 0 if sequences != "packed" else 1])
    if sequences in ("lengths", "both"):
        masks["lengths"] = lengths
    if sequences in ("resets", "both"):
        masks["reset"] = torch.rand(x.shape[:2]) < 0.3
    given = lambda: pack_padded_sequence(x, lengths, batch_first=layer.batch_first) if sequences == "packed" else x
    return layer, x, hx if state else None, lambda: layer(given(), hx if state else None, **masks)


def gradients(layer, x, hx, call):
    """{name: tensor} of what the call returns and of the gradients of a loss of all of it."""
    torch.manual_seed(7)            # of dropout
    y, (h_n, c_n) = call()
    y = getattr(y, "data", y) if not isinstance(y, torch.Tensor) else y
    leaves = dict(layer.named_parameters(), x=x, **dict(zip(("h0", "c0"), hx or ())))
    for leaf in leaves.values():
        leaf.grad = None
    (y.sin().sum() + h_n.sin().sum() + c_n.cos().sum()).backward()
    return dict(y=y.detach(), h_n=h_n.detach(), c_n=c_n.detach(), **{name: t.grad for name, t in leaves.items()})


KINDS = [("padded", False), ("padded", True), ("lengths", True), ("resets", True), ("both", False), ("packed", False)]


@pytest.mark.parametrize("options, sequences, keep_gates", [
    (options, *KINDS[(n + of) % 6]) for n, options in enumerate(LAYERS) for of in (0, 1, 3)], ids=str)
def test_same_bits_as_the_operator(options, sequences, keep_gates):
    layer, x, hx, call = arguments(options, sequences, state=options.get("num_layers") != 2)
    layer.keep_gates = keep_gates
    with harness.interpreter():
        with mock.patch.object(eager._Layers, "apply", wraps=eager._Layers.apply) as applied:
            got = gradients(layer, x, hx, call)
        assert applied.call_count == 1
        with mock.patch.object(eager, "layers", lambda *args, **masks: None):
            right = gradients(layer, x, hx, call)
    for name, tensor in right.items():
        assert torch.equal(got[name], tensor) and got[name].stride() == tensor.stride(), name
    assert_apart(got)


@pytest.mark.parametrize("options", [dict(num_layers=2, bidirectional=True), dict(num_layers=3, dropout=0.4)], ids=str)
def test_x_past_the_lengths_may_be_anything(options):
    """Gradients of weights of all layers are those of an x that is zero there."""
    found = []
    for past in (0., float("nan"), float("inf")):
        layer, x, hx, call = arguments(options, "lengths", state=False)
        with torch.no_grad():
            for row, length in enumerate((6, 4, 3, 3, 0)):
                x[length:, row] = past
        with harness.interpreter():
            found.append(gradients(layer, x, hx, call))
    for other in found[1:]:
        assert all(torch.equal(other[name], right) and right.isfinite().all() for name, right in found[0].items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dropout_in_16_bits(dtype):
    layer, *of_call = arguments(dict(num_layers=2, dropout=0.3), "lengths", True, dtype)
    with harness.interpreter():
        got = gradients(layer, *of_call)
        with mock.patch.object(eager, "layers", lambda *args, **masks: None):
            right = gradients(layer, *of_call)
    assert all(torch.equal(got[name], right[name]) for name in right)


@pytest.mark.parametrize("sequences", ["padded", "lengths", "packed"])
def test_a_plan_of_its_own(sequences):
    layer, *of_call = arguments(dict(num_layers=2), sequences, state=True)
    layer.plan = dataclasses.replace(make_plan(B, H, torch.float32, limits=None), keep_every=2)
    with harness.interpreter():
        with mock.patch.object(eager._Layers, "apply", wraps=eager._Layers.apply) as applied:
            got = gradients(layer, *of_call)
        call, = (call.args[0] for call in applied.call_args_list)
        assert call.plan == layer.plan and not call.keep_gates
        with mock.patch.object(eager, "layers", lambda *args, **masks: None):
            right = gradients(layer, *of_call)
    assert all(torch.equal(got[name], right[name]) for name in right)


@pytest.mark.parametrize("options, sequences", [
    (dict(), "both"), (dict(num_layers=2, bidirectional=True), "lengths"), (dict(num_layers=2, bias=False), "packed"),
    (dict(num_layers=3, dropout=0.4), "resets")], ids=str)
def test_second_derivatives(options, sequences):
    """A gradient penalty, by gradients of y, h_n and c_n and of y alone."""
    layer, x, hx, call = arguments(options, sequences, state=True)
    wanted = [x, *hx, *layer.parameters()]

    def penalty():
        found = []
        for with_state in (True, False):
            torch.manual_seed(7)
            y, (h_n, c_n) = call()
            y = y.data if isinstance(y, PackedSequence) else y
            out = y.sin().sum() + (h_n.sin().sum() + c_n.cos().sum() if with_state else 0)
            first = torch.autograd.grad(out, wanted, create_graph=True)
            found += [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), wanted)]
        return found

    with harness.interpreter():
        with mock.patch.object(eager._Layers, "apply", wraps=eager._Layers.apply) as applied:
            got = penalty()
        assert applied.call_count == 2
        with mock.patch.object(eager, "layers", lambda *args, **masks: None):
            right = penalty()
    for tensor, other in zip(got, right):
        assert other.abs().max() > 0
        # forward runs once more for these, with the same results, so that only the order of sums differs
        torch.testing.assert_close(tensor, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sequences", SEQUENCES)
@pytest.mark.parametrize("options", LAYERS[3:6], ids=str)
def test_without_gradients(options, sequences):
    layer, _, _, call = arguments(options, sequences, state=True)
    with harness.interpreter(), torch.no_grad():
        with mock.patch.object(eager._Layers, "apply") as applied:
            got = call()
        assert not applied.called
        with mock.patch.object(eager, "layers", lambda *args, **masks: None):
            right = call()
    assert torch.equal(got[0].data, right[0].data)          # of a tensor or a PackedSequence
    assert all(map(torch.equal, got[1], right[1])) and not got[1][0].requires_grad


def test_without_gradients_layers_keep_nothing():
    """What a layer computes is freed when the next layer has read it. The interpreter still holds what the last launch
    was given."""
    layer, _, _, call = arguments(dict(num_layers=4), "padded", state=True)
    real, alive, ys = harness.interpreted_sequence.forward_chunks, [], []

    def chunks(x, *args, **options):
        alive.append([y() is not None for y in ys])
        y, *others = yield from real(x, *args, **options)
        ys.append(weakref.ref(y.untyped_storage()))
        return y, *others

    with harness.interpreter(), torch.no_grad(), mock.patch.object(harness.interpreted_sequence, "forward_chunks",
                                                                   chunks):
        call()
    assert alive == [[], [True], [False, True], [False, False, True]]


@pytest.mark.parametrize("sequences", ["padded", "lengths", "packed"])
@pytest.mark.parametrize("options", [LAYERS[2], LAYERS[6]], ids=str)
def test_layers_share_workspace(options, sequences):
    """What only the loop of one layer needs is in the same place for all layers. What outlives a layer is not."""
    layer, x, hx, call = arguments(options, sequences, state=False)
    layer.keep_gates = False
    with harness.interpreter(), harness.places() as places:
        gradients(layer, x, hx, call)
    count = layer.num_layers
    shared = [("coefficients", "a_ptr"), ("coefficients", "coef_ptr"), ("backward_resident", "coef_ptr"),
              ("backward_resident", "da_ptr")]
    if sequences != "padded":
        shared.append(("previous", "h_ptr"))
    if layer.bidirectional:             # in one direction the product of x and W makes its own
        shared.append(("forward_resident", "x_ptr"))
    for name in shared:
        assert len(places[name]) == count and len({*places[name]}) == 1, name
    for name in ("forward_resident", "y_ptr"), ("forward_resident", "c_ptr"), ("backward_resident", "dh_ptr"):
        assert len({*places[name]}) == count, name


def test_workspace():
    workspace, like = harness.compiled_sequence.Workspace(), torch.empty(0, dtype=torch.float16)
    first = workspace.empty("da", like, 3, 4)
    assert first.shape == (3, 4) and first.dtype == torch.float16
    assert workspace.empty("da", like, 3, 4) is first and workspace.empty("slots", like, 3, 4) is not first
    freed = weakref.ref(first)
    del first
    other = workspace.empty("da", like, 4, 4)
    assert freed() is None and other.shape == (4, 4)


def test_only_some_weights_want_gradients():
    """Frozen ones get none, and the layer before the first one that is not frozen keeps nothing."""
    layer, x, _, call = arguments(dict(num_layers=2), "padded", state=False)
    x.requires_grad_(False)
    for name, weight in layer.named_parameters():
        weight.requires_grad_(name in ("weight_hh_l1", "bias_hh_l1"))
    with harness.interpreter():
        with mock.patch.object(eager._Layers, "apply", wraps=eager._Layers.apply) as applied:
            call()[0].sum().backward()
        assert applied.call_count == 1
        got = {name: weight.grad for name, weight in layer.named_parameters()}
        with mock.patch.object(eager, "layers", lambda *args, **masks: None):
            layer.zero_grad()
            call()[0].sum().backward()
    for name, weight in layer.named_parameters():
        assert (got[name] is None) == (weight.grad is None) == (name not in ("weight_hh_l1", "bias_hh_l1"))
        assert weight.grad is None or torch.equal(got[name], weight.grad), name


@pytest.mark.parametrize("case", ["zoneout", "projection", "weights"])
def test_who_does_not_take_it(case):
    """Calls with zoneout, with a projection, and with a weight of a wrong shape."""
    torch.manual_seed(0)
    layer = triton_lstm.LSTM(I, H, proj_size=3 if case == "projection" else 0, zoneout=0.1 if case == "zoneout" else 0.)
    with harness.interpreter(), mock.patch.object(eager._Layers, "apply") as applied:
        if case == "weights":
            layer.weight_hh_l0 = torch.nn.Parameter(torch.randn(4 * H, H + 1))
            with pytest.raises(ValueError, match=r"weight_ih must have the shape \(1, 28, 4\), got \(1, 24, 4\)"):
                layer(torch.randn(T, B, I))
        else:
            layer(torch.randn(T, B, I))
    assert not applied.called


def test_wrong_masks_raise_what_the_function_raises():
    layer, x = triton_lstm.LSTM(I, H), torch.randn(T, B, I)
    with harness.interpreter():
        with pytest.raises(ValueError, match=r"lengths must have the shape \(5,\), got \(4,\)"):
            layer(x, lengths=torch.ones(4, dtype=torch.int64))
        with pytest.raises(ValueError, match="reset must be bool, got torch.uint8"):
            layer(x, reset=torch.zeros(T, B, dtype=torch.uint8))
        with pytest.raises(TypeError, match="lengths must be a tensor, got list"):
            layer(x, lengths=[1] * B)


@pytest.fixture
def default_dtype():
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("options, dtype, state, sequences", [
    *[(dict(), torch.float32, False, sequences) for sequences in SEQUENCES],
    (dict(bidirectional=True), torch.float32, True, "both"), (dict(proj_size=3), torch.float32, False, "lengths"),
    (dict(bidirectional=True, num_layers=2), torch.bfloat16, False, "packed"),
    (dict(zoneout=0.2), torch.float32, False, "resets")], ids=str)
def test_torchs_default_dtype_changes_nothing(options, dtype, state, sequences, default_dtype):
    """``torch.set_default_dtype`` is for tensors that a program makes, not for those that a layer needs inside."""
    layer, x, _, call = arguments(options, sequences, state and "proj_size" not in options, dtype)
    found = []
    for default in (torch.float32, torch.float64, torch.bfloat16):
        default_dtype(default)
        torch.manual_seed(1)
        layer.zero_grad()
        x.grad = None
        with harness.interpreter():
            y, _ = call()
            y = y.data if isinstance(y, PackedSequence) else y
            y.float().sin().sum().backward()        # h_n and c_n have no gradients
            found.append([y.detach(), x.grad, *(p.grad for p in layer.parameters())])
    for other in found[1:]:
        assert all(t.dtype == dtype and torch.equal(t, right) for t, right in zip(other, found[0]))
