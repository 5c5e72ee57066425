"""The providers: the layers that are timed. Each takes x (T, B, I) and returns y, (h_n, c_n) like nn.LSTM.

A provider makes its layer from a ``Problem``, or raises ``Unavailable`` with the reason why it cannot run the case.
Other packages are used if they are installed.
"""
import dataclasses
import functools
import importlib.util

import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import triton_lstm
from triton_lstm.op import on_device, tf32_allowed
from triton_lstm.plan import SCHEDULES, Limits

from .correctness import dtype_of
from .rows import CUDNN, CUDNN_GRAPH, OURS, PACKED, RESET_LOOP
from .workloads import Case


class Unavailable(Exception):
    """Why a provider does not run a case."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A case with its tensors. ``dy`` is the gradient of y, or None if the case does not train. ``reset`` is (T, B)
    bool or None."""
    case: Case
    weights: torch.nn.LSTM
    x: torch.Tensor
    dy: torch.Tensor | None
    reset: torch.Tensor | None

    @property
    def lengths(self):
        """The length of each row, on the CPU, where pack_padded_sequence needs it."""
        return torch.tensor(self.case.lengths)

    @staticmethod
    def of(case, device):
        """Random weights and inputs, the same in each run."""
        torch.manual_seed(0)
        dtype, D = dtype_of(case.dtype), case.directions
        weights = torch.nn.LSTM(case.input_size, case.hidden_size, case.layers, bidirectional=D == 2, device=device,
                                dtype=dtype)
        random = functools.partial(torch.randn, case.steps, case.batch, device=device, dtype=dtype)
        x = random(case.input_size)
        dy = random(D * case.hidden_size) if case.mode == "train" else None
        # Resets before 3 % of the steps, as in TorchRL's reset benchmark: episodes have 33 steps on average.
        reset = (torch.rand(case.steps, case.batch, device=device) < 0.03 if case.sequences == "resets" else None)
        return Problem(case, weights, x, dy, reset)

    def layer(self, layer_class):
        """An instance of ``layer_class``, which takes nn.LSTM's arguments, with the weights of this problem."""
        case = self.case
        layer = layer_class(case.input_size, case.hidden_size, case.layers, dropout=case.dropout,
                            bidirectional=case.directions == 2, device=self.x.device, dtype=self.x.dtype)
        layer.load_state_dict(self.weights.state_dict())
        return layer

    def runs(self, lstm):
        """``lstm``, an nn.LSTM, wrapped so that it runs this problem's sequences. In float64 it is the reference."""
        return {"padded": lambda: lstm, "ragged": lambda: Packed(lstm, self.lengths),
                "resets": lambda: ResetLoop(lstm, self.reset)}[self.case.sequences]()


class Wrapper(torch.nn.Module):
    """A layer that calls another one. Its parameters keep their names."""

    def __init__(self, lstm):
        super().__init__()
        self._lstm = [lstm]                 # in a list, because a submodule would add a prefix to the names
        for name, parameter in lstm.named_parameters():
            self.register_parameter(name, parameter)

    @property
    def lstm(self):
        return self._lstm[0]

    @property
    def dropout(self):
        return self.lstm.dropout

    @dropout.setter
    def dropout(self, value):
        self.lstm.dropout = value

    def train(self, mode=True):
        self.lstm.train(mode)
        return super().train(mode)


class Packed(Wrapper):
    """Packs x, calls the layer, and pads y: nn.LSTM needs sequences of different lengths packed, and ours can take them
    so."""

    def __init__(self, lstm, lengths):
        super().__init__(lstm)
        self.lengths = lengths

    def forward(self, x):
        y, state = self.lstm(pack_padded_sequence(x, self.lengths, enforce_sorted=False))
        return pad_packed_sequence(y, total_length=x.shape[0])[0], state


class ResetLoop(Wrapper):
    """Calls nn.LSTM once for each step and zeroes its state where an episode begins, like reinforcement-learning code.
    """

    def __init__(self, lstm, reset):
        super().__init__(lstm)
        self.keep = (~reset)[:, None, :, None]

    def forward(self, x):
        state = (x.new_zeros(self.lstm.num_layers, x.shape[1], self.lstm.hidden_size),) * 2
        outputs = []
        for x_t, keep in zip(x, self.keep):
            y, state = self.lstm(x_t[None], tuple(s * keep for s in state))
            outputs.append(y)
        return torch.cat(outputs), state


