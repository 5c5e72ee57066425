"""Which rows each time has, and what a step does with each of them: the host writes it, the kernels read it.

Packed rows: a packed sequence has only the rows that are still alive at each time, (rows, -). ``offsets`` (T + 1,)
int64 counts the rows before each time, and before the end; padded input, (T, B, -), has None in its place.

Step flags: a byte for each direction, time and row, (D, T, B) uint8, where rows end early or begin anew; None where
every row runs through all steps. In the order in which a direction takes the steps:

    LIVE      the step counts; otherwise state passes it unchanged, and y is zero
    FRESH     the step begins from a zero state
    START     live, and the step before is not
    END       live, and the step after is not
    BEFORE    not live, and the step after is
    CUT       the step after is fresh

All rows begin with the first step of direction 0, so one that is not live there has ended: nobody reads its h, and it
is sent as it is. In direction 1 a row that ends early begins late, and keeps its first h until then.
"""
import itertools

import torch

from .language import tl, triton

LIVE, FRESH, START, END, BEFORE, CUT = (tl.constexpr(1 << n) for n in range(6))


# -- read by the kernels ----------------------------------------------------------------------------------------------

@triton.jit
def first_row(offsets_ptr, time, B):
    """How many rows of x and y come before those of one time."""
    if offsets_ptr is None:
        return time.to(tl.int64) * B
    else:
        return tl.load(offsets_ptr + time)


@triton.jit
def rows_at(offsets_ptr, time, B):
    """``first_row``, and how many rows that time has. They are always the first rows of the batch."""
    start = first_row(offsets_ptr, time, B)
    if offsets_ptr is None:
        return start, B
    else:
        return start, (first_row(offsets_ptr, time + 1, B) - start).to(tl.int32)


@triton.jit
def padded_or_packed(offsets_ptr, padded, packed):
    """An index into a tensor's first dimension: ``padded`` where that is time, ``packed`` where it is rows."""
    if offsets_ptr is None:
        return padded
    else:
        return packed


@triton.jit
def chunk_shift(offsets_ptr, d, T, S, B, first):
    """What to add to a row's number in x and y to get its number in the buffers of one chunk.

    A chunk's buffers have the rows of direction 0's times, ``first`` to ``first + S``, then the rows of the times that
    direction 1 takes in the same steps; both in order of time.
    """
    others = first_row(offsets_ptr, first + S, B) - first_row(offsets_ptr, first, B)
    return d * others - first_row(offsets_ptr, tl.where(d == 0, first, T - first - S), B)


@triton.jit
def load_flags(flags_ptr, time, row, B):
    """The step flags of some rows at one time; 0 past the last row."""
    return tl.load(flags_ptr + time * B + row, mask=row < B, other=0)


@triton.jit
def of_live_steps(k, flags):
    """The six coefficients k of a backward step, with those of a step that is not live in their place: it has no da
    and passes dc on. Before a fresh step dc ends."""
    live = (flags & LIVE) != 0
    passed = tl.where((flags & FRESH) == 0, k[5], 0.)
    return (tl.where(live, k[0], 0.), tl.where(live, k[1], 0.), tl.where(live, k[2], 0.), tl.where(live, k[3], 0.),
            tl.where(live, k[4], 0.), tl.where(live, passed, 1.))


# -- written before the kernels run -----------------------------------------------------------------------------------

@triton.jit(do_not_specialize=["T", "B", "reset_time", "reset_row"])
def write_flags(flags_ptr, lengths_ptr, sizes_ptr, reset_ptr, T, B, reset_time, reset_row, H: tl.constexpr,
                DIRECTIONS: tl.constexpr, BLOCK: tl.constexpr):
    """``step_flags`` by one launch.

    lengths, sizes   (B,), or rows of each time (T,), or None; at most one of them
    reset            element (t, b) lies at t reset_time + b reset_row; or None

    grid (blocks of times and rows,).
    """
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    time, row = n // B, n % B
    mask = time < T
    has_after = time + 1 < T
    live, after, before = mask, has_after, mask
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + row, mask=mask, other=0)
        live, after, before = time < length, has_after & (time + 1 < length), time <= length
    if sizes_ptr is not None:
        live = row < tl.load(sizes_ptr + time, mask=mask, other=0)
        after = row < tl.load(sizes_ptr + time + 1, mask=has_after, other=0)
        before = row < tl.load(sizes_ptr + time - 1, mask=mask & (time > 0), other=0)
    last = live & has_after & (after == 0)
    flags = tl.where(live, LIVE, 0)
    forward, reverse = flags + tl.where(last, END, 0), flags + tl.where(last, START, 0)
    reverse += tl.where((live == 0) & before & (time > 0), BEFORE, 0)
    if reset_ptr is not None:
        at = reset_ptr + time * reset_time + row * reset_row
        fresh = live & (tl.load(at, mask=mask, other=0) != 0)
        fresh_after = after & (tl.load(at + reset_time, mask=has_after, other=0) != 0)
        forward += tl.where(fresh, FRESH, 0) + tl.where(fresh_after, CUT, 0)
        reverse += tl.where(fresh_after, FRESH, 0) + tl.where(fresh & (time > 0), CUT, 0)
    tl.store(flags_ptr + n, forward.to(tl.uint8), mask=mask)
    if DIRECTIONS == 2:
        tl.store(flags_ptr + tl.cast(T, tl.int64) * B + n, reverse.to(tl.uint8), mask=mask)


