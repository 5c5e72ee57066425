"""Waits that end: a program that waits for another one longer than a limit leaves a record and traps.

So a fault of the protocol, or a program that never ran, is a CUDA error and not a process that hangs. The record is in
pinned host memory, because after such an error the host can reach nothing on the GPU any more. Programs of a cluster
wait at mbarriers, by a loop that Gluon writes. Those waits have no limit.
"""
import atexit
import collections
import functools
import os
import sys

import torch

from .language import tl, triton

KERNELS = {1: "forward_grid", 2: "backward_grid", 3: "forward_wgmma", 4: "forward_split",
           5: "backward_split", 6: "exchanges"}
FORWARD_GRID, BACKWARD_GRID, FORWARD_WGMMA, FORWARD_SPLIT, BACKWARD_SPLIT, EXCHANGES = map(tl.constexpr, KERNELS)
# How many records there are, one for a program, and the words of each: kernel; the program's three indices; number of
# programs along the first index; step; batch tile; thread.
SLOTS, FIELDS = 256, 8
TICK_BITS = 20          # time is counted in 2^20 ns, so that a wait needs one register for it
LINGER_MS = 64          # between a record and the trap, which ends all programs: time for others to leave theirs
VARIABLE, DEFAULT_S = "TRITON_LSTM_WAIT_LIMIT", 10.


@triton.constexpr_function
def give_up(kernel, since, stuck, limit, first, step, tile):
    """PTX for a wait of ``kernel`` that has looked in vain. The other arguments are names of registers.

    ``since`` (32 bits) is when the wait began, zero before the first look. Once the wait has lasted more than ``limit``
    ticks the program writes its record to ``stuck`` (SLOTS, FIELDS) and traps. The record's step is ``first`` +
    ``step``.
    """
    return f"""
        .reg .pred late; .reg .b64 now, slot; .reg .b32 n<7>;
        mov.u64 now, %globaltimer; shr.u64 now, now, {TICK_BITS}; cvt.u32.u64 n0, now;
        setp.eq.u32 late, {since}, 0; selp.b32 {since}, n0, {since}, late;
        sub.u32 n0, n0, {since}; setp.gt.s32 late, n0, {limit};
        @!late bra GOES_ON;
        mov.u32 n1, %ctaid.x; mov.u32 n2, %ctaid.y; mov.u32 n3, %ctaid.z; mov.u32 n4, %nctaid.x;
        mov.u32 n5, %nctaid.y; mad.lo.u32 n5, n3, n5, n2; mad.lo.u32 n5, n5, n4, n1;
        and.b32 n5, n5, {SLOTS - 1}; mad.wide.u32 slot, n5, {4 * FIELDS}, {stuck};
        mov.u32 n0, {kernel}; st.volatile.global.v4.b32 [slot], {{n0, n1, n2, n3}};
        add.u32 n0, {first}, {step}; mov.u32 n6, %tid.x; st.volatile.global.v4.b32 [slot+16], {{n4, n0, {tile}, n6}};
        fence.sc.sys;
        mov.u32 n0, {LINGER_MS};
        LINGER: .pragma "nounroll"; nanosleep.u32 1000000; sub.u32 n0, n0, 1; setp.ne.u32 late, n0, 0; @late bra LINGER;
        trap;
        GOES_ON:"""


@triton.jit
def look_at_clock(since, watch, KERNEL: tl.constexpr):
    """After a look in vain: give up if the wait has lasted too long, else return ``since`` for the next look.

    since is zero after a wait's first look. watch: (stuck, limit, first, step, tile) as ``give_up`` has them, with None
    for stuck where there is no limit. All threads of the program call this together.
    """
    if watch[0] is None:
        return since
    else:
        PTX: tl.constexpr = "{ mov.b32 $0, $1; " + give_up(KERNEL, "$0", "$2", "$3", "$4", "$5", "$6") + " }"
        return tl.inline_asm_elementwise(PTX, "=&r,r,l,r,r,r,r",
                                         [since, watch[0].to(tl.uint64), watch[1], watch[2], watch[3], watch[4]],
                                         dtype=tl.int32, is_pure=False, pack=1)


