"""Bytes that training saves and allocates, compared with the formulas of ``Plan``."""
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import harness
import triton_lstm
from triton_lstm.kernels import sequence
from triton_lstm.plan import H200


def saved(T, B, I, H, D, dtype, keep_every, **options):
    """Bytes saved for backward, without the arguments and y."""
    generator = torch.Generator().manual_seed(0)
    tensor = lambda *shape: torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    arguments = [tensor(T, B, I), tensor(D, 4 * H, I), tensor(D, 4 * H, H), tensor(D, 4 * H)]
    state = tensor(D, B, H), tensor(D, B, H)
    kept = []
    with harness.interpreter(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y, _ = triton_lstm.lstm(*arguments, state, keep_every=keep_every, **options)
    own = {t.untyped_storage().data_ptr() for t in (*arguments, *state, y)}
    others = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for place, size in others.items() if place not in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T, keep_every", [(12, 4), (13, 4), (4, 4), (5, 4), (1, 4), (7, 1)])
def test_saved_for_backward(T, keep_every, dtype):
    """c takes 4 H / keep_every bytes for each row and step; gates are not saved."""
    B, H, D = 3, 10, 2
    plan = triton_lstm.make_plan(B, H, dtype, D, limits=None, keep_every=keep_every)
    assert saved(T, B, 5, H, D, dtype, keep_every) == plan.saved_bytes(T) == 4 * D * B * H * ((T - 1) // keep_every)


def test_nothing_is_kept_without_gradients():
    x, w, r = torch.randn(9, 2, 3), torch.randn(20, 3), torch.randn(20, 5)
    with harness.interpreter():
        *_, kept, gates = triton_lstm.op.lstm_op(x, w[None], r[None], None, *[torch.zeros(1, 2, 5)] * 2, None, None, "",
                                                 2, False, 9)
    assert kept.shape == (0, 1, 2, 5) and gates.shape == (0, 20)


class Peak(TorchDispatchMode):
    """``most`` is the most bytes that storages made in this mode have had at one time. ``old`` are tensors that do not
    count."""

    def __init__(self, old):
        super().__init__()
        self.seen, self.alive, self.most = {t.untyped_storage().data_ptr() for t in old}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for t in tree_leaves(results):
            if isinstance(t, torch.Tensor) and (place := t.untyped_storage().data_ptr()) not in self.seen and place:
                self.seen.add(place)
                self.alive += (size := t.untyped_storage().nbytes())
                self.most = max(self.most, self.alive)
                weakref.finalize(t.untyped_storage(), self.free, place, size)
        return results

    def free(self, place, size):
        self.seen.discard(place)
        self.alive -= size


def backward_peak(plan, T, I, contiguous=True, zoneout=None):
    """The most bytes that backward has allocated at one time, besides dx. Its kernels, which allocate nothing, are left
    out."""
    D, B, H = plan.directions, plan.batch, plan.hidden_size
    x = torch.randn(T, B, I) if contiguous else torch.randn(B, T, I).transpose(0, 1)
    w, r, b, state = torch.randn(D, 4 * H, I), torch.randn(D, 4 * H, H), torch.randn(D, 4 * H), torch.randn(D, B, H)
    y, kept = torch.randn(T, B, D * H), torch.randn(max(T - 1, 0) // plan.keep_every, D, B, H)
    dy = torch.randn(T, B, D * H)
    old = [x, w, r, b, state, y, kept, dy]
    with Peak(old) as peak:
        sequence.backward(dy, state, state, x, w, r, b, state, state, None, y, kept, None, plan, [True] * 6,
                          zoneout=zoneout, launcher=lambda *args, **kwargs: None)
    return peak.most - x.numel() * 4


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("schedule, H", [("resident", 20), ("grid", 100), pytest.param(
    "cluster", 100, marks=pytest.mark.skipif(harness.TRITON < (3, 9), reason="clusters need Triton 3.9"))])
def test_backward_workspace_is_bounded(schedule, H, contiguous):
    plan = triton_lstm.make_plan(17, H, torch.float32, 2, limits=H200, schedule=schedule, keep_every=8)
    I = 40
    peaks = [backward_peak(plan, T, I, contiguous) for T in (8, 16, 64)]
    bounds = [plan.backward_bytes(T, I, 4) for T in (8, 16, 64)]
    assert bounds[0] == bounds[1] == bounds[2]
    assert peaks[2] <= peaks[1] <= bounds[0], (peaks, bounds)
    # The bound is not too high: at least a third of it is used.
    assert peaks[2] > bounds[0] / 3


def test_forward_holds_few_pre_activations():
    plan = triton_lstm.make_plan(64, 1024, torch.bfloat16, keep_every=32)
    steps = plan.forward_steps(10_000, 2)
    assert steps == 512 and steps * 64 * 4 * 1024 * 2 == 2**28
    assert plan.forward_steps(20, 2) == 20
    # For few rows, the slots for h take more than the pre-activations, because they have whole tiles of rows.
    few = triton_lstm.make_plan(1, 1024, torch.float32, limits=H200)
    assert few.block_b == 16 and few.forward_steps(10_000, 4) * 16 * 1024 * 4 == 2**28
