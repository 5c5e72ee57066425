"""Calls of sizes that were seen before, as straight-line Python.

Which operators and kernels a call of a layer runs is decided by sizes, types and strides alone, and deciding takes the
host as long as running them. So a call of sizes that come again is written down while it runs: every operator of torch
and every launch, with its arguments, as one statement of a Python function, the recording. Later calls run that. It
calls the same operators and kernels in the same order, so it computes the same bits, and it lets go of memory as early.
Only views that nothing but kernels reads are not made: a kernel gets the address.
"""
import functools
import operator
import typing
from collections.abc import Callable

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from . import op

# Calls of the same sizes that run before one is written down, which takes longer than many later calls spare
FIRST = 10
LONGEST = 2000          # statements of a recording. A call that has more waits for the GPU, not for Python
_UNCHANGED = {"contiguous", "float", "to"}      # do nothing where they return their argument
_FRESH = {"addmm", "cat", "linear", "mm", "new_empty", "new_zeros", "stack"}        # strides and place are their own
# Return no tensors, and the same for all calls that a recording is for. "__get__" is that of a property
_DECIDED = {"__get__", "__len__", "dim", "element_size", "get_device", "is_floating_point", "numel", "size"}


class _Statement(typing.NamedTuple):
    """made, used: names of tensors. only_views: whether it makes views and does nothing else."""
    text: str
    made: list
    used: list
    only_views: bool


class _Stream:
    """In the place of the current stream, which each call looks up."""


