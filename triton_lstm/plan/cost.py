"""The cost model: how many cycles the time loops of a plan are predicted to take.

The constants are fitted to bounds that ``bench.residency`` reads from machine code. They are not measured. ``python -m
bench fit`` fits them to measured loops.
"""
from .plan import WARP_GROUP_ROWS, Plan, element_bytes

# How many times more or less than a bound from machine code the model predicts at most, for the loops of 25 workloads
# of ``bench.workloads`` on 8.0, 8.9, 9.0 and 10.0 (``bench.residency.model_ratio``). bench/NOTES.md has one exception.
UNCERTAINTY = 2.1
# Cycles of a step beyond its work: of resident and cluster plans for each loop, and of portable resident ones; of each
# tile of grid and streamed plans, plus one for each hidden unit. Then which part of its work such a tile does not hide.
GLUON_STEP = {("native", "forward"): 490, ("native", "backward"): 530, ("tf32", "forward"): 1060,
              ("tf32", "backward"): 570}
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
# A step of a split tile: cycles beyond its products, and which part of those is not hidden, for each loop. Then the
# same of a wide one.
SPLIT_STEP = {("native", "forward"): 1000, ("native", "backward"): 1110, ("tf32", "forward"): 1120,
              ("tf32", "backward"): 860}
SPLIT_PRODUCTS = {("native", "forward"): 0.5, ("native", "backward"): 0.64, ("tf32", "forward"): 0.46,
                  ("tf32", "backward"): 0.58}
WIDE_STEP = {("native", "forward"): 1060, ("native", "backward"): 720, ("tf32", "forward"): 880,
             ("tf32", "backward"): 530}
WIDE_PRODUCTS = {("native", "forward"): 0.61, ("native", "backward"): 1.47, ("tf32", "forward"): 0.83,
                 ("tf32", "backward"): 1.17}
# A pass of a streamed tile over ``block_k`` units whose part of R is read from L2. What its backward loop takes beside
# passes, and in all at least. Backward passes over fewer than 64 units take longer, and more so with more rows.
STREAMED_PASS, STREAMED_STEP, STREAMED_LEAST = {"forward": 250, "backward": 475}, 1400, 3700
# What 16-bit types multiply that by where rows of R do not start at multiples of 16 bytes, so that loads are shorter.
STREAMED_UNALIGNED = 1.15
# What to multiply the mean of both loops of a grid plan by to get one of them.
LOOP_SHARE = {"forward": 1.15, "backward": 0.85}


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
    loops = [loop] if loop else ["forward", "backward"]
    return sum(CYCLES[plan.kind](plan, multiprocessors, loop, rate) for loop in loops) / len(loops)


def _waves(plan, multiprocessors):
    return -(-plan.groups * plan.directions // max(multiprocessors // plan.programs, 1))


def _wave_cycles(plan, multiprocessors, loop, rate):
    """Of resident and cluster plans. Forward multiplies by h of the units that there are, backward by padding too."""
    feeding = plan.programs * plan.block_h if loop == "backward" else plan.hidden_size
    products = 4 * plan.block_b * plan.block_h * feeding / rate
    work = 4 * plan.block_b * plan.block_h * plan.hidden_size / rate
    work += plan.block_b * plan.block_h * CELL_CYCLES
    step = max(GLUON_STEP[plan.precision, loop] + work / 4, products)
    return _waves(plan, multiprocessors) * (step + (CLUSTER_EXCHANGE if plan.programs > 1 else 0))


def _streamed_cycles(plan, multiprocessors, loop, rate):
    passes, block_k = -(-(plan.hidden_size - plan.held) // plan.block_k), plan.block_k
    products = 4 * plan.block_b * plan.block_h * plan.hidden_size / rate
    if loop == "forward":
        work = products + plan.block_b * plan.block_h * CELL_CYCLES
        h = plan.block_b * plan.hidden_size * element_bytes(plan.precision)
        tile = TILE_STEP + plan.hidden_size + TILE_WORK * (work + h / L2_BYTES) + STREAMED_PASS[loop] * passes
    else:
        longer = (64 / block_k * plan.block_b / 16) ** 0.5 if block_k < 64 else 1
        tile = max(STREAMED_STEP + STREAMED_PASS[loop] * longer * passes, STREAMED_LEAST)
    if plan.precision == "native" and plan.hidden_size % 8:
        tile *= STREAMED_UNALIGNED
    tile = max(tile, products, plan.streamed_bytes / L2_BYTES)
    return _with_exchange(plan, tile)


def _split_cycles(plan, multiprocessors, loop, rate):
    step, share = (WIDE_STEP, WIDE_PRODUCTS) if plan.wide else (SPLIT_STEP, SPLIT_PRODUCTS)
    products = 4 * plan.block_b * plan.block_h * plan.hidden_size / rate
    tile = step[plan.precision, loop] + share[plan.precision, loop] * products
    h = plan.block_b * plan.hidden_size * element_bytes(plan.precision)
    return _with_exchange(plan, max(tile, products, _h_cycles(plan, multiprocessors, h)))


def _warp_group_cycles(plan, multiprocessors, loop, rate):
    products = 4 * plan.block_b * plan.block_h * plan.held / WARP_GROUP_MULTIPLY_ADDS[plan.precision]
    tile = max(products * WARP_GROUP_ROWS / plan.block_b,
               WARP_GROUP_PRODUCT * plan.held * element_bytes(plan.precision) / 32)
    tile += WARP_GROUP_STEP[plan.precision] + WARP_GROUP_UNIT[plan.precision] * plan.block_h
    tile += WARP_GROUP_LOOK[plan.precision] * len(plan.r_slices)
    rows = -(-plan.batch // (plan.groups * plan.tiles))
    h = min(rows, plan.block_b) * plan.hidden_size * element_bytes(plan.precision)
    return _with_exchange(plan, max(tile, products, _h_cycles(plan, multiprocessors, h)))


def _portable_resident_cycles(plan, multiprocessors, loop, rate):
    products = 4 * plan.block_b * plan.hidden_size ** 2 / rate
    work = products + plan.block_b * plan.hidden_size * CELL_CYCLES
    return _waves(plan, multiprocessors) * max(RESIDENT_STEP + work / 2, products)


def _grid_cycles(plan, multiprocessors, loop, rate):
    products = 4 * plan.block_b * plan.block_h * plan.hidden_size / rate
    work = products + plan.block_b * plan.block_h * CELL_CYCLES
    h = plan.block_b * plan.hidden_size * element_bytes(plan.precision)
    tile = max(TILE_STEP + plan.hidden_size + TILE_WORK * (work + h / L2_BYTES), products)
    return LOOP_SHARE[loop] * _with_exchange(plan, tile)


def _h_cycles(plan, multiprocessors, h):
    """Of reading the ``h`` bytes of a tile from L2."""
    return h / L2_BYTES * max(plan.launched / multiprocessors, 0.5)


def _with_exchange(plan, tile):
    """A step of all tiles of a program, of ``tile`` cycles each. While h of one travels, the others are computed."""
    return plan.tiles * tile + max(L2_EXCHANGE - (plan.tiles - 1) * tile, 0)


CYCLES = {"portable resident": _portable_resident_cycles, "resident": _wave_cycles, "cluster": _wave_cycles,
          "grid": _grid_cycles, "streamed": _streamed_cycles, "split": _split_cycles, "wgmma": _warp_group_cycles}
