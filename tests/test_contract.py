"""What torch.nn.LSTM promises besides its results: constructor, state, replaced weights, aliasing, autograd, tracing.

Each test does the same with nn.LSTM and with ours. ``test_layer.py`` tests results, errors and fallbacks.
"""
import contextlib
import copy
import importlib
import io
import pickle
import warnings
from unittest import mock

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrizations, parametrize, prune

import harness
import triton_lstm
import triton_lstm.layer
from problems import error
from test_layer import compare, pair, run

CLOSE = dict(rtol=2e-5, atol=2e-6)      # for sums of at most 30 fp32 products in another order, with values near 1


@pytest.fixture
def kernels():
    """Runs the kernels in the interpreter and raises on a fallback, which would compare nn.LSTM with itself."""
    with harness.interpreter(), mock.patch.object(triton_lstm.layer._TorchLSTM, "forward", side_effect=AssertionError):
        yield


@pytest.fixture
def interpreter():
    with harness.interpreter():
        yield


def same_results(theirs, ours, x, hx=None):
    """Outputs and gradients of all parameters are the same for both layers, in fp32."""
    results = []
    for module, context in ((theirs, warnings.catch_warnings), (ours, harness.interpreter)):
        with context():
            y, (h, c) = module(x, hx)
            parameters = dict(module.named_parameters())
            loss = y.square().sum() + h.sum() + c.sum()
            gradients = torch.autograd.grad(loss, list(parameters.values()))
        results.append(dict(zip(parameters, gradients)) | dict(y=y, h_n=h, c_n=c))
    want, got = results
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=lambda m, name=name: f"{name}: {m}", rtol=1e-4, atol=1e-5)


# -- constructor ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments", [dict(input_size=2.0), dict(num_layers=-1), dict(bias=None), dict(dropout="0.5"),
                                       dict(batch_first="yes"), dict(proj_size=12)], ids=str)
def test_more_constructor_errors(arguments):
    arguments = dict(input_size=6, hidden_size=9) | arguments
    with pytest.raises((ValueError, TypeError)) as theirs:
        torch.nn.LSTM(**arguments)
    with pytest.raises(theirs.type) as ours:
        triton_lstm.LSTM(**arguments)
    assert str(ours.value) == str(theirs.value)


def test_dropout_with_one_layer_warns():
    for kind in (torch.nn.LSTM, triton_lstm.LSTM):
        with pytest.warns(UserWarning, match="num_layers greater than 1, but got dropout=0.5"):
            kind(6, 9, dropout=0.5)


def test_accepted_arguments():
    """Dropout may be 0 or 1; an int is stored as a float. bidirectional takes any truth value."""
    assert triton_lstm.LSTM(6, 9, 2, dropout=1).dropout == 1.0
    assert type(triton_lstm.LSTM(6, 9, 2, dropout=0).dropout) is float
    x = torch.randn(4, 3, 6)
    for truth in (1, 2, "yes"):
        theirs, ours, _ = pair(6, 9, bidirectional=truth)
        theirs.bidirectional = True             # the constructor takes any truth value, but forward needs a bool
        same_results(theirs, ours, x)
    with pytest.raises(TypeError, match="mode"):
        triton_lstm.LSTM(6, 9, mode="GRU")


def test_base_class_and_members():
    theirs, ours, _ = pair(6, 9, 2, bidirectional=True)
    assert isinstance(ours, torch.nn.RNNBase) and ours.mode == "LSTM"
    assert not list(ours.buffers()) and len(list(ours.modules())) == 1
    assert ours._flat_weights_names == theirs._flat_weights_names
    assert len(ours.all_weights) == 4
    for own, other in zip(ours.all_weights, theirs.all_weights, strict=True):
        assert all(map(torch.equal, own, other)) and len(own) == len(other) == 4
    assert all(own is getattr(ours, name) for own, name in zip(ours._flat_weights, ours._flat_weights_names))
    assert ours.flatten_parameters() is None


def test_reset_parameters():
    """reset_parameters draws the same numbers as nn.LSTM, into the existing tensors."""
    theirs, ours, _ = pair(6, 9, 2)
    before = list(ours.parameters())
    for module in (theirs, ours):
        torch.manual_seed(8)
        module.reset_parameters()
    assert all(map(torch.equal, theirs.parameters(), ours.parameters()))
    assert all(p is q for p, q in zip(before, ours.parameters(), strict=True))


