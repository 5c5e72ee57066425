"""``Plan``: which kernels run a layer, where its recurrent weights R are, and how much memory that takes.

Sizes are in bytes. Registers are the 4-byte registers of one thread. The sizes below come from compiling every plan of
``bench.residency`` for sm_90 (``python -m bench residency`` prints what the compiler made of each).
"""
import dataclasses
import functools
import json

# kind: the schedule, that is where R is and how h travels, and whether the kernels are written in Gluon
KINDS = {"portable resident": ("resident", False), "resident": ("resident", True), "cluster": ("cluster", True),
         "grid": ("grid", False), "split": ("grid", True), "wgmma": ("grid", True), "streamed": ("streamed", False)}
SCHEDULES = ("resident", "cluster", "grid", "streamed")
PRECISIONS = ("native", "tf32", "tf32x3")
BLOCK_B = 16                            # batch rows of a tile at least: the height of one mma.sync
NUM_WARPS = 8                           # of every program of the grid and streamed schedules
HELD_BYTES = 128 * 4 * 32 * NUM_WARPS   # of R in registers at most: 128 of a thread's 255, the step needs the rest
WARP_GROUP_ROWS = 64                    # of a batch tile for each warp group, of one wgmma
WARP_GROUP_BYTES = 512                  # along a row of R, between two looks at h by a warp group; half at the end
FUSED_INPUTS = 16                       # features that a Gluon forward loop multiplies by W itself, at most
FORWARD_BYTES = 1 << 28                 # of pre-activations, or of slots for h, that forward has at a time, if it can
SPLIT_TARGETS = 512                     # units whose shares a split program computes at a time, at most


