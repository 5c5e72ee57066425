"""``run_episodes``: an LSTM over a rollout in which episodes begin."""
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import RNNBase

from ..functional import runs_kernels
from ..layer import LSTM


def run_episodes(lstm: RNNBase, x: Tensor, state: Sequence[Tensor] | None, starts: Tensor
                 ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The layer over a rollout. Before each step at which an episode begins, h and c are set to zero.

    lstm     a ``triton_lstm.LSTM`` in one direction
    x        (T, B, I), with ``batch_first`` (B, T, I); or flat, (T B, I) with time first, with ``batch_first``
             (B T, I) with rows first. Flat x needs a state, because B is read from it
    state    (h, c), (num_layers, B, H) each, before the first step; zeros if None
    starts   T B elements in the order of x, bool or numbers: where not zero, an episode begins with this step, so the
             state before it is not used. CleanRL and PufferLib call it done, sb3-contrib episode_starts

    Returns y, in the layout of x and with H in the place of I, and (h, c) after the last step. This is one call of the
    layer. Nothing makes the host wait for the GPU, and acting (T = 1) without gradients is one launch a layer. A state
    that is not finite has no influence after an episode begins, where a product with zero would keep NaN.

    Raises TypeError for another layer: call ``triton_lstm.convert`` first. Raises ValueError for a bidirectional layer,
    whose final state would be that of another episode; for flat x without a state; for x whose rows are no multiple of
    B; for ``starts`` of another size; and what the layer raises.
    """
    if not isinstance(lstm, LSTM):
        raise TypeError(f"lstm must be a triton_lstm.LSTM, got {type(lstm).__name__}: call triton_lstm.convert first")
    if lstm.bidirectional:
        raise ValueError("a bidirectional LSTM does not run over a rollout: its reverse direction sees later steps")
    flat = x.dim() == 2
    if flat:
        if state is None:
            raise ValueError(f"flat x {tuple(x.shape)} needs a state, whose rows say how many environments there are")
        rows = state[0].shape[1]
        if rows == 0 or x.shape[0] % rows:
            raise ValueError(f"x has {x.shape[0]} rows, which is no multiple of the {rows} rows of the state")
        x = x.reshape((rows, -1, x.shape[1]) if lstm.batch_first else (-1, rows, x.shape[1]))
    if x.dim() != 3:
        raise ValueError(f"x must have two or three dimensions, got the shape {tuple(x.shape)}")
    if starts.numel() != x.shape[0] * x.shape[1]:
        raise ValueError(f"starts must have one element for each of {x.shape[0]} x {x.shape[1]} steps, got the shape "
                         f"{tuple(starts.shape)}")
    y, last = _run(lstm, x, state, starts.reshape(x.shape[:2]) != 0)
    return y.flatten(0, 1) if flat else y, last


def _run(lstm, x, state, reset) -> Any:
    """``run_episodes`` of x with three dimensions; reset is bool in the layout of x."""
    time = 1 if lstm.batch_first else 0
    steps = x.shape[time]
    # One step is one launch only without resets. torch's own LSTM on the CPU has no resets: there most rollouts are cut
    # where episodes begin, and a look at the flags waits for nothing.
    if steps and (steps == 1 or x.device.type == "cpu" and not runs_kernels(x, x.dtype)
                  and not reset.narrow(time, 1, steps - 1).any()):
        first = reset.select(time, 0)[:, None]
        return lstm(x, None if state is None else tuple(s.masked_fill(first, 0) for s in state))
    return lstm(x, state, reset=reset)