# -- state ------------------------------------------------------------------------------------------------------------

def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, saved, lambda m: pickle.loads(pickle.dumps(m, 2))],
                         ids=["deepcopy", "copy", "torch.save", "pickle"])
def test_copies(copied):
    theirs, ours, _ = pair(6, 9, 2, bidirectional=True, batch_first=True)
    ours.note = "kept"
    other = copied(ours)
    assert type(other) is triton_lstm.LSTM and other.note == "kept" and other.batch_first
    assert all(own is getattr(other, name) for own, name in zip(other._flat_weights, other._flat_weights_names))
    same_results(theirs, other, torch.randn(4, 3, 6))
    other.weight_hh_l0 = torch.nn.Parameter(torch.zeros(36, 9))
    assert (copied is copy.copy) == (ours.weight_hh_l0 is other.weight_hh_l0), "nn.LSTM: only copy.copy shares"


@pytest.mark.parametrize("bias", [True, False])
def test_old_pickles(bias):
    """A pickled state may lack proj_size (before torch 1.8), and may have lists of tensors instead of names."""
    theirs, ours, _ = pair(6, 9, 2, bidirectional=True, bias=bias)
    state = ours.__getstate__()
    assert "_flat_weight_refs" not in state
    del state["proj_size"]
    older = dict(state)
    older["all_weights"] = ours.all_weights         # old versions stored tensors, not names
    del older["_flat_weights_names"], older["_all_weights"]
    for old in (state, older):
        module = triton_lstm.LSTM.__new__(triton_lstm.LSTM)
        module.__setstate__(old)
        assert module.proj_size == 0 and module._flat_weights_names == ours._flat_weights_names
        same_results(theirs, module, torch.randn(4, 3, 6))


def test_state_dict_of_a_checkpoint():
    """A checkpoint of nn.LSTM loads, strictly, by copy or by assignment into a layer on the meta device. The error for
    a missing key is the same."""
    theirs, _, _ = pair(6, 9, 2, bidirectional=True)
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    for device, assign in (("cpu", False), ("meta", True)):
        file.seek(0)
        ours = triton_lstm.LSTM(6, 9, 2, bidirectional=True, device=device)
        assert str(ours.load_state_dict(torch.load(file), assign=assign)) == "<All keys matched successfully>"
        same_results(theirs, ours, torch.randn(4, 3, 6))
    missing = {k: v for k, v in theirs.state_dict().items() if k != "weight_hh_l1"}
    messages = []
    for module in (theirs, ours):
        with pytest.raises(RuntimeError) as caught:
            module.load_state_dict(missing)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("convert", [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.float16),
                                     lambda m: m.half().float()], ids=["half", "bfloat16", "to", "and back"])
def test_conversion(convert, interpreter):
    theirs, ours, exact = pair(6, 9, 2, bidirectional=True)
    for module in (theirs, ours):
        convert(module)
    exact.load_state_dict(theirs.state_dict())          # the float64 layer has the rounded weights too
    assert all(w is p and w.dtype == theirs.weight_hh_l0.dtype
               for w, p in zip(ours._flat_weights, ours.parameters(), strict=True))
    compare(theirs, ours, exact, torch.randn(4, 3, 6).to(theirs.weight_hh_l0.dtype))


def set_attribute(m, value):
    m.weight_hh_l0 = torch.nn.Parameter(value)


def set_data(m, value):
    m.weight_hh_l0.data = value


def set_storage(m, value):
    with torch.no_grad():
        m.weight_hh_l0.set_(value)


def copy_into(m, value):
    with torch.no_grad():
        m.weight_hh_l0.copy_(value)


def delete_and_restore(m, value):
    del m.weight_hh_l0
    m.weight_hh_l0 = torch.nn.Parameter(value)


def register(m, value):
    m.register_parameter("weight_hh_l0", torch.nn.Parameter(value))


def through_the_dictionary(m, value):
    m._parameters["weight_hh_l0"] = torch.nn.Parameter(value)


