"""Whether a layer computes what nn.LSTM computes in float64."""
import torch

from triton_lstm.check import relative_error

from .workloads import DTYPES


def dtype_of(name):
    """The torch type of "fp16", "bf16" or "fp32"."""
    return getattr(torch, DTYPES[name])


def results(layer, x, dy=None):
    """{name: tensor} of what ``layer`` computes for x. Given dy, the gradient of y, it includes the gradients of x and
    of the weights."""
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
    """``results`` of torch.nn.LSTM in float64 with the weights of ``layer``. ``runs`` may wrap it into another layer,
    which is called in its place."""
    reference = torch.nn.LSTM(layer.input_size, layer.hidden_size, layer.num_layers, bias=layer.bias,
                              batch_first=layer.batch_first, bidirectional=layer.bidirectional)
    reference.load_state_dict(layer.state_dict())
    return results(runs(reference.to(x.device, torch.float64)), x.double(), None if dy is None else dy.double())


def error(found, exact):
    """The largest relative error of any result, in the Frobenius norm. NaN if a result is not finite."""
    return torch.tensor([relative_error(found[name], right) for name, right in exact.items()]).max().item()
