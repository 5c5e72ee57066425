"""Published models, converted: the outputs and gradients of the unconverted model, from the same random weights, and
every layer computed by the kernels.

The packages are installed without their dependencies. Where a module imports what its network does not need, such as
readers of files, a stand-in is imported in its place, which each test names.
"""
import contextlib
import importlib
import importlib.machinery
import importlib.util
import itertools
import sys
import types
from unittest import mock

import pytest
import torch

import harness
import triton_lstm
from test_one_step import eager

PACKAGES = ("openunmix encodec einops pyannote.audio asteroid-filterbanks kokoro neuralhydrology flair speechbrain "
            "nemo_toolkit")

# Sums in fp32 in another order, through several layers.
CLOSE = dict(rtol=1e-4, atol=1e-5)


class Importer:
    """Finds modules before Python's own importers: of packages that are ``absent`` a stand-in, whatever is imported
    from them, and of the packages ``bare`` only what is imported from them, not their own ``__init__``."""

    def __init__(self, absent, bare):
        self.absent, self.bare = absent, bare

    def find_spec(self, name, path=None, target=None):
        if any(name == package or name.startswith(package + ".") for package in self.absent):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        found = importlib.machinery.PathFinder.find_spec(name, path) if name in self.bare else None
        if found is not None:
            found.loader = self
        return found

    def create_module(self, spec):
        return None if spec.name in self.bare else mock.MagicMock(name=spec.name)

    def exec_module(self, module):
        pass


@contextlib.contextmanager
def published(*needs, absent=(), bare=(), **given):
    """A context in which modules of the packages ``needs`` are imported as ``Importer`` says. given: attributes of
    stand-ins, {"package.module": {name: value}}. Afterwards no imported module is left."""
    for package in needs:
        if importlib.util.find_spec(package.split(".")[0]) is None:
            pytest.skip(f"{package} is not installed: pip install --no-deps {PACKAGES}")
    modules = {name: types.ModuleType(name) for name in given}
    for name, module in modules.items():
        vars(module).update(given[name], __path__=[])
    finder = Importer(absent, bare)
    with mock.patch.dict(sys.modules, modules), mock.patch.object(sys, "meta_path", [finder, *sys.meta_path]):
        yield importlib.import_module


def results(model, *inputs):
    """{name: tensor} of the outputs of a model and the gradients of its parameters and inputs in floating point."""
    model.zero_grad()
    inputs = [t.clone().requires_grad_() if torch.is_tensor(t) and t.is_floating_point() else t for t in inputs]
    y = model(*inputs)
    named = {f"y{n}": t for n, t in enumerate(y if isinstance(y, tuple) else (y,))}
    sum(t.square().sum() for t in named.values()).backward()
    named = {name: t.detach().clone() for name, t in named.items()}
    named |= {f"dx{n}": t.grad for n, t in enumerate(inputs) if torch.is_tensor(t) and t.requires_grad}
    return named | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, want, **tolerance):
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=lambda m: f"{name}: {m}", **tolerance)     # noqa: B023


@contextlib.contextmanager
def natively():
    """The interpreter, in which torch's own LSTM must not compute and kernels must be launched."""
    launch = harness.interpreted_launch
    wrong = AssertionError("torch's own LSTM computes")
    with (harness.interpreter(), mock.patch.object(torch._VF, "lstm", side_effect=wrong),
          mock.patch.object(launch, "launch_kernel", wraps=launch.launch_kernel) as launches):
        yield
    assert launches.called


def check(model, layers, *inputs):
    """The model has all gradients, and the same ones and outputs after ``convert``, inside ``everywhere``, and after
    ``to_torch``. layers: the names of its LSTMs."""
    want = results(model, *inputs)
    assert all(p.grad is not None and p.grad.any() for name in layers for p in model.get_submodule(name).parameters())
    with natively(), triton_lstm.everywhere():
        assert_same(results(model, *inputs), want, **CLOSE)
    assert all(type(model.get_submodule(name)) is torch.nn.LSTM for name in layers)
    assert triton_lstm.convert(model) == (layers, {})
    assert_same(results(model, *inputs), want, rtol=0, atol=0)      # on a CPU torch's own LSTM computes
    with natively():
        assert_same(results(model, *inputs), want, **CLOSE)
    assert triton_lstm.to_torch(model).swapped == layers
    assert_same(results(model, *inputs), want, rtol=0, atol=0)