def _seconds(value):
    """``value`` as a limit in seconds. ValueError unless it is a positive number."""
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = 0
    if not seconds > 0:
        raise ValueError(f"a wait limit must be a positive number of seconds, or inf for none, got {value!r}")
    return seconds


_limit_s = _seconds(os.environ.get(VARIABLE, DEFAULT_S))


def set_wait_limit(seconds: float) -> float:
    """Set how long the programs of a kernel may wait for each other, in seconds of the GPU's clock.

    The limit is 10 s at first, or what the environment variable TRITON_LSTM_WAIT_LIMIT says. ``float("inf")`` means no
    limit; kernels are then compiled without a look at the clock. A CUDA graph keeps the limit with which it was
    captured. Returns the limit before. ValueError unless ``seconds`` is a positive number.
    """
    global _limit_s
    before, _limit_s = _limit_s, _seconds(seconds)
    return before


_records = {}       # by device


def records(device):
    """Where programs on ``device`` leave their records, (SLOTS, FIELDS) int32; a record of zeros is none."""
    if device not in _records:
        _records[device] = torch.zeros(SLOTS, FIELDS, dtype=torch.int32, device="cpu",
                                       pin_memory=device.type == "cuda")
    return _records[device]


def limit():
    """The wait limit in ticks, as kernels take it; None without a limit."""
    return _ticks(_limit_s)


@functools.lru_cache
def _ticks(seconds):
    return None if seconds == float("inf") else max(min(int(seconds * 1e9) >> TICK_BITS, 2 ** 31 - 1), 1)


def _numbers(numbers):
    """Sorted integers for people: "0-4, 7"."""
    ranges = []
    for n in sorted(numbers):
        if ranges and n == ranges[-1][1] + 1:
            ranges[-1][1] = n
        else:
            ranges.append([n, n])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in ranges)


def describe(records):
    """The ``records`` (n, FIELDS) in words; None where there is none."""
    groups = collections.defaultdict(dict)
    for kernel, program, group, direction, programs, step, tile, _ in records.tolist():
        if kernel:
            groups[kernel, group, direction, programs][program] = step, tile
    lines = []
    for (kernel, group, direction, programs), waits in sorted(groups.items()):
        name = KERNELS.get(kernel, f"kernel {kernel}")
        what = "shares of dh after" if "backward" in name else "h before"
        lines.append(f"{name}, group {group}, direction {direction}, {programs} programs:")
        for step, tile in sorted(set(waits.values())):
            who = [program for program, wait in waits.items() if wait == (step, tile)]
            lines.append(f"    program {_numbers(who)} waited for {what} step {step} of batch tile {tile}")
        if others := set(range(programs)) - set(waits):
            lines.append(f"    program {_numbers(others)} left no record")
    return "\n".join(lines) or None


def wait_report() -> str | None:
    """Which programs waited for what when a kernel gave up; None if none has.

    For use after the CUDA error of such a kernel ("unspecified launch failure"), which a process gets at the next thing
    that it does on the GPU. Steps are counted in the order in which a direction takes them. Look first at programs that
    left no record or waited for an earlier step than the others: the others wait for those.
    """
    return "\n".join(filter(None, map(describe, _records.values()))) or None


class explained:
    """A context in which a CUDA error says which kernel has given up, if one has. A generator would take the host
    longer."""

    def __enter__(self):
        pass

    def __exit__(self, kind, error, traceback):
        if isinstance(error, RuntimeError):
            explain(error)


def explain(error):
    """Raise what says which kernel has given up, if one has, in the place of the RuntimeError ``error``."""
    if (text := wait_report()) is not None:
        raise RuntimeError(
            f"a kernel of triton_lstm gave up: its programs waited for each other longer than {_limit_s:g} s (see "
            f"triton_lstm.set_wait_limit):\n{text}\nThis process cannot use the GPU any more; `python -m "
            f"triton_lstm check` finds out whether the kernel works on it.") from error


@atexit.register
def _tell_at_exit():
    """Print the report at the end of the process, since the error may have been raised outside of this package."""
    if text := wait_report():
        print(f"triton_lstm: the programs of a kernel waited for each other longer than {_limit_s:g} s:\n{text}",
              file=sys.stderr)
