"""``make_graphed``: a step, or a call of a layer, as a CUDA graph for inference."""
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .layer import LSTM

WARM_UP = 3             # calls before the capture, which compile kernels and allocate


def make_graphed(layer: LSTM, x: Tensor, state: Sequence[Tensor] | None = None) -> Callable[[Tensor], Tensor]:
    """A function that computes ``layer`` for inputs like ``x`` by replaying a CUDA graph. For inference.

    layer   a ``triton_lstm.LSTM``
    x       (B, I): the function computes one step, as ``layer.step``. (T, B, I), or with ``batch_first`` (B, T, I): it
            computes a call of the layer. Only the shape, dtype and device are used
    state   (h, c), (num_layers D, B, H) each: each call of the function begins from what is in these tensors, and
            stores the new state in them. Between calls they may be changed in place, as for episodes that begin anew.
            None: each call begins from zeros, which only a call of the layer can

    The function takes a tensor like x and returns y, (B, H) or as the layer returns it. y lies in memory that the next
    call of the function overwrites. With ``proj_size`` y and h have that many units.

    A replay reads the weights again, so what an optimizer changes in place takes effect. It does not see a weight that
    was replaced, nor whether the layer has been set to training or evaluation mode since. Neither ``state`` nor the
    weights change while the graph is made. For graphs with gradients take ``torch.cuda.make_graphed_callables``.

    Raises TypeError for another layer; ValueError for x of another shape, and for a step without a state; RuntimeError
    for x that is not on a CUDA device; and what the layer raises. The function raises ValueError for a tensor that is
    not like x.
    """
    if not isinstance(layer, LSTM):
        raise TypeError(f"layer must be a triton_lstm.LSTM, got {type(layer).__name__}")
    if x.dim() not in (2, 3):
        raise ValueError(f"x must have the shape (B, I), (T, B, I) or (B, T, I), got {tuple(x.shape)}")
    if x.dim() == 2 and state is None:
        raise ValueError("a step needs a state to go on from")
    given, like = torch.zeros_like(x), (x.shape, x.dtype, x.device)
    held = given, state, list(layer.parameters())       # what the graph reads and writes lives as long as the graph

    def run():
        if given.dim() == 2:
            return layer.step(given, state, inplace=True)[0]
        y, new = layer(given, state)
        for old, s in zip(state or (), new):
            old.copy_(s)
        return y

    before = [s.clone() for s in state or ()]
    replay, y = _capture(run, x.device)
    for s, was in zip(state or (), before):
        s.copy_(was)

    def graphed(x: Tensor) -> Tensor:
        if (x.shape, x.dtype, x.device) != like:
            raise ValueError(f"the graph is for {tuple(like[0])} in {like[1]} on {like[2]}, got {tuple(x.shape)} in "
                             f"{x.dtype} on {x.device}")
        held[0].copy_(x)
        replay()
        return y
    return graphed


@torch.no_grad()
def _capture(run, device):
    """(a function that repeats what ``run`` queues on a CUDA device, what ``run`` returned)."""
    if device.type != "cuda":
        raise RuntimeError(f"make_graphed captures a CUDA graph, x is on {device}")
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run()
    return graph.replay, y
