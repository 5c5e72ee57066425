"""Reads from the machine code of a compiled kernel what its loops do. Needs no GPU."""
import collections
import dataclasses
import functools
import os
import re
import subprocess
import tempfile

import triton

CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")

# Latency in cycles of the instructions that report their completion through a scoreboard; 12 for those not listed.
# From public microbenchmarks of Hopper, rounded. Trust comparisons more than absolute figures.
LATENCY = {
    "HMMA": 25, "HGMMA": 64, "MUFU": 23, "LDS": 30, "LDSM": 33, "STS": 20, "STSM": 20, "LDG": 263, "LD": 200,
    "LDL": 40, "STG": 30, "SHFL": 24, "BAR": 25, "S2R": 25, "UCGABAR_WAIT": 190, "ATOMG": 700, "REDG": 350,
    "MEMBAR": 350, "CCTL": 30, "ERRBAR": 5,
}
READ_LATENCY = 30                               # until an instruction has read its operands, if a scoreboard tells so
WAITS = ("BAR", "UCGABAR_WAIT", "MEMBAR")       # the warp issues nothing until these are complete
# Multiply-adds in 16-bit types that the tensor core of one scheduler does in a cycle. TF32 runs at half the rate.
HGMMA_RATE = 512
# By architecture. Those of 8.6, 8.9 and 12.0 are of GeForce cards, others have twice as much. Hopper's HMMA reaches
# 63 % of its peak; that of 10.x is taken to be as fast (``triton_lstm.plan.limits``).
HMMA_RATE = {80: 256, 86: 64, 87: 256, 89: 64, 90: 320, 100: 320, 103: 320, 120: 64, 121: 128}
MUFU_CYCLES = 8                                 # a warp's 32 results from the 4 lanes of its scheduler


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop: addresses, number of each instruction, bytes of R in registers, and lower bounds of the cycles of a pass.

    start, end   addresses of the first and the last instruction
    counts       {instruction: how often it occurs}. The instructions of a nested loop are counted too, once each
    held         bytes of second operands of matrix products that stay in registers: products read them, and nothing
                 in the loop writes them. Of all threads of a program
    issue, tensor, mufu   cycles that one multiprocessor takes at least to issue the instructions, on its tensor cores,
                 and for special functions
    chain        cycles of one warp that issues in order and waits as the compiler has encoded it: the time of a pass
                 if nothing hides latency

    A pass is assumed to find what other programs send at its first look. Instructions that follow a look in vain are
    left out; the first of them reads the clock.
    """
    start: int
    end: int
    counts: collections.Counter
    held: int
    issue: float
    tensor: float
    mufu: float
    chain: float

    @property
    def instructions(self):
        return self.counts.total()

    @property
    def bound(self):
        """Lower bound of the cycles of one pass."""
        return max(self.issue, self.tensor, self.mufu, self.chain)

    @property
    def spills(self):
        """Loads and stores of spilled registers."""
        return self.counts["LDL"] + self.counts["STL"]


@dataclasses.dataclass(frozen=True)
class Report:
    """A kernel: registers and bytes of stack of a thread, bytes of shared memory of a program, and its loops, the one
    with the most instructions first."""
    registers: int
    stack: int
    shared: int
    loops: tuple

    @property
    def time_loop(self):
        """The loop over the steps: the longest loop that has no cluster barrier.

        The slow path of a wait may lie behind the end of the kernel. The branch back from there looks like the end of
        a still longer loop, which contains the last cluster barrier.
        """
        return next(loop for loop in self.loops if not loop.counts["UCGABAR_WAIT"])

    def inside(self, loop):
        """The loops nested in ``loop``."""
        return [other for other in self.loops
                if other is not loop and loop.start <= other.start and other.end <= loop.end]


# An instruction. op and full are its name without and with modifiers. From the control bits: stall, cycles until the
# next instruction; wr and rd, the scoreboards that it sets when it has written its result and when it has read its
# operands, 7 for none; wait, a bit mask of the scoreboards that it waits for. guarded: it depends on a condition.
_Instruction = collections.namedtuple("_Instruction", "address op full operands stall wr rd wait guarded",
                                      defaults=(False,))


def read(compiled):
    """The ``Report`` of a kernel that ``triton.compile`` returned, compiled for an NVIDIA GPU."""
    m = compiled.metadata
    return _read(compiled.asm["cubin"], m.num_warps, m.target.arch, m.shared)


@functools.lru_cache
def _read(cubin, warps, arch, shared):
    text = _disassemble(cubin)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", text).groups())
    return Report(registers, stack, shared, tuple(_loops(_parse(text), warps, arch)))


def _disassemble(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([CUOBJDUMP, "-sass", "-res-usage", file.name], capture_output=True, text=True,
                              check=True).stdout


def _loops(code, warps, arch):
    """The loops of ``code``, longest first."""
    index = {instruction.address: n for n, instruction in enumerate(code)}
    spans = []
    goes_to = [_target(instruction, index) for instruction in code]
    for n, first in enumerate(goes_to):
        if first is not None and first < n:             # a branch backwards
            spans.append((first, n + 1))
    loops = []
    for first, end in spans:
        body = [code[n] for n in _pass(code, goes_to, first, end)]
        if body:
            loops.append(Loop(code[first].address, code[end - 1].address, collections.Counter(i.op for i in body),
                              _held(body, warps), *_bounds(body, warps, arch)))
    return sorted(loops, key=lambda loop: -loop.instructions)


def _target(instruction, index):
    """The number of the instruction that a branch goes to; None for other instructions. ``index`` is {address:
    number}."""
    target = re.search(r"0x([0-9a-f]+)", instruction.operands) if instruction.op == "BRA" else None
    return index.get(int(target[1], 16)) if target else None


def _pass(code, goes_to, first, end):
    """The numbers of the instructions that a pass may execute without reading the clock. A pass goes from ``first`` to
    the branch back, which is at ``end - 1``."""
    then = {}
    for n in range(first, end - 1):
        if "GLOBALTIMER" not in code[n].operands:
            falls = [] if code[n].op in ("BRA", "EXIT", "BPT") and not code[n].guarded else [n + 1]
            then[n] = falls + [t for t in [goes_to[n]] if t is not None and first < t < end]
    before = collections.defaultdict(list)
    for n, following in then.items():
        for m in following:
            before[m].append(n)
    return sorted(_reached(first, then) & _reached(end - 1, before))


def _reached(start, edges):
    """All numbers that ``edges``, {number: [numbers]}, lead to from ``start``."""
    found, left = {start}, [start]
    while left:
        new = set(edges.get(left.pop(), ())) - found
        found |= new
        left += new
    return found


def _parse(text):
    """[_Instruction] of what cuobjdump prints: two lines for each instruction, /*address*/ code; /* low word */ and
    /* high word */. The top bits of the high word are the control bits."""
    code = []
    for address, body, high in re.findall(
            r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s+/\* 0x[0-9a-f]+ \*/\s*\n\s+/\* 0x([0-9a-f]{16}) \*/", text):
        full, _, operands = re.sub(r"^@!?U?P\w+\s+", "", body).partition(" ")
        # Some branches have their condition among their operands.
        control, guarded = int(high, 16) >> 41, body.startswith("@") or full.startswith("BRA") and "," in operands
        code.append(_Instruction(int(address, 16), full.split(".")[0], full, operands, control & 15, control >> 5 & 7,
                                 control >> 8 & 7, control >> 11 & 63, guarded))
    return code


def _written(instruction):
    """The numbers of the registers that an instruction writes: some registers from its first operand on; none if that
    operand is an address."""
    m = re.match(r"(?:P\w, )?R(\d+)\b", instruction.operands)
    if not m:
        return range(0)
    if instruction.op == "HMMA" or re.search(r"\.128\b|88\.4", instruction.full):
        count = 4
    else:       # instructions on pairs of registers (FFMA2, IMAD.WIDE, ...) write two
        count = 2 if re.search(r"\.64\b|\.WIDE|88\.2|^CS2R$|^\w+2$", instruction.full) else 1
    return range(int(m[1]), int(m[1]) + count)


def _held(body, warps):
    """Bytes of second operands of matrix products that stay in registers over all passes of a loop."""
    operands = set()
    for i in body:
        if m := re.match(r"HMMA\.168(\d+)\S* R\S+ R\S+ R(\d+)", f"{i.full} {i.operands}"):
            count = int(m[1]) * 8 * (4 if "TF32" in i.full else 2) // 128       # (k, 8) elements, in 32 threads
            operands.update(range(int(m[2]), int(m[2]) + count))
    return len(operands.difference(*map(_written, body))) * 4 * 32 * warps


def _tensor_cycles(instruction, arch):
    """Cycles for which the matrix product of one warp keeps the tensor core of its scheduler busy; 0 for other
    instructions."""
    rate = HMMA_RATE.get(arch, HMMA_RATE[90])
    if m := re.match(r"HMMA\.(16)(8)(16|8|4)\b", instruction.full):
        products = int(m[1]) * int(m[2]) * int(m[3])
    elif m := re.match(r"HGMMA\.64x(\d+)x(\d+)", instruction.full):
        products, rate = 16 * int(m[1]) * int(m[2]), HGMMA_RATE     # one warp has a quarter of the 64 rows
    else:
        return 0
    return products / rate * (2 if "TF32" in instruction.full else 1)


def _bounds(body, warps, arch):
    """(issue, tensor, mufu, chain) of one pass through ``body``; see ``Loop``."""
    per_scheduler = max(1, warps // 4)
    issue = len(body) * per_scheduler
    tensor = sum(_tensor_cycles(i, arch) for i in body) * per_scheduler
    mufu = sum(i.op == "MUFU" for i in body) * MUFU_CYCLES * per_scheduler
    clock = tensor_free = mufu_free = 0
    ready = [0] * 6                                                 # cycle at which each scoreboard is free
    for i in body:
        clock = max([clock] + [ready[n] for n in range(6) if i.wait >> n & 1])
        if busy := _tensor_cycles(i, arch):
            clock = max(clock, tensor_free)
            tensor_free = clock + busy
        if i.op == "MUFU":
            clock = max(clock, mufu_free)
            mufu_free = clock + MUFU_CYCLES
        done = clock + LATENCY.get(i.op, 12)
        for scoreboard, then in (i.wr, done), (i.rd, min(done, clock + READ_LATENCY)):
            if scoreboard < 6:
                ready[scoreboard] = max(ready[scoreboard], then)
        clock = max(1, i.stall) + (done if i.op in WAITS else clock)
    return issue, tensor, mufu, clock
