"""Random layers, their results in float64, and the error that every implementation is allowed."""
import dataclasses

import torch

import triton_lstm
from triton_lstm.plan import H200
from triton_lstm.plan.plan import HELD_BYTES, split_slices, wgmma_slices
from triton_lstm.reference import lstm_reference

PORTABLE = dataclasses.replace(H200, cluster=0)     # limits of a device on which only the portable kernels run
# Types, each with the architecture that it is emulated for. Every shape is tested with every type and both
# architectures, but not with all pairs: products differ by type, loads and waits by architecture.
EMULATED = [(torch.float32, 90), (torch.float16, 80), (torch.bfloat16, 90)]
BUDGET = 1.5        # times nn.LSTM's own error in the same dtype


def floor(right, dtype, tf32=False):
    """An error that is always allowed, because nn.LSTM's own error may be smaller by chance.

    fp32: four units in the last place, as the order of a sum decides about these (dx is a sum of 4 D H terms, in a
    product by torch). 16-bit types: in a small tensor nn.LSTM may be exact by chance, so two roundings are allowed, of
    da and of the result. TF32: likewise for the roundings of both operands.
    """
    eps = torch.finfo(dtype).eps
    if tf32 and right.numel() < 64:
        return 2 ** -10
    return 4 * eps if dtype == torch.float32 else eps if right.numel() < 64 else 0.


def assert_apart(named):
    """No two tensors share a storage, and no storage is larger than its tensor."""
    places = {}
    for name, tensor in named.items():
        storage = tensor.untyped_storage()
        assert storage.data_ptr() not in places, (name, places[storage.data_ptr()])
        places[storage.data_ptr()] = name
        assert storage.nbytes() == tensor.numel() * tensor.element_size(), name