class Recorder(TorchFunctionMode):
    """Writes down what runs while it is active. It holds no tensor, so that memory is freed as without it.

    tensors     the arguments of the recording, which are all different; or None
    constants   tensors that live as long as the process

    launches    whether the recording calls compiled kernels
    relied_on   which arguments must be as they are now: at multiples of 16 bytes where they are now, and with the same
                strides. Operators find out by themselves, kernels do not
    why_not     why there is no recording
    """

    def __init__(self, tensors, constants=()):
        super().__init__()
        self.launches, self.relied_on, self.why_not = False, set(), None
        self._names, self._named = WeakTensorKeyDictionary(), 0
        self._statements: list[_Statement] = []
        self._views = {}                # names of views, by the expression that made them
        # by name of a view that the recording makes: the name of what it is a view of, and the bytes before it
        self._places = {}
        self._addresses = set()         # names of addresses
        self._constants, self._constant_names = {}, {}          # objects that the text names, by name; their names
        self._arguments = [f"none{n}" if tensor is None else self._name(tensor) for n, tensor in enumerate(tensors)]
        self._from = {name: {n} for n, name in enumerate(self._arguments)}      # the arguments that decide strides
        for tensor in constants:
            self._names[tensor] = self._constant(tensor)

    def _name(self, tensor):
        self._named += 1
        name = self._names[tensor] = f"t{self._named}"
        return name

    def _constant(self, value):
        key = (value.start, value.stop, value.step) if isinstance(value, slice) else id(value)
        name = self._constant_names.setdefault(key, f"k{len(self._constants)}")
        self._constants.setdefault(name, value)
        return name

    def _text(self, value, used, by_address=False):
        """An expression for ``value``. Adds the names of its tensors to ``used``. by_address: whether the address of a
        view will do. Where all will do with addresses, nobody makes the view."""
        if isinstance(value, torch.Tensor):
            name = self._names.get(value)
            if name is None:            # made where nothing is seen: the next call's will be another
                self.why_not = f"a tensor {tuple(value.shape)} of unknown origin"
                return "unknown"
            if by_address and name in self._places:
                name, before = self._places[name]
                if (address := f"at_{name}") not in self._addresses:
                    self._addresses.add(address)
                    self._statements.append(
                        _Statement(f"{address} = {self._constant(_data_ptr)}({name})", [], [name], False))
                used.append(name)
                return f"{address} + {before}"
            used.append(name)
            return name
        if value is _Stream:
            return "stream"
        if value is None or type(value) in (bool, int):
            return repr(value)
        if type(value) in (tuple, list):
            inner = "".join(f"{self._text(v, used)}, " for v in value)
            return f"({inner})" if type(value) is tuple else f"[{inner}]"
        if isinstance(value, (tuple, list, dict)) and not isinstance(value, torch.Size):    # may have tensors inside
            self.why_not = f"a {type(value).__name__}"
        return self._constant(value)

    def _write(self, function, args, kwargs, made=(), several=False, by_address=False):
        """A statement. several: whether the function returns ``made`` as a sequence. by_address: see ``_text``."""
        used = []
        if made and function.__name__ == "new_empty":           # so that a view is not made for its type alone
            args = self._like(args[0]), *args[1:]
        inner = [self._text(arg, used, by_address) for arg in args]
        inner += [f"{name}={self._text(arg, used)}" for name, arg in kwargs.items()]
        text = f"{self._constant(function)}({', '.join(inner)})"
        if len(made) == 1 and made[0]._base is not None:
            if text in self._views:             # a view that is there already
                self._names[made[0]] = self._views[text]
                return
            self._views[text] = f"t{self._named + 1}"
        names = [self._name(tensor) for tensor in made]
        if names and function.__name__ not in _FRESH:
            self._from.update(dict.fromkeys(names, self._sources(used)))
        left = f"{', '.join(names)}{',' if several else ''} = " if names else ""
        views = [tensor._base is not None for tensor in made]
        self._statements.append(_Statement(left + text, names, used, bool(views) and all(views)))
        for tensor, name, view in zip(made, names, views):
            root = self._names.get(tensor._base) if view and tensor.numel() else None
            # Of two arguments, one may be a view of the other now and not at the next call. So what counts is whether
            # it is made from its root here.
            if root is not None and len(used) == 1 and root in (used[0], self._places.get(used[0], [None])[0]):
                self._places[name] = root, tensor.data_ptr() - tensor._base.data_ptr()

    def _like(self, tensor):
        """A tensor of the same type and device that is there anyway, where ``tensor`` is a view of one."""
        # for torch, what ``tensor.view(dtype)`` returns has no base
        return tensor._base if self._names.get(tensor) in self._places else tensor

    def _sources(self, names):
        """The arguments that decide the strides of tensors."""
        return set().union(*[self._from.get(name, ()) for name in names])

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        if isinstance(found, torch.Tensor):
            if not any(found is given for given in (*args, *kwargs.values())):
                self._write(func, args, kwargs, [found])
            elif func.__name__ in _UNCHANGED:
                self.relied_on |= self._sources([self._names.get(found)])
            else:                                           # in place, or into ``out``
                self._write(func, args, kwargs)
        elif isinstance(found, (tuple, list)) and found and isinstance(found[0], torch.Tensor):
            self._write(func, args, kwargs, found, several=True)
        elif found is None:                                 # such as __setitem__
            self._write(func, args, kwargs)
        elif func.__name__ == "stride":
            self.relied_on |= self._sources([self._names.get(args[0])])
        elif func.__name__ not in _DECIDED:
            self.why_not = f"{func.__name__} returns what the next call may have otherwise"
        return found

    def launch(self, kernel, plan, grid, *args, waits, **constants):
        """In the place of ``launch.launch_kernel``."""
        launch = op.sequence.launch
        self.relied_on |= self._sources([self._names.get(t) for t in (*args, *constants.values())
                                         if isinstance(t, torch.Tensor)])
        with torch._C.DisableTorchFunction():           # the interpreter computes with tensors
            found = launch.launch_kernel(kernel, plan, grid, *args, waits=waits, **constants)
        if isinstance(found, launch.Found):
            self.launches = True
            self._write(found.compiled.run, found.arguments(plan, grid, _Stream, args, constants), {}, by_address=True)
        else:
            self._write(launch.launch_kernel, (kernel, plan, grid, *args), dict(waits=waits, **constants))

    def recording(self, results):
        """The function of the current stream and the tensors that does what was written down and returns ``results``;
        None if there is none."""
        if len(self._statements) > LONGEST:
            self.why_not = f"{len(self._statements)} statements"
        used = []
        lines = [f"    return {self._text(results, used)}"]
        if self.why_not is not None:
            return None
        needed = {*used, *self._arguments}
        for text, made, used, only_views in reversed(self._statements):
            if only_views and needed.isdisjoint(made):
                continue
            # this is the last statement that uses these
            over = [name for name in dict.fromkeys((*made, *used)) if name[0] == "t" and name not in needed]
            needed.update(over)
            if over:
                lines.append(f"    del {', '.join(over)}")
            lines.append(f"    {text}")
        lines.append(f"def recording(stream, {', '.join(self._arguments)}):")
        exec(compile("\n".join(reversed(lines)), "<triton_lstm recording>", "exec"), self._constants)
        return self._constants["recording"]


