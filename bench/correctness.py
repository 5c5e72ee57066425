"""Whether a layer computes what nn.LSTM computes in float64."""
import dataclasses

import torch

import triton_lstm

from .console import progress
from .workloads import DTYPES


def dtype_of(name):
    """The torch type of "fp16", "bf16" or "fp32"."""
    return getattr(torch, DTYPES[name])


# Relative error in the norm that a result may have, by how products are computed: ten times what torch's own LSTM has
# over 256 steps, in fp16 (whose ten bits TF32 has too) four times. Far below any wrong result; the tests of the package
# hold it to a closer budget.
TOLERANCE = {"bf16": 4e-2, "fp16": 1e-2, "tf32": 1e-2, "fp32": 1e-5}


def results(layer, x, dy=None):
    """What ``layer`` computes for x, by name; with dy, the gradient of y, also the gradients of x and the weights."""
    with torch.set_grad_enabled(dy is not None):
        x = x.detach().requires_grad_(dy is not None)
        y, (h_n, c_n) = layer(x)
        named = dict(y=y, h_n=h_n, c_n=c_n)
        if dy is not None:
            layer.zero_grad()
            y.backward(dy)
            named["dx"] = x.grad
            named.update((f"d{name}", weight.grad) for name, weight in layer.named_parameters())
    return {name: tensor.detach() for name, tensor in named.items()}


def exact_results(layer, x, dy=None, runs=lambda lstm: lstm):
    """The same from torch's own LSTM in float64, with the weights of ``layer``; ``runs(lstm)`` is the layer to call."""
    reference = torch.nn.LSTM(layer.input_size, layer.hidden_size, layer.num_layers, bias=layer.bias,
                              batch_first=layer.batch_first, bidirectional=layer.bidirectional)
    reference.load_state_dict(layer.state_dict())
    return results(runs(reference.to(x.device, torch.float64)), x.double(), None if dy is None else dy.double())


def error(found, exact):
    """The largest relative error in the norm of any result; NaN, which no bound admits, where one is not finite."""
    return torch.stack([(found[name].double() - right).norm() / right.norm().clamp(min=1e-300)     # 0 may be exact
                        for name, right in exact.items()]).max().item()


@dataclasses.dataclass(frozen=True)
class Shape:
    """A small layer and its input."""
    steps: int
    batch: int
    input_size: int
    hidden_size: int
    dtype: str
    layers: int = 1
    directions: int = 1
    bias: bool = True
    batch_first: bool = False

    def __str__(self):
        return (f"T={self.steps} B={self.batch} I={self.input_size} H={self.hidden_size} {self.dtype}"
                + f", {self.layers} layers" * (self.layers > 1) + ", both directions" * (self.directions > 1)
                + ", no bias" * (not self.bias) + ", batch first" * self.batch_first)


SHAPES = (
    Shape(5, 3, 7, 18, "fp32"),
    Shape(1, 1, 1, 1, "fp32", bias=False),
    Shape(7, 17, 5, 33, "fp32", layers=2, directions=2),
    Shape(6, 4, 20, 100, "fp32", batch_first=True),
    Shape(9, 5, 3, 40, "fp16", directions=2),
    Shape(6, 2, 16, 64, "bf16", layers=2),
)


def check_interpreted(layer_class=triton_lstm.LSTM):
    """Compare small odd layers with float64 on the CPU, print the errors and return whether all are within bounds.

    It is for the caller to see that Triton's interpreter is on: without it CPU tensors reach no kernel.
    """
    good = True
    for shape in progress(SHAPES):
        torch.manual_seed(0)
        dtype, allowed = dtype_of(shape.dtype), TOLERANCE[shape.dtype]
        layer = layer_class(shape.input_size, shape.hidden_size, shape.layers, bias=shape.bias,
                            batch_first=shape.batch_first, bidirectional=shape.directions == 2, dtype=dtype)
        size = (shape.batch, shape.steps) if shape.batch_first else (shape.steps, shape.batch)
        x = torch.randn(*size, shape.input_size, dtype=dtype)
        dy = torch.randn(*size, shape.directions * shape.hidden_size, dtype=dtype)
        got = error(results(layer, x, dy), exact_results(layer, x, dy))
        passed = got <= allowed
        good = good and passed
        print(f"{'ok   ' if passed else 'WRONG'} relative error {got:.1e}, allowed {allowed:.0e}: {shape}")
    return good
