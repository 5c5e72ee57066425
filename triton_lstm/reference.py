"""The LSTM as its equations say: what every kernel is judged by. Slow, differentiable, any dtype and device."""
import torch


def lstm_reference(x, w, r, b, h0, c0, lengths=None, reset=None, multiply=torch.matmul, weight_hr=None):
    """One layer: x (T, B, I), w (D, 4H, I), r (D, 4H, H), b (D, 4H) or None, h0 and c0 (D, B, H); gates i, f, g, o.

    lengths (B,) and reset (T, B) as in ``lstm``. Returns y (T, B, D H), h_n, c_n (D, B, H). ``multiply`` takes the
    place of the matrix product. With weight_hr (D, P, H) r is (D, 4H, P), and h0, h_n and y have P for H.

    Hochreiter and Schmidhuber 1997 with the forget gate of Gers et al. 2000 and the projection of Sak et al. 2014, as
    torch.nn.LSTM computes it.
    """
    outputs, h_n, c_n = [], [], []
    for d in range(r.shape[0]):
        h, c, steps = h0[d], c0[d], []
        for t in (reversed(range(len(x))) if d else range(len(x))):
            x_t, live, earlier = x[t], None, (h, c)
            if lengths is not None:
                live = (t < lengths)[:, None]
                x_t = torch.where(live, x_t, 0)
            if reset is not None and t + d < len(x):
                begins = reset[t + d] if lengths is None else reset[t + d] & (t + d < lengths)
                h, c = (s.masked_fill(begins[:, None], 0) for s in (h, c))
            a = multiply(x_t, w[d].t()) + multiply(h, r[d].t()) + (0 if b is None else b[d])
            i, f, g, o = a.chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            if weight_hr is not None:
                h = multiply(h, weight_hr[d].t())
            steps.append(h if live is None else torch.where(live, h, 0))
            if live is not None:
                h, c = (torch.where(live, s, before) for s, before in zip((h, c), earlier))
        steps = torch.stack(steps)
        outputs.append(steps.flip(0) if d else steps)
        h_n.append(h)
        c_n.append(c)
    return torch.cat(outputs, -1), torch.stack(h_n), torch.stack(c_n)
