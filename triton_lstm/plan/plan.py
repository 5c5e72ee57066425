"""``Plan``: which kernels run a layer, where its recurrent weights R are, and how much memory that takes.

Sizes are in bytes. The constants were chosen by compiling the plans of ``bench.residency`` for sm_90. ``python -m bench
residency`` prints for each of them how many registers it takes and what the compiler keeps in them.
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
WIDE_BYTES = HELD_BYTES * 3 // 4        # of R in registers of a split program that has the rest in shared memory
WIDE_UNITS = 16                         # of such a program: with 32 its products would not fit beside R
DERIVING_UNITS = 1 << 15                # of all rows, from which on a backward loop computes the coefficients itself
SPLIT_TARGETS = 512                     # units whose shares a split program computes at a time, at most


class PlanError(ValueError):
    """A plan cannot run, or no plan can. The message says what does not fit."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one layer runs over all its timesteps. ``str(plan)`` describes it in words.

    kind             which kernels run it, and so where R is and how h travels:
                     "resident": each program has all of R, and batch rows of its own
                     "portable resident": the same in plain Triton
                     "cluster": the programs of a thread-block cluster have the parts of R for different hidden units
                     and exchange h through their shared memory
                     "grid": programs have the parts of R for different hidden units and exchange h through L2
                     "split": as "grid", in Gluon, for few batch rows: each warp of a program multiplies a part of h.
                     R is in registers, or in registers and shared memory
                     "wgmma": as "grid", in Gluon, for many batch rows: each warp group multiplies 64 rows, and R is in
                     shared memory. For the forward loop only
                     "streamed": as "grid", but a part of R is read from L2 at every step
    hidden_size      H
    directions       1 or 2
    batch            batch rows
    precision        "native" (16-bit types), "tf32", or "tf32x3" (fp32 in three TF32 products)
    programs         how many programs share one R
    groups           how many such sets of programs each direction has; each has batch rows of its own
    tiles            how many tiles of batch rows a group computes one after the other in each step
    block_h          hidden units of a program
    num_warps        warps of a program
    r_slices         how the part of R on chip is cut along the units of the earlier h: (start, width) for each slice.
                     Widths are powers of two. Slices reach hidden_size unless the plan is streamed. In a split plan
                     they cover the units of one warp
    block_k          for how many units of the earlier h a part of R is streamed at a time; 0 if nothing is streamed
    keep_every       c is kept every ``keep_every`` steps for backward, which recomputes that many steps at a time
    block_b          batch rows of a tile: 16; in grid and streamed plans 32 if a group has several tiles; in wgmma
                     plans 64 for every four warps
    backward_plan    the plan of the backward loop if it is another one, else None; see ``backward``
    register_room    bytes of R that a Gluon program has in registers at most; see ``register_bytes``
    gates_steps      how many steps there may be for forward to keep the gates by default: ``keep_every`` if None
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
    register_room: int = HELD_BYTES
    gates_steps: int | None = None

    @property
    def backward(self):
        """The plan of the backward loop, which may be this one."""
        return self.backward_plan or self

    @property
    def schedule(self):
        """One of ``SCHEDULES``."""
        return KINDS[self.kind][0]

    @property
    def gluon(self):
        """Whether the kernels are written in Gluon."""
        return KINDS[self.kind][1]

    @property
    def exchanges(self):
        """Whether the programs that share R exchange h through L2, and so wait for each other."""
        return self.schedule in ("grid", "streamed")

    @property
    def variant(self):
        """The name of the kernels: the kind, for a cluster also how many programs it has, and for a split plan whether
        it is wide."""
        if self.wide:
            return "wide split"
        return f"cluster {self.programs}" if self.kind == "cluster" else self.kind

    @property
    def held(self):
        """For how many units of the earlier h the part of R stays on chip, padding included."""
        return sum(width for _, width in self.r_slices) * (self.num_warps if self.kind == "split" else 1)

    @property
    def looks(self):
        """The slices of R on chip, (start, width) each; in a split plan those of all warps."""
        of_warps = range(0, self.held, self.held // self.num_warps) if self.kind == "split" else [0]
        return tuple((first + start, width) for first in of_warps for start, width in self.r_slices)

    @property
    def r_bytes(self):
        """Bytes of R of one direction, in tf32x3 of both of its planes."""
        return 4 * self.hidden_size ** 2 * element_bytes(self.precision)

    @property
    def target_slices(self):
        """How a split backward loop cuts the units for which it computes shares of dh: (start, width) for each slice.

        Each warp has at least 16 units of a slice. Slices of R in registers come first.
        """
        least = 16 * self.num_warps
        column = 4 * self.block_h * element_bytes(self.precision)
        end = -(-self.hidden_size // least) * least
        first = min(self.register_room // column // least * least, end)
        return _cut(0, first, SPLIT_TARGETS) + _cut(first, end, SPLIT_TARGETS)

    @property
    def held_bytes(self):
        """Bytes of R that one program has on chip, padding included.

        They are in registers. Those of a cluster or split plan are in shared memory too if they are more than
        ``register_room``, those of a wgmma plan are in shared memory, and for streamed plans the compiler decides. For
        the Gluon kinds "resident" and "cluster" this is what the backward loop has, which pads both dimensions of R.
        """
        if self.kind in ("resident", "cluster"):
            return 4 * self.block_h * self._units * element_bytes(self.precision)
        rows = self.held if self.schedule == "resident" else self.block_h
        return 4 * rows * self.held * element_bytes(self.precision)

    @property
    def _units(self):
        """Hidden units of all programs together, padding included."""
        return self.programs * self.block_h

    @property
    def forward_warps(self):
        """Warps of a program in the forward loop of resident and cluster plans.

        They are twice ``num_warps`` if a thread would otherwise have four units or more. Then special functions overlap
        with products. A backward loop has no special functions, unless it computes its coefficients.
        """
        doubled = self.num_warps == NUM_WARPS and self.block_h >= 16 * NUM_WARPS
        return 2 * self.num_warps if doubled else self.num_warps

    @property
    def compiled_as(self):
        """What decides the plan's kernels: the plan without the sizes that are no constants of them, and whether the
        backward loop computes its coefficients. Plans that have the same share their kernels."""
        sizes = dict(batch=0, groups=0, tiles=0, keep_every=1, gates_steps=None)
        backward = self.backward_plan and dataclasses.replace(self.backward_plan, **sizes)
        return dataclasses.replace(self, backward_plan=backward, **sizes), self.backward.derives_coefficients

    @property
    def register_bytes(self):
        """Bytes of R that a Gluon program has in registers. The rest is in shared memory."""
        if self.kind == "wgmma":
            return 0
        if self.kind == "split":        # whole slices
            unit = self.held_bytes // sum(width for _, width in self.r_slices)
            return max([unit * (start + width) for start, width in self.r_slices
                        if unit * (start + width) <= self.register_room], default=0)
        return min(self.held_bytes, self.register_room)

    @property
    def wide(self):
        """Whether it is a split plan with a part of R in shared memory."""
        return self.kind == "split" and self.register_bytes < self.held_bytes

    @property
    def shared_bytes(self):
        """Bytes of shared memory of a Gluon program.

        In a wgmma plan they are R, otherwise the part of R that is not in registers, in a split plan the products of
        all warps, in other plans the tiles of a step, and in a cluster two mbarriers.
        """
        if self.kind == "wgmma":
            return self.held_bytes
        if self.kind == "split":
            return self.held_bytes - self.register_bytes + 4 * self.num_warps * self.block_b * 4 * self.block_h
        element, row = element_bytes(self.precision), self.block_b * self._units
        forward, backward = row * element, self.block_b * 4 * self.block_h * element
        if self.programs > 1:
            forward, backward = 2 * forward + 16, backward + 2 * row * 4 + 16
        else:
            forward, backward = 2 * forward, 2 * backward
        return self.held_bytes - self.register_bytes + max(forward, backward)

    @property
    def padded_programs(self):
        """How many programs of ``block_h`` units the products of a grid or streamed plan cover, padding included.

        It may be more than ``programs``, because slices of R may end beyond the units of the last program.
        """
        reach = self.held
        if reach < self.hidden_size:
            reach += -(-(self.hidden_size - reach) // self.block_k) * self.block_k
        return max(-(-reach // self.block_h), self.programs)

    @property
    def streamed_bytes(self):
        """Bytes of R that one program reads from L2 at every step."""
        return 4 * self.block_h * max(self.hidden_size - self.held, 0) * element_bytes(self.precision)

    @property
    def launched(self):
        """How many programs one launch has."""
        return self.programs * self.groups * self.directions

    @property
    def derives_coefficients(self):
        """Whether the backward loop computes its coefficients itself, from the gates' pre-activations and c.

        It then reads 20 bytes or less for each unit, row and step in place of 24, and no kernel has to write these 24,
        but a step takes longer. With many rows the bytes decide. With few, a kernel of its own has the whole chip for
        the coefficients.
        """
        return (self.kind in ("resident", "cluster", "grid")
                and self.batch * self.hidden_size * self.directions >= DERIVING_UNITS)

    @property
    def adds_up_da(self):
        """Whether the backward loop adds up da for the gradient of the bias, so that nothing reads da again for it.

        The sums take 8 registers of a thread for tiles of 16 rows and 32 units. On sm_90 a step takes up to 4 % longer
        by ``bench.machine_code``. Clusters with larger tiles or more than 256 units would spill.
        """
        return self.kind == "cluster" and self.block_b * self.block_h <= 512 and self.programs * self.block_h <= 256

    def multiplies_input(self, input_size):
        """Whether the forward time loop computes x W^T itself, so that no pre-activations go through device memory.

        ``bench.machine_code`` says what this adds to a step: 16 to 38 cycles in 16-bit types, 100 to 400 in TF32. In
        TF32 it saves time only if reading pre-activations is slow: when programs fill half the chip, each can read at
        most 18 bytes a cycle from device memory.
        """
        return (self.kind in ("resident", "cluster") and 0 < input_size <= FUSED_INPUTS
                and (self.precision == "native" or self.launched >= 64))

    def keeps_gates(self, T, layers=1):
        """Whether forward keeps the gates and every c of T steps by default: where backward would recompute as many
        steps as ``layers`` have together at a time. They take no more memory than those that it would recompute.
        Where something else was measured to be faster, ``gates_steps`` says so."""
        return layers * T <= (self.keep_every if self.gates_steps is None else self.gates_steps)

    def saved_bytes(self, T, gates=None):
        """Bytes kept for backward in addition to x, y and the weights, for T steps.

        They are c in fp32 before every ``keep_every``-th step except step 0. Where gates are kept, they are c before
        every step and the pre-activations of four gates; ``gates`` is then the bytes of an element of x.
        """
        units = self.directions * self.batch * self.hidden_size
        if gates is not None:
            return units * T * (4 + 4 * gates)
        return 4 * (max(-(-T // self.keep_every), 1) - 1) * units

    def backward_bytes(self, T, input_size, element, zoneout=False, keep_gates=False):
        """An upper bound of the bytes that backward needs in addition to dx.

        T             steps; the bound is the same for all T from ``keep_every`` on
        input_size    I
        element       bytes of an element of x
        zoneout       whether there is zoneout
        keep_gates    whether forward kept the gates

        The bound contains, for each unit, row and step of a chunk, the pre-activations in the dtype of x (da takes
        their place later) and six coefficients in fp32, or eight with zoneout, or c in their place, unless that is
        kept, if the loop computes them (``derives_coefficients``); a copy of the chunk of x, which is made
        if x is not contiguous; the shares of dh that the programs of a group exchange; R as the kernels read it; dh
        and dc; dW, dR and db in fp32 and in the dtype of x; and the sums that make db (``adds_up_da``). It does not
        contain what masks need: up to three copies of the chunk's h with lengths or resets, or one copy and an index of
        its rows for packed input.
        """
        if self.backward is not self:
            return self.backward.backward_bytes(T, input_size, element, zoneout, keep_gates)
        chunk = min(T, self.keep_every) * self.batch
        coefficients = 8 if zoneout else 6
        if self.derives_coefficients and not zoneout:
            coefficients = 0 if keep_gates else 1
        unit = 4 * element + 4 * coefficients
        work = chunk * (self.directions * self.hidden_size * unit + input_size * element)
        if self.exchanges:
            rows = self.directions * self.groups * self.tiles * self.block_b
            work += 2 * 4 * rows * self.padded_programs * self.programs * self.block_h
        if self.adds_up_da:
            work += 4 * self.groups * self.directions * 4 * self.hidden_size
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
        """A string from which ``Plan.decode`` makes an equal plan. Custom operators take strings but no objects."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    @functools.lru_cache
    def decode(text):
        return _plan(json.loads(text))

    def __str__(self):
        kib = lambda n: f"{n / 1024:.0f} KiB"
        chip = "shared memory" if self.kind == "wgmma" else "registers"
        where = f"{kib(self.held_bytes)} of R in the {chip} of each program"
        if self.schedule == "cluster" and self.held_bytes > self.register_room or self.wide:
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
    """Bytes of an element of R as the kernels read it; in tf32x3 an element is two numbers."""
    return {"native": 2, "tf32": 4, "tf32x3": 8}[precision]


def r_slices(units, width):
    """The slices of R for ``units`` units, up to ``width`` wide. They end at 16, or at the next multiple of 32."""
    return _cut(0, 16 if units <= 16 else -(-units // 32) * 32, width)


def _cut(start, end, width):
    """(start, size) of slices from ``start`` to ``end``. Sizes are powers of two up to ``width``, the largest first."""
    slices = []
    while start < end:
        size = min(width, 1 << ((end - start).bit_length() - 1))
        slices.append((start, size))
        start += size
    return tuple(slices)


def wgmma_slices(units, precision):
    """``r_slices`` of a wgmma plan. Each is WARP_GROUP_BYTES wide, but the last one may have half the width."""
    width = WARP_GROUP_BYTES // element_bytes(precision)
    slices = [(start, width) for start in range(0, units, width)]
    start, _ = slices[-1]
    if units - start <= width // 2:
        slices[-1] = start, width // 2
    return tuple(slices)


def split_slices(units, precision, block_h=WIDE_UNITS, room=None):
    """``r_slices`` of a split plan, for the units of one warp. Four threads together read 64 bytes of a row of R.

    Slices of R in registers come first. They hold ``room`` bytes in programs of ``block_h`` units, or all of R if room
    is None. Slices of R in shared memory have 128 bytes of a row at most, which fill the banks once.
    """
    element = element_bytes(precision)
    least = 64 // element
    units_per_warp = first = -(-units // (NUM_WARPS * least)) * least
    if room is not None:
        first = min(room // (NUM_WARPS * 4 * block_h * element) // least * least, units_per_warp)
    return _cut(0, first, first) + _cut(first, units_per_warp, 2 * least)
