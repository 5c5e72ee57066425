"""``convert`` turns a model's nn.LSTM layers into triton_lstm.LSTM in place, ``to_torch`` turns them back."""
import typing

import torch
from torch.nn.utils import parametrize

from .layer import LSTM, _TorchLSTM


class Conversion(typing.NamedTuple):
    """What a conversion did. Names are those of ``named_modules``; the model itself is "".

    swapped    names of the layers that changed class
    left       {name: reason} for layers that were not converted although they are LSTMs of the class in question
    """
    swapped: list[str]
    left: dict[str, str]


def convert(model: torch.nn.Module) -> Conversion:
    """Make every ``torch.nn.LSTM`` inside ``model`` (or ``model`` itself) a ``triton_lstm.LSTM``, in place.

    Only the class of a layer changes. It stays the same object with the same Parameters, buffers, hooks,
    parametrizations, mode, device and dtype. So optimizers need no change, state dicts keep their keys, and a layer
    used in two places is still one layer.

    Some layers are not converted: subclasses of nn.LSTM, whose forward may differ; layers whose forward was replaced
    on the instance; and scripted layers. Layers that the model does not register, such as those in a plain list, are
    not found.

    Returns a ``Conversion``. Call it before torch.compile. ``isinstance(layer, nn.LSTM)`` is False for a converted
    layer, so code that asks for it must run before.
    """
    return _swap(model, _TorchLSTM, LSTM)


def to_torch(model: torch.nn.Module) -> Conversion:
    """Make every ``triton_lstm.LSTM`` inside ``model`` a ``torch.nn.LSTM``: undoes ``convert``, returns as it does.

    A layer's ``plan`` is dropped. Subclasses of triton_lstm.LSTM are left, and layers with zoneout, which nn.LSTM does
    not have.
    """
    result = _swap(model, LSTM, _TorchLSTM)
    for name in result.swapped:
        module = model.get_submodule(name)
        assert isinstance(module, torch.nn.RNNBase)
        for name in ("plan", "zoneout"):
            module.__dict__.pop(name, None)
        module._init_flat_weights()         # which ours does without
    return result


def _swap(model, source, target):
    result = Conversion([], {})
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and getattr(module, "original_name", None) == source.__name__:
            result.left[name] = "it is scripted"
        elif not isinstance(module, source):
            continue
        elif parametrize.type_before_parametrizations(module) is not source:
            result.left[name] = f"{type(module).__name__} is a subclass of {source.__module__}.{source.__name__}"
        elif "forward" in vars(module):
            result.left[name] = "its forward was replaced on the instance"
        elif source is LSTM and module._zoned():
            result.left[name] = f"zoneout={module.zoneout}: torch's own LSTM has none"
        else:
            module.__class__ = _parametrized(type(module), target) if parametrize.is_parametrized(module) else target
            result.swapped.append(name)
    return result


def _parametrized(cls, target):
    """The class ``cls``, which torch's parametrize has made for one module, with ``target`` as its base class."""
    members = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(f"Parametrized{target.__name__}", (target,), members)
