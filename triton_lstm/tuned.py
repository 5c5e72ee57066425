"""Remembers in the user's cache folder which plans were measured to be the fastest on a GPU.

A JSON file (see ``cachefile``): {"format": FORMAT, "plans": {place: {call: {loop: entry}}}}. A place is a GPU with its
driver and versions, see ``place``, and a call is a ``Call`` as text. ``tuning`` measures, ``op`` asks ``known``.
"""
import dataclasses
import functools
import warnings
from collections.abc import Callable

import torch

from . import cachefile, faults
from .plan import Plan, combined
from .plan.plan import BLOCK_B

FILE, FORMAT = "plans.json", 1
PADDED, FLAGS, PACKED = "padded", "flags", "packed"     # sequences of a call: they decide which kernels it takes
FORWARD, BACKWARD, TRAINING = "forward", "backward", "training"
LOOPS = FORWARD, BACKWARD, TRAINING
WHOLE = {False: "whole inference", True: "whole training"}      # of a layer, ours and torch's own


@dataclasses.dataclass(frozen=True)
class Call:
    """What automatic plans tell apart.

    dtype        of torch, such as "bfloat16"
    precision    ``Plan.precision``
    hidden_size  H
    directions   1 or 2
    batch        batch rows, rounded up to whole tiles of 16 rows, see ``of``
    sequences    PADDED, FLAGS with lengths or resets, or PACKED
    zoneout      whether there is zoneout
    """
    dtype: str
    precision: str
    hidden_size: int
    directions: int
    batch: int
    sequences: str = PADDED
    zoneout: bool = False

    @staticmethod
    def of(batch, hidden_size, dtype, directions, precision, sequences, zoneout):
        """The call with so many batch rows, in torch's ``dtype``."""
        return Call(str(dtype).removeprefix("torch."), precision, hidden_size, directions,
                    max(-(-batch // BLOCK_B), 1) * BLOCK_B, sequences, bool(zoneout))

    @property
    def torch_dtype(self):
        return getattr(torch, self.dtype)

    def __str__(self):
        return (f"H={self.hidden_size} B={self.batch} x {self.directions} direction(s), {self.dtype}, "
                f"{self.precision}, {self.sequences}" + (", zoneout" if self.zoneout else ""))


@dataclasses.dataclass(frozen=True)
class Entry:
    """What was measured of one loop of a call.

    plan    that was chosen, encoded. Of FORWARD and BACKWARD it stands for that loop only. Of TRAINING only its
            ``keep_every`` and ``gates_steps`` count. "" is torch's own LSTM, which only WHOLE may choose
    chosen  its name in ``us``
    us      microseconds of a step of all candidates, by name. The first is the plan by arithmetic
    """
    plan: str
    chosen: str
    us: dict

    @property
    def gain(self):
        """Which part of its time the plan by arithmetic would lose: 0 if it was chosen."""
        return 1 - self.us[self.chosen] / next(iter(self.us.values()))

    def __str__(self):
        return ", ".join(f"{us:.2f} us a step {name}" + (" (chosen)" if name == self.chosen else "")
                         for name, us in self.us.items())


class Remembered:
    """What is remembered of one place: ``calls``, {text of a call: {loop: Entry}}. Compared by identity, so that caches
    see when it was read anew."""

    def __init__(self, calls: dict[str, dict[str, Entry]]):
        self.calls = calls


def place(device):
    """The key of a device in the file; None for devices on which nothing is measured."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return f"{faults.place(device)}, torch {torch.__version__}, {count} multiprocessors"


def _check(found):
    """Raise unless ``found`` is what the file holds."""
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"not a table of plans in format {FORMAT}")
    for calls in found["plans"].values():
        for loops in calls.values():
            for loop, entry in loops.items():
                if entry["plan"] or loop in LOOPS:
                    _check_types(Plan.decode(entry["plan"]))
                if (loop not in (*LOOPS, *WHOLE.values()) or entry["chosen"] not in entry["us"] or len(entry) != 3
                        or not all(us > 0 for us in entry["us"].values())):
                    raise ValueError(f"not a measured loop: {loop} {entry}")


def _check_types(plan):
    """Raise unless the numbers of ``plan`` are integers."""
    fields = dataclasses.asdict(dataclasses.replace(plan, kind=0, precision=0, r_slices=0, backward_plan=None))
    numbers = *fields.values(), *(number for of_slice in plan.r_slices for number in of_slice)
    if not all(isinstance(number, int) for number in numbers if number is not None):
        raise ValueError(f"not a plan: {plan.encode()}")
    if plan.backward_plan:
        _check_types(plan.backward_plan)


# While ``tuning.tune`` looks which calls a model makes: (Call, device) of each, as the keys of a dict. Else None.
recorded: dict | None = None
notice: Callable = lambda *call: None       # ``tuning.notice``, which that module puts here
_own = {}       # {place: {call: {loop: Entry}}} that this process has measured, also where no file can be written


@functools.lru_cache
def everything() -> dict[str | None, dict[str, dict[str, Entry]]]:
    """All that is remembered: {place: {call: {loop: Entry}}}. The file is read once a process, and again after
    ``remember``, ``clear`` and ``read_again``."""
    plans = cachefile.read(FILE, _check).get("plans", {})
    found = {where: {call: {loop: Entry(**entry) for loop, entry in loops.items()} for call, loops in calls.items()}
             for where, calls in plans.items()}
    for where, calls in _own.items():
        for call, loops in calls.items():
            found.setdefault(where, {}).setdefault(call, {}).update(loops)
    return found


@functools.lru_cache
def known(device):
    """The ``Remembered`` of a device; None if there is nothing. This is on the way of every call of a layer."""
    calls = everything().get(place(device)) if everything() else None
    return Remembered(calls) if calls else None


def read_again():
    """What another process has remembered is seen from now on."""
    everything.cache_clear()
    known.cache_clear()


def remember(where, call, loops):
    """Add ``loops``, {loop: Entry}, to what is remembered of a ``Call`` at a ``place``. What other processes have
    remembered stays."""
    _own.setdefault(where, {}).setdefault(str(call), {}).update(loops)

    def change(found):
        plans = found.get("plans", {})
        entries = {loop: dataclasses.asdict(entry) for loop, entry in loops.items()}
        plans.setdefault(where, {}).setdefault(str(call), {}).update(entries)
        return dict(format=FORMAT, plans=plans)
    cachefile.update(FILE, _check, change)
    read_again()


def clear():
    """Forget all plans that were measured, on all GPUs. Then plans come from the cost model again, in this process at
    once, in others that have read the file when they are started anew."""
    _own.clear()
    try:
        (cachefile.folder() / FILE).unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"triton_lstm cannot remove {cachefile.folder() / FILE}: {error}", stacklevel=2)
    read_again()


def plan_of(loops, arithmetic: Plan, batch, keep_every=None):
    """The plan that ``loops``, {loop: Entry}, make for so many batch rows. Of a loop that was not measured it is that
    of ``arithmetic``. Raises ValueError where they are of another layer. keep_every: of the plan, if not None."""
    decoded = {loop: Plan.decode(entry.plan) for loop, entry in loops.items() if loop in LOOPS}
    for plan in decoded.values():
        if any(getattr(plan, name) != getattr(arithmetic, name) for name in ("hidden_size", "directions", "precision")):
            raise ValueError(f"it is for another layer: {plan}")
    backward = decoded.get(BACKWARD, arithmetic.backward)
    plan = combined(decoded.get(FORWARD, arithmetic), backward)
    ways = decoded.get(TRAINING, arithmetic if BACKWARD not in decoded else plan)
    same = dict(batch=batch, keep_every=keep_every or ways.keep_every)
    return dataclasses.replace(plan, **same, gates_steps=ways.gates_steps, backward_plan=plan.backward_plan and
                               dataclasses.replace(plan.backward_plan, **same))