REPLACEMENTS = [set_attribute, set_data, set_storage, copy_into, delete_and_restore, register, through_the_dictionary]


@pytest.mark.parametrize("replace", REPLACEMENTS, ids=lambda f: f.__name__)
def test_replaced_weights(replace):
    """After a call with the old weight, the next call uses the new one and gives it the gradient."""
    theirs, ours, _ = pair(6, 9)
    x, value = torch.randn(4, 3, 6), torch.randn(36, 9) / 3
    with harness.interpreter():
        before = ours(x)[0].detach()
    theirs(x)
    for module in (theirs, ours):
        replace(module, value.clone())
    same_results(theirs, ours, x)
    assert ours._flat_weights[1] is ours.weight_hh_l0 and torch.equal(ours.weight_hh_l0, value)
    with harness.interpreter():
        assert not torch.allclose(ours(x)[0], before, atol=1e-3)


def test_deleted_weight():
    """nn.LSTM uses the deleted weight further; ours names the missing weight."""
    ours = triton_lstm.LSTM(6, 9)
    del ours.weight_hh_l0
    with harness.interpreter(), pytest.raises(AttributeError, match="weight_hh_l0"):
        ours(torch.zeros(2, 3, 6))
    assert ours._flat_weights[1] is None


def weight_norm(m):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)          # deprecated, but still in use
        torch.nn.utils.weight_norm(m, "weight_hh_l0")


@pytest.mark.parametrize("reparametrize", [
    lambda m: parametrizations.weight_norm(m, "weight_hh_l0"), weight_norm,
    lambda m: parametrizations.orthogonal(m, "weight_hh_l0", orthogonal_map="cayley", use_trivialization=False),
    lambda m: prune.l1_unstructured(m, "weight_hh_l0", 0.5),
], ids=["weight_norm", "old weight_norm", "orthogonal", "prune"])
def test_reparametrized_weights(reparametrize):
    theirs, ours, _ = pair(6, 9, 2)
    x = torch.randn(4, 3, 6)
    for module in (theirs, ours):
        module(x)
        torch.manual_seed(4)
        reparametrize(module)
    assert "weight_hh_l0" not in dict(ours.named_parameters())
    same_results(theirs, ours, x)
    with torch.no_grad():
        for module in (theirs, ours):
            for p in module.parameters():
                p.mul_(1.1)
    same_results(theirs, ours, x)


def test_replica_for_data_parallel(kernels):
    """torch.nn.parallel.replicate makes a shallow copy whose parameters are plain tensors on another device."""
    _, ours, _ = pair(6, 9, 2)
    x, replica = torch.randn(4, 3, 6), ours._replicate_for_data_parallel()
    for name, p in ours.named_parameters():
        setattr(replica, name, 2 * p)
    assert not list(replica.parameters()) and replica._flat_weights[1] is replica.weight_hh_l0
    before = ours(x)[0]
    weights = {name: 2 * p for name, p in ours.named_parameters()}
    assert torch.equal(replica(x)[0], torch.func.functional_call(ours, weights, (x,))[0])
    assert torch.equal(ours(x)[0], before)


def test_parametrization_runs_once(kernels):
    """A call runs a parametrization once. One that draws random numbers, like DropConnect, needs that."""
    class Half(torch.nn.Module):
        calls = 0

        def forward(self, w):
            self.calls += 1
            return w / 2

    _, ours, _ = pair(6, 9)
    x, half = torch.randn(4, 3, 6), Half()
    parametrize.register_parametrization(ours, "weight_hh_l0", half)
    half.calls = 0
    y = ours(x)[0]
    assert half.calls == 1
    parametrize.remove_parametrizations(ours, "weight_hh_l0")       # leaves w / 2 as the parameter
    assert torch.equal(ours(x)[0], y) and type(ours) is triton_lstm.LSTM
    assert ours._flat_weights[1] is ours.weight_hh_l0


