"""Sums, stacks and concatenations whose gradients each have memory of their own.

Autograd gives both terms of a + b the same gradient tensor, the parts of a stack views of one tensor, and the parts of
a concatenation views with holes. What then changes one gradient in place, as accumulation, clipping and unscaling do,
would change the other too. The gradients that nn.LSTM gives are separate and contiguous.
"""
import torch

from .op import eager_style, plain


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


_EAGER = {function: eager_style(function) for function in (_Sum, _Stack, _Cat)}


def _apply(function, a, b, *options):
    if not plain(a, b):
        return function.apply(a, b, *options)
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return _EAGER[function].apply(a, b, *options)
    return function.forward(a, b, *options)


def add(a, b):
    """a + b."""
    return _apply(_Sum, a, b)


def stack(tensors):
    """``torch.stack`` of a list of one or two tensors. One tensor gives a view of itself."""
    return _apply(_Stack, *tensors) if len(tensors) > 1 else tensors[0].unsqueeze(0)


def stacked(own, kinds):
    """W (D, 4H, I), R (D, 4H, -) and the sum of both biases (D, 4H), or None without biases.

    own: the weights of a layer in nn.LSTM's order, ``kinds`` of them for each direction.
    """
    bias = stack(list(map(add, own[2::kinds], own[3::kinds]))) if kinds > 3 else None
    return stack(own[0::kinds]), stack(own[1::kinds]), bias


def cat(a, b, dim):
    """``torch.cat`` of a and b along ``dim``."""
    return _apply(_Cat, a, b, dim)
