"""``step``: one timestep of a layer, for streams; the method ``triton_lstm.LSTM.step``."""


def step(layer, x, state=None, *, inplace=False):
    """One timestep of ``layer``, an LSTM in one direction: what ``layer`` computes for T = 1.

    x        (B, I), whatever ``batch_first``
    state    (h, c), (num_layers, B, H) each, as hx of the layer; zeros if None
    inplace  write the new state into the tensors of ``state`` and return those: a CUDA graph captured once then goes on
             from replay to replay. For inference: under torch.no_grad()

    Returns y (B, H), the last layer's new h, and the new state. The host waits for nothing. The layer is called as
    always, hooks included; inter-layer dropout and zoneout draw anew at every step in training mode. With ``proj_size``
    y and h are as wide as that.

    Raises ValueError for a bidirectional layer, whose reverse direction begins at the end of the sequence; for x that
    is not (B, I); for ``inplace`` without a state or with gradients, which the next step's write would make wrong; and
    what the layer raises.
    """
    if layer.bidirectional:
        raise ValueError("a bidirectional LSTM has no single step: its reverse direction begins with the last input")
    if x.dim() != 2:
        raise ValueError(f"x must have the shape (B, I), got {tuple(x.shape)}")
    if inplace and state is None:
        raise ValueError("inplace needs a state to write to")
    time = 1 if layer.batch_first else 0
    y, new = layer(x.unsqueeze(time), state)
    if not inplace:
        return y.squeeze(time), new
    if any(s.requires_grad for s in new):
        raise ValueError("inplace is for inference, call it under torch.no_grad(): backward needs the state before")
    for old, s in zip(state, new):
        old.copy_(s)
    return y.squeeze(time), state
