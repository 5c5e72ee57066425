"""The LSTM as its equations say: what every kernel is judged by. Slow, differentiable, any dtype and device."""
import torch


def lstm_reference(x, w, r, b, h0, c0, multiply=torch.matmul):
    """One layer: x (T, B, I), w (D, 4H, I), r (D, 4H, H), b (D, 4H) or None, h0 and c0 (D, B, H); gates i, f, g, o.

    Returns y (T, B, D H), h_n, c_n (D, B, H). ``multiply`` takes the place of the matrix product. Hochreiter and
    Schmidhuber 1997 with the forget gate of Gers et al. 2000, as torch.nn.LSTM computes it.
    """
    outputs, h_n, c_n = [], [], []
    for d in range(r.shape[0]):
        h, c, steps = h0[d], c0[d], []
        for x_t in (x.flip(0) if d else x):
            a = multiply(x_t, w[d].t()) + multiply(h, r[d].t()) + (0 if b is None else b[d])
            i, f, g, o = a.chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            steps.append(h)
        steps = torch.stack(steps)
        outputs.append(steps.flip(0) if d else steps)
        h_n.append(h)
        c_n.append(c)
    return torch.cat(outputs, -1), torch.stack(h_n), torch.stack(c_n)
