"""Which schedule a layer runs with, and where its recurrent weights R then live: plain arithmetic, no GPU needed.

Sizes are in bytes; registers are the 4-byte registers of one thread. The thresholds come from compiling every plan of
``bench.residency`` for sm_90 (``python -m bench residency`` prints what the compiler made of each); the cost model's
cycles are bounds read from that machine code, not measurements.
"""
import dataclasses
import functools
import itertools
import json

import torch
import triton

SCHEDULES = ("resident", "cluster", "grid", "streamed")
PRECISIONS = ("native", "tf32", "tf32x3")
BLOCK_B = 16                            # batch rows of a tile at least: the height of one mma.sync
NUM_WARPS = 8                           # of every program of the grid and streamed schedules
HELD_BYTES = 128 * 4 * 32 * NUM_WARPS   # of R in registers at most: 128 of a thread's 255, the rest is the step's
BLOCK_BYTES = 1 << 14                   # of R that a streamed plan reads at a time
GLUON_BYTES = 128                       # along a row of R, of one product of the Gluon kernels
WARP_GROUP_ROWS = 64                    # of a batch tile, of one wgmma
WARP_GROUP_BYTES = 512                  # along a row of R, between two looks at h by a warp group; half at the end
FUSED_INPUTS = 16                       # features that the Gluon forward loop multiplies by W itself, at most
BACKWARD_ELEMENTS = 1 << 21             # units x rows x steps that backward recomputes at a time, if it can choose
FORWARD_BYTES = 1 << 28                 # of pre-activations, or h on its way, that forward holds at a time, if it can
# The cost model, fitted to bounds that ``bench.residency`` reads from machine code, not to measurements. Cycles of a
# step beyond its work: of the Gluon kernels, of portable resident ones, and of each tile of grid and streamed plans,
# with one more for each unit of h; what an exchange adds in a cluster, and through L2. Then the work, of which a tile
# hides most: multiply-adds a cycle, cycles an element of the cell, bytes a cycle from L2.
GLUON_STEP = {"native": 350, "tf32": 650}
RESIDENT_STEP, TILE_STEP, TILE_WORK = 2400, 1500, 0.3
CLUSTER_EXCHANGE, L2_EXCHANGE = 400, 1000
MULTIPLY_ADDS, CELL_CYCLES, L2_BYTES = {"native": 1280, "tf32": 640, "tf32x3": 640 / 3}, 0.5, 32
# A step of one warp group: cycles beyond its products, for each unit of the program, for each look at h, and of a
# product along 32 bytes at least. Then multiply-adds a cycle, which all of a program's share. One multiprocessor reads
# at most twice its share of L2_BYTES.
WARP_GROUP_STEP, WARP_GROUP_UNIT = {"native": 700, "tf32": 900}, {"native": 30, "tf32": 70}
WARP_GROUP_LOOK, WARP_GROUP_PRODUCT = {"native": 170, "tf32": 130}, 28
WARP_GROUP_MULTIPLY_ADDS = {"native": 2048, "tf32": 1024}
# A step of a tile whose warps share the feeding units: cycles beyond its products, and the part of those that is seen.
SPLIT_STEP, SPLIT_PRODUCTS = {"native": 730, "tf32": 900}, {"native": 1., "tf32": 0.6}
SPLIT_TARGETS = 512                     # units whose shares a program computes at a time, at most
# Of one loop, where the two differ much; warp groups have but one.
LOOP_SHARE = {("split", "forward"): 0.9, ("split", "backward"): 1.1, ("grid", "forward"): 1.15,
              ("grid", "backward"): 0.85, ("streamed", "forward"): 1.15, ("streamed", "backward"): 0.85}


class PlanError(ValueError):
    """The schedule cannot run: the message says what does not fit."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a plan must fit: multiprocessors, shared memory of one program in bytes, and how many programs a cluster may
    have at most, 0 where the Gluon kernels do not run. The highest clock in MHz turns predicted cycles into time.
    ``wgmma``: whether there are the products by warp groups of compute capability 9.0."""
    multiprocessors: int
    shared_memory: int
    cluster: int = 0
    mhz: int = 1980
    wgmma: bool = False

    @staticmethod
    def of(device):
        """The limits of a CUDA device."""
        p = torch.cuda.get_device_properties(device)
        return Limits(p.multi_processor_count, p.shared_memory_per_block_optin,
                      _cluster((p.major, p.minor), p.multi_processor_count),
                      getattr(p, "clock_rate", 1000 * Limits.mhz) // 1000,      # older versions of torch tell none
                      (p.major, p.minor) == (9, 0))