def test_shared_weights():
    """If two layers of a module, or two modules, share a parameter, its gradients add up."""
    theirs, ours, _ = pair(9, 9, 2)
    for module in (theirs, ours):
        module.weight_hh_l1 = module.weight_hh_l0
    assert len(list(ours.parameters())) == 7
    x = torch.randn(4, 3, 9)
    same_results(theirs, ours, x)

    results = []
    for module, context in ((theirs, warnings.catch_warnings), (ours, harness.interpreter)):
        other = copy.deepcopy(module)
        other.weight_ih_l0 = module.weight_ih_l0
        with context():
            (module(x)[0] * other(x)[0]).sum().backward()
        results.append(module.weight_ih_l0.grad)
    torch.testing.assert_close(*results, **CLOSE)


def test_functional_call(kernels):
    """The given weights are used and get the gradients. Afterwards the module has its own weights, unchanged."""
    _, ours, exact = pair(6, 9, 2, bidirectional=True)
    x, before = torch.randn(4, 3, 6), {n: p.detach().clone() for n, p in ours.named_parameters()}
    given = {n: (2 * p.detach()).requires_grad_() for n, p in ours.named_parameters()}
    y = torch.func.functional_call(ours, given, (x,))[0]
    gradients = torch.autograd.grad(y.sum(), list(given.values()))
    with torch.no_grad():
        for p in exact.parameters():
            p.mul_(2)
    run(ours, x)
    with mock.patch.object(triton_lstm.layer._TorchLSTM, "forward", torch_forward):
        right = exact(x.double())[0]
    for got, want in zip((y, *gradients), (right, *torch.autograd.grad(right.sum(), list(exact.parameters())))):
        assert error(got, want) < 1e-5
    assert all(torch.equal(p, before[n]) for n, p in ours.named_parameters())


torch_forward = torch.nn.LSTM.forward


# -- forward ----------------------------------------------------------------------------------------------------------

FORWARD = [dict(), dict(bidirectional=True), dict(num_layers=2), dict(batch_first=True), dict(proj_size=4)]


@pytest.mark.parametrize("options", FORWARD, ids=str)
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("batched", [True, False])
def test_results_are_tuples_of_unaliased_tensors(options, T, batched, kernels):
    ours = triton_lstm.LSTM(6, 9, **options)
    layers = ours.num_layers * (2 if ours.bidirectional else 1)
    shape = [T, 1, 6] if batched else [T, 6]
    if batched and ours.batch_first:
        shape = [1, T, 6]
    x = torch.randn(shape)
    hx = tuple(torch.randn((layers, 1, n) if batched else (layers, n)) for n in (ours.proj_size or 9, 9))
    result = ours(x, hx)
    assert type(result) is tuple and type(result[1]) is tuple and list(map(len, (result, result[1]))) == [2, 2]
    tensors = (x, *hx, result[0], *result[1])
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == 6
    before = [t.clone() for t in tensors]
    for n, t in enumerate(tensors):
        with torch.no_grad():
            t.fill_(7.)
        assert all(torch.equal(a, b) for a, b in zip(tensors[n + 1:], before[n + 1:]))


def test_state_is_taken_before_dropout(kernels):
    """h_n of the first layer is the same as without dropout. The input of the second layer is dropped out: at p = 1 it
    is zero."""
    ours = triton_lstm.LSTM(6, 9, 2, dropout=1.0)
    x = torch.randn(4, 3, 6)
    h, c = ours(x)[1]
    h_eval, c_eval = ours.eval()(x)[1]
    assert torch.equal(h[0], h_eval[0]) and torch.equal(c[0], c_eval[0]) and not torch.equal(h[1], h_eval[1])


def test_random_numbers_are_drawn_by_training_dropout_only(kernels):
    ours = triton_lstm.LSTM(6, 9, 2, dropout=0.5)
    x = torch.randn(4, 3, 6)
    draws = []
    for train, p in ((True, 0.5), (False, 0.5), (True, 0.0)):
        ours.train(train).dropout = p
        state = torch.get_rng_state()
        ours(x)
        draws.append(not torch.equal(torch.get_rng_state(), state))
    assert draws == [True, False, False]


