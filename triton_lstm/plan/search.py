"""``make_plan``: the plan with the fewest predicted cycles among those that fit."""
import dataclasses
import functools
import itertools

import torch

from .check import check_plan
from .cost import step_cycles
from .limits import H200, Limits
from .plan import (
    BLOCK_B,
    HELD_BYTES,
    NUM_WARPS,
    SCHEDULES,
    WARP_GROUP_ROWS,
    WIDE_BYTES,
    WIDE_UNITS,
    Plan,
    PlanError,
    element_bytes,
    r_slices,
    split_slices,
    wgmma_slices,
)

BLOCK_BYTES = 1 << 14                   # of R that a streamed plan reads at a time
GLUON_BYTES = 128                       # along a row of R, of one product of the Gluon kernels of a CTA or cluster
BACKWARD_ELEMENTS = 1 << 24             # units x rows x steps that backward recomputes at a time, if it can choose
KEEP_EVERY = 2048                       # at most
FAST_PRODUCTS = 1024                    # ``Limits.multiply_adds`` from which on a resident plan is always taken
CONTENDERS, WITHIN = 5, 2.              # of the plans of a loop that are measured: how many, and how near the cheapest


def keep_every_for(batch: int, hidden_size: int, directions: int, derives: bool = False) -> int:
    """The default of ``keep_every``: the most steps, from 16 to 2048, for which backward's workspace is at most 512 MiB
    in 16-bit types (640 MiB in fp32).

    derives    whether the backward loop computes its coefficients (``Plan.derives_coefficients``). The workspace has
               then 12 bytes for each unit, row and step, 20 in fp32, in place of 32 and 40
    """
    elements = BACKWARD_ELEMENTS * (2 if derives else 1)
    return min(max(elements // max(batch * hidden_size * directions, 1), 16), KEEP_EVERY)


def precision_for(dtype: torch.dtype, tf32: bool) -> str:
    """``Plan.precision`` for a dtype. tf32: whether fp32 may use TF32. Raises PlanError for a dtype without kernels."""
    if dtype in (torch.float16, torch.bfloat16):
        return "native"
    if dtype == torch.float32:
        return "tf32" if tf32 else "tf32x3"
    raise PlanError(f"no kernel computes in {dtype}")


def make_plan(batch: int, hidden_size: int, dtype: torch.dtype, directions: int = 1, *, limits: Limits | None = H200,
              tf32: bool = True, schedule: str | None = None, keep_every: int | None = None, zoneout: bool = False,
              avoid: frozenset = frozenset()) -> Plan:
    """The plan with the fewest predicted cycles for a layer of ``hidden_size`` units and ``batch`` rows.

    dtype        torch.float16, bfloat16 or float32
    directions   1 or 2
    limits       of the device, see ``triton_lstm.plan.Limits``. None stands for Triton's interpreter, which runs
                 programs one by one; there the schedule is always "resident"
    tf32         whether fp32 may multiply in TF32
    schedule     one of "resident", "cluster", "grid" and "streamed", or None for the fastest
    keep_every   backward keeps c every so many steps; chosen from the other sizes if None
    zoneout      whether the plan must run with zoneout
    avoid        kernels that must not be chosen: (``Plan.variant``, "forward" or "backward", ``Plan.precision``) each

    Raises PlanError, with the reasons, if no plan fits.
    """
    plans, reasons = _candidates(batch, hidden_size, dtype, directions, limits, tf32, schedule, keep_every, zoneout)
    good = lambda plans, loop: [plan for plan in plans if (plan.variant, loop, plan.precision) not in avoid]
    cost = lambda plan, loop: 0 if limits is None else step_cycles(plan, limits.multiprocessors, loop,
                                                                  limits.multiply_adds)
    # Where every program can have all of R, nothing is faster, unless products take longer than the exchange of h, as
    # they do on GeForce cards. Where R fits on the chip, it is not read from L2. But wide split plans have small tiles
    # only, so for many rows a streamed plan may be cheaper.
    alone = [plan for plan in plans if plan.schedule == "resident"] if (
        limits is None or limits.multiply_adds >= FAST_PRODUCTS) else []
    on_chip = lambda plans: [plan for plan in plans if plan.kind != "streamed"]
    best = lambda plans: plans if all(plan.wide for plan in on_chip(plans)) else on_chip(plans)
    backwards = good(alone, "backward") or good(best(plans), "backward") or good(plans, "backward")
    backward = min(backwards, key=lambda plan: cost(plan, "backward"), default=None)
    more = _fitting(_wgmma(backward, limits), limits, zoneout) if (
        backward and schedule in (None, "grid") and not alone) else []
    forwards = good(alone, "forward") or good(best(plans + more), "forward") or good(plans, "forward")
    forward = min(forwards, key=lambda plan: cost(plan, "forward"), default=None)
    if forward is None or backward is None:
        loops = [loop for loop, plan in (("forward", forward), ("backward", backward)) if plan is None]
        raise PlanError("; ".join(reasons) if not plans else
                        f"every kernel that fits is known to be wrong here, {' and '.join(loops)}")
    return combined(forward, backward)


def combined(forward: Plan, backward: Plan) -> Plan:
    """The plan whose forward loop is that of ``forward``, and whose backward loop and ``keep_every`` are those of
    ``backward``."""
    own = dataclasses.replace(forward, backward_plan=None, keep_every=backward.keep_every)
    return own if own == backward else dataclasses.replace(own, backward_plan=backward)


def contenders(batch: int, hidden_size: int, dtype: torch.dtype, directions: int = 1, *, limits: Limits,
               tf32: bool = True, zoneout: bool = False, avoid: frozenset = frozenset()) -> dict[str, list[Plan]]:
    """The plans that are worth measuring, for each loop, "forward" and "backward". Arguments are those of
    ``make_plan``.

    The first is the plan that ``make_plan`` chooses. Then comes the cheapest plan of each other kind, then others that
    are predicted to take at most ``WITHIN`` times the cycles of the cheapest. They are ``CONTENDERS`` at most. Those of
    the forward loop all have the backward loop of the first.

    Raises PlanError if no plan fits.
    """
    chosen = make_plan(batch, hidden_size, dtype, directions, limits=limits, tf32=tf32, zoneout=zoneout, avoid=avoid)
    plans, _ = _candidates(batch, hidden_size, dtype, directions, limits, tf32, None, None, zoneout)
    more = _fitting(_wgmma(chosen.backward, limits), limits, zoneout)
    found = {}
    for loop, first, others in (("forward", chosen, [combined(plan, chosen.backward) for plan in plans + more]),
                                ("backward", chosen.backward, plans)):
        cost = functools.partial(step_cycles, multiprocessors=limits.multiprocessors, loop=loop,
                                 multiply_adds=limits.multiply_adds)
        others = sorted((plan for plan in others if (plan.variant, loop, plan.precision) not in avoid), key=cost)
        of_kinds = list({plan.kind: plan for plan in reversed(others) if plan.kind != first.kind}.values())
        close = [plan for plan in others if cost(plan) <= WITHIN * cost(others[0])]
        found[loop] = list(dict.fromkeys([first, *sorted(of_kinds, key=cost), *close]))[:CONTENDERS]
    return found


def candidates(batch: int, hidden_size: int, dtype: torch.dtype, directions: int = 1, *, limits: Limits | None = H200,
               tf32: bool = True, keep_every: int | None = None) -> list[Plan]:
    """All plans from which ``make_plan`` chooses; an empty list if none fits. Arguments are those of ``make_plan``.

    Each plan is for both loops, except those of kind "wgmma", which are for the forward loop only.
    """
    plans, _ = _candidates(batch, hidden_size, dtype, directions, limits, tf32, None, keep_every, False)
    if plans and limits is not None:
        cheapest = min(plans, key=lambda plan: step_cycles(plan, limits.multiprocessors, "backward",
                                                          limits.multiply_adds))
        plans += _fitting(_wgmma(cheapest, limits), limits)
    return plans


def _candidates(batch, hidden_size, dtype, directions, limits, tf32, schedule, keep_every, zoneout):
    """(plans, reasons): the plans that fit, except wgmma plans, the resident one first; and why others do not fit."""
    if batch < 0 or hidden_size < 1 or directions not in (1, 2):
        raise PlanError(f"no plan for batch {batch}, hidden_size {hidden_size}, {directions} directions")
    if schedule not in (None, *SCHEDULES):
        raise PlanError(f"schedule must be one of {SCHEDULES}, got {schedule!r}")
    precision = precision_for(dtype, tf32)
    layer = dict(hidden_size=hidden_size, directions=directions, batch=batch, precision=precision,
                 keep_every=keep_every or KEEP_EVERY)
    gluon = limits is not None and limits.cluster > 0 and precision != "tf32x3" and not zoneout
    plans, reasons = [], []
    for plan in itertools.chain(_resident(layer, gluon), _cluster(layer), _grid(layer, limits),
                                _split(layer, limits) if gluon else ()):
        if schedule not in (None, plan.schedule):
            if plan.exchanges and schedule in ("grid", "streamed"):
                reasons.append(f"{schedule}: " + ("R does not fit on the chip" if plan.kind == "streamed" else
                                                  "all of R fits on the chip"))
            continue
        if keep_every is None:
            steps = keep_every_for(batch, hidden_size, directions, plan.derives_coefficients)
            plan = dataclasses.replace(plan, keep_every=steps)
        plans += _fitting([plan], limits, zoneout, reasons)
    return plans, list(dict.fromkeys(reasons))


def _fitting(plans, limits, zoneout=False, reasons=None):
    """Those of ``plans`` that can run. Why the others cannot is appended to the list ``reasons``.

    No reasons are given for split and wgmma plans: they have the schedule of grid plans, whose reasons are enough.
    """
    found = []
    for plan in plans:
        try:
            check_plan(plan, limits, zoneout)
            found.append(plan)
        except PlanError as error:
            if reasons is not None and plan.kind not in ("split", "wgmma"):
                reasons.append(f"{plan.schedule}: {error}")
    return found


def _resident(layer, gluon):
    """The plan in which each program has all of R: in Gluon if ``gluon``, else in plain Triton."""
    if gluon:
        yield _one_or_several_ctas(1, layer)
        return
    slices = r_slices(layer["hidden_size"], 128)
    units = sum(width for _, width in slices)
    yield Plan("portable resident", programs=1, groups=_tiles_of_all(layer), tiles=1, block_h=layer["hidden_size"],
               r_slices=slices, block_k=0, num_warps=4 if units <= 64 and layer["precision"] == "native" else NUM_WARPS,
               **layer)


def _cluster(layer):
    """Plans with clusters of 2 to 16 programs. Programs of fewer than 32 units make no step shorter."""
    for ctas in (2, 4, 8, 16):
        if ctas == 2 or layer["hidden_size"] > 16 * ctas:
            yield _one_or_several_ctas(ctas, layer)


def _one_or_several_ctas(ctas, layer):
    element = element_bytes(layer["precision"])
    block_h = max(1 << (-(-layer["hidden_size"] // ctas) - 1).bit_length(), 16)
    # A thread has all four gates of a unit. In one CTA it has two units: with one, dh would reach it by a detour.
    num_warps = min(NUM_WARPS, block_h // 4 if ctas > 1 else block_h // 8)
    return Plan("cluster" if ctas > 1 else "resident", programs=ctas, groups=_tiles_of_all(layer), tiles=1,
                block_h=block_h, num_warps=num_warps, r_slices=r_slices(layer["hidden_size"], GLUON_BYTES // element),
                block_k=0, **layer)


def _grid(layer, limits):
    """Plans of plain Triton programs that exchange h through L2; streamed plans if not all of R fits on chip."""
    for block_h, block_b in itertools.product((16, 32, 64), (16, 32)):
        slices, block_k = _slices_and_block(layer, block_h, block_b, limits)
        programs = -(-layer["hidden_size"] // block_h)
        most = _tiles_of_all(layer) if limits is None else (
            limits.multiprocessors // (programs * layer["directions"]))
        # where a program has one tile anyway it should be small; exact fp32 has too many operands for more registers
        if block_b > BLOCK_B and (_tiles_of_all(layer) <= most or layer["precision"] == "tf32x3"):
            continue
        yield Plan("streamed" if block_k else "grid", programs=programs, block_h=block_h, num_warps=NUM_WARPS,
                   r_slices=slices, block_k=block_k, block_b=block_b, **_groups(layer, most, block_b), **layer)


def _split(layer, limits):
    """Split plans: grid plans in which each warp of a program multiplies a part of the units of the earlier h. A wide
    one if not all of R fits into registers."""
    for block_h in (16, 32):
        programs = -(-layer["hidden_size"] // block_h)
        most = limits.multiprocessors // (programs * layer["directions"])
        plan = Plan("split", programs=programs, block_h=block_h, num_warps=NUM_WARPS, block_k=0,
                    r_slices=split_slices(layer["hidden_size"], layer["precision"]), **_groups(layer, most, BLOCK_B),
                    **layer)
        if block_h == WIDE_UNITS and plan.held_bytes > HELD_BYTES:
            slices = split_slices(layer["hidden_size"], layer["precision"], block_h, WIDE_BYTES)
            plan = dataclasses.replace(plan, r_slices=slices, register_room=WIDE_BYTES)
        yield plan


def _wgmma(backward, limits):
    """Wgmma plans for the layer of ``backward``, which becomes their plan of the backward loop."""
    layer = {name: getattr(backward, name)
             for name in ("hidden_size", "directions", "batch", "precision", "keep_every")}
    if limits is None or layer["precision"] == "tf32x3":
        return
    slices = wgmma_slices(layer["hidden_size"], layer["precision"])
    for block_h, block_b in itertools.product((8, 16, 32, 64), (WARP_GROUP_ROWS, 2 * WARP_GROUP_ROWS)):
        programs = -(-layer["hidden_size"] // block_h)
        most = limits.multiprocessors // (programs * layer["directions"])
        yield Plan("wgmma", programs=programs, block_h=block_h, num_warps=block_b // 16, r_slices=slices, block_k=0,
                   block_b=block_b, backward_plan=backward, **_groups(layer, most, block_b), **layer)


def _tiles_of_all(layer, block_b=BLOCK_B):
    return max(-(-layer["batch"] // block_b), 1)


def _groups(layer, most, block_b):
    """``Plan.groups`` and ``Plan.tiles``: as many groups as the batch has tiles, but at most ``most``, at least one."""
    tiles_of_all = _tiles_of_all(layer, block_b)
    tiles = -(-tiles_of_all // max(min(most, tiles_of_all), 1))
    return dict(groups=-(-tiles_of_all // tiles), tiles=tiles)


def _slices_and_block(layer, block_h, block_b, limits):
    """(r_slices, block_k) of a program with ``block_h`` hidden units; block_k is 0 if all of its part of R fits."""
    shared_memory = HELD_BYTES if limits is None else limits.shared_memory
    column = 4 * block_h * element_bytes(layer["precision"])            # bytes of R for one unit that feeds
    width = {"native": 256, "tf32": 128, "tf32x3": 64}[layer["precision"]] * 16 // block_b  # units of h in registers
    slices = r_slices(layer["hidden_size"], width)
    if column * sum(w for _, w in slices) <= min(HELD_BYTES, shared_memory):
        return slices, 0
    # blocks on their way need registers, and shared memory for three
    held = min(HELD_BYTES * 3 // 4, shared_memory - 3 * BLOCK_BYTES) // column // 32 * 32
    return r_slices(max(held, 16), width), max(BLOCK_BYTES // column, 16)