def _cluster(capability, multiprocessors):
    """Tests run what the Gluon kernels compile to for three architectures. Clusters need the last and Triton 3.9, and
    lie within one GPC, of which only the full chips have several with 16 multiprocessors."""
    if capability not in ((8, 0), (8, 9), (9, 0)):
        return 0
    if capability < (9, 0) or tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        return 1
    return 16 if multiprocessors >= 132 else 8


H200 = H100 = Limits(132, 232448, _cluster((9, 0), 132), wgmma=True)
A100 = Limits(108, 166912, _cluster((8, 0), 108), 1410)
RTX_4090 = Limits(128, 101376, _cluster((8, 9), 128), 2520)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one layer runs over all its timesteps; ``str(plan)`` is the explanation for people.

    schedule     "resident": every program holds all of R for its batch rows; "cluster": the ``programs`` of one
                 thread-block cluster share R by hidden units and exchange h through their shared memory; "grid": any
                 programs share R so and meet in L2 once a step; "streamed": grid, but part of R is read from L2 every
                 step, and the rest stays in shared memory or registers
    hidden_size, directions, batch
    precision    "native" (16-bit types), "tf32", or "tf32x3" (fp32 in three TF32 products)
    programs     that share one R
    groups       of such programs side by side, per direction
    tiles        of batch rows that a group takes through each step
    block_h      hidden units of a program
    num_warps    of a program
    chunks       how the part of R on chip is cut along the units that feed it, (start, width) each: powers of two,
                 which reach hidden_size unless the plan is streamed; of each warp's share of them, if ``split``
    block_k      feeding units whose part of R is streamed at a time
    keep_every   c is kept every so many steps for backward, which recomputes that many steps at a time
    gluon        whether the Gluon kernels run it: always in a cluster, never in streamed plans; in grid plans with the
                 feeding units split among warps or, only forward, by warp groups
    block_b      batch rows of a tile: 16, in grid and streamed plans 32 where a group has several tiles, for warp
                 groups 64 for each four warps
    backward_plan   the plan of the backward loop where it is another, else None; see ``backward``
    """
    schedule: str
    hidden_size: int
    directions: int
    batch: int
    precision: str
    programs: int
    groups: int
    tiles: int
    block_h: int
    num_warps: int
    chunks: tuple
    block_k: int
    keep_every: int
    gluon: bool = False
    block_b: int = BLOCK_B
    backward_plan: "Plan | None" = None

    @property
    def backward(self):
        """The plan of the backward loop."""
        return self.backward_plan or self

    @property
    def wgmma(self):
        """Whether the forward loop multiplies by warp groups, 64 rows each, with R in shared memory."""
        return self.gluon and self.schedule == "grid" and self.block_b >= WARP_GROUP_ROWS

    @property
    def split(self):
        """Whether a program's warps share the units that feed, in backward those that shares are for."""
        return self.gluon and self.schedule == "grid" and self.block_b == BLOCK_B

    @property
    def kind(self):
        """The schedule, or which Gluon kernel a grid plan has."""
        return "wgmma" if self.wgmma else "split" if self.split else self.schedule

    @property
    def variant(self):
        """The kind, and what else tells kernels apart: how many programs a cluster has, and whether a resident plan is
        one of plain Triton."""
        if self.schedule == "cluster":
            return f"cluster {self.programs}"
        return "portable resident" if self.kind == "resident" and not self.gluon else self.kind

    @property
    def held(self):
        """Units whose part of R stays on chip."""
        return sum(width for _, width in self.chunks) * (self.num_warps if self.split else 1)

    @property
    def looks(self):
        """``chunks`` of all that feed."""
        each = self.held // self.num_warps
        shares = range(0, self.held, each) if self.split else [0]
        return tuple((first + start, width) for first in shares for start, width in self.chunks)

    @property
    def r_bytes(self):
        """Bytes of R of one direction, both planes of a tf32x3 R together."""
        return 4 * self.hidden_size ** 2 * _element(self.precision)

    @property
    def targets(self):
        """How a split backward loop cuts the units that its shares are for: of a product each warp has 16 at least."""
        least = 16 * self.num_warps
        return _cut(-(-self.hidden_size // least) * least, SPLIT_TARGETS)

    @property
    def held_bytes(self):
        """Bytes of R that one program holds on chip, padding included: in registers, but those of a streamed plan in
        shared memory or registers, as the compiler likes, and those of warp groups in shared memory. Of a cluster or
        one CTA the Gluon backward kernel's, which pads both sides alike."""
        if self.gluon and self.schedule != "grid":
            return 4 * self.block_h * self._units * _element(self.precision)
        rows = self.held if self.schedule == "resident" else self.block_h
        return 4 * rows * self.held * _element(self.precision)

    @property
    def _units(self):
        """Hidden units of all programs, padding included."""
        return self.programs * self.block_h

    @property
    def forward_warps(self):
        """Warps of a program of the Gluon forward kernel: twice as many where a thread would have four units or more,
        for their special functions to overlap with products. Backward has no special functions."""
        doubled = self.num_warps == NUM_WARPS and self.block_h >= 16 * NUM_WARPS
        return 2 * self.num_warps if doubled else self.num_warps

    @property
    def register_bytes(self):
        """Bytes of R that one Gluon program holds in registers; the rest is in shared memory."""
        return 0 if self.wgmma else min(self.held_bytes, HELD_BYTES)

    @property
    def shared_bytes(self):
        """Bytes of shared memory of a Gluon program: R beyond the registers, tiles of a step, and two mbarriers; or the
        products of each warp."""
        if self.wgmma:
            return self.held_bytes
        if self.split:
            return 4 * self.num_warps * self.block_b * 4 * self.block_h
        element, row = _element(self.precision), self.block_b * self._units
        forward, backward = row * element, self.block_b * 4 * self.block_h * element
        if self.programs > 1:
            forward, backward = 2 * forward + 16, backward + 2 * row * 4 + 16
        else:
            forward, backward = 2 * forward, 2 * backward
        return self.held_bytes - self.register_bytes + max(forward, backward)

    @property
    def owners(self):
        """Programs for all units that the products of a grid or streamed plan reach, padding included; no program is
        there for the last of them where blocks of R end beyond the last program's units."""
        reach = self.held
        if reach < self.hidden_size:
            reach += -(-(self.hidden_size - reach) // self.block_k) * self.block_k
        return max(-(-reach // self.block_h), self.programs)

    @property
    def streamed_bytes(self):
        """Bytes of R that one program reads from L2 each step."""
        return 4 * self.block_h * max(self.hidden_size - self.held, 0) * _element(self.precision)

    @property
    def launched(self):
        """Programs of one launch."""
        return self.programs * self.groups * self.directions

    def multiplies_input(self, input_size):
        """Whether the forward time loop computes x W^T itself, so that no pre-activations go through device memory.

        In 16-bit types that takes it 16 to 38 cycles more a step. In TF32 100 to 400 (by ``bench.machine_code``), less
        than to read pre-activations once programs fill half the chip: 18 bytes a cycle of device memory each, at most.
        """
        return (self.gluon and self.schedule != "grid" and 0 < input_size <= FUSED_INPUTS
                and (self.precision == "native" or self.launched >= 64))

    def step_cycles(self, multiprocessors, loop=None):
        """Cycles that the time loop is predicted to take for a step of all rows: the ``loop`` "forward" or "backward",
        or the mean of the two.

        Programs that wait for none outside their cluster run in waves. Those of grid and streamed plans run all at
        once, and take their tiles in turn: while h of one travels, the others are computed. So do warp groups.
        """
        return self._mean_cycles(multiprocessors) * LOOP_SHARE.get((self.kind, loop), 1)

    def _mean_cycles(self, multiprocessors):
        units = self.hidden_size if self.schedule == "resident" else self.block_h
        products = 4 * self.block_b * units * self.hidden_size / MULTIPLY_ADDS[self.precision]
        work = products + self.block_b * units * CELL_CYCLES
        if self.schedule in ("resident", "cluster"):
            waves = -(-self.groups * self.directions // max(multiprocessors // self.programs, 1))
            if not self.gluon:
                return waves * (RESIDENT_STEP + work / 2)
            step = max(GLUON_STEP[self.precision] + work / 4, products)
            return waves * (step + (CLUSTER_EXCHANGE if self.programs > 1 else 0))
        h = self.block_b * self.hidden_size * (2 if self.precision == "native" else 4)
        if self.wgmma:
            products = 4 * self.block_b * self.block_h * self.held / WARP_GROUP_MULTIPLY_ADDS[self.precision]
            own = max(products * WARP_GROUP_ROWS / self.block_b,
                      WARP_GROUP_PRODUCT * self.held * _element(self.precision) / 32)
            own += WARP_GROUP_STEP[self.precision] + WARP_GROUP_UNIT[self.precision] * self.block_h
            own += WARP_GROUP_LOOK[self.precision] * len(self.chunks)
            rows = -(-self.batch // (self.groups * self.tiles))
            h *= rows / self.block_b
        elif self.split:
            own = SPLIT_STEP[self.precision] + SPLIT_PRODUCTS[self.precision] * products
        if self.wgmma or self.split:
            tile = max(own, products, h / L2_BYTES * max(self.launched / multiprocessors, 0.5))
            return self.tiles * tile + max(L2_EXCHANGE - (self.tiles - 1) * tile, 0)
        tile = TILE_STEP + self.hidden_size + TILE_WORK * (work + h / L2_BYTES) + self.streamed_bytes / L2_BYTES
        return self.tiles * tile + max(L2_EXCHANGE - (self.tiles - 1) * tile, 0)

    def saved_bytes(self, T):
        """Bytes kept for backward beyond x, y and the weights: c in fp32 before every keep_every-th step but step 0."""
        return 4 * (max(-(-T // self.keep_every), 1) - 1) * self.directions * self.batch * self.hidden_size

    def backward_bytes(self, T, input_size, element, zoneout=False):
        """Bound on what backward needs beside dx for inputs of ``element`` bytes; constant from T = keep_every on.

        Per unit, row and step of a chunk: pre-activations, later da, in the input's type, and six fp32 coefficients,
        eight with zoneout; a copy of the chunk of x, should it not be contiguous. Then the shares of dh that a group's
        programs exchange, R as the kernels read it, dh and dc, and dW, dR, db in fp32 and in the input's type. A call
        with lengths or resets takes up to three copies of the chunk's h on top, a packed one a copy and an index of its
        rows.
        """
        if self.backward is not self:
            return self.backward.backward_bytes(T, input_size, element, zoneout)
        chunk = min(T, self.keep_every) * self.batch
        unit = 4 * element + (8 if zoneout else 6) * 4
        work = chunk * (self.directions * self.hidden_size * unit + input_size * element)
        if self.schedule in ("grid", "streamed"):
            rows = self.directions * self.groups * self.tiles * self.block_b
            work += 2 * 4 * rows * self.owners * self.programs * self.block_h
        weights = 4 * self.hidden_size * (input_size + self.hidden_size + 1)
        # c0 in fp32, dh and dc, and the latter two in the input's type
        states = self.directions * self.batch * self.hidden_size * (3 * 4 + 3 * element)
        return work + self.directions * (self.r_bytes * 2 + weights * (4 + element)) + states

    def forward_steps(self, T, element):
        """Steps whose pre-activations, and h on its way through L2, forward holds at a time: all of them or a multiple
        of keep_every."""
        step = 4 * self.hidden_size * self.batch * self.directions * element
        if self.schedule in ("grid", "streamed"):
            rows = self.directions * self.groups * self.tiles * self.block_b
            step = max(step, rows * self.owners * self.block_h * element)
        steps = max(FORWARD_BYTES // max(step, 1) // self.keep_every, 1) * self.keep_every
        return min(steps, T)

    def check(self, limits):
        """Raise PlanError unless every program of a launch can run at the same time within ``limits``."""
        if self.schedule not in SCHEDULES or self.precision not in PRECISIONS:
            raise PlanError(f"unknown schedule {self.schedule!r} or precision {self.precision!r}")
        if self.keep_every < 1:
            raise PlanError(f"keep_every must be at least 1, got {self.keep_every}")
        ends = [0] + [start + width for start, width in self.chunks]
        if [start for start, _ in self.chunks] != ends[:-1] or any(w < 16 or w & (w - 1) for _, w in self.chunks):
            raise PlanError(f"chunks must be powers of two from 16 up, one after the other, got {self.chunks}")
        if (self.held < self.hidden_size) != (self.schedule == "streamed"):
            raise PlanError(f"{self.schedule} with {self.held} of {self.hidden_size} units' R on chip")
        if self.schedule == "streamed" and (self.block_k < 16 or self.block_k & (self.block_k - 1)):
            raise PlanError(f"block_k must be a power of two from 16 up, got {self.block_k}")
        if self.gluon and self.schedule == "streamed" or not self.gluon and self.schedule == "cluster":
            raise PlanError(f"gluon={self.gluon} with {self.schedule}")
        if self.gluon and self.schedule == "grid":
            self._check_grid()
        elif self.gluon and (self.programs & (self.programs - 1) or self.block_h & (self.block_h - 1)
                             or self.block_h < max(16, 4 * self.num_warps)):
            raise PlanError(f"Gluon programs and their units must be powers of two, from 16 and four a warp up, got "
                            f"{self.programs} of {self.block_h} units and {self.num_warps} warps")
        if self.gluon and self.precision == "tf32x3":
            raise PlanError("the Gluon kernels have no exact fp32")
        if self.schedule == "cluster" and not 2 <= self.programs <= 16:
            raise PlanError(f"a cluster has 2 to 16 programs, got {self.programs}")
        if self.schedule == "resident":
            if self.programs != 1:
                raise PlanError(f"a resident plan has one program, got {self.programs}")
        elif self.programs * self.block_h < self.hidden_size:
            raise PlanError(f"{self.programs} programs of {self.block_h} units hold fewer than {self.hidden_size}")
        if not self.gluon and self.block_b not in ((16, 32) if self.schedule in ("grid", "streamed") else (16,)):
            raise PlanError(f"{self.schedule} with tiles of {self.block_b} batch rows")
        if self.groups * self.tiles * self.block_b < self.batch:
            raise PlanError(f"{self.groups} groups of {self.tiles} tiles hold fewer than {self.batch} batch rows")
        if self.wgmma or self.backward_plan:
            same = ("hidden_size", "directions", "batch", "precision", "keep_every")
            if self.backward.wgmma or any(getattr(self.backward, name) != getattr(self, name) for name in same):
                raise PlanError(f"no plan of the same layer's backward loop: {self.backward_plan}")
            self.backward.check(limits)
        if limits is None:
            return
        if self.gluon:
            if limits.cluster == 0:
                raise PlanError("the Gluon kernels need compute capability 8.0, 8.9 or 9.0")
            if self.wgmma and not limits.wgmma:
                raise PlanError("products by warp groups need compute capability 9.0")
            if self.schedule == "cluster" and self.programs > limits.cluster:
                raise PlanError(f"a cluster of {self.programs} programs, where at most {limits.cluster} run")
        if self.schedule in ("grid", "streamed") and self.launched > limits.multiprocessors:
            raise PlanError(f"{self.launched} programs wait for each other but only {limits.multiprocessors} "
                            f"multiprocessors can run them at the same time")
        room = HELD_BYTES * self.num_warps // NUM_WARPS
        if self.schedule != "cluster" and not self.wgmma and self.held_bytes > room:
            raise PlanError(f"{self.held_bytes} bytes of R for a program's registers, which hold {room} beside a "
                            f"step's own")
        if self.gluon and self.shared_bytes > limits.shared_memory:
            raise PlanError(f"{self.shared_bytes} bytes for R and a step's tiles in shared memory, which has "
                            f"{limits.shared_memory}")
        if not self.gluon and self.held_bytes > limits.shared_memory:
            raise PlanError(f"{self.held_bytes} bytes of R pass through shared memory once, which has "
                            f"{limits.shared_memory}")

    def _check_grid(self):
        """Raise PlanError unless the Gluon kernels of grid plans can multiply as this plan says."""
        if self.precision == "tf32x3":
            raise PlanError("the Gluon kernels have no exact fp32")
        if self.split:
            if self.block_h not in (16, 32) or self.num_warps != NUM_WARPS:
                raise PlanError(f"{NUM_WARPS} warps that share the feeding units have 16 or 32 units, got "
                                f"{self.num_warps} and {self.block_h}")
            if any(width % (64 // _element(self.precision)) for _, width in self.chunks):
                raise PlanError(f"four threads take 64 bytes of a row together, got {self.chunks}")
            return
        if self.block_b != 16 * self.num_warps or self.block_b not in (WARP_GROUP_ROWS, 2 * WARP_GROUP_ROWS):
            raise PlanError(f"four or eight warps multiply {WARP_GROUP_ROWS} rows for each four, got {self.block_b} "
                            f"rows and {self.num_warps} warps")
        if self.block_h not in (8, 16, 32, 64):
            raise PlanError(f"a program with warp groups has 8, 16, 32 or 64 units, got {self.block_h}")
        if self.chunks != _wgmma_chunks(self.hidden_size, WARP_GROUP_BYTES // _element(self.precision)):
            raise PlanError(f"warp groups look at {WARP_GROUP_BYTES} bytes of a row at a time, got {self.chunks}")

    @functools.lru_cache        # noqa: B019 - few plans, which are small
    def encode(self):
        """A string from which ``Plan.decode`` makes an equal plan: custom operators take no objects."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    @functools.lru_cache
    def decode(text):
        return _plan(json.loads(text))

    def __str__(self):
        kib = lambda n: f"{n / 1024:.0f} KiB"
        where = f"{kib(self.held_bytes)} of R in the {'shared memory' if self.wgmma else 'registers'} of each program"
        if self.schedule == "cluster" and self.held_bytes > HELD_BYTES:
            where = f"{kib(self.held_bytes)} of R in the registers and shared memory of each program"
        if self.streamed_bytes:
            where = (f"{kib(self.held_bytes)} of R on the chip in each program, {kib(self.streamed_bytes)} read from "
                     f"L2 every step")
        if self.schedule == "resident":
            how = "h stays in the program"
        elif self.schedule == "cluster":
            how = f"clusters of {self.programs} programs share R and exchange h through shared memory"
        else:
            how = f"{self.programs} programs share R and exchange h through L2"
        if self.wgmma:
            how += " and multiply by warp groups"
        if self.split:
            how += " and split it among their warps"
        text = (f"{self.schedule}: H={self.hidden_size} B={self.batch} x {self.directions} direction(s), "
                f"{self.precision}; {where}; {how}; {self.launched} programs of {self.num_warps} warps; "
                f"c kept every {self.keep_every} steps")
        return f"{text}; backward {self.backward}" if self.backward_plan else text


def _plan(fields):
    """The plan of which ``fields`` are what JSON makes of it."""
    chunks, backward = tuple(map(tuple, fields["chunks"])), fields["backward_plan"]
    return Plan(**{**fields, "chunks": chunks, "backward_plan": backward and _plan(backward)})


def _element(precision):
    return {"native": 2, "tf32": 4, "tf32x3": 8}[precision]


def _chunks(units, width):
    """``_cut`` so as to reach ``units`` rounded up to 16 or, beyond 16, to 32."""
    return _cut(16 if units <= 16 else -(-units // 32) * 32, width)


def _cut(end, width):
    """(start, size) of powers of two up to ``width``, largest first, that reach ``end``."""
    chunks, start = [], 0
    while start < end:
        size = min(width, 1 << ((end - start).bit_length() - 1))
        chunks.append((start, size))
        start += size
    return tuple(chunks)


def _wgmma_chunks(units, width):
    """As ``_chunks``, of ``width`` each but for the last, which may have half of it."""
    chunks = [(start, width) for start in range(0, units, width)]
    start, _ = chunks[-1]
    if units - start <= width // 2:
        chunks[-1] = start, width // 2
    return tuple(chunks)


def _split_chunks(units, element):
    """As ``_chunks``, of each warp's share of the units, in powers of two of which four threads take 64 bytes a row."""
    least = 64 // element
    each = -(-units // (NUM_WARPS * least)) * least
    return _cut(each, each)


def keep_every_for(batch, hidden_size, directions):
    """The default of ``keep_every``: a power of two from 16 to 256 that keeps backward's workspace moderate."""
    steps = 256
    while steps > 16 and steps * batch * hidden_size * directions > BACKWARD_ELEMENTS:
        steps //= 2
    return steps


def precision_for(dtype, tf32):
    """How products of ``dtype`` are computed; ``tf32`` tells whether fp32 may use TF32."""
    if dtype in (torch.float16, torch.bfloat16):
        return "native"
    if dtype == torch.float32:
        return "tf32" if tf32 else "tf32x3"
    raise PlanError(f"no kernel computes in {dtype}")


def _gluon(ctas, batch_tiles, common, limits):
    """The plan of the Gluon kernels in clusters of ``ctas``, or of one CTA."""
    element = _element(common["precision"])
    block_h = max(1 << (-(-common["hidden_size"] // ctas) - 1).bit_length(), 16)
    # a thread has all four gates of a unit; alone, two units, or dh would need a detour to its owner
    num_warps = min(NUM_WARPS, block_h // 4 if ctas > 1 else block_h // 8)
    plan = Plan("cluster" if ctas > 1 else "resident", programs=ctas, groups=batch_tiles, tiles=1, block_h=block_h,
                num_warps=num_warps, chunks=_chunks(common["hidden_size"], GLUON_BYTES // element), block_k=0,
                gluon=True, **common)
    plan.check(limits)
    return plan


def _resident(hidden_size, precision, batch_tiles, common, limits):
    if limits is not None and limits.cluster and precision != "tf32x3":
        return _gluon(1, batch_tiles, common, limits)
    chunks = _chunks(hidden_size, 128)
    units = sum(width for _, width in chunks)
    plan = Plan("resident", programs=1, groups=batch_tiles, tiles=1, block_h=hidden_size, chunks=chunks, block_k=0,
                num_warps=4 if units <= 64 and precision == "native" else NUM_WARPS, **common)
    plan.check(limits)
    return plan


def _shared(hidden_size, precision, block_h, block_b, shared_memory):
    """(chunks, block_k) of a program with ``block_h`` hidden units; block_k 0 where all of its R fits."""
    column = 4 * block_h * _element(precision)          # bytes of R for one unit that feeds
    width = {"native": 256, "tf32": 128, "tf32x3": 64}[precision] * 16 // block_b   # of a block of h in registers
    chunks = _chunks(hidden_size, width)
    if column * sum(w for _, w in chunks) <= min(HELD_BYTES, shared_memory):
        return chunks, 0
    # blocks on their way need registers, and shared memory for three
    held = min(HELD_BYTES * 3 // 4, shared_memory - 3 * BLOCK_BYTES) // column // 32 * 32
    return _chunks(max(held, 16), width), max(BLOCK_BYTES // column, 16)


def make_plan(batch, hidden_size, dtype, directions=1, *, limits=H200, tf32=True, schedule=None, keep_every=None,
              avoid=frozenset()):
    """The plan for ``batch`` rows of a layer of ``hidden_size`` units.

    dtype: torch.float16, bfloat16 or float32; ``tf32`` says whether fp32 may multiply in TF32. limits: of the device,
    or None for Triton's interpreter, which knows no registers and runs programs one by one: there R is always
    resident. schedule: one of ``SCHEDULES`` instead of the cheapest. avoid: (variant, loop, precision) that are not to
    be chosen. Raises PlanError with the reason if none fits.
    """
    plans, reasons = _candidates(batch, hidden_size, dtype, directions, limits, tf32, schedule, keep_every)
    good = lambda loop: [plan for plan in plans if (plan.variant, loop, plan.precision) not in avoid]
    # where every program can have all of R, nothing is faster
    alone = plans[:1] if plans and plans[0].schedule == "resident" else []
    backwards = good("backward")
    if any(plan in backwards for plan in alone):
        backwards = alone
    cost = lambda plan, loop: 0 if limits is None else plan.step_cycles(limits.multiprocessors, loop)
    backward = min(backwards, key=lambda plan: cost(plan, "backward"), default=None)
    forwards = good("forward")
    if any(plan in forwards for plan in alone):
        forwards = alone
    elif backward and schedule in (None, "grid") and not alone:
        forwards += [plan for plan in _with_warp_groups(backward, limits)
                     if (plan.variant, "forward", plan.precision) not in avoid]
    forward = min(forwards, key=lambda plan: cost(plan, "forward"), default=None)
    if forward is None or backward is None:
        loops = [loop for loop, plan in (("forward", forward), ("backward", backward)) if plan is None]
        raise PlanError("; ".join(reasons) if not plans else
                        f"every kernel that fits is known to be wrong here, {' and '.join(loops)}")
    if forward is backward or forward.wgmma:
        return forward
    return dataclasses.replace(forward, backward_plan=backward)


def candidates(batch, hidden_size, dtype, directions=1, *, limits=H200, tf32=True, keep_every=None):
    """A list of all plans that ``make_plan`` chooses from; empty where none fits. Each is for both loops, but those
    with ``Plan.wgmma`` for the forward loop alone."""
    plans, _ = _candidates(batch, hidden_size, dtype, directions, limits, tf32, None, keep_every)
    if plans and limits is not None:
        cheapest = min(plans, key=lambda plan: plan.step_cycles(limits.multiprocessors, "backward"))
        plans += _with_warp_groups(cheapest, limits)
    return plans


def _candidates(batch, hidden_size, dtype, directions, limits, tf32, schedule, keep_every):
    """(plans, reasons): those that fit but for warp groups, the resident one first, and why others do not."""
    if batch < 0 or hidden_size < 1 or directions not in (1, 2):
        raise PlanError(f"no plan for batch {batch}, hidden_size {hidden_size}, {directions} directions")
    if schedule not in (None, *SCHEDULES):
        raise PlanError(f"schedule must be one of {SCHEDULES}, got {schedule!r}")
    precision = precision_for(dtype, tf32)
    keep_every = keep_every or keep_every_for(batch, hidden_size, directions)
    all_tiles = max(-(-batch // BLOCK_B), 1)
    common = dict(hidden_size=hidden_size, directions=directions, batch=batch, precision=precision,
                  keep_every=keep_every)
    plans, reasons = [], []
    if schedule in (None, "resident"):
        try:
            plans.append(_resident(hidden_size, precision, all_tiles, common, limits))
        except PlanError as error:
            reasons.append(f"resident: {error}")
    for ctas in (2, 4, 8, 16) if schedule in (None, "cluster") else ():
        if limits is None or limits.multiprocessors < ctas:
            reasons.append(f"cluster: no device for {ctas} programs")
            continue
        if hidden_size <= 16 * ctas and ctas > 2:       # fewer than 32 units a program make no step shorter
            continue
        try:
            plans.append(_gluon(ctas, all_tiles, common, limits))
        except PlanError as error:
            reasons.append(f"cluster: {error}")
    for block_h, block_b in itertools.product((16, 32, 64), (16, 32)):
        chunks, block_k = _shared(hidden_size, precision, block_h, block_b,
                                  HELD_BYTES if limits is None else limits.shared_memory)
        programs = -(-hidden_size // block_h)
        name = "streamed" if block_k else "grid"
        most = all_tiles if limits is None else limits.multiprocessors // (programs * directions)
        # where a program has one tile anyway it should be small; exact fp32 has too many operands for more registers
        if block_b > 16 and (all_tiles <= most or precision == "tf32x3"):
            continue
        tiles_of_all = max(-(-batch // block_b), 1)
        groups = min(most, tiles_of_all)
        if schedule not in (None, name):
            reasons.append(f"block_h {block_h} would be {name}")
            continue
        if groups == 0:
            reasons.append(f"{name}: {programs * directions} programs of {block_h} units do not run side by side on "
                           f"{limits.multiprocessors} multiprocessors")
            continue
        tiles = -(-tiles_of_all // groups)
        groups = -(-tiles_of_all // tiles)
        plan = Plan(name, programs=programs, groups=groups, tiles=tiles, block_h=block_h, num_warps=NUM_WARPS,
                    chunks=chunks, block_k=block_k, block_b=block_b, **common)
        try:
            plan.check(limits)
        except PlanError as error:
            reasons.append(f"{name}: {error}")
            continue
        plans.append(plan)
    if schedule in (None, "grid"):
        plans += _split(all_tiles, common, limits)
    return plans, reasons


def _split(all_tiles, common, limits):
    """Plans whose warps share the units that feed."""
    if limits is None or not limits.cluster or common["precision"] == "tf32x3":
        return
    H = common["hidden_size"]
    for block_h in (16, 32):
        programs = -(-H // block_h)
        groups = min(limits.multiprocessors // (programs * common["directions"]), all_tiles)
        if groups == 0:
            continue
        tiles = -(-all_tiles // groups)
        plan = Plan("grid", programs=programs, groups=-(-all_tiles // tiles), tiles=tiles, block_h=block_h,
                    num_warps=NUM_WARPS, chunks=_split_chunks(H, _element(common["precision"])), block_k=0, gluon=True,
                    **common)
        try:
            plan.check(limits)
        except PlanError:
            continue
        yield plan


def _with_warp_groups(backward, limits):
    """Plans of the layer of ``backward`` whose forward loop multiplies by warp groups."""
    if limits is None or not (limits.wgmma and limits.cluster) or backward.precision == "tf32x3":
        return
    H = backward.hidden_size
    chunks = _wgmma_chunks(H, WARP_GROUP_BYTES // _element(backward.precision))
    for block_h, block_b in itertools.product((8, 16, 32, 64), (WARP_GROUP_ROWS, 2 * WARP_GROUP_ROWS)):
        programs, all_tiles = -(-H // block_h), -(-backward.batch // block_b)
        groups = min(limits.multiprocessors // (programs * backward.directions), all_tiles)
        if groups == 0:
            continue
        tiles = -(-all_tiles // groups)
        plan = dataclasses.replace(backward, schedule="grid", programs=programs, groups=-(-all_tiles // tiles),
                                   tiles=tiles, block_h=block_h, num_warps=block_b // 16, chunks=chunks, block_k=0,
                                   gluon=True, block_b=block_b, backward_plan=backward)
        try:
            plan.check(limits)
        except PlanError:
            continue
        yield plan