@pytest.mark.parametrize("weights, input, state", [
    (torch.float32, torch.float32, None), (torch.float32, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float32, torch.bfloat16),
], ids=str)
@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_takes_mixed_types(weights, input, state, compute, kernels):
    """The kernels also run if x is bf16 and the weights are fp32, as after a Linear under autocast."""
    _, ours, exact = pair(6, 9, 2)
    ours.to(weights)
    x = torch.randn(4, 3, 6)
    hx = state and (torch.randn(2, 3, 9).to(state),) * 2
    with torch.autocast("cpu", compute):
        y, (h, c) = ours(x.to(input), hx)
    assert y.dtype == h.dtype == c.dtype == compute
    with mock.patch.object(triton_lstm.layer._TorchLSTM, "forward", torch_forward):
        right = exact(x.double(), hx and tuple(s.double() for s in hx))[0]
    # Rounding errors of input, weights and h: at most 2^-9 each in bf16, 2^-12 in fp16. bf16 inputs are rounded twice.
    assert error(y, right) < 4 * 2 ** -9


@pytest.mark.parametrize("weights, input", [(torch.float32, torch.float64), (torch.float32, torch.long),
                                            (torch.float64, torch.float32)], ids=str)
def test_autocast_refuses_what_torch_refuses(weights, input, interpreter):
    """Autocast does not cast float64 and integers, so their types do not match the weights'."""
    theirs, ours, _ = pair(6, 9, dtype=weights)
    messages = []
    for module in (theirs, ours):
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError) as caught:
            module(torch.ones(4, 3, 6).to(input))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_mixed_weights_are_refused(interpreter):
    theirs, ours, _ = pair(6, 9)
    messages = []
    for module in (theirs, ours):
        module.weight_hh_l0 = torch.nn.Parameter(torch.zeros(36, 9, dtype=torch.float64))
        with pytest.raises(RuntimeError) as caught:
            module(torch.zeros(4, 3, 6))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_in_the_place_of_nn_lstm(untold, interpreter):
    """With ours in the place of torch.nn.LSTM, a fallback still uses torch's own class, also if our module is reloaded
    after the replacement."""
    theirs, ours, _ = pair(6, 9)
    x = torch.randn(4, 3, 6)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 2, 1]))
    with mock.patch.object(torch.nn, "LSTM", triton_lstm.LSTM):
        module = importlib.reload(triton_lstm.layer)
        try:
            again = module.LSTM(6, 9)
            again.load_state_dict(theirs.state_dict())
            for layer in (ours, again, torch.nn.LSTM(6, 9)):
                layer.load_state_dict(theirs.state_dict())
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)
                    y, double = layer(packed)[0].data, copy.deepcopy(layer).double()(x.double())[0]
                torch.testing.assert_close(y, theirs(packed)[0].data)
                torch.testing.assert_close(double, copy.deepcopy(theirs).double()(x.double())[0])
                with pytest.raises(ValueError, match="2D or 3D"):
                    layer(torch.zeros(6))
        finally:
            module.LSTM = triton_lstm.LSTM


@pytest.fixture
def untold():
    with mock.patch.object(triton_lstm.functional, "_told", set()):
        yield


# -- autograd ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [dict(), dict(num_layers=2, bidirectional=True)], ids=str)
def test_nan_stays_in_its_batch_row(options, kernels):
    ours = triton_lstm.LSTM(6, 9, **options)
    x = torch.randn(4, 3, 6)
    results = []
    for value in (0.5, float("nan")):
        row = x.clone()
        row[2, 1] = value
        row.requires_grad_()
        hx = tuple(torch.zeros(ours.num_layers * (2 if ours.bidirectional else 1), 3, 9, requires_grad=True)
                   for _ in range(2))
        y, (h, c) = ours(row, hx)
        (y.square().sum() + h.sum() + c.sum()).backward()
        results.append([t.detach() for t in (y, h, c, row.grad, hx[0].grad, hx[1].grad)])
    others = torch.tensor([0, 2])
    for clean, dirty in zip(*results):
        assert torch.equal(clean[:, others], dirty[:, others])
        assert dirty[:, 1].isnan().any()


