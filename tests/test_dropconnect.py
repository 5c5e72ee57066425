"""``drop_connect``: the mask, gradients, eval mode, and what it must leave unchanged."""
import copy
import pickle

import pytest
import torch

import harness
import triton_lstm

KINDS = [torch.nn.LSTM, triton_lstm.LSTM]


@pytest.fixture(params=["torch", "cpu", "interpreter"])
def make(request):
    """A function that makes layers of one class, always from the same seed, and whether the kernels run."""
    def layer(*args, **kwargs):
        torch.manual_seed(0)
        return (torch.nn.LSTM if request.param == "torch" else triton_lstm.LSTM)(*args, **kwargs)
    if request.param == "interpreter":
        with harness.interpreter():
            yield layer
    else:
        yield layer


def dropped(layer, p, seed):
    """(a plain layer with the weights that ``layer`` has in a forward after ``torch.manual_seed(seed)``, {name:
    mask})."""
    torch.manual_seed(seed)
    plain, masks = copy.deepcopy(layer), {}
    plain._forward_hooks.clear(), plain._forward_pre_hooks.clear()
    for name, weight in plain.named_parameters():
        if "weight_hh" in name:
            masks[name] = torch.nn.functional.dropout(torch.ones_like(weight), p)
            weight.data *= masks[name]
    return plain, masks


def results(layer, x, hx=None):
    layer.zero_grad()
    y, (h, c) = layer(x, hx)
    (y.square().sum() + c.sum()).backward()
    return y.detach(), h.detach(), c.detach(), {name: w.grad.clone() for name, w in layer.named_parameters()}


@pytest.mark.parametrize("options", [dict(), dict(num_layers=2, bidirectional=True, batch_first=True)], ids=str)
def test_is_a_plain_layer_with_masked_weights(make, options):
    """Outputs and gradients are those of a plain layer with masked weights, and the parameters do not change."""
    layer, x = make(4, 6, **options), torch.randn(5, 3, 4)
    before = copy.deepcopy(layer.state_dict())
    triton_lstm.drop_connect(layer, 0.4)
    for seed in (1, 2):
        plain, masks = dropped(layer, 0.4, seed)
        assert len(masks) == (4 if options else 1)
        want = results(plain, x)
        torch.manual_seed(seed)
        got = results(layer, x)
        for ours, right in zip(got[:3], want[:3]):
            torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-6)
        assert got[3].keys() == want[3].keys()
        for name, gradient in got[3].items():
            right = want[3][name] * masks.get(name, 1)
            torch.testing.assert_close(gradient, right, rtol=1e-4, atol=1e-6)
            if name in masks:
                kept = masks[name] != 0
                assert (gradient[kept] != 0).any() and not gradient[~kept].any()
                assert torch.equal(masks[name][kept].unique(), torch.tensor([1 / 0.6]))
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert all(isinstance(w, torch.nn.Parameter) for w in layer._flat_weights)


def test_share_dropped(make):
    """About a share p of the elements is dropped, other ones in each forward."""
    layer, seen = make(2, 40), []
    triton_lstm.drop_connect(layer, 0.25)
    layer.register_forward_pre_hook(lambda module, args: seen.append(module.weight_hh_l0.detach() == 0))
    for _ in range(2):
        layer(torch.zeros(1, 1, 2))
    first, second = seen
    assert abs(first.float().mean() - 0.25) < 0.02 and not torch.equal(first, second)


def test_eval_is_the_plain_layer(make):
    """In eval mode, with p = 0, and after remove(): the same bits as the plain layer, and no random numbers are
    drawn."""
    layer, x = make(4, 6, num_layers=2), torch.randn(5, 3, 4)
    want = layer(x)[0]
    drop = triton_lstm.drop_connect(layer, 0.5)
    assert not torch.equal(layer(x)[0], want)
    state = torch.get_rng_state()
    assert torch.equal(layer.eval()(x)[0], want)
    layer.train()
    drop.p = 0
    assert torch.equal(layer(x)[0], want)
    drop.p = 0.5
    drop.remove()
    assert torch.equal(layer(x)[0], want) and torch.equal(torch.get_rng_state(), state)
    assert not layer._forward_hooks and not layer._forward_pre_hooks and "flatten_parameters" not in vars(layer)


def test_drops_everything(make):
    """With p = 1 there is no recurrence, so each step is like a first step, except for c."""
    layer, x = make(4, 6), torch.randn(5, 3, 4)
    triton_lstm.drop_connect(layer, 1.0)
    y, (_, c) = layer(x, (torch.full((1, 3, 6), 100.), torch.zeros(1, 3, 6)))
    torch.testing.assert_close(y, layer(x)[0])
    results(layer, x)
    assert not layer.weight_hh_l0.grad.any() and layer.weight_ih_l0.grad.any()


