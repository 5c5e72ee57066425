"""``convert`` and ``to_torch``: modules and parameters stay the same objects, results stay the same, and the layers
that cannot be converted are returned with reasons. Published models are in ``test_published.py``."""
import contextlib
import copy
from unittest import mock

import pytest
import torch
from torch.nn.utils import parametrizations, parametrize

import harness
import triton_lstm


class Shared(torch.nn.Module):
    """A model with LSTMs in nested containers: one of them is in two places, one is bidirectional, one is frozen."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.ModuleDict({"first": torch.nn.LSTM(4, 6, bidirectional=True, batch_first=True)})
        self.body = torch.nn.ModuleList([torch.nn.ModuleList([torch.nn.LSTM(12, 12, batch_first=True)])])
        self.again = self.body[0][0]
        self.frozen = torch.nn.LSTM(12, 5, num_layers=2, dropout=0.2, batch_first=True).requires_grad_(False).eval()
        self.head = torch.nn.Linear(5, 2)

    def forward(self, x):
        for layer in (self.stem["first"], self.body[0][0], self.again, self.frozen):
            x = layer(x)[0]
        return self.head(x)


LAYERS = ["stem.first", "body.0.0", "frozen"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Shared()


class Head(torch.nn.Module):
    """A model that returns only y of an LSTM."""

    def __init__(self, lstm):
        super().__init__()
        self.lstm = lstm

    def forward(self, x):
        return self.lstm(x)[0]


def results(model, x):
    """{name: tensor} of the output and the gradients of a model."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    named = {"y": y.detach(), "dx": x.grad}
    return named | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, want, **tolerance):
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=lambda m: f"{name}: {m}", **tolerance)     # noqa: B023


def same_objects(model):
    """Names and ids of all modules and parameters, in order."""
    return [(name, id(m)) for name, m in model.named_modules(remove_duplicate=False)], [
        (name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)]


def test_there_and_back(model):
    x, objects, before = torch.randn(3, 5, 4), same_objects(model), copy.deepcopy(model.state_dict())
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    want = results(model, x)
    assert triton_lstm.convert(model) == (LAYERS, {})
    assert all(type(model.get_submodule(name)) is triton_lstm.LSTM for name in LAYERS)
    assert model.again is model.body[0][0] and same_objects(model) == objects
    assert not model.frozen.training and model.stem.training and not model.frozen.weight_hh_l1.requires_grad
    assert_same(results(model, x), want, rtol=0, atol=0)            # on CPU tensors ours calls torch's LSTM
    with harness.interpreter():
        assert_same(results(model, x), want, rtol=1e-4, atol=1e-6)
    model.again.plan = triton_lstm.make_plan(3, 12, torch.float32)
    assert triton_lstm.convert(model) == ([], {})
    assert triton_lstm.to_torch(model) == (LAYERS, {})
    assert all(type(model.get_submodule(name)) is torch.nn.LSTM for name in LAYERS)
    assert same_objects(model) == objects and attributes == {name: set(vars(m)) for name, m in model.named_modules()}
    assert_same(model.state_dict(), before, rtol=0, atol=0)
    assert_same(results(model, x), want, rtol=0, atol=0)


def test_interpreter_runs_the_kernels(model, monkeypatch):
    """The comparison in ``test_there_and_back`` runs kernels; it does not compare torch with itself."""
    triton_lstm.convert(model)
    calls, real = [], harness.interpreted_launch.launch_kernel
    monkeypatch.setattr(harness.interpreted_launch, "launch_kernel",
                        lambda kernel, *a, **kw: (calls.append(kernel), real(kernel, *a, **kw)))
    with harness.interpreter():
        model(torch.randn(3, 5, 4))
    assert len(calls) == 5                      # two for the frozen layer, two for the shared one, one for the other