@pytest.mark.parametrize("options", FORWARD, ids=str)
@pytest.mark.parametrize("which", ["x", "y", "h_n", "c_n", "h0", "c0", "weight_hh_l0", "weight_ih_l0", "bias_hh_l0"])
def test_in_place_edits_raise_or_are_right(options, which, kernels):
    layers = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    ours = triton_lstm.LSTM(6, 9, **options)
    batch = 4 if ours.batch_first else 3

    def loss(edit):
        torch.manual_seed(0)
        x = torch.randn(4, 3, 6, requires_grad=True)
        h0, c0 = (torch.randn(layers, batch, n, requires_grad=True) for n in (ours.proj_size or 9, 9))
        inputs = [x, h0, c0, *ours.parameters()]
        x_, h0_, c0_ = x.clone(), h0.clone(), c0.clone()
        y, (h_n, c_n) = ours(x_, (h0_, c0_))
        total = y.sum() + h_n.sum() + c_n.sum()             # sums save no tensors for backward
        tensors = dict(x=x_, h0=h0_, c0=c0_, y=y, h_n=h_n, c_n=c_n, **dict(ours.named_parameters()))
        if edit:
            with torch.no_grad():
                tensors[which].mul_(2)
        try:
            return torch.autograd.grad(total, inputs)
        finally:
            if edit:
                with torch.no_grad():
                    tensors[which].div_(2)

    right = loss(False)
    try:
        got = loss(True)
    except RuntimeError as caught:
        assert "modified by an inplace operation" in str(caught)
    else:
        assert all(map(torch.equal, got, right))


def test_backward_twice(kernels):
    """A retained graph gives the same gradient again, and a freed one raises."""
    ours = triton_lstm.LSTM(6, 9, 2)
    total = ours(torch.randn(4, 3, 6))[0].sum()
    parameters = list(ours.parameters())
    first = torch.autograd.grad(total, parameters, retain_graph=True)
    second = torch.autograd.grad(total, parameters)
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(total, parameters)


@pytest.mark.parametrize("frozen", ["x", "weight_hh_l0", "weight_ih_l0", "bias_hh_l0", "all but bias_ih_l0"])
def test_frozen(frozen, kernels):
    """A frozen tensor gets no gradient, and the gradients of the others do not change."""
    ours = triton_lstm.LSTM(6, 9)
    x = torch.randn(4, 3, 6)
    both = []
    for freeze in (False, True):
        inputs = dict(x=x.clone(), **dict(ours.named_parameters()))
        for name, t in inputs.items():
            t.grad = None
            t.requires_grad_(not (freeze and (name == frozen or frozen == "all but bias_ih_l0" != f"all but {name}")))
        ours(inputs["x"])[0].square().sum().backward()
        both.append({name: t.grad for name, t in inputs.items()})
    for name, t in inputs.items():
        assert torch.equal(both[1][name], both[0][name]) if t.requires_grad else both[1][name] is None
    assert 0 < sum(t.requires_grad for t in inputs.values()) < 5


def test_inference_and_no_grad(kernels):
    _, ours, _ = pair(6, 9, 2, bidirectional=True)
    x = torch.randn(4, 3, 6)
    y = ours(x)[0]
    with torch.no_grad():
        without = ours(x)[0]
    with torch.inference_mode():
        inference, (h, c) = ours(x)
    assert y.requires_grad and not without.requires_grad
    assert inference.is_inference() and h.is_inference() and c.is_inference()
    assert torch.equal(y, without) and torch.equal(y, inference)


# -- torch.func -------------------------------------------------------------------------------------------------------

def squares(module, weights, x):
    y, (h, c) = torch.func.functional_call(module, weights, (x,))
    return y.square().sum() + h.sum() + c.sum()


@pytest.mark.parametrize("options", [dict(), dict(num_layers=2, bidirectional=True, bias=False)], ids=str)
def test_func_grad(options, kernels):
    ours = triton_lstm.LSTM(6, 9, **options)
    ours.keep_gates = False         # as by default under torch.func, so that results are equal to the bit
    weights, x = dict(ours.named_parameters()), torch.randn(4, 3, 6)
    got = torch.func.grad(lambda w: squares(ours, w, x))(weights)
    want = torch.autograd.grad(squares(ours, weights, x), list(weights.values()))
    assert all(torch.equal(got[name], g) for name, g in zip(weights, want))