class _Tf32Matmul(torch.autograd.Function):
    """A product whose operands are rounded to TF32, in forward and backward, as in cuDNN's fp32 by default."""

    @staticmethod
    def round(v):
        return ((v.float().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32).to(v.dtype)

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return _Tf32Matmul.round(a) @ _Tf32Matmul.round(b)

    @staticmethod
    def backward(ctx, g):
        a, b = map(_Tf32Matmul.round, ctx.saved_tensors)
        g = _Tf32Matmul.round(g)
        return g @ b.t(), a.t() @ g


@dataclasses.dataclass(frozen=True)
class Problem:
    """A layer, and inputs and gradients of its outputs, which are drawn from ``seed``. It has D directions, and a
    projection to P units unless P is 0. Results are {name: tensor}."""
    T: int
    B: int
    I: int
    H: int
    D: int = 1
    dtype: torch.dtype = torch.float32
    bias: bool = True
    tf32: bool = False
    seed: int = 0
    device: str = "cpu"
    ragged: bool = False
    resets: bool = False
    packed: bool = False
    P: int = 0

    def tensors(self):
        """[x, w, r, b, h0, c0], followed by weight_hr if there is a projection, and [dy, dh_n, dc_n]. Weights are
        uniform, as nn.LSTM initialises them; all else is normal."""
        generator = torch.Generator().manual_seed(self.seed)
        T, B, I, H, D, P = self.T, self.B, self.I, self.H, self.D, self.P or self.H
        normal = lambda *shape: torch.randn(shape, generator=generator).to(self.device, self.dtype)
        flat = lambda *shape: (torch.rand(shape, generator=generator) * 2 - 1) / H ** 0.5
        uniform = lambda *shape: flat(*shape).to(self.device, self.dtype)
        inputs = [normal(T, B, I), uniform(D, 4 * H, I), uniform(D, 4 * H, P),
                  uniform(D, 4 * H) if self.bias else None, normal(D, B, P), normal(D, B, H)]
        inputs += [uniform(D, P, H)] if self.P else []
        return inputs, [normal(T, B, D * P), normal(D, B, P), normal(D, B, H)]

    def lengths_and_reset(self):
        """{"lengths", "reset"} as ``lstm`` takes them; None for what the problem does not have.

        The lengths include T and 0, or T and at least 1 in falling order for packed sequences. A fifth of the steps are
        resets.
        """
        generator = torch.Generator().manual_seed(self.seed + 1)
        lengths = torch.randint(self.T + 1, (self.B,), generator=generator)
        lengths[:2] = torch.tensor([self.T, 0])[:self.B]
        if self.packed:
            lengths = lengths.clamp(min=1).sort(descending=True).values
        reset = torch.rand(self.T, self.B, generator=generator) < 0.2
        return dict(lengths=lengths.to(self.device) if self.ragged or self.packed else None,
                    reset=reset.to(self.device) if self.resets else None)

    def pieces(self, b):
        """[(start, end)] of the pieces of row b between resets; times from ``start`` up to, not including, ``end``."""
        given = self.lengths_and_reset()
        end = self.T if given["lengths"] is None else int(given["lengths"][b])
        cuts = [] if given["reset"] is None else [t for t in range(1, end) if given["reset"][t, b]]
        return list(zip([0, *cuts], [*cuts, end])) if end else []

    def results(self, function, dtype=None):
        """{name: tensor} of the outputs and gradients of ``function(x, w, r, b, h0, c0, [hr]) -> y, h_n, c_n``."""
        inputs, gradients = self.tensors()
        inputs = [t if t is None else t.to(dtype or self.dtype).requires_grad_() for t in inputs]
        outputs = function(*inputs)
        torch.autograd.backward(outputs, [g.to(dtype or self.dtype) for g in gradients])
        named = dict(zip(("y", "h_n", "c_n"), outputs))
        named.update((f"d{name}", t.grad) for name, t in zip(("x", "w", "r", "b", "h0", "c0", "hr"), inputs)
                     if t is not None)
        return {name: t.detach() for name, t in named.items()}

    def exact(self):
        return self.results(self._reference(torch.matmul), torch.float64)

    def _reference(self, multiply):
        return lambda x, w, r, b, h0, c0, hr=None: lstm_reference(
            x, w, r, b, h0, c0, **self.lengths_and_reset(), multiply=multiply, weight_hr=hr)

    def torch(self):
        """Results of nn.LSTM in this dtype. No CPU has TF32; there, it is a float64 LSTM whose products round their
        operands to TF32."""
        if self.tf32 and self.device == "cpu":
            return self.results(self._reference(_Tf32Matmul.apply), torch.float64)

        def function(x, w, r, b, h0, c0, hr=None):
            weights = [t for d in range(self.D) for t in
                       [w[d], r[d]] + ([b[d], torch.zeros_like(b[d])] if self.bias else [])
                       + ([hr[d]] if self.P else [])]
            return torch._VF.lstm(x, (h0, c0), weights, self.bias, 1, 0., True, self.D == 2, False)

        def piece_by_piece(x, w, r, b, h0, c0, hr=None):
            # Inputs go through fp32, so that gradients of the pieces are added up in fp32, as in one product over all.
            x32, w32, r32, h32, c32 = (t.float() for t in (x, w, r, h0, c0))
            b32, hr32 = (None if t is None else t.float() for t in (b, hr))
            narrow = lambda t: t.to(x.dtype)
            outputs, states = [], []
            for d in range(self.D):
                weights = [narrow(w32[d]), narrow(r32[d])]
                weights += [narrow(b32[d]), torch.zeros_like(weights[0][:, 0])] if self.bias else []
                weights += [narrow(hr32[d])] if self.P else []
                rows = []
                for n in range(self.B):
                    state, y = (h32[d:d + 1, n:n + 1], c32[d:d + 1, n:n + 1]), x32.new_zeros(self.T, h0.shape[2])
                    pieces = self.pieces(n)
                    for start, end in pieces[::-1] if d else pieces:
                        again = self.resets and (end < pieces[-1][1] if d else
                                                 start > 0 or bool(self.lengths_and_reset()["reset"][0, n]))
                        state = tuple(narrow(torch.zeros_like(s) if again else s) for s in state)
                        piece = narrow(x32[start:end, n:n + 1])
                        out, *state = torch._VF.lstm(piece.flip(0) if d else piece, state, weights, self.bias, 1, 0.,
                                                     True, False, False)
                        out, state = out.float()[:, 0], tuple(s.float() for s in state)
                        y = torch.cat([y[:start], out.flip(0) if d else out, y[end:]])
                    rows.append(y)
                    states.append(state)
                outputs.append(torch.stack(rows, 1))
            h_n, c_n = (torch.cat([s[k] for s in states], 1).view_as(s0) for k, s0 in ((0, h0), (1, c0)))
            return narrow(torch.cat(outputs, -1)), narrow(h_n), narrow(c_n)
        return self.results(piece_by_piece if self.ragged or self.resets or self.packed else function)

    def ours(self, **options):
        def function(x, w, r, b, h0, c0, hr=None):
            y, (h_n, c_n) = triton_lstm.lstm(x, w, r, b, (h0, c0), weight_hr=hr, **self.lengths_and_reset(), **options)
            return y, h_n, c_n

        def packed(x, w, r, b, h0, c0, hr=None):
            live = torch.arange(self.T)[:, None] < self.lengths_and_reset()["lengths"].cpu()
            places = live.flatten().nonzero()[:, 0].to(x.device)
            y, (h_n, c_n) = triton_lstm.lstm(x.flatten(0, 1)[places], w, r, b, (h0, c0), batch_sizes=live.sum(1),
                                             weight_hr=hr, **options)
            y = y.new_zeros(live.numel(), y.shape[1]).index_copy(0, places, y)
            return y.view(self.T, self.B, -1), h_n, c_n
        return self.results(packed if self.packed else function)

    def plan(self, limits=PORTABLE, **options):
        return triton_lstm.make_plan(self.B, self.H, self.dtype, self.D, tf32=self.tf32, limits=limits, **options)

    def cluster_plan(self, ctas, keep_every=2):
        """A plan of the cluster kernels with ``ctas`` CTAs in a cluster. With one CTA it is a resident plan."""
        plan = self.plan(limits=H200, schedule="cluster" if ctas > 1 else "resident", keep_every=keep_every)
        block_h = max(1 << (-(-self.H // ctas) - 1).bit_length(), 16)
        num_warps = min(8, block_h // (4 if ctas > 1 else 8))
        return dataclasses.replace(plan, programs=ctas, block_h=block_h, num_warps=num_warps)

    def shared_plan(self, schedule, multiprocessors=132, keep_every=2):
        """A grid or streamed plan of the portable kernels, with several programs. A streamed plan keeps R of 16 units
        on chip and reads the rest from L2; make_plan would choose none for so small a layer."""
        limits = dataclasses.replace(PORTABLE, multiprocessors=multiprocessors)
        plan = self.plan(schedule="grid", limits=limits, keep_every=keep_every)
        if schedule == "streamed":
            plan = dataclasses.replace(plan, kind="streamed", r_slices=((0, 16),), block_k=16)
        return plan

    def wgmma_plan(self, block_h=16, warps=4, tiles=1, keep_every=2):
        """A plan of the wgmma kernels; make_plan would choose none for so few rows."""
        backward = self.plan(keep_every=keep_every)
        rows = 16 * warps
        return dataclasses.replace(
            backward, kind="wgmma", backward_plan=backward, block_k=0, programs=-(-self.H // block_h),
            block_h=block_h, block_b=rows, num_warps=warps, tiles=tiles, groups=-(-self.B // (rows * tiles)),
            r_slices=wgmma_slices(self.H, backward.precision))

    def split_plan(self, block_h=16, tiles=1, keep_every=2, room=None):
        """A plan of the split kernels; make_plan would choose none for so small a layer. Registers hold ``room`` bytes
        of R at most; None: all of it."""
        plan = self.plan(keep_every=keep_every)
        return dataclasses.replace(
            plan, kind="split", block_k=0, programs=-(-self.H // block_h), block_h=block_h, block_b=16, num_warps=8,
            tiles=tiles, groups=-(-self.B // (16 * tiles)), register_room=HELD_BYTES if room is None else room,
            r_slices=split_slices(self.H, plan.precision, block_h, room))

    def check(self, ours):
        """Every result in ``ours`` is finite, and its error is at most BUDGET times that of nn.LSTM or ``floor``."""
        exact, torchs = self.exact(), self.torch()
        assert ours.keys() == exact.keys()
        for name, right in exact.items():
            assert ours[name].shape == right.shape and ours[name].dtype == self.dtype, name
            allowed = BUDGET * max(error(torchs[name], right), floor(right, self.dtype, self.tf32))
            got = error(ours[name], right)
            assert got <= allowed, f"{name}: relative error {got:.2e}, allowed {allowed:.2e} ({self})"


class NotFinite(Problem):
    """x has a NaN. h0 has, in another row, the NaN whose bits mean in a slot for h that nothing has arrived yet."""

    def tensors(self):
        inputs, gradients = super().tensors()
        inputs[0][2, 0, 1] = torch.nan
        inputs[4].view(torch.int16 if self.dtype.itemsize == 2 else torch.int32)[0, 1, 3] = -1
        return inputs, gradients

    def check(self, ours):
        for name, right in self.exact().items():
            got = ours[name].double()
            finite = right.isfinite()
            assert torch.equal(got.isnan(), right.isnan()), name
            allowed = 0.05 if self.dtype.itemsize == 2 else 0.005 if self.tf32 else 1e-5
            assert torch.allclose(got[finite], right[finite], rtol=0, atol=allowed)


def error(result, right):
    """Relative error in the Frobenius norm. If an element is NaN, the error is NaN, which no bound admits."""
    return ((result.double() - right).norm() / right.norm()).item()
