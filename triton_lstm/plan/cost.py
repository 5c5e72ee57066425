"""The cost model: how many cycles the time loops of a plan are predicted to take.

The constants are fitted to bounds that ``bench.residency`` reads from machine code. They are not measured. ``python -m
bench fit`` fits them to measured loops.
"""
from .plan import WARP_GROUP_ROWS, Plan, element_bytes

# How many times more or less than a bound from machine code the model predicts at most, for the loops of 24 workloads
# of ``bench.workloads`` on 8.0, 8.9, 9.0 and 10.0 (``bench.residency.model_ratio``). bench/NOTES.md has one exception.
UNCERTAINTY = 2.3
# Cycles of a step beyond its work: of resident and cluster plans, and of portable resident ones; of each tile of grid
# and streamed plans, plus one for each hidden unit. Then which part of its work such a tile does not hide.
GLUON_STEP = {"native": 350, "tf32": 650}
RESIDENT_STEP, TILE_STEP, TILE_WORK = 2400, 1500, 0.3
# What an exchange adds, in a cluster and through L2.
CLUSTER_EXCHANGE, L2_EXCHANGE = 400, 1000
# The work: multiply-adds a cycle by mma.sync on Hopper, which other GPUs do faster or slower (``Limits``); cycles an
# element of the cell, bytes a cycle from L2.
HOPPER_MULTIPLY_ADDS = 1280
MULTIPLY_ADDS, CELL_CYCLES, L2_BYTES = {"native": 1280, "tf32": 640, "tf32x3": 640 / 3}, 0.5, 32
# A step of one warp group, in cycles: beyond its products, for each unit of the program, for each look at h, and for a
# product along 32 bytes at least. Then multiply-adds a cycle, which all warp groups of a program share. One
# multiprocessor reads at most twice its share of L2_BYTES.
WARP_GROUP_STEP, WARP_GROUP_UNIT = {"native": 700, "tf32": 900}, {"native": 30, "tf32": 70}
WARP_GROUP_LOOK, WARP_GROUP_PRODUCT = {"native": 170, "tf32": 130}, 28
WARP_GROUP_MULTIPLY_ADDS = {"native": 2048, "tf32": 1024}
# A step of a split tile: cycles beyond its products, and which part of those is not hidden.
SPLIT_STEP, SPLIT_PRODUCTS = {"native": 730, "tf32": 900}, {"native": 1., "tf32": 0.6}
# The same of a wide one, for each loop.
WIDE_STEP = {("native", "forward"): 1060, ("native", "backward"): 720, ("tf32", "forward"): 880,
             ("tf32", "backward"): 530}
WIDE_PRODUCTS = {("native", "forward"): 0.61, ("native", "backward"): 1.47, ("tf32", "forward"): 0.83,
                 ("tf32", "backward"): 1.17}
# A pass of a streamed tile over ``block_k`` units whose part of R is read from L2. What its backward loop takes beside
# passes, and in all at least. Backward passes over fewer than 64 units take longer, and more so with more rows.
STREAMED_PASS, STREAMED_STEP, STREAMED_LEAST = {"forward": 250, "backward": 475}, 1400, 3700
# What 16-bit types multiply that by where rows of R do not start at multiples of 16 bytes, so that loads are shorter.
STREAMED_UNALIGNED = 1.15
# What to multiply the mean of both loops by to get one of them, where the two differ much.
LOOP_SHARE = {("split", "forward"): 0.9, ("split", "backward"): 1.1, ("grid", "forward"): 1.15,
              ("grid", "backward"): 0.85}


def step_cycles(plan: Plan, multiprocessors: int, loop: str | None = None,
                multiply_adds: int = HOPPER_MULTIPLY_ADDS) -> float:
    """The predicted cycles of one step of all batch rows in a time loop of ``plan``.

    multiprocessors    of the device
    loop               "forward", "backward", or None for the mean of both
    multiply_adds      ``Limits.multiply_adds`` of the device

    Programs that wait for no program outside their cluster run one wave after the other. Programs that exchange h
    through L2 all run at the same time and compute their tiles in turn: while the h of one tile travels, they compute
    the others.
    """
    rate = MULTIPLY_ADDS[plan.precision] * multiply_adds / HOPPER_MULTIPLY_ADDS
    if plan.kind in ("streamed", "resident", "cluster") or plan.wide:
        cycles = _streamed_cycles if plan.kind == "streamed" else _wide_cycles if plan.wide else _wave_cycles
        loops = [loop] if loop else ["forward", "backward"]
        return sum(cycles(plan, multiprocessors, loop, rate) for loop in loops) / len(loops)
    return _mean_cycles(plan, multiprocessors, rate) * (LOOP_SHARE.get((plan.kind, loop), 1) if loop else 1)