def test_batched_gradients(kernels):
    """``is_grads_batched`` gives the same as a call for each gradient."""
    ours = triton_lstm.LSTM(6, 9, 2)
    y, (h, c) = ours(torch.randn(4, 3, 6))
    parameters = list(ours.parameters())
    batch = [torch.randn(3, *t.shape) for t in (y, h, c)]
    got = torch.autograd.grad((y, h, c), parameters, batch, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad((y, h, c), parameters, [g[n] for g in batch], retain_graph=True) for n in range(3)]
    assert all(torch.equal(g, torch.stack(rows)) for g, rows in zip(got, zip(*each), strict=True))


def test_vmap_over_stacked_weights(kernels):
    """An ensemble: outputs, and gradients by torch.func.grad inside vmap, around vmap, and by backward."""
    members = [triton_lstm.LSTM(3, 5, bidirectional=True) for _ in range(3)]
    weights, _ = torch.func.stack_module_state(members)
    x = torch.randn(2, 2, 3)
    with torch.no_grad():
        got = torch.func.vmap(lambda w: torch.func.functional_call(members[0], w, (x,)))(weights)
        for n, member in enumerate(members):
            y, (h, c) = member(x)
            assert torch.equal(got[0][n], y) and torch.equal(got[1][0][n], h) and torch.equal(got[1][1][n], c)
    for member in members:
        squares(member, dict(member.named_parameters()), x).backward()
    want = {name: torch.stack([dict(m.named_parameters())[name].grad for m in members]) for name in weights}
    ensemble = lambda w: torch.func.vmap(lambda w: squares(members[0], w, x))(w).sum()
    inside = torch.func.vmap(torch.func.grad(lambda w: squares(members[0], w, x)))(weights)
    outside = torch.func.grad(ensemble)(weights)
    ensemble(weights).backward()
    for name, right in want.items():
        for g in (inside[name], outside[name], weights[name].grad):
            torch.testing.assert_close(g, right, **CLOSE)


def test_gradients_of_each_sample(kernels):
    """vmap over inputs with shared weights gives a gradient for each sample."""
    ours = triton_lstm.LSTM(6, 9)
    weights = {n: p.detach() for n, p in ours.named_parameters()}
    x = torch.randn(3, 4, 6)
    got = torch.func.vmap(torch.func.grad(lambda w, x: squares(ours, w, x)), (None, 0))(weights, x)
    for n in range(3):
        squares(ours, dict(ours.named_parameters()), x[n]).backward()
        for name, p in ours.named_parameters():
            torch.testing.assert_close(got[name][n], p.grad, **CLOSE)
        ours.zero_grad()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")         # torch's forward mode uses it
def test_forward_mode_raises(kernels):
    """There is no formula for forward-mode derivatives, so torch raises. jacrev gives the right result instead."""
    ours = triton_lstm.LSTM(3, 4)
    x, f = torch.randn(2, 1, 3), lambda x: ours(x)[0]
    with pytest.raises((RuntimeError, NotImplementedError), match="jvp|forward AD"):
        torch.func.jvp(f, (x,), (torch.ones_like(x),))
    got = torch.func.jacrev(f)(x)
    want = torch.autograd.functional.jacobian(f, x)
    torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")     # torch's forward mode uses it
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("which", ["x", "weight_ih", "h0"])
def test_tangents_are_never_dropped(which, frozen, kernels):
    """An input with a tangent raises, also if nothing requires grad."""
    inputs = dict(x=torch.randn(3, 2, 4), weight_ih=torch.randn(20, 4), weight_hh=torch.randn(20, 5),
                  h0=torch.zeros(1, 2, 5), c0=torch.zeros(1, 2, 5))
    inputs["weight_hh"].requires_grad_(not frozen)
    with torch.autograd.forward_ad.dual_level():
        inputs[which] = torch.autograd.forward_ad.make_dual(inputs[which], torch.ones_like(inputs[which]))
        h0, c0 = inputs.pop("h0"), inputs.pop("c0")
        with pytest.raises(NotImplementedError, match="jacrev"):
            triton_lstm.lstm(**inputs, hx=(h0, c0))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("options", FORWARD[:3] + FORWARD[4:], ids=str)
