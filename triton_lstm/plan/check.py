"""``check_plan``: whether a plan can run on a device."""
from .limits import Limits, needed
from .plan import (
    HELD_BYTES,
    KINDS,
    NUM_WARPS,
    PRECISIONS,
    WARP_GROUP_BYTES,
    WARP_GROUP_ROWS,
    WIDE_UNITS,
    Plan,
    PlanError,
    element_bytes,
    split_slices,
    wgmma_slices,
)


def check_plan(plan: Plan, limits: Limits | None, zoneout: bool = False) -> None:
    """Raise PlanError, with the reason, unless the kernels can run ``plan``.

    limits     of the device; None for Triton's interpreter, which has no limits
    zoneout    whether the plan must run with zoneout

    Programs that wait for each other must all run at the same time.
    """
    if plan.kind not in KINDS or plan.precision not in PRECISIONS:
        raise PlanError(f"unknown kind {plan.kind!r} or precision {plan.precision!r}")
    if plan.keep_every < 1:
        raise PlanError(f"keep_every must be at least 1, got {plan.keep_every}")
    _check_slices(plan)
    if plan.gluon:
        if zoneout:
            raise PlanError(f"the {plan.kind} kernels have no zoneout: make_plan(..., zoneout=True) finds others")
        if plan.precision == "tf32x3":
            raise PlanError(f"the {plan.kind} kernels have no exact fp32")
    if plan.kind in ("resident", "cluster"):
        if (plan.programs & (plan.programs - 1) or plan.block_h & (plan.block_h - 1)
                or plan.block_h < max(16, 4 * plan.num_warps)):
            raise PlanError(f"{plan.kind} programs and their units must be powers of two, from 16 and four a warp up, "
                            f"got {plan.programs} of {plan.block_h} units and {plan.num_warps} warps")
    if plan.kind == "split":
        _check_split(plan)
    if plan.kind == "wgmma":
        _check_wgmma(plan)
    if plan.kind == "cluster" and not 2 <= plan.programs <= 16:
        raise PlanError(f"a cluster has 2 to 16 programs, got {plan.programs}")
    if plan.schedule == "resident":
        if plan.programs != 1:
            raise PlanError(f"a resident plan has one program, got {plan.programs}")
    elif plan.programs * plan.block_h < plan.hidden_size:
        raise PlanError(f"{plan.programs} programs of {plan.block_h} units hold fewer than {plan.hidden_size}")
    if not plan.gluon and plan.block_b not in ((16, 32) if plan.exchanges else (16,)):
        raise PlanError(f"{plan.kind} with tiles of {plan.block_b} batch rows")
    if plan.groups * plan.tiles * plan.block_b < plan.batch:
        raise PlanError(f"{plan.groups} groups of {plan.tiles} tiles hold fewer than {plan.batch} batch rows")
    if plan.kind == "wgmma" or plan.backward_plan:
        same = ("hidden_size", "directions", "batch", "precision", "keep_every")
        if plan.backward.kind == "wgmma" or any(getattr(plan.backward, name) != getattr(plan, name) for name in same):
            raise PlanError(f"no plan of the same layer's backward loop: {plan.backward_plan}")
        check_plan(plan.backward, limits, zoneout)
    if limits is not None:
        _check_limits(plan, limits)
    elif plan.gluon:
        raise PlanError(f"Triton's interpreter has no {plan.kind} kernels")


def _check_slices(plan):
    ends = [0] + [start + width for start, width in plan.r_slices]
    if [start for start, _ in plan.r_slices] != ends[:-1] or any(w < 16 or w & (w - 1) for _, w in plan.r_slices):
        raise PlanError(f"r_slices must be powers of two from 16 up, one after the other, got {plan.r_slices}")
    if (plan.held < plan.hidden_size) != (plan.kind == "streamed"):
        raise PlanError(f"{plan.kind} with {plan.held} of {plan.hidden_size} units' R on chip")
    if plan.kind == "streamed" and (plan.block_k < 16 or plan.block_k & (plan.block_k - 1)):
        raise PlanError(f"block_k must be a power of two from 16 up, got {plan.block_k}")


def _check_split(plan):
    if plan.block_b != 16:
        raise PlanError(f"split with tiles of {plan.block_b} batch rows")
    if plan.block_h not in (16, 32) or plan.num_warps != NUM_WARPS:
        raise PlanError(f"a split program has {NUM_WARPS} warps and 16 or 32 units, got {plan.num_warps} and "
                        f"{plan.block_h}")
    if any(width % (64 // element_bytes(plan.precision)) for _, width in plan.r_slices):
        raise PlanError(f"four threads take 64 bytes of a row together, got {plan.r_slices}")
    if plan.register_room > HELD_BYTES:
        raise PlanError(f"registers hold {HELD_BYTES} bytes of R at most, got {plan.register_room}")
    if plan.wide and plan.block_h == WIDE_UNITS and plan.r_slices != split_slices(
            plan.hidden_size, plan.precision, plan.block_h, plan.register_room):
        raise PlanError(f"slices of R in registers come first, got {plan.r_slices}")


def _check_wgmma(plan):
    if plan.block_b != 16 * plan.num_warps or plan.block_b not in (WARP_GROUP_ROWS, 2 * WARP_GROUP_ROWS):
        raise PlanError(f"four or eight warps multiply {WARP_GROUP_ROWS} rows for each four, got {plan.block_b} "
                        f"rows and {plan.num_warps} warps")
    if plan.block_h not in (8, 16, 32, 64):
        raise PlanError(f"a program with warp groups has 8, 16, 32 or 64 units, got {plan.block_h}")
    if plan.r_slices != wgmma_slices(plan.hidden_size, plan.precision):
        raise PlanError(f"warp groups look at {WARP_GROUP_BYTES} bytes of a row at a time, got {plan.r_slices}")


def _check_limits(plan, limits):
    if plan.gluon and limits.cluster == 0:
        raise PlanError(f"the {plan.kind} kernels need {needed('gluon')}")
    if plan.kind == "wgmma" and not limits.wgmma:
        raise PlanError(f"products by warp groups need {needed('wgmma')}")
    if plan.kind == "cluster" and plan.programs > min(limits.cluster, limits.multiprocessors):
        raise PlanError(f"a cluster of {plan.programs} programs, where at most "
                        f"{min(limits.cluster, limits.multiprocessors)} run")
    if plan.exchanges and plan.launched > limits.multiprocessors:
        raise PlanError(f"{plan.launched} programs of {plan.block_h} units wait for each other but only "
                        f"{limits.multiprocessors} multiprocessors can run them at the same time")
    room = HELD_BYTES * plan.num_warps // NUM_WARPS
    shares_room = plan.kind in ("cluster", "wgmma") or plan.wide and plan.block_h == WIDE_UNITS
    if not shares_room and plan.held_bytes > room:
        raise PlanError(f"{plan.held_bytes} bytes of R do not fit the registers of a program, which hold {room} beside "
                        f"what a step needs")
    if plan.gluon and plan.shared_bytes > limits.shared_memory:
        raise PlanError(f"{plan.shared_bytes} bytes of R and a step's tiles do not fit the shared memory, which has "
                        f"{limits.shared_memory}")
    if not plan.gluon and plan.held_bytes > limits.shared_memory:
        raise PlanError(f"{plan.held_bytes} bytes of R pass through shared memory once, which has "
                        f"{limits.shared_memory}")