def _waves(plan, multiprocessors):
    return -(-plan.groups * plan.directions // max(multiprocessors // plan.programs, 1))


def _wave_cycles(plan, multiprocessors, loop, rate):
    """Of resident and cluster plans. Forward multiplies by the units that there are, backward by padding too."""
    units = plan.hidden_size if plan.programs == 1 else plan.block_h
    feeding = plan.programs * plan.block_h if loop == "backward" and plan.programs > 1 else plan.hidden_size
    products = 4 * plan.block_b * units * feeding / rate
    work = 4 * plan.block_b * units * plan.hidden_size / rate
    work += plan.block_b * units * CELL_CYCLES
    step = max(GLUON_STEP[plan.precision] + work / 4, products)
    return _waves(plan, multiprocessors) * (step + (CLUSTER_EXCHANGE if plan.programs > 1 else 0))


def _streamed_cycles(plan, multiprocessors, loop, rate):
    passes, block_k = -(-(plan.hidden_size - plan.held) // plan.block_k), plan.block_k
    products = 4 * plan.block_b * plan.block_h * plan.hidden_size / rate
    if loop == "forward":
        work = products + plan.block_b * plan.block_h * CELL_CYCLES
        h = plan.block_b * plan.hidden_size * (2 if plan.precision == "native" else 4)
        tile = TILE_STEP + plan.hidden_size + TILE_WORK * (work + h / L2_BYTES) + STREAMED_PASS[loop] * passes
    else:
        longer = (64 / block_k * plan.block_b / 16) ** 0.5 if block_k < 64 else 1
        tile = max(STREAMED_STEP + STREAMED_PASS[loop] * longer * passes, STREAMED_LEAST)
    if plan.precision == "native" and plan.hidden_size % 8:
        tile *= STREAMED_UNALIGNED
    tile = max(tile, products, plan.streamed_bytes / L2_BYTES)
    return plan.tiles * tile + max(L2_EXCHANGE - (plan.tiles - 1) * tile, 0)


def _wide_cycles(plan, multiprocessors, loop, rate):
    products = 4 * plan.block_b * plan.block_h * plan.hidden_size / rate
    tile = WIDE_STEP[plan.precision, loop] + WIDE_PRODUCTS[plan.precision, loop] * products
    h = plan.block_b * plan.hidden_size * element_bytes(plan.precision)
    tile = max(tile, products, h / L2_BYTES * max(plan.launched / multiprocessors, 0.5))
    return plan.tiles * tile + max(L2_EXCHANGE - (plan.tiles - 1) * tile, 0)


def _mean_cycles(plan, multiprocessors, rate):
    units = plan.hidden_size if plan.kind == "portable resident" else plan.block_h
    products = 4 * plan.block_b * units * plan.hidden_size / rate
    work = products + plan.block_b * units * CELL_CYCLES
    if plan.kind == "portable resident":
        return _waves(plan, multiprocessors) * max(RESIDENT_STEP + work / 2, products)
    h = plan.block_b * plan.hidden_size * (2 if plan.precision == "native" else 4)
    if plan.kind == "wgmma":
        products = 4 * plan.block_b * plan.block_h * plan.held / WARP_GROUP_MULTIPLY_ADDS[plan.precision]
        own = max(products * WARP_GROUP_ROWS / plan.block_b,
                  WARP_GROUP_PRODUCT * plan.held * element_bytes(plan.precision) / 32)
        own += WARP_GROUP_STEP[plan.precision] + WARP_GROUP_UNIT[plan.precision] * plan.block_h
        own += WARP_GROUP_LOOK[plan.precision] * len(plan.r_slices)
        rows = -(-plan.batch // (plan.groups * plan.tiles))
        h *= rows / plan.block_b
    elif plan.kind == "split":
        own = SPLIT_STEP[plan.precision] + SPLIT_PRODUCTS[plan.precision] * products
    if plan.gluon:
        tile = max(own, products, h / L2_BYTES * max(plan.launched / multiprocessors, 0.5))
    else:
        tile = max(TILE_STEP + plan.hidden_size + TILE_WORK * (work + h / L2_BYTES), products)
    return plan.tiles * tile + max(L2_EXCHANGE - (plan.tiles - 1) * tile, 0)