def test_state_edited_in_place(options):
    """h_n and c_n may be edited in place: truncated backpropagation calls detach_() on them, and some code scales them.
    """
    gradients = []
    for kind in (torch.nn.LSTM, triton_lstm.LSTM):
        torch.manual_seed(0)
        layer, x = kind(6, 9, **options), torch.randn(4, 3, 6, requires_grad=True)
        with harness.interpreter():
            _, (h, c) = layer(x)
            h.mul_(2), c.add_(h.sum())
            gradients.append(torch.autograd.grad((c * h.mean()).sum(), [x, *layer.parameters()]))
            for state in layer(x)[1]:
                assert not state.detach_().requires_grad
    for want, got in zip(*gradients):
        torch.testing.assert_close(got, want, **CLOSE)


# -- tracing ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [dict(), dict(num_layers=2, bidirectional=True, batch_first=True)], ids=str)
def test_compile_does_not_recompile_by_length(options, kernels, monkeypatch):
    """By default torch.compile makes sizes symbolic at the second length. After that nothing is compiled again."""
    # With this constant, these small batches differ in keep_every, as batches of thousands of rows do.
    for module in (triton_lstm.functional, triton_lstm.plan.search):
        monkeypatch.setattr(module, "BACKWARD_ELEMENTS", 16 * 9 * 16)
    _, ours, _ = pair(6, 9, **options)
    torch._dynamo.reset()
    counter = CompileCounter()
    model = torch.compile(ours, fullgraph=True, backend=counter)
    counts = []
    for T, B in ((5, 3), (7, 4), (2, 6), (9, 2), (4, 5)):
        x = torch.randn(T, B, 6)
        got, want = model(x), ours(x)
        assert torch.equal(got[0], want[0]) and all(map(torch.equal, got[1], want[1]))
        counts.append(counter.frame_count)
    assert counts == [1, 2, 2, 2, 2]
    torch._dynamo.reset()


@pytest.mark.parametrize("frozen", [False, True])
def test_compile_bidirectional_without_gradients(frozen, kernels):
    """Without gradients dynamo traces the forward of an autograd.Function, not the Function itself."""
    _, ours, _ = pair(6, 9, 2, bidirectional=True)
    x = torch.randn(5, 3, 6)
    ours.requires_grad_(not frozen)
    torch._dynamo.reset()
    with contextlib.nullcontext() if frozen else torch.no_grad():
        got, want = torch.compile(ours, fullgraph=True, backend="eager")(x), ours(x)
    assert torch.equal(got[0], want[0]) and all(map(torch.equal, got[1], want[1]))
    torch._dynamo.reset()


def test_compile_with_state_and_autocast(kernels):
    _, ours, _ = pair(6, 9)
    torch._dynamo.reset()
    counter = CompileCounter()

    def f(x, h, c):
        with torch.autocast("cpu", torch.bfloat16):
            return ours(x, (h, c))
    model = torch.compile(f, fullgraph=True, dynamic=True, backend=counter)
    for T, B in ((5, 3), (7, 4)):
        inputs = torch.randn(T, B, 6), torch.randn(1, B, 9), torch.randn(1, B, 9)
        (y, (h, c)), want = model(*inputs), f(*inputs)
        assert y.dtype == h.dtype == c.dtype == torch.bfloat16
        assert torch.equal(y, want[0]) and torch.equal(h, want[1][0]) and torch.equal(c, want[1][1])
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, kernels):
    """The exported program has one operator for each layer, dynamic lengths and batches, and the same state_dict."""
    _, ours, _ = pair(6, 9, 2, bidirectional=True)
    lengths = {0: torch.export.Dim("T", min=2), 1: torch.export.Dim("B", min=2)}
    program = torch.export.export(ours, (torch.randn(5, 3, 6),), dynamic_shapes=(lengths,), strict=strict)
    ops = [node.target for node in program.graph.nodes if "triton_lstm" in str(node.target)]
    assert ops == [torch.ops.triton_lstm.lstm.default] * 2
    assert list(program.state_dict) == list(ours.state_dict())
    for shape in ((5, 3, 6), (2, 7, 6)):
        x = torch.randn(shape)
        got, want = program.module()(x), ours(x)
        assert torch.equal(got[0], want[0]) and all(map(torch.equal, got[1], want[1]))