def test_state_dict_convert_and_training():
    """When the layer is converted and back, its keys, parameters and optimizer stay, and training goes on."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(dict(lstm=torch.nn.LSTM(4, 6), head=torch.nn.Linear(6, 2)))
    keys, parameters = list(model.state_dict()), list(model.parameters())
    triton_lstm.drop_connect(model["lstm"], 0.3)
    assert list(model.state_dict()) == keys and all(map(lambda p, q: p is q, model.parameters(), parameters))
    x, trained = torch.randn(5, 3, 4), []
    for converts in (False, True):
        twin = copy.deepcopy(model)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
        for seed in range(4):
            if converts and seed in (1, 3):
                (triton_lstm.convert if seed == 1 else triton_lstm.to_torch)(twin)
            torch.manual_seed(seed)
            optimizer.zero_grad()
            with harness.interpreter():
                twin["head"](twin["lstm"](x)[0]).square().sum().backward()
            optimizer.step()
        trained.append(twin.state_dict())
    assert list(trained[0]) == list(trained[1]) == keys
    for name in keys:
        torch.testing.assert_close(trained[1][name], trained[0][name], rtol=1e-4, atol=1e-6)
        assert "weight" not in name or not torch.equal(trained[0][name], model.state_dict()[name])


@pytest.mark.parametrize("how", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))],
                         ids=["deepcopy", "pickle"])
def test_copies_drop_too(how, make):
    """Copies of a layer that has run a forward drop weights too, and each has a handle of its own."""
    layer, x = make(4, 6), torch.randn(5, 3, 4)
    drop = triton_lstm.drop_connect(layer, 0.5)
    layer(x)
    twin = how(layer)
    results_of = []
    for module in (layer, twin):
        torch.manual_seed(1)
        results_of.append(module(x)[0])
    assert torch.equal(*results_of)
    drop.p = 0
    torch.manual_seed(1)
    assert torch.equal(twin(x)[0], results_of[0]) and not torch.equal(layer(x)[0], results_of[0])


def test_weights_come_back_after_an_error(make):
    layer = make(4, 6)
    weight = layer.weight_hh_l0
    triton_lstm.drop_connect(layer, 0.5)
    with pytest.raises(RuntimeError, match="input_size"):
        layer(torch.zeros(5, 3, 7))
    assert layer.weight_hh_l0 is weight and layer._flat_weights[1] is weight and "flatten_parameters" not in vars(layer)


def test_parameters_are_not_moved(make, monkeypatch):
    """cuDNN's flat buffer holds the parameters. It must not be made of the dropped weights in each forward."""
    layer, calls = make(4, 6), []
    triton_lstm.drop_connect(layer, 0.5)
    monkeypatch.setattr(torch.nn.RNNBase, "flatten_parameters", lambda self: calls.append(self))
    layer(torch.zeros(5, 3, 4))
    assert not calls
    layer.float()
    assert calls == [layer] and "flatten_parameters" not in vars(layer)


def test_compile_full_graph():
    """The compiled layer is one graph, each call has its own mask, and the parameters stay unchanged."""
    torch.manual_seed(0)
    layer, x = triton_lstm.LSTM(4, 6), torch.randn(5, 3, 4)
    weight = layer.weight_hh_l0
    triton_lstm.drop_connect(layer, 0.5)
    function = lambda x: layer(x)[0].square().sum()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    with harness.interpreter():
        for seed in (1, 2):
            gradients = []
            for f in (function, compiled):
                layer.zero_grad()
                torch.manual_seed(seed)
                f(x).backward()
                assert layer.weight_hh_l0 is weight
                gradients.append(weight.grad.clone())
            torch.testing.assert_close(*gradients)
            assert 0.3 < (gradients[1] == 0).float().mean() < 0.7
    torch._dynamo.reset()


def test_errors():
    layer = triton_lstm.LSTM(4, 6)
    with pytest.raises(TypeError, match="got GRU"):
        triton_lstm.drop_connect(torch.nn.GRU(4, 6))
    for p in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="probability"):
            triton_lstm.drop_connect(layer, p)
    drop = triton_lstm.drop_connect(layer)
    assert drop.p == 0.5
    with pytest.raises(ValueError, match="already"):
        triton_lstm.drop_connect(layer)
    drop.remove()
    triton_lstm.drop_connect(layer)
    torch.nn.utils.parametrizations.weight_norm(other := triton_lstm.LSTM(4, 6), "weight_hh_l0")
    with pytest.raises(ValueError, match="weight_hh_l0: no plain parameter"):
        triton_lstm.drop_connect(other)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk")
@pytest.mark.parametrize("kind", KINDS, ids=["torchs", "ours"])
def test_on_a_gpu(kind):
    torch.manual_seed(0)
    layer, x = kind(30, 200, num_layers=2).cuda(), torch.randn(20, 17, 30, device="cuda")
    triton_lstm.drop_connect(layer, 0.4)
    plain, masks = dropped(layer, 0.4, 1)
    want = results(plain, x)
    torch.manual_seed(1)
    got = results(layer, x)
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=2e-3)
    for name, mask in masks.items():
        assert not got[3][name][mask == 0].any()
        torch.testing.assert_close(got[3][name], want[3][name] * mask, rtol=1e-2, atol=1e-2 * want[3][name].abs().max())