def test_natively_sees_torchs_lstm():
    with pytest.raises(AssertionError, match="torch's own LSTM"), natively():
        torch.nn.LSTM(2, 3)(torch.randn(4, 1, 2))
    with pytest.raises(AssertionError), natively():
        pass


def test_open_unmix():
    """Three bidirectional layers between linear ones (Stöter et al. 2019). Dropout is off, because it is random. No
    torchaudio, which reads files."""
    with published("openunmix", absent=["torchaudio"]) as load:
        model = load("openunmix.model").OpenUnmix
    torch.manual_seed(0)
    check(model(nb_bins=12, nb_channels=2, hidden_size=16).eval(), ["lstm"], torch.rand(3, 2, 12, 5))


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_encodec():
    """Encoder and decoder of EnCodec (Défossez et al. 2022): convolutions around two layers with a skip connection. No
    torchaudio, which reads files."""
    with published("encodec", "einops", absent=["torchaudio"]) as load:
        encodec = load("encodec.modules")
    torch.manual_seed(0)
    options = dict(channels=1, dimension=8, n_filters=2, ratios=[4, 2], lstm=2)
    model = torch.nn.Sequential(encodec.SEANetEncoder(**options, norm="weight_norm"), encodec.SEANetDecoder(**options))
    check(model, ["0.model.7.lstm", "1.model.1.lstm"], torch.randn(2, 1, 40))


class Lightning(torch.nn.Module):
    """Takes the place of pyannote's base class, a LightningModule: what PyanNet uses of it."""

    def __init__(self, sample_rate, num_channels, task):
        super().__init__()
        self.hparams = types.SimpleNamespace(sample_rate=sample_rate, num_channels=num_channels)
        self.specifications = types.SimpleNamespace(powerset=False, classes=["one", "two", "three"])

    def save_hyperparameters(self, *names):
        given = sys._getframe(1).f_locals
        vars(self.hparams).update({name: given[name] for name in names})

    def default_activation(self):
        return torch.nn.Sigmoid()


@pytest.mark.parametrize("monolithic", [True, False], ids=["layers in one", "layer by layer"])
def test_pyannote_segmentation(monolithic):
    """PyanNet of pyannote.audio (Bredin 2023): SincNet, two bidirectional layers, linear ones. Its files and those of
    SincNet; a stand-in for the base class, which is Lightning's."""
    packages = "pyannote.audio", *(f"pyannote.audio.{name}" for name in (
        "core", "models", "models.blocks", "models.segmentation", "utils"))
    with published("pyannote", "asteroid_filterbanks", "einops", bare=packages, **{
            "pyannote.audio.core.model": dict(Model=Lightning), "pyannote.audio.core.task": dict(Task=None),
            "pyannote.core.utils.generators": dict(pairwise=itertools.pairwise)}) as load:
        model = load("pyannote.audio.models.segmentation.PyanNet").PyanNet
    torch.manual_seed(0)
    model = model(lstm=dict(hidden_size=9, monolithic=monolithic), linear=dict(hidden_size=8))
    model.build()
    check(model, ["lstm"] if monolithic else ["lstm.0", "lstm.1"], torch.randn(2, 1, 2000))


@pytest.fixture
def kokoro():
    """``kokoro.modules``, without the package's pipeline and its language model."""
    with published("kokoro", absent=["attr", "transformers"], bare=["kokoro"]) as load:
        return load("kokoro.modules")


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_kokoro_text_encoder(kokoro):
    """Convolutions, then a bidirectional layer over packed rows of different lengths, out of order."""
    torch.manual_seed(0)
    model, lengths = kokoro.TextEncoder(8, 3, 2, n_symbols=11).eval(), torch.tensor([4, 6, 1])
    check(model, ["lstm"], torch.randint(11, (3, 6)), lengths, torch.arange(6) >= lengths[:, None])


class Prosody(torch.nn.Module):
    """Both parts of ``ProsodyPredictor``: durations, then pitch and energy."""

    def __init__(self, predictor):
        super().__init__()
        self.predictor = predictor

    def forward(self, texts, style, lengths, alignment, mask):
        duration, encoded = self.predictor(texts, style, lengths, alignment, mask)
        return duration, *self.predictor.F0Ntrain(encoded, style)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:dropout option adds dropout after all but last:UserWarning")
def test_kokoro_prosody(kokoro):
    """Four bidirectional layers, three of them over packed rows."""
    torch.manual_seed(0)
    model, lengths = Prosody(kokoro.ProsodyPredictor(4, 8, nlayers=2, max_dur=5).eval()), torch.tensor([3, 5])
    layers = [f"predictor.{name}" for name in ("text_encoder.lstms.0", "text_encoder.lstms.2", "lstm", "shared")]
    check(model, layers, torch.randn(2, 8, 5), torch.randn(2, 4), lengths, torch.rand(2, 5, 7),
          torch.arange(5) >= lengths[:, None])