class _Known:
    """What is known of calls with the same key.

    calls        how many there were
    recording    None if there is none
    launches     whether it calls compiled kernels
    aligned      gets those tensors of a call that must begin at multiples of 16 bytes
    contiguous   gets those that must be contiguous
    why_not      why there can be none
    """

    def __init__(self):
        self.calls, self.launches = 0, False
        self.recording: Callable | None = None
        self.why_not: str | None = None
        self.aligned = self.contiguous = _getter([])


def _getter(places):
    """Gets the elements at ``places`` of a sequence, as a tuple."""
    # of one place, itemgetter gets the element alone
    return operator.itemgetter(*places, *places[:1]) if places else lambda tensors: ()


_is_contiguous, _data_ptr = torch.Tensor.is_contiguous, torch.Tensor.data_ptr


def _fit(aligned, contiguous):
    """Whether kernels can be given these tensors as a recording gives them."""
    return not functools.reduce(operator.or_, map(_data_ptr, aligned), 0) % 16 and all(map(_is_contiguous, contiguous))


@functools.lru_cache(op.launch.KNOWN)
def _known(*key):
    return _Known()


def _current(device):
    """Whether compiled kernels may be launched directly for tensors on ``device``, as ``launch.Launch`` decides it."""
    launch = op.sequence.launch
    return device in (-1, launch.driver.active.get_current_device()) and not launch.hooked()


def run(function, call, how, tensors, given=0):
    """``function(call, how, *tensors)``, by its recording where there is one. The function also takes a launcher, as
    ``sequence.forward_chunks`` does.

    call      ``eager._Call``
    how       what else the function needs to know, hashable
    tensors   ``given`` gradients, flags, batch_sizes, x, h0, c0, and the rest; each may be None but x

    Without wavefronts and batch_sizes, ``call``, ``how``, and the size, type and strides of x and of the gradients
    decide which operators and kernels the function runs.

    A call is written down where all tensors are different, weights and states are contiguous, and all begin at
    multiples of 16 bytes, for which Triton compiles kernels of their own. Of two arguments that are one tensor, as tied
    weights are, a recording could not tell which it means. A call runs a recording where what kernels are given is so.
    """
    flags, batch_sizes, x, _, c0 = tensors[given:given + 5]
    if call.steps is not None or batch_sizes is not None:
        return function(call, how, *tensors)
    if op.autocasts(x):
        with op.without_autocast(x):            # a recording has nothing of it
            return run(function, call, how, tensors, given)
    device, strides = x.get_device(), [None if t is None else t.stride() for t in tensors[:given]]
    known = _known(function, call, how, device, x.dtype, x.shape, x.stride(), flags is None, c0 is None, len(tensors),
                   op.sequence.waiting.limit(), *strides)
    known.calls += 1
    if known.calls <= FIRST or known.why_not is not None:
        return function(call, how, *tensors)
    if known.recording is None:
        there = [t for t in tensors if t is not None]
        if len({*map(id, there)}) < len(there) or not _fit(there, [t for t in tensors[given + 3:] if t is not None]):
            return function(call, how, *tensors)
        waits = call.plan.exchanges or call.plan.backward.exchanges
        recorder = Recorder(tensors, [op.sequence.waiting.records(x.device)] if waits else [])
        with recorder:
            results = function(call, how, *tensors, launcher=recorder.launch)
        recording, relied_on = recorder.recording(results), sorted(recorder.relied_on)
        known.aligned, known.contiguous = _getter(relied_on), _getter([n for n in relied_on if n >= given + 3])
        known.launches, known.why_not, known.recording = recorder.launches, recorder.why_not, recording
        return results
    if not _fit(known.aligned(tensors), known.contiguous(tensors)):
        return function(call, how, *tensors)
    stream = None
    if known.launches:
        if not _current(device):
            return function(call, how, *tensors)
        stream = op.sequence.launch.driver.active.get_current_stream(device)
    try:
        with op.sequence.products_in(call.plan.precision):
            return known.recording(stream, *tensors)
    except RuntimeError as error:
        op.sequence.waiting.explain(error)
        raise
