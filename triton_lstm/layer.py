"""``LSTM``: torch.nn.LSTM with the time loop in Triton."""
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.rnn import LSTM as _TorchLSTM  # stays torch's where a program puts ours in torch.nn
from torch.nn.utils._expanded_weights import ExpandedWeight
from torch.nn.utils.rnn import PackedSequence

from . import apart, eager, one_step
from .functional import DTYPES, one_of, recorded, runs_kernels, tell_once, zoneout_rates
from .op import autocasts, on_device, sequences_of
from .plan import Plan
from .projection import too_large_together


class LSTM(torch.nn.RNNBase):
    """Drop-in for ``torch.nn.LSTM``: same arguments, parameters, initialisation, ``state_dict`` and results.

    The kernels compute on CUDA tensors in float16, bfloat16 or float32, and on CPU tensors in these types under
    ``TRITON_INTERPRET=1``. Each layer is then one call of ``triton_lstm.lstm``, or several layers overlap in time if
    they fit on the chip side by side. On other devices torch's own LSTM computes. It also computes, after one warning,
    what the kernels do not cover: float64, R too large for the device, and with ``proj_size`` a product R W_hr (4H, H)
    too large for the chip, because the kernels use that product instead of R; and what ``tune(..., allow_torch=True)``
    has measured to be faster there. One step (T = 1) without gradients is one launch a layer, unless rows and units are
    very many, and R of any size will do.

    Wrong input raises what nn.LSTM raises. Weights are read again at each call, so a weight may be replaced by
    assignment, parametrizations, ``torch.func.functional_call`` or FSDP.

    The class is an ``nn.RNNBase`` but not an ``nn.LSTM``: torch.compile refuses full graphs with an nn.LSTM in them.

    Three attributes are not in nn.LSTM. They may be changed at any time.

    plan       a ``Plan`` for every layer, or None for automatic plans
    keep_gates whether forward keeps the gates for backward, see ``triton_lstm.lstm``: True for speed, False for memory,
               None to keep them where those of all layers take no more memory than recomputing one layer's
    zoneout    a rate or a pair (rate_h, rate_c), also an argument: in training mode each layer keeps earlier values of
               h and c at random, with masks of its own; in eval mode it takes the expectation. See
               ``triton_lstm.lstm``. Where the kernels do not compute, such a layer runs step by step in torch
               operators. Raises ValueError for a rate outside [0, 1], and together with ``proj_size``
    """

    plan: Plan | None = None
    keep_gates: bool | None = None
    zoneout: float | tuple[float, float] = 0.

    _given_weights: list[Tensor] | None = None      # assigned to ``_flat_weights``, and not the layer's own

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True,
                 batch_first: bool = False, dropout: float = 0., bidirectional: bool = False, proj_size: int = 0,
                 device: torch.device | str | int | None = None, dtype: torch.dtype | None = None, *,
                 zoneout: float | tuple[float, float] = 0.):
        super().__init__("LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
                         proj_size, device, dtype)
        if any(zoneout_rates(zoneout)):     # otherwise the layer has what torch's has and nothing else
            self.zoneout = zoneout
            self._zoned()

    def _zoned(self):
        """Whether the layer has zoneout. ValueError where its rates are not valid."""
        zoned = any(zoneout_rates(self.zoneout))
        if zoned and self.proj_size:
            raise ValueError(f"zoneout with proj_size={self.proj_size} is not implemented")
        return zoned

    def extra_repr(self):
        return super().extra_repr() + (f", zoneout={self.zoneout}" if self._zoned() else "")

    @property
    def _flat_weights(self):
        """The weights that the layer computes with: its own, read at each access, or others that were assigned here, as
        some code for nn.LSTM does. nn.LSTM always keeps a list, which is stale after a weight is replaced."""
        return self._given_weights or [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights):
        weights = list(weights)
        own = [getattr(self, name, None) for name in self._flat_weights_names]
        if len(weights) != len(own):
            raise ValueError(f"_flat_weights must be the {len(own)} tensors of {self._flat_weights_names}, got "
                             f"{len(weights)}")
        self._given_weights = None if all(given is of for given, of in zip(weights, own)) else weights

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if vars(self).get("_given_weights") is not None and name in self._flat_weights_names:
            self._given_weights = None          # as nn.LSTM, which makes a new list when a weight has changed

    def __setstate__(self, state):
        super().__setstate__(state)
        self._given_weights = None              # a copy of an nn.LSTM makes a new list too

    def _weights(self):
        """``_flat_weights``. AttributeError where one is missing."""
        own = vars(self)
        parameters = own["_parameters"]
        # getattr would find these too, but each by a call of nn.Module.__getattr__
        return self._given_weights or [parameters[name] if name in parameters and name not in own else
                                       getattr(self, name) for name in self._flat_weights_names]

    # nn.LSTM's own differ in their types from nn.RNNBase's: states are pairs
    check_forward_args = _TorchLSTM.check_forward_args              # pyright: ignore[reportAssignmentType]
    get_expected_cell_size = _TorchLSTM.get_expected_cell_size
    permute_hidden = _TorchLSTM.permute_hidden                      # pyright: ignore[reportAssignmentType]

    def forward(self, input: Tensor | PackedSequence, hx: Sequence[Tensor] | None = None, *,
                # torch.jit.ScriptModule stops here and shows these lines: call triton_lstm.to_torch(layer) before
                lengths: Tensor | None = None, reset: Tensor | None = None) -> tuple[Any, Any]:
        """As ``torch.nn.LSTM.forward``, with two more arguments.

        input     (T, B, I), with ``batch_first`` (B, T, I), or (T, I) without a batch, or a ``PackedSequence``
        hx        (h_0, c_0), (num_layers D, B, H) each for D directions; without a batch (num_layers D, H); zeros if
                  None. With ``proj_size`` h_0 has that many units
        lengths   (B,) integers, see ``triton_lstm.lstm``. Every layer uses them
        reset     (T, B) bool, with ``batch_first`` (B, T), or (T,) without a batch, see ``triton_lstm.lstm``. Every
                  layer uses it

        Returns output and (h_n, c_n) as nn.LSTM. Raises what nn.LSTM raises, and what ``triton_lstm.lstm`` raises for
        ``lengths``, ``reset`` and ``plan``. Raises ValueError for ``lengths`` or ``reset`` with a packed sequence.
        """
        masked = lengths is not None or reset is not None
        if recorded() and not masked and not self._zoned():
            return _TorchLSTM.forward(self, input, hx)  # pyright: ignore[reportCallIssue, reportArgumentType]
        if not masked and (found := self._one_step(input, hx)) is not None:
            return found
        if (found := self._eager(input, hx, lengths, reset)) is not None:
            return found
        if isinstance(input, torch.fx.Proxy):
            return self._leaf(input, hx, dict(lengths=lengths, reset=reset) if masked else {})
        if masked and isinstance(input, PackedSequence):
            raise ValueError(f"lengths and reset are for padded input, got {type(input).__name__}")
        weights = self._weights()               # once: they may be parametrized
        if not self._natively(input, hx, weights, masked) and not masked and not self._zoned():
            return _TorchLSTM.forward(self, input, hx)  # pyright: ignore[reportCallIssue, reportArgumentType]
        if isinstance(input, PackedSequence):
            return self._packed(input, hx, weights)
        batch_dim = 0 if self.batch_first else 1
        x = input.unsqueeze(batch_dim) if input.dim() == 2 else input
        if hx is not None and input.dim() == 2:
            hx = [s.unsqueeze(1) for s in hx]
        if reset is not None and input.dim() == 2:
            reset = reset.unsqueeze(batch_dim)
        if self.batch_first:
            x = x.transpose(0, 1)
            reset = None if reset is None else reset.t()
        y, (h_n, c_n) = self._layers(x, hx, weights, lengths=lengths, reset=reset)
        if self.batch_first:
            y = y.transpose(0, 1)
        if input.dim() == 2:
            y, h_n, c_n = y.squeeze(batch_dim), h_n.squeeze(1), c_n.squeeze(1)
        return y, (h_n, c_n)

    def step(self, x: Tensor, state: Sequence[Tensor] | None = None, *, inplace: bool = False
             ) -> tuple[Tensor, Sequence[Tensor]]:
        """One timestep of an LSTM in one direction: what the layer computes for T = 1.

        x        (B, I), with and without ``batch_first``
        state    (h, c), (num_layers, B, H) each, as hx of the layer; zeros if None
        inplace  write the new state into the tensors of ``state`` and return those. Then each replay of a captured
                 CUDA graph continues from the state of the replay before. For inference, under torch.no_grad()

        Returns y (B, H), which is the last layer's new h, and the new state. With ``proj_size`` y and h have that many
        units. Nothing makes the host wait for the GPU. Hooks of the layer run. In training mode dropout between layers
        and zoneout draw new masks at every step. ``triton_lstm.make_graphed`` makes a CUDA graph of a step.

        Raises what the layer raises. Raises ValueError for a bidirectional layer, because its reverse direction begins
        at the end of the sequence; for x that is not (B, I); for ``inplace`` without a state; and for ``inplace`` with
        gradients, because they need the state that is overwritten.
        """
        if self.bidirectional:
            raise ValueError("a bidirectional LSTM has no single step: its reverse direction begins with the last "
                             "input")
        if x.dim() != 2:
            raise ValueError(f"x must have the shape (B, I), got {tuple(x.shape)}")
        if inplace and state is None:
            raise ValueError("inplace needs a state to write to")
        time = 1 if self.batch_first else 0
        y, new = self(x.unsqueeze(time), state)
        if not inplace:
            return y.squeeze(time), new
        assert state is not None
        if any(s.requires_grad for s in new):
            raise ValueError("inplace is for inference, call it under torch.no_grad(): backward needs the state before")
        for old, s in zip(state, new):
            old.copy_(s)
        return y.squeeze(time), state

    def _leaf(self, input, hx, masks) -> Any:
        """The call in a graph that torch.fx is tracing, as one node, like that of a layer of torch.nn."""
        tracer, state = input.tracer, () if hx is None else (hx,)
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (input, *state), masks)

    def __prepare_scriptable__(self):
        """torch.jit.script calls this of every module before it compiles."""
        raise RuntimeError("torch.jit.script compiles no triton_lstm.LSTM: call triton_lstm.to_torch(model) before, "
                           "which makes it an nn.LSTM with the same parameters; or use torch.jit.trace")

    def _one_step(self, input, hx):
        """``forward`` of T = 1 where no gradient is wanted, by one launch a layer; None for other calls, for wrong
        input, and where something needs the general way."""
        if (not isinstance(input, torch.Tensor) or input.dim() != 3 or input.shape[1 if self.batch_first else 0] != 1
                or torch.compiler.is_compiling() or self.plan is not None or self.zoneout or self.proj_size
                or input.shape[-1] != self.input_size or self.training and self.dropout
                or not runs_kernels(input, input.dtype)):
            return None
        D, H, layers = 2 if self.bidirectional else 1, self.hidden_size, self.num_layers
        found = one_step.layers(input, hx, self._weights(),
                                (layers, D, self.input_size, H, self.bias),
                                (layers * D, input.shape[0 if self.batch_first else 1], H))
        return found and (found[0], found[1:])

    def _eager(self, input, hx, lengths, reset):
        """``forward`` of padded input with a batch by ``eager.layers``, before all that other calls need; None for
        other calls and for wrong input."""
        if (torch.compiler.is_compiling() or self.zoneout or self.proj_size
                or not isinstance(input, torch.Tensor) or input.dim() != 3 or input.shape[-1] != self.input_size
                or not runs_kernels(input, input.dtype) or autocasts(input)):
            return None
        D, H, layers = 2 if self.bidirectional else 1, self.hidden_size, self.num_layers
        x = input
        if self.batch_first:
            x = input.transpose(0, 1)
            if reset is not None:
                if not isinstance(reset, torch.Tensor) or reset.dim() != 2:
                    return None
                reset = reset.t()
        if x.shape[0] == 0 or hx is not None and not (
                isinstance(hx, (tuple, list)) and len(hx) == 2
                and all(isinstance(s, torch.Tensor) and s.shape == (layers * D, x.shape[1], H) for s in hx)):
            return None
        found = eager.layers(x, hx, self._weights(),
                             (layers, D, self.input_size, H, self.bias), self.plan,
                             self.dropout if self.training else 0., self.keep_gates, None, lengths, reset)
        return (found[0].transpose(0, 1), found[1]) if found and self.batch_first else found

    def _packed(self, input, hx, weights):
        """``forward`` of a packed sequence. States are in the caller's order of rows."""
        data, sizes, order, original_order = input
        hx = None if hx is None else self.permute_hidden(hx, order)
        y, state = self._layers(data, hx, weights, batch_sizes=sizes)
        state = self.permute_hidden(state, original_order)      # pyright: ignore[reportArgumentType]
        return PackedSequence(y, sizes, order, original_order), state

    def _layers(self, x, hx, weights, batch_sizes=None, **masks):
        """All layers over x (T, B, I) or packed (N, I). hx: two tensors (num_layers D, B, H), or None."""
        D = 2 if self.bidirectional else 1
        dtype = self._compute_dtype(x)
        x, hx = x.to(dtype), hx and tuple(s.to(dtype) for s in hx)
        if not (torch.compiler.is_compiling() or self.proj_size or self._zoned()) and runs_kernels(x, dtype):
            found = eager.layers(x, hx, [w.to(dtype) for w in weights],
                                 (self.num_layers, D, self.input_size, self.hidden_size, self.bias), self.plan,
                                 self.dropout if self.training else 0., self.keep_gates, batch_sizes, **masks)
            if found is not None:
                return found
        h_n, c_n = [], []
        for layer in range(self.num_layers):
            if layer and self.dropout:
                x = torch.nn.functional.dropout(x, self.dropout, self.training)
            w, r, b, hr = self._stacked(weights, layer, dtype)
            state = hx and tuple(s[layer * D:(layer + 1) * D] for s in hx)
            x, (h, c) = one_of(self.num_layers, x, w, r, b, state, hr, masks.get("lengths"), masks.get("reset"),
                               batch_sizes, self.zoneout, self.training, self.plan, None, self.keep_gates)
            h_n.append(h)
            c_n.append(c)
        h_n, c_n = (torch.cat(s) if len(s) > 1 else s[0] for s in (h_n, c_n))
        return x, (h_n, c_n)

    def _stacked(self, weights, layer, dtype):
        """The weights of one layer as ``lstm`` takes them, in ``dtype``: W (D, 4H, I), R (D, 4H, P), the sum of both
        biases (D, 4H) or None, and W_hr (D, P, H) or None. ``weights`` are those of all layers, in the order of
        ``_flat_weights_names``. ``self`` may also be an nn.LSTM."""
        D, kinds = 2 if self.bidirectional else 1, (4 if self.bias else 2) + (1 if self.proj_size else 0)
        own = [w.to(dtype) for w in weights[layer * D * kinds:(layer + 1) * D * kinds]]
        return *apart.stacked(own, kinds), apart.stack(own[kinds - 1::kinds]) if self.proj_size else None

    @staticmethod
    def _autocast(input):
        """Whether autocast decides the type of this call. It does not for float64 and integers, as everywhere in
        torch."""
        return (torch.is_autocast_enabled(input.device.type) and input.is_floating_point()
                and input.dtype != torch.float64)

    @staticmethod
    def _compute_dtype(input):
        return torch.get_autocast_dtype(input.device.type) if LSTM._autocast(input) else input.dtype

    def _natively(self, input, hx, weights, masked=False):
        """Whether the kernels compute this call. False also for wrong input, for which nn.LSTM then raises its
        error."""
        packed = isinstance(input, PackedSequence)
        x = input.data if packed else input
        if not isinstance(x, torch.Tensor) or x.dim() not in ((2,) if packed else (2, 3)) or (
                x.shape[-1] != self.input_size):
            return False
        if weights[0].device != x.device or not runs_kernels(x, torch.float32):
            return False
        if isinstance(weights[0], ExpandedWeight):
            return self._no("torch.nn.utils computes gradients of each sample only of torch's operators", x)
        dtype = self._compute_dtype(x)
        accepted = lambda t: t.dtype == x.dtype or self._autocast(x) and self._autocast(t)
        if not all(map(accepted, weights)):
            return False
        if dtype not in DTYPES:
            return self._no(f"{dtype}", x)
        unbatched = not packed and x.dim() == 2
        T, B = (len(input.batch_sizes), int(input.batch_sizes[0])) if packed else (x.shape[0], 1) if unbatched else (
            x.shape[:2][::-1] if self.batch_first else x.shape[:2])
        if T == 0:
            return False
        if hx is not None:
            rows = (self.num_layers * (2 if self.bidirectional else 1), *(() if unbatched else (B,)))
            units = self.proj_size or self.hidden_size, self.hidden_size
            if not isinstance(hx, (tuple, list)) or len(hx) != 2 or any(
                    not isinstance(s, torch.Tensor) or tuple(s.shape) != (*rows, n) or s.device != x.device
                    or not accepted(s) for s, n in zip(hx, units)):
                return False
        if self.plan is None and not self._zoned() and not torch.compiler.is_compiling():
            D = 2 if self.bidirectional else 1
            plan, reason = on_device(B, self.hidden_size, dtype, D, x.device, sequences=sequences_of(masked, packed),
                                     or_torch=not self.proj_size)
            if plan is not None and self.proj_size and not masked:
                one_row, _ = on_device(1, self.hidden_size, dtype, D, x.device, measure=False)
                reason = too_large_together(one_row)
            if reason is not None:
                return self._no(reason, x)
        return True

    @staticmethod
    def _no(reason, tensor):
        if runs_kernels(tensor, torch.float32):         # on other devices nobody expects the kernels
            tell_once(reason)
        return False
