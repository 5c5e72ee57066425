"""Sums, stacks and concatenations, whose gradients have memory of their own.

Of a + b autograd gives both the same gradient, of a stack views of one, of a part of a concatenation a view with holes.
Whatever then works on gradients in place, as accumulation, clipping and unscaling do, would work on them twice; and
nn.LSTM's gradients are apart and contiguous.
"""
import torch


def _own(g):
    return g.clone(memory_format=torch.contiguous_format)


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
    def forward(a, b):         # torch.compile traces no forward of *tensors where no gradient is asked for
        return torch.stack((a, b))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        a, b = g.unbind()
        return _own(a), _own(b)


class _Cat(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a, b, dim):
        return torch.cat((a, b), dim)

    @staticmethod
    def setup_context(ctx, inputs, output):
        a, b, ctx.dim = inputs
        ctx.sizes = a.shape[ctx.dim], b.shape[ctx.dim]

    @staticmethod
    def backward(ctx, g):
        a, b = g.split(ctx.sizes, ctx.dim)
        return _own(a), _own(b), None


def add(a, b):
    """a + b."""
    return _Sum.apply(a, b)


def stack(tensors):
    """``torch.stack`` of one tensor, which gives a view of it, or of two."""
    return _Stack.apply(*tensors) if len(tensors) > 1 else tensors[0].unsqueeze(0)


def cat(a, b, dim):
    """``torch.cat`` of two."""
    return _Cat.apply(a, b, dim)
