"""``triton_lstm.LSTM`` against torch.nn.LSTM, on layers and inputs that Hypothesis draws."""
import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_padded_sequence

import harness
import triton_lstm
from problems import BUDGET

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
# The interpreter is slow, so there is no deadline, and no health check of speed. Hypothesis sets up the fixture of
# conftest.py only once for all examples, which is fine, because it has no state. There is no database of failures; the
# printed blob reproduces one.
SETTINGS = settings(deadline=None, print_blob=True, database=None,
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


@dataclasses.dataclass(frozen=True)
class Call:
    """A layer and one call of it. Values of tensors come from ``seed``."""
    layer: dict
    dtype: torch.dtype
    T: int
    B: int | None       # None for unbatched input
    state: bool
    seed: int
    # {name of a further argument of forward: function of this Call that makes its value}
    options: dict = dataclasses.field(default_factory=dict)
    packed: bool = False
    keep_gates: bool | None = None

    def modules(self):
        """nn.LSTM, our LSTM, and nn.LSTM in float64, with the same weights. If the call has arguments that nn.LSTM does
        not take, the first and the last are our class too; without the interpreter it runs ``lstm_reference``."""
        torch.manual_seed(self.seed)
        theirs_class = triton_lstm.LSTM if self.options else torch.nn.LSTM
        theirs = theirs_class(**self.layer).to(self.dtype)
        ours, exact = triton_lstm.LSTM(**self.layer).to(self.dtype), theirs_class(**self.layer).double()
        for module in (ours, exact):
            module.load_state_dict(theirs.state_dict())
        ours.keep_gates = self.keep_gates
        return theirs, ours, exact

    def tensors(self):
        """(x, (h0, c0) or None)."""
        generator = torch.Generator().manual_seed(self.seed)
        normal = lambda *shape: torch.randn(shape, generator=generator).to(self.dtype)
        batch = () if self.B is None else (self.B,)
        lengths = (*batch, self.T) if self.layer["batch_first"] else (self.T, *batch)
        rows = self.layer["num_layers"] * (1 + self.layer["bidirectional"])
        state = lambda units: normal(rows, *batch, units)
        units = self.layer["hidden_size"]
        return normal(*lengths, self.layer["input_size"]), (
            (state(self.layer["proj_size"] or units), state(units)) if self.state else None)

    def results(self, module, backward):
        """{name: tensor} of all outputs and, if ``backward``, of gradients for random gradients of the outputs."""
        dtype = next(module.parameters()).dtype
        x, hx = self.tensors()
        inputs = dict(x=x, **dict(zip(("h0", "c0"), hx or ())))
        inputs = {name: t.to(dtype).requires_grad_() for name, t in inputs.items()}
        hx = (inputs["h0"], inputs["c0"]) if self.state else None
        if self.packed:
            x = pack_padded_sequence(inputs["x"], lengths(self).clamp(min=1), self.layer["batch_first"], False)
            y, (h, c) = module(x, hx)
            y = y.data
        else:
            y, (h, c) = module(inputs["x"], hx, **{name: make(self) for name, make in self.options.items()})
        if not backward:
            return dict(y=y, h_n=h, c_n=c)
        generator = torch.Generator().manual_seed(self.seed + 1)
        cotangents = [torch.randn(t.shape, generator=generator).to(self.dtype).to(dtype) for t in (y, h, c)]
        inputs |= dict(module.named_parameters())
        gradients = torch.autograd.grad((y, h, c), list(inputs.values()), cotangents)
        return dict(y=y, h_n=h, c_n=c) | {f"d{name}": g for name, g in zip(inputs, gradients)}


@st.composite
def calls(draw, options=None):
    """Draws a Call. ``options`` adds arguments like ``lengths`` and ``reset``: {name of the argument: strategy that
    draws a function of the Call, which makes the value}.
    """
    # 17 units or rows need a second tile of 16
    hidden_size = draw(st.sampled_from([1, 2, 3, 4, 5, 16, 17]))
    layer = dict(input_size=draw(st.integers(1, 4)), hidden_size=hidden_size,
                 proj_size=draw(st.sampled_from([0, *(n for n in (0, 1, 3, 16) if n < hidden_size)])),
                 num_layers=draw(st.sampled_from([1, 1, 1, 2])), bias=draw(st.booleans()),
                 batch_first=draw(st.booleans()), bidirectional=draw(st.booleans()))
    return Call(layer, dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
                T=draw(st.integers(1, 3)), B=draw(st.sampled_from([2, 1, 3, None, 0, 17])),
                state=draw(st.booleans()),
                seed=draw(st.integers(0, 2 ** 31)), options={name: draw(s) for name, s in (options or {}).items()},
                keep_gates=draw(st.sampled_from([None, True, False])))


def check(call, backward):
    """The error of each result is at most BUDGET times the larger of nn.LSTM's error and four roundings of values near
    1.

    Errors are absolute, unlike in ``Problem.check``. Tensors have few elements, and some are sums that cancel or are
    zero, where the error of nn.LSTM is a matter of chance.
    """
    theirs, ours, exact = call.modules()
    want, right = call.results(theirs, backward), call.results(exact, backward)
    with harness.interpreter():
        got = call.results(ours, backward)
    assert list(got) == list(right)
    for name, exactly in right.items():
        assert got[name].shape == want[name].shape and got[name].dtype == want[name].dtype == call.dtype, name
        rounding = 4 * torch.finfo(call.dtype).eps * (exactly.norm() + exactly.numel() ** 0.5)
        allowed = BUDGET * max((want[name].double() - exactly).norm(), rounding)
        difference = (got[name].double() - exactly).norm()
        assert difference <= allowed, f"{name}: error {difference:.2e}, allowed {allowed:.2e}"


@settings(SETTINGS, max_examples=160)
@given(calls())
def test_forward(call):
    check(call, backward=False)


@settings(SETTINGS, max_examples=64)
@given(calls())
def test_forward_and_backward(call):
    check(call, backward=True)


def lengths(call):
    return torch.randint(call.T + 1, (call.B if call.B is not None else 1,),
                         generator=torch.Generator().manual_seed(call.seed))


def reset(call):
    shape = (call.T,) if call.B is None else (call.B, call.T) if call.layer["batch_first"] else (call.T, call.B)
    return torch.rand(shape, generator=torch.Generator().manual_seed(call.seed)) < 0.3


nothing = lambda call: None


@settings(SETTINGS, max_examples=64)
@given(calls())
def test_packed(call):
    assume(call.B)
    check(dataclasses.replace(call, packed=True), backward=True)


@settings(SETTINGS, max_examples=64)
@given(calls(options=dict(lengths=st.sampled_from([lengths, nothing]), reset=st.sampled_from([reset, nothing]))))
def test_lengths_and_resets(call):
    check(call, backward=True)
