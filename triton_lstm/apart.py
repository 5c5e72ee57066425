"""Sums, stacks and the identity, whose gradients have memory of their own.

Of a + b autograd gives both the same gradient, of a stack views of one, of a part of a concatenation a view with holes.
Whatever then works on gradients in place, as accumulation, clipping and unscaling do, would work on them twice; and
nn.LSTM's gradients are apart and contiguous.
"""
import torch


def _own(g):
    return None if g is None else g.clone(memory_format=torch.contiguous_format)


class _Sum(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a, b):
        return a + b

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g, _own(g)


class _Stack(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*tensors):
        return torch.stack(tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return tuple(map(_own, g.unbind()))


class _Identity(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(tensor):
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return _own(g)


def add(a, b):
    """a + b."""
    return _Sum.apply(a, b)


def stack(tensors):
    """``torch.stack``, of one tensor a view of it."""
    return _Stack.apply(*tensors) if len(tensors) > 1 else tensors[0].unsqueeze(0)


def identity(tensor):
    """A view of ``tensor`` whose gradient is copied on its way back."""
    return _Identity.apply(tensor)
