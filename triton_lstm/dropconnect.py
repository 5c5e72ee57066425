"""``drop_connect``: dropout on the recurrent weights R, the weight drop of Merity et al. 2018 (AWD-LSTM)."""
import torch

from .layer import LSTM, _TorchLSTM


def drop_connect(layer: torch.nn.RNNBase, p: float = 0.5) -> "DropConnect":
    """From now on ``layer``, a triton_lstm.LSTM or torch.nn.LSTM, drops weights of R in training.

    At each forward of a layer in training mode every element of each weight_hh is zero with probability ``p``, the rest
    are scaled by 1 / (1 - p); one mask for all timesteps and batch rows, drawn from torch's generator of the weights'
    device. Only the weights kept get gradients. In eval mode the layer is the plain one. (DropConnect: Wan et al. 2013;
    on the recurrent weights of an LSTM: Merity, Keskar and Socher 2018.)

    It works by hooks on the layer: parameters, ``state_dict`` and optimizers do not change, ``convert`` and
    ``to_torch`` keep it, and so does copying. ``LSTM.step`` is a forward of its own each time, with its own mask. A
    mask costs 4 H² random numbers and a copy of R a direction. nn.LSTM on a CUDA device warns that its weights do not
    lie in one piece, which is so. Not under nn.DataParallel, whose replicas have no parameters.

    Returns an object with ``p``, which may be changed, and ``remove()``. Raises TypeError for another layer; ValueError
    for p outside [0, 1], for a layer that drops already, and where a weight_hh is no plain parameter (parametrized).
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
    """Handle of one ``drop_connect``."""

    def __init__(self, layer, p, names):
        self.p, self.names, self._whole = p, names, {}
        # prepend and always_call: the weights are dropped for as short as can be and come back after any exception
        self._hooks = [layer.register_forward_pre_hook(self._drop),
                       layer.register_forward_hook(self._restore, prepend=True, always_call=True)]

    def remove(self):
        """The layer is the plain one again."""
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
