"""``gates`` returns what the gates of a layer do over time, ``plot_gates`` draws it."""
import typing
from collections.abc import Sequence

import torch

from .functional import lstm, zoneout_rates
from .layer import LSTM, _TorchLSTM


class Gates(typing.NamedTuple):
    """Gates and cell state of one layer in one direction, (T, B, H) each. Index t belongs to the input of time t.

    i, f, o    input, forget and output gate, in (0, 1)
    g          candidate, in (-1, 1)
    c          cell state after the step. Without zoneout h = o tanh(c), or with ``proj_size`` h = W_hr (o tanh(c))
    """
    i: torch.Tensor
    f: torch.Tensor
    g: torch.Tensor
    o: torch.Tensor
    c: torch.Tensor


@torch.no_grad()
def gates(layer: torch.nn.RNNBase, x: torch.Tensor, hx: Sequence[torch.Tensor] | None = None
          ) -> tuple[Gates, ...]:
    """The gates and cell states of every step and unit of ``layer``, a triton_lstm.LSTM or torch.nn.LSTM.

    x     (T, B, I), with ``batch_first`` (B, T, I), or (T, I), in the layer's dtype and on its device
    hx    (h_0, c_0) as for the layer; zeros if None

    Returns a tuple of ``Gates``, one for each layer and direction, in the order of h_n: layer by layer, in each layer
    forward before reverse. They are (T, B, H) with and without ``batch_first``, with B = 1 for an x (T, I); float32,
    or float64 for a float64 layer. They have no gradients. Everything is as in eval mode: dropout between layers is
    off, zoneout takes its expectation. Hooks do not run.

    First the layer computes y, which contains every h. From these two GEMMs compute i, f, g, o of all steps,
    x Wᵀ + h_prev Rᵀ + b. Then c = f c_prev + i g is computed step by step. The result takes 5 T B H elements for each
    layer and direction.

    Raises TypeError for a layer of another class or a packed sequence, and what ``triton_lstm.lstm`` raises.
    """
    if not isinstance(layer, (LSTM, _TorchLSTM)):
        raise TypeError(f"layer must be a triton_lstm.LSTM or torch.nn.LSTM, got {type(layer).__name__}")
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dim() == 2:
        x, hx = x.unsqueeze(1), hx and tuple(s.unsqueeze(1) for s in hx)
    elif layer.batch_first:
        x = x.transpose(0, 1)
    D, results = 2 if layer.bidirectional else 1, []
    zoneout = zoneout_rates(getattr(layer, "zoneout", 0.))
    with torch.autocast(x.device.type, enabled=False):
        for k in range(layer.num_layers):
            weights = [getattr(layer, name) for name in layer._flat_weights_names]
            w, r, b, weight_hr = LSTM._stacked(layer, weights, k, layer.weight_hh_l0.dtype)  # pyright: ignore[reportArgumentType]
            state = hx and tuple(s[k * D:(k + 1) * D] for s in hx)
            y, _ = lstm(x, w, r, b, state, weight_hr=weight_hr, plan=getattr(layer, "plan", None),
                        zoneout=zoneout, training=False)
            h0, c0 = state or (x.new_zeros(D, x.shape[1], n) for n in (y.shape[2] // D, layer.hidden_size))
            for d, h in enumerate(y.chunk(D, -1)):
                results.append(_recompute(x, h, w[d], r[d], None if b is None else b[d], h0[d], c0[d], zoneout[1],
                                          reverse=d == 1))
            x = y
    return tuple(results)


def _recompute(x, h, w, r, b, h0, c0, rate_c, reverse):
    """``Gates`` of one direction from its input x (T, B, I) and all of its h (T, B, H), or (T, B, P)."""
    x, h, w, r, h0, c = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x, h, w, r, h0, c0))
    previous = torch.cat([h[1:], h0[None]] if reverse else [h0[None], h[:-1]])[:len(h)]
    a = x @ w.t() + previous @ r.t()
    if b is not None:
        a += b
    i, f, g, o = a.chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cells = torch.empty_like(i)
    for t in (reversed(range(len(x))) if reverse else range(len(x))):
        c = cells[t] = rate_c * c + (1 - rate_c) * (f[t] * c + i[t] * g[t])
    return Gates(i, f, g, o, cells)


def plot_gates(gates: Gates, row: int = 0, title: str | None = None):
    """A matplotlib Figure of one ``Gates`` for a batch row: heat maps of i, f, g, o and c, units over time.

    One scale for i, f and o, 0 to 1; g from -1 to 1; c symmetric about 0. ``figure.savefig(path)`` writes it; pyplot is
    not touched. Raises ImportError without matplotlib, IndexError for a row outside of the batch.
    """
    try:
        from matplotlib.figure import Figure  # without pyplot: draws with Agg, keeps no state
    except ImportError as error:
        raise ImportError("plot_gates draws with matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(9, 10), layout="constrained")
    extreme = max(gates.c[:, row].abs().max().item(), 1e-6)
    names = dict(i="input gate i", f="forget gate f", g="candidate g", o="output gate o", c="cell state c")
    for axes, (key, name) in zip(figure.subplots(5, 1, sharex=True), names.items()):
        bound = extreme if key == "c" else 1
        scale = dict(vmin=-bound, vmax=bound, cmap="RdBu_r") if key in "gc" else dict(vmin=0, vmax=1, cmap="viridis")
        image = axes.imshow(getattr(gates, key)[:, row].t().float().cpu().numpy(), aspect="auto",
                            interpolation="nearest", **scale)
        axes.set(title=name, ylabel="unit")
        figure.colorbar(image, ax=axes)
    axes.set_xlabel("time step")
    figure.suptitle(title or f"Gates of batch row {row}")
    return figure