@pytest.mark.parametrize("natively", [False, True], ids=["torch", "natively"])
def test_optimizer_goes_on(model, natively):
    """Converting a model in the middle of its training, with Adam and a scheduler, gives the same weights in the
    end."""
    other = copy.deepcopy(model)
    x = torch.randn(3, 5, 4)
    for m, converts in ((model, True), (other, False)):
        optimizer = torch.optim.Adam([p for p in m.parameters() if p.requires_grad], lr=0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        for step in range(6):
            if converts and step == 3:
                triton_lstm.convert(m)
            optimizer.zero_grad()
            with harness.interpreter() if natively else contextlib.nullcontext():
                m(x).square().sum().backward()
            optimizer.step()
            scheduler.step()
    # Adam moves a weight by 0.01 at a step at most, and in proportion to the relative error of its gradient
    assert_same(model.state_dict(), other.state_dict(), rtol=0, atol=1e-6 if natively else 0)


def test_hooks(model):
    seen = []
    layer = model.body[0][0]
    layer.register_forward_pre_hook(lambda module, args: seen.append(("before", module)))
    layer.register_forward_hook(lambda module, args, result: (result[0] * 2, result[1]))
    layer.weight_hh_l0.register_hook(lambda gradient: gradient * 0)
    x = torch.randn(3, 5, 4)
    want = results(model, x)
    assert seen == [("before", layer)] * 2 and not want["body.0.0.weight_hh_l0"].any()
    triton_lstm.convert(model)
    with harness.interpreter():
        assert_same(results(model, x), want, rtol=1e-4, atol=1e-6)
    assert seen == [("before", layer)] * 4


@pytest.mark.filterwarnings("ignore:triton_lstm.LSTM uses torch's own LSTM. torch.float64:UserWarning")
@pytest.mark.parametrize("natively", [False, True], ids=["torch", "natively"])
@pytest.mark.parametrize("kind", [torch.float64, torch.float16], ids=str)
def test_dtype(model, kind, natively):
    x, other = torch.randn(3, 5, 4, dtype=kind), copy.deepcopy(model).to(kind)
    model.to(kind)
    triton_lstm.convert(model)
    assert model.again.weight_hh_l0.dtype == kind
    with harness.interpreter() if natively else contextlib.nullcontext():
        torch.testing.assert_close(model(x), other(x), rtol=0, atol=4 * torch.finfo(kind).eps)
        assert model.float().again.weight_hh_l0.dtype == torch.float32
        torch.testing.assert_close(model(x.float()), other.float()(x.float()))


def test_the_model_itself():
    layer = torch.nn.LSTM(4, 6)
    assert triton_lstm.convert(layer) == ([""], {}) and type(layer) is triton_lstm.LSTM
    assert triton_lstm.to_torch(layer) == ([""], {}) and type(layer) is torch.nn.LSTM


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_parametrized(kind):
    """A parametrized module has a class of its own, which torch makes. Its weights, and removal, still work."""
    torch.manual_seed(0)
    layer, x = torch.nn.LSTM(4, 6), torch.randn(5, 3, 4)
    model = Head(layer).eval()                 # in training spectral_norm changes its estimate
    getattr(parametrizations, kind)(layer, "weight_hh_l0")
    want = results(model, x)
    for _ in range(2):
        assert triton_lstm.convert(layer) == ([""], {}) and isinstance(layer, triton_lstm.LSTM)
        with harness.interpreter():
            assert_same(results(model, x), want, rtol=1e-4, atol=1e-6)
        assert triton_lstm.to_torch(layer) == ([""], {}) and isinstance(layer, torch.nn.LSTM)
        assert_same(results(model, x), want, rtol=0, atol=0)
    triton_lstm.convert(layer)
    parametrize.remove_parametrizations(layer, "weight_hh_l0")
    assert type(layer) is triton_lstm.LSTM
    torch.testing.assert_close(model(x), want["y"])


def test_old_weight_norm():
    """The old torch.nn.utils.weight_norm, which computes the weight in a pre-hook."""
    torch.manual_seed(0)
    with pytest.warns(FutureWarning, match="weight_norm"):
        layer = torch.nn.utils.weight_norm(torch.nn.LSTM(4, 6), "weight_hh_l0")
    x, model = torch.randn(5, 3, 4), Head(layer)
    want = results(model, x)
    triton_lstm.convert(model)
    with harness.interpreter():
        assert_same(results(model, x), want, rtol=1e-4, atol=1e-6)


def test_what_is_left():
    class Own(torch.nn.LSTM):
        pass

    class OurOwn(triton_lstm.LSTM):
        pass

    replaced = torch.nn.LSTM(2, 3)
    replaced.forward = lambda x: x
    with pytest.warns(Warning, match="`torch.jit.script` is deprecated"):
        scripted = torch.jit.script(torch.nn.LSTM(2, 3))
    model = torch.nn.ModuleDict(dict(own=Own(2, 3), replaced=replaced, scripted=scripted, gru=torch.nn.GRU(2, 3),
                                     ours=OurOwn(2, 3),
                                     parametrized=parametrizations.weight_norm(Own(2, 3), "weight_hh_l0")))
    classes = [type(m) for m in model.values()]
    swapped, left = triton_lstm.convert(model)
    assert swapped == [] and [type(m) for m in model.values()] == classes
    assert left.keys() == {"own", "replaced", "scripted", "parametrized"}
    assert left["own"] == "Own is a subclass of torch.nn.modules.rnn.LSTM" and "instance" in left["replaced"]
    assert "scripted" in left["scripted"]
    assert triton_lstm.to_torch(model).left["ours"] == "OurOwn is a subclass of triton_lstm.layer.LSTM"


def test_a_class_in_the_place_of_torchs(model, monkeypatch):
    """A program may put our class in the place of torch.nn.LSTM. convert still converts torch's own layers."""
    monkeypatch.setattr(torch.nn, "LSTM", triton_lstm.LSTM)
    assert triton_lstm.convert(model).swapped == LAYERS
    triton_lstm.to_torch(model)
    assert type(model.again).__module__ == "torch.nn.modules.rnn"


class Library(torch.nn.Module):
    """Makes its layers inside, and more of them at each call, as code does that one cannot edit."""

    def __init__(self):
        super().__init__()
        self.lstm = torch.nn.LSTM(4, 6, batch_first=True)
        assert isinstance(self.lstm, torch.nn.LSTM)
        self.special = Special(6, 6, batch_first=True)

    def forward(self, x):
        made = torch.nn.LSTM(6, 6)
        made.load_state_dict(self.special.state_dict())
        return made(self.special(self.lstm(x)[0])[0])[0]


class Special(torch.nn.LSTM):
    """A subclass: its forward may do anything."""

    def forward(self, x):
        return super().forward(2 * x)


def test_everywhere():
    """Layers run our kernels inside, also those made there; subclasses do not; afterwards all is as it was."""
    torch.manual_seed(0)
    x, before = torch.randn(2, 3, 4), torch.nn.LSTM.forward
    outside = Library()
    with harness.interpreter(), mock.patch.object(triton_lstm.eager, "layers", wraps=triton_lstm.eager.layers) as runs:
        right = results(outside, x)
        assert not runs.called
        with triton_lstm.everywhere():
            library = Library()
            library.load_state_dict(outside.state_dict())
            parameters = list(library.parameters())
            got = results(library, x)
            assert runs.call_count == 2 and type(library.lstm) is triton_lstm.LSTM
            with triton_lstm.everywhere():
                results(outside, x)
            assert type(outside.lstm) is torch.nn.LSTM and type(library.lstm) is triton_lstm.LSTM
            assert triton_lstm.to_torch(library).swapped == ["lstm"]
            results(library, x)
        assert runs.call_count == 6
        results(library, x)
        assert runs.call_count == 6
    assert torch.nn.LSTM.forward is before and type(library.lstm) is torch.nn.LSTM
    assert type(library.special) is Special
    assert all(now is then for now, then in zip(library.parameters(), parameters, strict=True))
    for name, value in right.items():
        torch.testing.assert_close(got[name], value, msg=name)


@pytest.mark.parametrize("computing", [harness.interpreter, contextlib.nullcontext], ids=["natively", "torch"])
def test_everywhere_ends_with_an_exception(computing):
    before, layer = torch.nn.LSTM.forward, torch.nn.LSTM(4, 6)
    with computing(), pytest.raises(RuntimeError, match="must be equal to input_size"), triton_lstm.everywhere():
        layer(torch.randn(3, 2, 4))
        assert type(layer) is triton_lstm.LSTM
        layer(torch.randn(3, 2, 5))
    assert torch.nn.LSTM.forward is before and type(layer) is torch.nn.LSTM
