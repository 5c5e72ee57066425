"""The equations of the LSTM in torch operators, with which every kernel is compared. Slow, differentiable, for any
dtype and device."""
import torch


def lstm_reference(x, w, r, b, h0, c0, lengths=None, reset=None, multiply=torch.matmul, weight_hr=None, keep=None):
    """One layer: x (T, B, I), w (D, 4H, I), r (D, 4H, H), b (D, 4H) or None, h0 and c0 (D, B, H); gates i, f, g, o.

    lengths (B,) and reset (T, B) as in ``lstm``. Returns y (T, B, D H), h_n, c_n (D, B, H). ``multiply`` takes the
    place of the matrix product. With weight_hr (D, P, H) r is (D, 4H, P), and h0, h_n and y have P for H. keep: for
    zoneout, what ``zoneout_shares`` gives.

    Hochreiter and Schmidhuber 1997 with the forget gate of Gers et al. 2000 and the projection of Sak et al. 2014, as
    torch.nn.LSTM computes it; zoneout as Krueger et al. 2017 write it for the LSTM: h is made of the new f c + i g even
    where c keeps its earlier value.
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
            new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            new_h = o.sigmoid() * new_c.tanh()
            if weight_hr is not None:
                new_h = multiply(new_h, weight_hr[d].t())
            if keep is not None:
                m_h, m_c = (share[d, t] for share in keep)
                new_h, new_c = m_h * h + (1 - m_h) * new_h, m_c * c + (1 - m_c) * new_c
            h, c = new_h, new_c
            steps.append(h if live is None else torch.where(live, h, 0))
            if live is not None:
                h, c = (torch.where(live, s, before) for s, before in zip((h, c), earlier))
        steps = torch.stack(steps)
        outputs.append(steps.flip(0) if d else steps)
        h_n.append(h)
        c_n.append(c)
    return torch.cat(outputs, -1), torch.stack(h_n), torch.stack(c_n)


def zoneout_shares(zoneout, T, B, D, H, like):
    """The shares of their earlier h and c that units keep at each step: two tensors (D, T, B, H) of the type of
    ``like``.

    zoneout is (seed, rate_h, rate_c). With a seed, an int64 tensor of one element, shares are 0 or 1, from the same
    random bits as in the kernels (see ``cell.zoneout``). With None they are the rates, which is their expectation.
    """
    seed, *rates = zoneout
    if seed is None:
        return [like.new_full((1, 1, 1, 1), rate).expand(D, T, B, H) for rate in rates]
    count = lambda n, *shape: torch.arange(n, device=seed.device).view(shape)
    words = philox(seed, count(H, 1, 1, 1, H), count(B, 1, 1, B, 1), count(T, 1, T, 1, 1), count(D, D, 1, 1, 1))
    return [((word >> 8) < round(rate * 2 ** 24)).to(like.dtype) for word, rate in zip(words, rates)]


def philox(seed, n0, n1, n2, n3, rounds=7):
    """Philox-4x32 (Salmon et al. 2011): four random words of 32 bits for the counter (n0, n1, n2, n3), in int64."""
    low = 0xFFFFFFFF
    key0, key1 = seed & low, seed >> 32 & low

    def product(n, factor):
        """High and low word of n times factor, by halves of the factor, whose products fit into 63 bits."""
        right = n * (factor & 0xFFFF)
        left = n * (factor >> 16)
        return left + (right >> 16) >> 16, right + ((left & 0xFFFF) << 16) & low
    for _ in range(rounds):
        (high0, low0), (high2, low2) = product(n0, 0xD2511F53), product(n2, 0xCD9E8D57)
        n0, n1, n2, n3 = high2 ^ n1 ^ key0, low2, high0 ^ n3 ^ key1, low0
        key0, key1 = key0 + 0x9E3779B9 & low, key1 + 0xBB67AE85 & low
    return n0, n1, n2, n3


def packed_reference(x, w, r, b, h0, c0, batch_sizes, **options):
    """``lstm_reference`` of packed x (rows, I), which is padded for it. y is packed again."""
    B = h0.shape[1]
    live = torch.arange(B, device="cpu") < batch_sizes[:, None]
    places, lengths = (t.to(x.device, non_blocking=True) for t in (live.flatten().nonzero()[:, 0], live.sum(0)))
    padded = x.new_zeros(live.numel(), x.shape[1]).index_copy(0, places, x).view(*live.shape, -1)
    y, h_n, c_n = lstm_reference(padded, w, r, b, h0, c0, lengths, **options)
    return y.flatten(0, 1).index_select(0, places), h_n, c_n