def step_flags(T, B, D, lengths, reset, device):
    """Step flags (D, T, B) uint8 of ``T`` steps of ``B`` rows in ``D`` directions.

    lengths (B,) or None: so many first times of a row are live. reset (T, B) bool or None: the forward direction begins
    from a zero state at such a time. The reverse direction does so at the time before, which is the last of the piece
    that ends there.

    These are operators that a compiler can follow and fuse, and a transform can map. See ``write_flags``.
    """
    if lengths is None:
        flags = torch.full((D, T, B), LIVE.value, dtype=torch.uint8, device=device)
    else:
        # By the distance from the end: live, the last live time, the first that is not, all others. A row that is live
        # at all times or at none has neither of the two in the middle.
        table = torch.tensor([[LIVE.value, LIVE.value | END.value, 0, 0],
                              [LIVE.value, LIVE.value | START.value, BEFORE.value, 0]][:D], dtype=torch.uint8)
        ends = lengths.masked_fill(lengths >= T, T + 2).masked_fill_(lengths < 1, -2)
        place = torch.arange(T, device=device)[:, None] - ends
        flags = table.to(device, non_blocking=True)[:, place.clamp_(-2, 1).add_(2)]
    if reset is not None:
        fresh = reset if lengths is None else reset & flags[0].bitwise_and(LIVE.value).bool()
        begins = [fresh] if D == 1 else [fresh, torch.cat([fresh[1:], torch.zeros_like(fresh[:1])])]
        for d, of_direction in enumerate(begins):
            flags[d].add_(of_direction, alpha=FRESH.value)
            before, after = (flags[0, :-1], of_direction[1:]) if d == 0 else (flags[1, 1:], of_direction[:-1])
            before.add_(after, alpha=CUT.value)
    return flags


def lengths_and_reset(flags):
    """What ``step_flags`` was given, (B,) and (T, B), as far as it has an effect."""
    return has(flags[0], LIVE).sum((0, 2)), has(flags[0], FRESH)[..., 0]


def has(flags, bit):
    """Where ``flags`` have ``bit``, with a last dimension of 1 to broadcast over units."""
    return (flags & bit.value).bool().unsqueeze(-1)


def lacks(flags, bit):
    """The opposite of ``has``, by one operator less than ``~has``."""
    return ((flags & bit.value) == 0).unsqueeze(-1)


def ends_of(flags):
    """Of padded rows, the time of the last live step and whether there is one, (B, 1) each; 0 for rows without."""
    live = has(flags[0], LIVE)
    return (live.sum(0) - 1).clamp(min=0), live.any(0)


def times_of(d, first, steps, T):
    """Times [lo, hi) of the ``steps`` steps from ``first`` on of direction ``d``."""
    return (first, first + steps) if d == 0 else (T - first - steps, T - first)


class Rows:
    """Where the rows of each time are in x and y.

    x            (T, B, -), or packed (rows, -)
    B            rows of the batch
    batch_sizes  None, or packed, rows of each time: (T,) on the CPU

    ``offsets`` is for the kernels. ``last`` (B,), packed only: the last row of each sequence. ValueError
    where the batch sizes do not fit x and B.
    """

    def __init__(self, x, B, batch_sizes):
        self.T, self.B, self.offsets = len(x) if batch_sizes is None else len(batch_sizes), B, None
        if batch_sizes is None:
            return
        self._sizes = [*batch_sizes.tolist(), 0]
        self._before = [0, *itertools.accumulate(self._sizes[:-1])]
        if self._before[-1] != len(x) or self._sizes[0] != B or self._sizes != sorted(self._sizes, reverse=True):
            raise ValueError(f"batch_sizes must fall from the {B} rows of the state and add up to the {len(x)} of x, "
                             f"got {self._sizes[:-1]}")
        last = [self._before[t] + n for t in reversed(range(self.T)) for n in range(self._sizes[t + 1], self._sizes[t])]
        on_device = torch.tensor([*self._before, *last], device="cpu").to(x.device, non_blocking=True)
        self.offsets, self.last = on_device[:self.T + 1], on_device[self.T + 1:]

    def count(self, lo, hi):
        """How many rows times [lo, hi) have."""
        return (hi - lo) * self.B if self.offsets is None else self._before[hi] - self._before[lo]

    def of(self, x, lo, hi):
        """The rows of x or y at times [lo, hi), as a matrix."""
        if lo or hi < self.T:
            x = x[lo:hi] if self.offsets is None else x[self._before[lo]:self._before[hi]]
        return x.reshape(-1, x.shape[-1])

    def split(self, buffer, spans):
        """The part of ``buffer`` (rows, -) that a chunk fills, as a matrix for each direction; ``spans``: the times
        that each takes."""
        parts, start = [], 0
        for span in spans:              # torch.split takes the host longer
            end = start + self.count(*span)
            parts.append(buffer[start:end] if end - start < len(buffer) else buffer)
            start = end
        return parts

    def most(self, D, steps):
        """The most rows that a chunk of ``steps`` steps has, all directions together."""
        if self.offsets is None:
            return D * steps * self.B
        return max(sum(self.count(*times_of(d, first, min(steps, self.T - first), self.T)) for d in range(D))
                   for first in range(0, self.T, steps))
