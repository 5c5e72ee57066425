"""``LSTMCell``: torch.nn.LSTMCell with each step as one call of ``lstm``."""
from collections.abc import Sequence

import torch

from . import apart, one_step
from .functional import lstm, runs_kernels
from .layer import LSTM
from .op import on_device


class LSTMCell(torch.nn.LSTMCell):
    """Drop-in for ``torch.nn.LSTMCell``: same arguments, parameters, ``state_dict``, initialisation, results, errors.

    ``cell(input, (h, c))`` returns the new (h, c). input is (B, I), h and c are (B, H), or all are without B; without
    a state h and c are zero. The kernels compute in the cases in which they do for ``triton_lstm.LSTM``, torch's own
    cell in all others. Each call loads R again: if the inputs of several steps are known, ``LSTM`` is faster.

    There is no zoneout: the argument raises NotImplementedError. ``LSTM.step`` has it.
    """

    def __init__(self, *args, **kwargs):
        if "zoneout" in kwargs:
            raise NotImplementedError("LSTMCell has no zoneout: use LSTM(..., zoneout=...) and its method step")
        super().__init__(*args, **kwargs)

    def forward(self, input: torch.Tensor, hx: Sequence[torch.Tensor] | None = None
                ) -> tuple[torch.Tensor, torch.Tensor]:
        if (found := self._one_step(input, hx)) is not None:
            return found
        if not self._natively(input, hx):
            return super().forward(input, hx)       # pyright: ignore[reportArgumentType] - a list will do too
        dtype = LSTM._compute_dtype(input)
        x = input.to(dtype).reshape(1, -1, self.input_size)
        if hx is not None:
            hx = tuple(s.to(dtype).reshape(1, -1, self.hidden_size) for s in hx)
        bias = apart.add(self.bias_ih, self.bias_hh).to(dtype) if self.bias else None
        _, (h, c) = lstm(x, self.weight_ih.to(dtype), self.weight_hh.to(dtype), bias, hx)
        shape = (*input.shape[:-1], self.hidden_size)
        return h.reshape(shape), c.reshape(shape)

    def _one_step(self, input, hx):
        """``LSTM._one_step`` of a cell."""
        if (torch.compiler.is_compiling() or not isinstance(input, torch.Tensor) or input.dim() not in (1, 2)
                or input.shape[-1] != self.input_size or not runs_kernels(input, input.dtype)):
            return None
        weights = [self.weight_ih, self.weight_hh, *((self.bias_ih, self.bias_hh) if self.bias else ())]
        found = one_step.layers(input, hx, weights, (1, 1, self.input_size, self.hidden_size, self.bias),
                                (*input.shape[:-1], self.hidden_size), with_y=False)
        return found and found[1:]

    def _natively(self, input, hx):
        """Whether the kernels compute this call. False also for wrong input, for which nn.LSTMCell then raises its
        error."""
        if not isinstance(input, torch.Tensor) or input.dim() not in (1, 2) or input.shape[-1] != self.input_size:
            return False
        if self.weight_hh.device != input.device:
            return False
        dtype = LSTM._compute_dtype(input)
        if not runs_kernels(input, dtype):
            return LSTM._no(f"LSTMCell in {dtype}", input) if input.is_floating_point() else False
        shape = (*input.shape[:-1], self.hidden_size)
        if hx is not None and (not isinstance(hx, (tuple, list)) or len(hx) != 2 or any(
                not isinstance(s, torch.Tensor) or tuple(s.shape) != shape or s.device != input.device for s in hx)):
            return False
        if dtype == input.dtype and any(t.dtype != dtype for t in (self.weight_hh, *(hx or ()))):
            return False
        if not torch.compiler.is_compiling():
            plan, reason = on_device(shape[0] if input.dim() == 2 else 1, self.hidden_size, dtype, 1, input.device)
            if plan is None:
                return LSTM._no(reason, input)
        return True
