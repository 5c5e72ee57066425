"""``LSTM``: torch.nn.LSTM with the time loop in Triton."""
import warnings

import torch
from torch.nn.modules.rnn import LSTM as _TorchLSTM  # stays torch's where a program puts ours in torch.nn
from torch.nn.utils.rnn import PackedSequence

from .functional import DTYPES, lstm, runs_kernels
from .op import automatic_plan
from .plan import PlanError

_told = set()


def _tell_once(reason):
    if reason not in _told:
        _told.add(reason)
        warnings.warn(f"triton_lstm.LSTM uses torch's own LSTM: {reason}", stacklevel=4)


class LSTM(torch.nn.RNNBase):
    """Drop-in for ``torch.nn.LSTM``: same arguments, parameters, initialisation, ``state_dict`` and results.

    On CUDA tensors in float16, bfloat16 or float32 (and on CPU tensors under ``TRITON_INTERPRET=1``) each layer is one
    call of ``triton_lstm.lstm``. Everything else is computed by torch's own LSTM: silently on other devices, with one
    warning for what the kernels do not cover (packed input, ``proj_size``, float64, R larger than the chip).
    Wrong input raises what nn.LSTM raises. Weights are read anew at each call, so that whatever replaces one
    (assignment, parametrizations, ``torch.func.functional_call``, FSDP) takes effect.

    It is an ``nn.RNNBase`` but not an ``nn.LSTM``: torch.compile refuses full graphs with instances of that one.
    The attribute ``plan`` (None: automatic) may hold a ``Plan`` to use for every layer.
    """

    plan = None

    def __init__(self, *args, **kwargs):
        if "mode" in kwargs:
            raise TypeError(f"LSTM got an unexpected argument mode={kwargs['mode']!r}")
        super().__init__("LSTM", *args, **kwargs)

    @property
    def _flat_weights(self):
        """nn.LSTM keeps a list and looks for changes; read anew, nothing that replaces a weight can make it stale."""
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights):
        pass

    check_forward_args = _TorchLSTM.check_forward_args
    get_expected_cell_size = _TorchLSTM.get_expected_cell_size
    permute_hidden = _TorchLSTM.permute_hidden

    def forward(self, input, hx=None):
        """As ``torch.nn.LSTM.forward``: input (T, B, I), (B, T, I) with ``batch_first``, or (T, I); hx (h_0, c_0)."""
        weights = [getattr(self, name) for name in self._flat_weights_names]    # once: they may be parametrized
        if not self._natively(input, hx, weights):
            return _TorchLSTM.forward(self, input, hx)
        batch_dim = 0 if self.batch_first else 1
        x = input.unsqueeze(batch_dim) if input.dim() == 2 else input
        if self.batch_first:
            x = x.transpose(0, 1)
        B = x.shape[1]
        D = 2 if self.bidirectional else 1
        dtype = self._compute_dtype(input)
        if hx is None:
            h0 = c0 = x.new_zeros(self.num_layers * D, B, self.hidden_size, dtype=dtype)
        else:
            h0, c0 = (s.unsqueeze(1) if input.dim() == 2 else s for s in hx)
        x, h0, c0 = x.to(dtype), h0.to(dtype), c0.to(dtype)
        h_n, c_n = [], []
        for layer in range(self.num_layers):
            if layer and self.dropout:
                x = torch.nn.functional.dropout(x, self.dropout, self.training)
            w, r, b = self._stacked(weights, layer, dtype)
            state = slice(layer * D, (layer + 1) * D)
            x, (h, c) = lstm(x, w, r, b, (h0[state], c0[state]), plan=self.plan)
            h_n.append(h)
            c_n.append(c)
        h_n, c_n = (torch.cat(s) if len(s) > 1 else s[0] for s in (h_n, c_n))
        if self.batch_first:
            x = x.transpose(0, 1)
        if input.dim() == 2:
            x, h_n, c_n = x.squeeze(batch_dim), h_n.squeeze(1), c_n.squeeze(1)
        return x, (h_n, c_n)

    def _stacked(self, weights, layer, dtype):
        """W (D, 4H, I), R (D, 4H, H) and the summed bias (D, 4H) of a layer."""
        D, kinds = 2 if self.bidirectional else 1, 4 if self.bias else 2
        own = [w.to(dtype) for w in weights[layer * D * kinds:(layer + 1) * D * kinds]]
        both = lambda kind: torch.stack(own[kind::kinds]) if D == 2 else own[kind].unsqueeze(0)
        return both(0), both(1), both(2) + both(3) if self.bias else None

    @staticmethod
    def _autocast(input):
        """Whether autocast decides the type; like all of torch, it leaves float64 and integers as they are."""
        return (torch.is_autocast_enabled(input.device.type) and input.is_floating_point()
                and input.dtype != torch.float64)

    def _compute_dtype(self, input):
        return torch.get_autocast_dtype(input.device.type) if self._autocast(input) else input.dtype

    def _natively(self, input, hx, weights):
        """Whether the kernels compute this call. What nn.LSTM would refuse is left to nn.LSTM to refuse."""
        if isinstance(input, PackedSequence):
            return self._no("packed sequences", input.data)
        if not isinstance(input, torch.Tensor) or input.dim() not in (2, 3) or input.shape[-1] != self.input_size:
            return False
        if weights[0].device != input.device or not runs_kernels(input, torch.float32):
            return False
        dtype = self._compute_dtype(input)
        accepted = lambda t: t.dtype == input.dtype or self._autocast(input) and self._autocast(t)
        if not all(map(accepted, weights)):
            return False
        if dtype not in DTYPES:
            return self._no(f"{dtype}", input)
        if self.proj_size:
            return self._no("proj_size", input)
        T, B = input.shape[:2] if input.dim() == 3 else (input.shape[0], 1)
        if self.batch_first and input.dim() == 3:
            T, B = B, T
        if T == 0:
            return False
        if hx is not None:
            layers = self.num_layers * (2 if self.bidirectional else 1)
            shape = (layers, B, self.hidden_size) if input.dim() == 3 else (layers, self.hidden_size)
            if not isinstance(hx, (tuple, list)) or len(hx) != 2 or any(
                    not isinstance(s, torch.Tensor) or tuple(s.shape) != shape or s.device != input.device
                    or not accepted(s) for s in hx):
                return False
        if self.plan is None and not torch.compiler.is_compiling():
            try:
                automatic_plan(B, self.hidden_size, dtype, 2 if self.bidirectional else 1, input.device)
            except PlanError as error:
                return self._no(f"{error}", input)
        return True

    @staticmethod
    def _no(reason, tensor):
        if runs_kernels(tensor, torch.float32):         # on other devices nobody expects the kernels
            _tell_once(reason)
        return False
