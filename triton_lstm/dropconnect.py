"""``drop_connect``: dropout on the recurrent weights R, the weight drop of Merity et al. 2018 (AWD-LSTM)."""
import torch

from .layer import LSTM, _TorchLSTM


def drop_connect(layer: torch.nn.RNNBase, p: float = 0.5) -> "DropConnect":
    """Make ``layer``, a triton_lstm.LSTM or torch.nn.LSTM, drop recurrent weights in training from now on.

    In training mode each forward sets every element of each weight_hh to zero with probability ``p`` and scales the
    others by 1 / (1 - p). One mask holds for all timesteps and batch rows. It is drawn from torch's generator of the
    weights' device. Dropped weights get no gradient. In eval mode nothing is dropped. Sources: DropConnect (Wan et al.
    2013), on the recurrent weights of an LSTM (Merity, Keskar and Socher 2018).

    It works by hooks on the layer. Parameters, ``state_dict`` and optimizers do not change. ``convert``, ``to_torch``
    and copying keep the hooks. Each call of ``LSTM.step`` is a forward and draws its own mask. A mask costs 4 H²
    random numbers and a copy of R for each direction. On a CUDA device nn.LSTM warns that its weights are not one
    chunk of memory, which is then true. Does not work under nn.DataParallel, whose replicas have no parameters.

    Returns a handle with the attribute ``p``, which may be changed, and the method ``remove()``. Raises TypeError for a
    layer of another class. Raises ValueError for p outside [0, 1], for a layer that drops recurrent weights already,
    and if a weight_hh is not a plain parameter (for example parametrized).
    """
    if not isinstance(layer, (LSTM, _TorchLSTM)):
        raise TypeError(f"layer must be a triton_lstm.LSTM or torch.nn.LSTM, got {type(layer).__name__}")
    if not 0 <= p <= 1:
        raise ValueError(f"p must be a probability, got {p}")
    names = [name for names in layer._all_weights for name in names if name.startswith("weight_hh")]
    replaced = [name for name in names if name not in layer._parameters]
    if replaced:
        raise ValueError(f"{', '.join(replaced)}: no plain parameter of the layer")
    if any(isinstance(getattr(hook, "__self__", None), DropConnect) for hook in layer._forward_pre_hooks.values()):
        raise ValueError("the layer drops recurrent weights already; change p of what drop_connect returned")
    return DropConnect(layer, p, names)


class DropConnect:
    """The handle that ``drop_connect`` returns."""

    def __init__(self, layer, p, names):
        self.p, self.names, self._whole = p, names, {}
        # prepend and always_call: the weights are dropped for as short as can be and come back after any exception
        self._hooks = [layer.register_forward_pre_hook(self._drop),
                       layer.register_forward_hook(self._restore, prepend=True, always_call=True)]

    def remove(self):
        """Remove the hooks: the layer drops no weights any more."""
        for hook in self._hooks:
            hook.remove()

    def _drop(self, layer, args):
        if layer.training and self.p:
            self._whole = {name: layer._parameters[name] for name in self.names}
            # torch's own LSTM, where it computes, must not move the parameters to lie beside weights of one forward
            if not torch.compiler.is_compiling():
                layer.flatten_parameters = _nothing
            for name, weight in self._whole.items():
                layer._parameters[name] = torch.nn.functional.dropout(weight, self.p)

    def _restore(self, layer, args, output):
        if self._whole:
            layer._parameters.update(self._whole)
            self._whole = {}
            if not torch.compiler.is_compiling():
                layer._update_flat_weights()
                del layer.flatten_parameters


def _nothing():
    pass