class PlanError(ValueError):
    """The plan cannot run. The message says what does not fit."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one layer runs over all its timesteps. ``str(plan)`` explains it to people.

    kind         which kernels run it, and so where R is and how h travels:
                 "resident": each program has all of R, and its own batch rows; "portable resident": the same in plain
                 Triton; "cluster": the ``programs`` of a thread-block cluster share R by hidden units and exchange h
                 through their shared memory; "grid": programs share R by hidden units and exchange h through L2;
                 "split": the same in Gluon for few rows, where the warps of a program share the units that feed;
                 "wgmma": the same for many rows, where warp groups multiply 64 rows each, with R in shared memory, for
                 the forward loop only; "streamed": as grid, but a part of R is read from L2 at every step
    hidden_size, directions, batch
    precision    "native" (16-bit types), "tf32", or "tf32x3" (fp32 in three TF32 products)
    programs     that share one R
    groups       of such programs side by side, per direction
    tiles        of batch rows that a group takes through each step
    block_h      hidden units of a program
    num_warps    of a program
    r_slices     how the part of R on chip is cut along the units that feed, (start, width) each: powers of two, which
                 reach hidden_size unless the plan is streamed; of a split plan, along those of one warp
    block_k      units that feed, whose part of R is streamed at a time
    keep_every   c is kept before every so many steps for backward, which recomputes that many steps at a time
    block_b      batch rows of a tile: 16; in grid and streamed plans 32 where a group has several tiles; in wgmma plans
                 64 for each four warps
    backward_plan   the plan of the backward loop where it is another, else None; see ``backward``
    """
    kind: str
    hidden_size: int
    directions: int
    batch: int
    precision: str
    programs: int
    groups: int
    tiles: int
    block_h: int
    num_warps: int
    r_slices: tuple
    block_k: int
    keep_every: int
    block_b: int = BLOCK_B
    backward_plan: "Plan | None" = None

    @property
    def backward(self):
        """The plan of the backward loop."""
        return self.backward_plan or self

    @property
    def schedule(self):
        """One of ``SCHEDULES``."""
        return KINDS[self.kind][0]

    @property
    def gluon(self):
        """Whether its kernels are written in Gluon."""
        return KINDS[self.kind][1]

    @property
    def exchanges(self):
        """Whether the programs that share R exchange h through L2, and so wait for each other."""
        return self.schedule in ("grid", "streamed")

    @property
    def variant(self):
        """The kind and, of a cluster, how many programs it has: what tells kernels apart."""
        return f"cluster {self.programs}" if self.kind == "cluster" else self.kind

    @property
    def held(self):
        """Units whose part of R stays on chip."""
        return sum(width for _, width in self.r_slices) * (self.num_warps if self.kind == "split" else 1)

    @property
    def looks(self):
        """``r_slices`` of all units on chip, in a split plan of all warps."""
        of_warps = range(0, self.held, self.held // self.num_warps) if self.kind == "split" else [0]
        return tuple((first + start, width) for first in of_warps for start, width in self.r_slices)

    @property
    def r_bytes(self):
        """Bytes of R of one direction, both planes of a tf32x3 R together."""
        return 4 * self.hidden_size ** 2 * element_bytes(self.precision)

    @property
    def target_slices(self):
        """How a split backward loop cuts the units that its shares are for; each warp has 16 of a slice at least."""
        least = 16 * self.num_warps
        return _cut(-(-self.hidden_size // least) * least, SPLIT_TARGETS)

    @property
    def held_bytes(self):
        """Bytes of R that one program has on chip, padding included. They are in registers; of a wgmma plan in shared
        memory; of a streamed plan in either, as the compiler decides. Of resident and cluster plans this is what the
        backward kernel has, which pads both sides alike."""
        if self.kind in ("resident", "cluster"):
            return 4 * self.block_h * self._units * element_bytes(self.precision)
        rows = self.held if self.schedule == "resident" else self.block_h
        return 4 * rows * self.held * element_bytes(self.precision)

    @property
    def _units(self):
        """Hidden units of all programs, padding included."""
        return self.programs * self.block_h

    @property
    def forward_warps(self):
        """Warps of a program of the resident and cluster forward loop: twice as many where a thread would have four
        units or more, so that special functions overlap with products. The backward loop has no special functions."""
        doubled = self.num_warps == NUM_WARPS and self.block_h >= 16 * NUM_WARPS
        return 2 * self.num_warps if doubled else self.num_warps

    @property
    def register_bytes(self):
        """Bytes of R that a Gluon program has in registers; the rest is in shared memory."""
        return 0 if self.kind == "wgmma" else min(self.held_bytes, HELD_BYTES)

    @property
    def shared_bytes(self):
        """Bytes of shared memory of a Gluon program: R beyond the registers, tiles of a step, and two mbarriers; or the
        products of each warp."""
        if self.kind == "wgmma":
            return self.held_bytes
        if self.kind == "split":
            return 4 * self.num_warps * self.block_b * 4 * self.block_h
        element, row = element_bytes(self.precision), self.block_b * self._units
        forward, backward = row * element, self.block_b * 4 * self.block_h * element
        if self.programs > 1:
            forward, backward = 2 * forward + 16, backward + 2 * row * 4 + 16
        else:
            forward, backward = 2 * forward, 2 * backward
        return self.held_bytes - self.register_bytes + max(forward, backward)

    @property
    def padded_programs(self):
        """Programs that would have all units which the products of a grid or streamed plan reach, padding included. The
        last of them do not exist where slices of R end beyond the last program's units."""
        reach = self.held
        if reach < self.hidden_size:
            reach += -(-(self.hidden_size - reach) // self.block_k) * self.block_k
        return max(-(-reach // self.block_h), self.programs)

    @property
    def streamed_bytes(self):
        """Bytes of R that one program reads from L2 each step."""
        return 4 * self.block_h * max(self.hidden_size - self.held, 0) * element_bytes(self.precision)

    @property
    def launched(self):
        """Programs of one launch."""
        return self.programs * self.groups * self.directions

    def multiplies_input(self, input_size):
        """Whether the forward time loop computes x W^T itself, so that no pre-activations go through device memory.

        In 16-bit types that takes it 16 to 38 cycles more a step. In TF32 100 to 400 (by ``bench.machine_code``), less
        than to read pre-activations once programs fill half the chip: 18 bytes a cycle of device memory each, at most.
        """
        return (self.kind in ("resident", "cluster") and 0 < input_size <= FUSED_INPUTS
                and (self.precision == "native" or self.launched >= 64))

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
        if self.exchanges:
            rows = self.directions * self.groups * self.tiles * self.block_b
            work += 2 * 4 * rows * self.padded_programs * self.programs * self.block_h
        weights = 4 * self.hidden_size * (input_size + self.hidden_size + 1)
        # c0 in fp32, dh and dc, and the latter two in the input's type
        states = self.directions * self.batch * self.hidden_size * (3 * 4 + 3 * element)
        return work + self.directions * (self.r_bytes * 2 + weights * (4 + element)) + states

    def forward_steps(self, T, element):
        """Steps whose pre-activations, and slots for h, forward has at a time: all of them or a multiple of 16, or of
        keep_every where that is less."""
        step = 4 * self.hidden_size * self.batch * self.directions * element
        if self.exchanges:
            rows = self.directions * self.groups * self.tiles * self.block_b
            step = max(step, rows * self.padded_programs * self.block_h * element)
        unit = min(self.keep_every, 16)
        return min(max(FORWARD_BYTES // max(step, 1) // unit, 1) * unit, T)

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
        chip = "shared memory" if self.kind == "wgmma" else "registers"
        where = f"{kib(self.held_bytes)} of R in the {chip} of each program"
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
        if self.kind == "wgmma":
            how += " and multiply by warp groups"
        if self.kind == "split":
            how += " and split it among their warps"
        text = (f"{self.kind}: H={self.hidden_size} B={self.batch} x {self.directions} direction(s), "
                f"{self.precision}; {where}; {how}; {self.launched} programs of {self.num_warps} warps; "
                f"c kept every {self.keep_every} steps")
        return f"{text}; backward {self.backward}" if self.backward_plan else text


def _plan(fields):
    """The plan with these ``fields``, as JSON has them."""
    r_slices, backward = tuple(map(tuple, fields["r_slices"])), fields["backward_plan"]
    return Plan(**{**fields, "r_slices": r_slices, "backward_plan": backward and _plan(backward)})


def element_bytes(precision):
    """Bytes of an element of R as the kernels read it."""
    return {"native": 2, "tf32": 4, "tf32x3": 8}[precision]


def r_slices(units, width):
    """``_cut`` so as to reach ``units``, rounded up to 16 or, beyond 16, to a multiple of 32."""
    return _cut(16 if units <= 16 else -(-units // 32) * 32, width)


def _cut(end, width):
    """(start, size) of powers of two up to ``width``, largest first, that reach ``end``."""
    slices, start = [], 0
    while start < end:
        size = min(width, 1 << ((end - start).bit_length() - 1))
        slices.append((start, size))
        start += size
    return tuple(slices)


def wgmma_slices(units, precision):
    """``r_slices`` of a wgmma plan: WARP_GROUP_BYTES wide each, except the last, which may have half of that."""
    width = WARP_GROUP_BYTES // element_bytes(precision)
    slices = [(start, width) for start in range(0, units, width)]
    start, _ = slices[-1]
    if units - start <= width // 2:
        slices[-1] = start, width // 2
    return tuple(slices)


def split_slices(units, precision):
    """``r_slices`` of a split plan, along the units of one warp. Four threads take 64 bytes of a row together."""
    least = 64 // element_bytes(precision)
    units_per_warp = -(-units // (NUM_WARPS * least)) * least
    return _cut(units_per_warp, units_per_warp)
