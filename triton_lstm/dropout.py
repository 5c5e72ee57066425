"""Dropout between layers, where autograd does not follow: the random numbers of torch.nn.functional.dropout, and its
results."""
import typing

import torch


class Dropout(typing.NamedTuple):
    """Dropout at a ``rate``. scale: the factor of the elements that it keeps."""
    rate: float
    scale: float

    @classmethod
    def of(cls, x, rate):
        """That of tensors such as x."""
        if rate == 1:
            return cls(rate, 0.)
        # on CPUs torch rounds it to the type of x
        return cls(rate, 1 / (1 - rate) if x.is_cuda else x.new_ones(()).div(1 - rate).item())

    def __call__(self, x):
        """(x after dropout, the mask), or (None, None) where nothing is dropped."""
        if self.rate == 0:
            return None, None
        if x.is_cuda and self.rate < 1:
            return torch.native_dropout(x, self.rate, True)
        mask = self.mask(x)
        return self.masked(x, mask), mask

    def mask(self, x):
        """A new mask (bool) for x."""
        return torch.nn.functional.dropout(torch.ones_like(x), self.rate) != 0

    def masked(self, x, mask):
        """x as dropout with this mask would have it; and the gradient of x, from that of the result. mask: None for x
        itself."""
        return x if mask is None else torch.ops.aten.native_dropout_backward(x, mask, self.scale)


NO_DROPOUT = Dropout(0., 1.)
