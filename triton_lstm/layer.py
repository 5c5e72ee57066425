"""``LSTM``: torch.nn.LSTM with the time loop in Triton."""
import warnings

import torch
from torch.nn.utils.rnn import PackedSequence

from .functional import DTYPES, lstm, runs_kernels
from .op import automatic_plan
from .plan import PlanError
from .step import step

# Held here, so that a program may put our class in the place of torch.nn.LSTM.
_TorchLSTM = torch.nn.LSTM
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
    Wrong input raises what nn.LSTM raises.

    It is an ``nn.RNNBase`` but not an ``nn.LSTM``: torch.compile refuses full graphs with instances of that one.
    The attribute ``plan`` (None: automatic) may hold a ``Plan`` to use for every layer.
    """

    plan = None

    def __init__(self, *args, **kwargs):
        if "mode" in kwargs:
            raise TypeError(f"LSTM got an unexpected argument mode={kwargs['mode']!r}")
        super().__init__("LSTM", *args, **kwargs)

    check_forward_args = _TorchLSTM.check_forward_args
    get_expected_cell_size = _TorchLSTM.get_expected_cell_size
    permute_hidden = _TorchLSTM.permute_hidden
    step = step

    def forward(self, input, hx=None):
        """As ``torch.nn.LSTM.forward``: input (T, B, I), (B, T, I) with ``batch_first``, or (T, I); hx (h_0, c_0)."""
        if not self._natively(input, hx):
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
            w, r, b = self._weights(layer, dtype)
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

    def _weights(self, layer, dtype):
        """W (D, 4H, I), R (D, 4H, H) and the summed bias (D, 4H) of a layer."""
        def both(kind):
            names = [f"{kind}_l{layer}"] + [f"{kind}_l{layer}_reverse"] * self.bidirectional
            weights = [getattr(self, name).to(dtype) for name in names]
            return torch.stack(weights) if self.bidirectional else weights[0].unsqueeze(0)
        b = both("bias_ih") + both("bias_hh") if self.bias else None
        return both("weight_ih"), both("weight_hh"), b

    @staticmethod
    def _compute_dtype(input):
        kind = input.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype

    def _natively(self, input, hx):
        """Whether the kernels compute this call. What nn.LSTM would refuse is left to nn.LSTM to refuse."""
        if isinstance(input, PackedSequence):
            return self._no("packed sequences", input.data)
        if not isinstance(input, torch.Tensor) or input.dim() not in (2, 3) or input.shape[-1] != self.input_size:
            return False
        weight = self.weight_hh_l0
        if weight.device != input.device or not runs_kernels(input, torch.float32):
            return False
        dtype = self._compute_dtype(input)
        if dtype == input.dtype and weight.dtype != input.dtype:
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
                    or s.dtype != input.dtype and dtype == input.dtype for s in hx):
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
