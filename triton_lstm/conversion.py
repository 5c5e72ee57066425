"""``convert`` turns a model's nn.LSTM layers into triton_lstm.LSTM in place, ``to_torch`` turns them back.
``everywhere`` does both to layers that code calls which one cannot edit."""
import contextlib
import functools
import typing
import weakref
from collections.abc import Iterator

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
        for name in ("plan", "keep_gates", "zoneout"):
            module.__dict__.pop(name, None)
        given = module.__dict__.pop("_given_weights", None)
        module._init_flat_weights()         # which ours does without
        if given is not None:
            module._flat_weights = given
    return result


@contextlib.contextmanager
def everywhere() -> Iterator[None]:
    """A context in which every ``torch.nn.LSTM`` that is called becomes a ``triton_lstm.LSTM``: for layers inside code
    that one cannot edit, where ``convert`` finds no model to convert.

    A layer is converted at its first call, so code that makes and initialises layers still sees nn.LSTMs. Those that
    ``convert`` would leave are left. At the end of the context all are nn.LSTMs again, and optimizers, state dicts and
    references to them are not concerned by either change.

    It is for the whole process, not for a thread. Contexts may be nested.
    """
    torchs, converted = _TorchLSTM.forward, weakref.WeakSet()

    @functools.wraps(torchs)
    def forward(self, *args, **kwargs):
        # a subclass may call this as its super(), and ours for what the kernels do not cover
        if parametrize.type_before_parametrizations(self) is not _TorchLSTM or _why_left(self, _TorchLSTM):
            return torchs(self, *args, **kwargs)
        _change(self, LSTM)
        converted.add(self)
        return self.forward(*args, **kwargs)

    _TorchLSTM.forward = forward
    try:
        yield
    finally:
        _TorchLSTM.forward = torchs
        for layer in converted:
            to_torch(layer)


def _swap(model, source, target):
    result = Conversion([], {})
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and getattr(module, "original_name", None) == source.__name__:
            result.left[name] = "it is scripted"
        elif not isinstance(module, source):
            continue
        elif reason := _why_left(module, source):
            result.left[name] = reason
        else:
            _change(module, target)
            result.swapped.append(name)
    return result


def _why_left(module, source):
    """The reason why an LSTM of the class ``source`` is not converted; None if it can be."""
    if parametrize.type_before_parametrizations(module) is not source:
        return f"{type(module).__name__} is a subclass of {source.__module__}.{source.__name__}"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if source is LSTM and module._zoned():
        return f"zoneout={module.zoneout}: torch's own LSTM has none"
    return None


def _change(module, target):
    module.__class__ = _parametrized(type(module), target) if parametrize.is_parametrized(module) else target


def _parametrized(cls, target):
    """The class ``cls``, which torch's parametrize has made for one module, with ``target`` as its base class."""
    members = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(f"Parametrized{target.__name__}", (target,), members)