class Values(torch.nn.Module):
    """A model that returns a dictionary, as one that returns its values."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs):
        return tuple(self.model(inputs).values())


def test_neuralhydrology():
    """CudaLSTM of neuralhydrology (Kratzert et al. 2022), which sets the bias of the forget gate. Stand-ins for what
    reads data and configuration files: the configuration is a dictionary."""
    absent = ["numba", "pandas", "ruamel", "xarray", "neuralhydrology.datautils", "neuralhydrology.utils.samplingutils"]
    with published("neuralhydrology", absent=absent, bare=["neuralhydrology.modelzoo"]) as load:
        config = load("neuralhydrology.utils.config").Config
        model = load("neuralhydrology.modelzoo.cudalstm").CudaLSTM
        torch.manual_seed(0)
        model = Values(model(config(dict(
            model="cudalstm", head="regression", hidden_size=9, initial_forget_bias=3, dynamic_inputs=["rain", "heat"],
            static_attributes=["area"], target_variables=["flow"], output_dropout=0., seq_length=6))))
    days = {name: torch.randn(3, 6, 1) for name in ("rain", "heat")}
    check(model, ["model.lstm"], dict(x_d=days, x_s=torch.randn(3, 1)))


def test_flair_language_model():
    """LanguageModel of flair (Akbik et al. 2018): characters, two layers, and a state that is handed on. Its file and
    the one that makes the layers; stand-ins for what reads texts."""
    packages = ["flair", "flair.models", "flair.nn"]
    with published("flair", bare=packages, **{"flair.data": dict(Dictionary=None)}) as load:
        load("flair").device = "cpu"
        model = load("flair.models.language_model").LanguageModel
    torch.manual_seed(0)
    model = model(["a", "b", "c", "d"], True, hidden_size=9, nlayers=2, embedding_size=5, dropout=0.)

    class Chunks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, characters):
            first, _, hidden = self.model(characters[:4], self.model.init_hidden(3))
            second, _, hidden = self.model(characters[4:], hidden)
            return first, second, *hidden
    check(Chunks(), ["model.rnn"], torch.randint(4, (9, 3)))


class Batch(torch.nn.Module):
    """A model of speechbrain: outputs and states of padded rows, whose lengths are relative ones."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, lengths):
        y, (h, c) = self.model(x, lengths=lengths)
        return y, h, c


@pytest.mark.parametrize("lengths", [None, torch.tensor([0.5, 1., 0.2])], ids=["full rows", "packed rows"])
def test_speechbrain(lengths):
    """The LSTM of speechbrain's nnet, which its CRDNN and encoders have: it initialises the layer, flattens channels,
    and packs rows. Its file; stand-ins for attention, which other classes in it use, and for the log."""
    bare = ["speechbrain", "speechbrain.nnet", "speechbrain.utils"]
    with published("speechbrain", bare=bare, absent=["speechbrain.utils.logger", "speechbrain.nnet.attention"]) as load:
        model = load("speechbrain.nnet.RNN").LSTM
    torch.manual_seed(0)
    model = Batch(model(hidden_size=9, input_shape=(None, None, 3, 2), num_layers=2, bidirectional=True))
    check(model, ["model.rnn"], torch.randn(3, 5, 3, 2), lengths)


# The prediction network of an RNN-T (Graves 2012), which decodes label by label

@pytest.fixture
def rnnt_decoder():
    """``RNNTDecoder`` of NeMo: its file, that of its base class and that of its LSTM. Stand-ins for configuration,
    checks of types, export and adapters."""
    class Adapters:
        def is_adapter_available(self):
            return False
    bare = ["nemo", *(f"nemo.collections{name}" for name in ("", ".asr", ".asr.modules", ".common", ".common.parts"))]
    given = {"nemo.core": dict(NeuralModule=torch.nn.Module),
             "nemo.core.classes": dict(adapter_mixins=mock.MagicMock(), typecheck=lambda: lambda method: method),
             "nemo.core.classes.exportable": dict(Exportable=type("Exportable", (), {})),
             "nemo.core.classes.mixins": dict(AdapterModuleMixin=Adapters)}
    absent = ["omegaconf", "nemo.core.neural_types", "nemo.utils", "nemo.collections.asr.parts"]
    with published("nemo", bare=bare, absent=absent, **given) as load:
        return load("nemo.collections.asr.modules.rnnt").RNNTDecoder