class Flagged(Wrapper):
    """triton_lstm.LSTM with the lengths or resets of a problem, which are already on its device."""

    def __init__(self, lstm, problem):
        super().__init__(lstm)
        self.timed_plan = lstm.timed_plan
        self.options = (dict(reset=problem.reset) if problem.reset is not None else
                        dict(lengths=problem.lengths.to(problem.x.device)))

    def forward(self, x):
        return self.lstm(x, **self.options)


class Graph(Wrapper):
    """Replays a layer from a CUDA graph that was captured for x. In training backward has a graph too."""

    def __init__(self, lstm, x, training):
        super().__init__(lstm)
        if training:
            x = x.detach().clone().requires_grad_()
            self.call = torch.cuda.make_graphed_callables(lstm, (x,))
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            for _ in range(3):
                lstm(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            result = lstm(x)

        def replay(given):
            if given.data_ptr() != x.data_ptr():
                raise ValueError("the graph was captured for another input")
            graph.replay()
            return result
        self.call = replay

    def forward(self, x):
        return self.call(x)


class Own(torch.nn.Module):
    """A layer with its own copies of a problem's weights, under the names of nn.LSTM."""

    def __init__(self, problem):
        super().__init__()
        for name, parameter in problem.weights.named_parameters():
            self.register_parameter(name, torch.nn.Parameter(parameter.detach().clone()))


class CompiledLoop(Own):
    """A Python loop over the steps; one step, in torch operators, is compiled by torch.compile."""

    def __init__(self, problem):
        super().__init__(problem)
        self.layers, self.directions, self.reset = problem.case.layers, problem.case.directions, problem.reset
        self.step = torch.compile(_step)

    def forward(self, x):
        h_n, c_n = [], []
        for layer in range(self.layers):
            outputs = []
            for end in ("", "_reverse")[:self.directions]:
                w, r, b_ih, b_hh = (getattr(self, f"{kind}_l{layer}{end}")
                                    for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
                gates = torch.nn.functional.linear(x, w, b_ih + b_hh)
                h = c = x.new_zeros(x.shape[1], r.shape[1])
                steps = [None] * x.shape[0]
                for t in range(x.shape[0]) if not end else reversed(range(x.shape[0])):
                    if self.reset is not None:
                        keep = ~self.reset[t, :, None]
                        h, c = h * keep, c * keep
                    h, c = self.step(gates[t], h, c, r)
                    steps[t] = h
                outputs.append(torch.stack(steps))
                h_n.append(h)
                c_n.append(c)
            x = torch.cat(outputs, -1)
        return x, (torch.stack(h_n), torch.stack(c_n))


def _step(gates, h, c, r):
    i, f, g, o = (gates + h @ r.t()).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


class TorchRL(Own):
    """The Triton LSTM of torchrl. It takes the batch first, so x should lie in memory in that order."""
    batch_first_memory = True

    def __init__(self, problem, function):
        super().__init__(problem)
        case, self.function = problem.case, function
        self.zeros = problem.x.new_zeros(case.batch, case.steps, case.hidden_size)
        reset = problem.reset
        self.is_init = (torch.zeros(case.batch, case.steps, dtype=torch.bool, device=problem.x.device) if reset is None
                        else reset.t().contiguous())

    def forward(self, x):
        y, _, h_n, c_n = self.function(x.transpose(0, 1), self.zeros, self.zeros, self.weight_ih_l0, self.weight_hh_l0,
                                       self.bias_ih_l0, self.bias_hh_l0, self.is_init)
        return y.transpose(0, 1), (h_n[None], c_n[None])


class FlashRNN(Own):
    """The Triton kernel of FlashRNN, after the input product, which its interface leaves to the caller."""
    batch_first_memory = True

    def __init__(self, problem, function):
        super().__init__(problem)
        self.function, self.dtype = function, str(problem.x.dtype).removeprefix("torch.")

    def forward(self, x):
        H = self.weight_hh_l0.shape[1]
        x = torch.nn.functional.linear(x.transpose(0, 1), self.weight_ih_l0)
        states, last = self.function(x.unflatten(-1, (4, 1, H)), self.weight_hh_l0.view(4, 1, H, H),
                                     (self.bias_ih_l0 + self.bias_hh_l0).view(4, 1, H), function="lstm",
                                     backend="triton_fused", dtype=self.dtype)
        # (h and c, B, T, head, H)
        return states[0, :, :, 0].transpose(0, 1), (last[0, :, 0, 0][None], last[1, :, 0, 0][None])


def _ours(schedule=None, packed=False, keep_gates=None):
    """triton_lstm.LSTM as people use it, or with a plan of this schedule, or with this ``keep_gates``. The layer also
    has the attribute ``timed_plan``."""
    def make(problem):
        case, x = problem.case, problem.x
        if packed and case.sequences != "ragged":
            raise Unavailable("only for ragged sequences")
        layer = problem.layer(triton_lstm.LSTM)
        plan, reason = on_device(case.batch, case.hidden_size, x.dtype, case.directions, x.device)
        if plan is None:        # our layer would fall back to torch's LSTM, so there is nothing to time
            raise Unavailable(reason)
        try:
            if schedule and plan.schedule != schedule:
                plan = triton_lstm.make_plan(case.batch, case.hidden_size, x.dtype, case.directions,
                                             limits=Limits.of(x.device), tf32=tf32_allowed(), schedule=schedule)
        except triton_lstm.PlanError as error:
            raise Unavailable(str(error)) from error
        layer.timed_plan, layer.keep_gates = plan, keep_gates
        if schedule:
            layer.plan, layer.keep_gates = plan, plan.keeps_gates(case.steps, case.layers)
        if packed:
            return Packed(layer, problem.lengths)
        return layer if case.sequences == "padded" else Flagged(layer, problem)
    return make


def _nn_lstm(sequences):
    def make(problem):
        if problem.case.sequences != sequences:
            raise Unavailable(f"only for {sequences} sequences")
        lstm = problem.layer(torch.nn.LSTM)
        lstm.flatten_parameters()
        return problem.runs(lstm)
    return make


def _graph(make):
    def make_graph(problem):
        if problem.x.device.type != "cuda":
            raise Unavailable("CUDA graphs need a GPU")
        if problem.case.dropout:
            raise Unavailable("a captured graph cannot leave out dropout, which the check needs")
        inner = make(problem)
        inner.train(problem.case.mode == "train")
        return Graph(inner, problem.x, problem.case.mode == "train")
    return make_graph


def _compiled_loop(problem):
    if problem.case.sequences == "ragged":
        raise Unavailable("only for padded sequences and resets")
    if problem.case.dropout:
        raise Unavailable("no dropout between layers")
    if problem.case.steps > 1024:
        raise Unavailable("more than 1024 steps, too many for a Python loop")
    return CompiledLoop(problem)


def _rival(layer_class, module, function, sequences):
    def make(problem):
        case = problem.case
        if importlib.util.find_spec(module.split(".")[0]) is None:
            raise Unavailable(f"{module.split('.')[0]} is not installed")
        if case.layers > 1 or case.directions > 1 or case.sequences not in sequences:
            raise Unavailable(f"only for one layer in one direction, with {' or '.join(sequences)} sequences")
        return layer_class(problem, getattr(importlib.import_module(module), function))
    return make


RECOMPUTE = f"{OURS} recompute"
PROVIDERS = {
    OURS: _ours(),
    CUDNN: _nn_lstm("padded"),
    PACKED: _nn_lstm("ragged"),
    RESET_LOOP: _nn_lstm("resets"),
    CUDNN_GRAPH: _graph(_nn_lstm("padded")),
    f"{OURS} packed": _ours(packed=True),
    f"{OURS} graph": _graph(_ours()),
    RECOMPUTE: _ours(keep_gates=False),
    **{f"{OURS} {schedule}": _ours(schedule) for schedule in SCHEDULES},
    "compiled loop": _compiled_loop,
    "TorchRL": _rival(TorchRL, "torchrl.modules.tensordict_module._rnn_triton", "lstm_triton", ("padded", "resets")),
    "FlashRNN": _rival(FlashRNN, "flashrnn", "flashrnn", ("padded",)),
}
# Single schedules, recomputing and the compiled loop are left out. They only help to understand why a layer is slow.
COMPARED = tuple(name for name in PROVIDERS if name not in {f"{OURS} {s}" for s in SCHEDULES}
                 | {RECOMPUTE, "compiled loop"})