class Outputs(torch.nn.Module):
    """The outputs and states of a decoder in training."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, targets):
        y, _, (h, c) = self.decoder(targets, None)
        return y, h, c


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.parametrize("options", [dict(), dict(rnn_hidden_size=12)], ids=["plain", "projected"])
def test_nemo_predictor_in_training(rnnt_decoder, options):
    torch.manual_seed(0)
    model = Outputs(rnnt_decoder(dict(pred_hidden=9, pred_rnn_layers=2, t_max=6, **options), vocab_size=5))
    check(model, ["decoder.prediction.dec_rnn.lstm"], torch.randint(5, (3, 6)))


def greedy(step, state, joint, encoded, blank, most=3):
    """Labels of each row and frame, found greedily: rows in which the blank wins keep their state and go on to the next
    frame. ``step`` (labels, state) -> y, state. encoded (T, B, H) is what an encoder gives."""
    rows, found = encoded.shape[1], []
    labels = torch.full((rows,), blank, device=encoded.device)
    y, state = step(labels, state)
    for frame in encoded:
        going = torch.ones(rows, dtype=torch.bool, device=encoded.device)
        for _ in range(most):
            best = joint(torch.tanh(frame + y)).argmax(-1)
            going = going & (best != blank)
            found.append(torch.where(going, best, blank))
            labels = torch.where(going, best, labels)
            new_y, new = step(labels, state)
            y = torch.where(going[:, None], new_y, y)
            state = tuple(torch.where(going[:, None], a, b) for a, b in zip(new, state))
    return torch.stack(found), state


class Transducer:
    """A predictor of NeMo with its ways to take a step, and all that ``greedy`` needs beside it."""

    def __init__(self, rnnt_decoder, device):
        torch.manual_seed(0)
        self.predictor = rnnt_decoder(dict(pred_hidden=9, pred_rnn_layers=2), vocab_size=5).to(device)
        self.blank, self.embed = self.predictor.blank_idx, self.predictor.prediction["embed"]
        self.joint, self.encoded = torch.nn.Linear(9, 6).to(device), torch.randn(7, 3, 9).to(device)
        self.state = tuple(torch.zeros(2, 3, 9, device=device) for _ in range(2))

    @property
    def lstm(self):
        return self.predictor.prediction["dec_rnn"].lstm

    def decode(self, step):
        return greedy(step, self.state, self.joint, self.encoded, self.blank)

    def call(self, labels, state):
        """As NeMo decodes."""
        y, state = self.predictor.predict(labels[:, None], state, add_sos=False)
        return y[:, 0], state

    def step(self, labels, state):
        return self.lstm.step(self.embed(labels), state)

    def graphed(self):
        """A step by a CUDA graph, which reads and writes a state of its own."""
        held = tuple(torch.zeros_like(s) for s in self.state)
        act = triton_lstm.make_graphed(self.lstm, self.encoded[0], held)

        def step(labels, state):
            for own, s in zip(held, state):
                own.copy_(s)
            return act(self.embed(labels)).clone(), tuple(s.clone() for s in held)
        return step


@pytest.mark.parametrize("way", ["call", "step", "graphed"])
def test_nemo_predictor_decodes(rnnt_decoder, way):
    """The labels are those of the unconverted model: none is decided by a difference as small as a rounding."""
    transducer = Transducer(rnnt_decoder, "cpu")
    with torch.no_grad():
        labels, last = transducer.decode(transducer.call)
        assert (labels == transducer.blank).any() and len(labels.unique()) > 3
        triton_lstm.convert(transducer.predictor)
        with natively(), mock.patch.object(triton_lstm.graphed, "_capture", eager):
            step = transducer.graphed() if way == "graphed" else getattr(transducer, way)
            got, got_last = transducer.decode(step)
    assert torch.equal(got, labels)
    for a, b in zip(got_last, last, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.gpu
def test_nemo_predictor_decodes_with_a_graph(rnnt_decoder):
    """Each step is a replay of a CUDA graph, of the same kernel: bit by bit."""
    transducer = Transducer(rnnt_decoder, "cuda")
    triton_lstm.convert(transducer.predictor)
    with torch.no_grad():
        labels, last = transducer.decode(transducer.step)
        got, got_last = transducer.decode(transducer.graphed())
    assert torch.equal(got, labels)
    assert all(torch.equal(a, b) for a, b in zip(got_last, last, strict=True))
