"""One CTA: its registers, its groups of diverged threads, its barriers, and the loop that executes it."""

import numpy as np

from .errors import Deadlock
from .formats import PAIR128, UINT
from .races import Races


class CTA:
    """State of one CTA.

    Throughout the package a mask is a boolean array over the CTA's threads, or None for all of them.  At any time one
    group of threads is current: `pc` and `mask`.  The other groups wait in `parked`, by program counter."""

    def __init__(self, device, prog, ctaid, rank):
        self.device, self.prog, self.ctaid = device, prog, ctaid
        self.rank = rank  # within the cluster
        self.cluster = None  # set by the device
        self.n = n = prog.threads
        self.warps = (n + 31) // 32
        self.tid = np.arange(n)
        self.warp = self.tid >> 5
        self.first = rank * n  # number of the first thread within the cluster
        self.cluster_tid = self.tid + self.first

        self.registers = [np.zeros(n, bool if bits == 1 else UINT[bits] if bits < 128 else PAIR128)
                          for bits in prog.reg_bits]
        self.carry = np.zeros(n, np.uint64)
        self.local = np.zeros((n, (prog.local_size + 31) // 16 * 16), np.uint8)
        raw = np.full((device.shared_bytes + 31) // 16 * 16, 0xFF, np.uint8)
        self.shared = {w: raw.view(UINT[8 * w]) for w in (1, 2, 4, 8)}
        self.races = Races(len(raw), prog.word_bytes, self.first) if device.checks else None

        self.pc, self.mask = 0, None
        self.parked = {}  # pc -> mask
        self.barriers = {}  # id -> [arrived threads, {pc to resume at: mask}, expected count]
        self.exited = np.zeros(n, bool)
        self.hold = 0  # instructions for which the current group keeps running although others are behind
        self.spins = 0  # backward branches taken while diverged
        self.done = False

        self.barrier_time = np.zeros(self.warps, np.int64)  # cluster clock at each warp's last barrier
        self.warp_barrier_time = np.zeros(self.warps, np.int64)  # ... including barriers of the warp alone
        self.cluster_arrivals = self.cluster_waits = 0  # cluster barriers arrived at and waited for
        self.awaited_phase = 0
        self.mbarrier_wait_time = 0  # when the last wait at an mbarrier was through

        self.copy_groups, self.open_copies = [], []  # cp.async: committed groups, copies not yet committed
        self.pending = []  # weak stores that are not published, see GlobalMemory
        self.issued = [0] * len(prog.instructions)  # warp instructions
        self.clock = 0

    # -- helpers for instructions
    def active(self, mask):
        """The mask as an array."""
        return np.ones(self.n, bool) if mask is None else mask

    def count_active(self, mask):
        return self.n if mask is None else int(mask.sum())

    def where(self, pc=None):
        """Where this CTA is, for messages."""
        code = self.prog.instructions
        ins = code[min(self.pc if pc is None else pc, len(code) - 1)]
        return f"CTA {self.ctaid}, {ins.loc}, PTX line {ins.line}: {ins.text}"

    def synced(self, mask, warp_only=False):
        """The threads of the mask have passed a barrier."""
        self.cluster.time += 1
        warps = slice(None) if mask is None else np.unique(self.warp[mask])
        self.warp_barrier_time[warps] = self.cluster.time
        if not warp_only:
            self.barrier_time[warps] = self.cluster.time
            self.cluster.cta_barrier_time[self.rank] = self.barrier_time.min()
        self.device.memory.renew(self)

    def commit_copies(self):
        """cp.async.commit_group"""
        self.copy_groups.append(self.open_copies)
        self.open_copies = []

    def finish_copies(self, keep):
        """cp.async.wait_group keep: do the copies of all but the newest groups."""
        if keep == 0 and self.open_copies and not self.copy_groups:
            self.copy_groups, self.open_copies = [self.open_copies], []
        while len(self.copy_groups) > keep:
            group = self.copy_groups.pop(0)
            while group:  # emptied, as cp.async.mbarrier.arrive may hold the same group and must not copy again
                group.pop(0)()

    # -- divergence
    def park(self, pc, mask):
        parked = self.parked
        parked[pc] = parked[pc] | mask if pc in parked else mask

    def pick(self, pc=None):
        """Make the group with the lowest pc (or the given one) current; False if none can run."""
        if not self.parked:
            return False
        self.pc = min(self.parked) if pc is None else pc
        mask = self.parked.pop(self.pc)
        self.mask = None if mask.all() else mask
        return True

    def switch_at_random(self, longest):
        """Make any group current and let it keep running for a while."""
        rng = self.device.rng
        self.park(self.pc, self.active(self.mask))
        self.pick(int(rng.choice(list(self.parked))))
        self.hold = int(rng.integers(1, longest))

    def regroup(self):
        """Merge with a group at this pc, or run the group that is furthest behind."""
        if self.pc in self.parked:
            mask = self.mask | self.parked.pop(self.pc)
            self.mask = None if mask.all() else mask
        elif self.hold > 0:
            self.hold -= 1
        elif min(self.parked) < self.pc:
            self.park(self.pc, self.mask)
            self.pick()

    # -- barriers of the CTA
    def arrive(self, mask, ident, count, resume, wait=True):
        """bar.sync and bar.arrive of the threads of the mask; `count` None: all threads that have not exited."""
        barrier = self.barriers.setdefault(ident, [np.zeros(self.n, bool), {}, count])
        mask = self.active(mask)
        barrier[0] = barrier[0] | mask
        if wait:
            barrier[1][resume] = barrier[1][resume] | mask if resume in barrier[1] else mask
        barrier[2] = count
        self.check_barriers()

    def check_barriers(self):
        """Let the threads of complete barriers go on."""
        for ident, (arrived, resume, count) in list(self.barriers.items()):
            need = count if count is not None else self.n - int((self.exited & ~arrived).sum())
            if arrived.sum() >= need:
                del self.barriers[ident]
                self.device.stats.barriers += 1
                self.device.progress += 1
                self.synced(None if arrived.all() else arrived)
                for pc, mask in resume.items():
                    self.park(pc, mask)

    # -- execution
    def run(self):
        """Generator: executes the CTA, yields where other CTAs may get in between.

        `mask` is the current group, `active` the same when the instruction's guard has narrowed `mask` further."""
        code, registers, every, device = self.prog.instructions, self.registers, self.device.switch_every, self.device
        while True:
            ins = code[self.pc]
            mask = self.mask
            guard = ins.guard
            if guard is not None:
                p = registers[guard]
                if ins.negate:
                    p = ~p
                t = p if mask is None else p & mask
                if not t.any():
                    self.pc += 1
                    if self.parked:
                        self.regroup()
                    continue
                active, mask = mask, (None if mask is None and t.all() else t)
            self.issued[self.pc] += (self.warps if mask is None else len(np.unique(self.warp[mask])))
            self.clock += 1
            control = ins.control
            if control is None:
                ins.fn(self, mask)
                self.pc += 1
            elif control == "branch":
                here = self.pc
                if mask is None or guard is None or (active is not None and (mask == active).all()):
                    self.pc = ins.target
                else:
                    self.park(ins.target, mask)
                    self.mask = self.active(active) & ~mask
                    self.pc += 1
                if self.parked and ins.target <= here:  # a divergent loop: let the others run at times
                    self.spins += 1
                    if self.spins % 16 == 0:
                        self.switch_at_random(400)
                    if self.spins % 64 == 0:
                        yield
            elif control == "indexed branch":
                index, going = ins.fn(self, mask), self.active(mask)
                if guard is not None and mask is not None and (self.active(active) & ~mask).any():
                    self.park(self.pc + 1, self.active(active) & ~mask)
                for v in np.unique(index[going]):
                    self.park(ins.target[v], going & (index == v))
                self.pick()
                continue
            elif control == "yield":
                yield
                ins.fn(self, mask)
                self.pc += 1
            elif control == "poll":  # one attempt of a loop that waits
                ins.fn(self, mask)
                self.pc += 1
                yield
                if self.parked and self.hold <= 0 and device.rng.random() < 0.5:  # other warps may have to act first
                    self.switch_at_random(120)
            elif control == "cluster wait":
                want = self.awaited_phase
                while not self.cluster.phase > want:
                    yield
                self.cluster.waited(self, mask)
                self.pc += 1
            elif control == "barrier":
                ident, count = ins.fn(self, mask)
                if mask is None and (count is None or count >= self.n):
                    device.stats.barriers += 1
                    self.synced(None)
                    self.pc += 1
                    continue
                here = self.pc
                rest = self.active(active) & ~mask if guard is not None and mask is not None else None
                self.arrive(mask, ident, count, here + 1)
                if rest is not None and rest.any():
                    self.park(here + 1, rest)
                if not self.pick():
                    self.stuck()
                continue
            elif control == "exit":
                self.exited |= self.active(mask)
                here = self.pc
                rest = self.active(active) & ~mask if guard is not None and mask is not None else None
                if rest is not None and rest.any():
                    self.park(here + 1, rest)
                self.check_barriers()
                if not self.pick():
                    if self.exited.all():
                        break
                    self.stuck()
                continue
            else:
                raise AssertionError(control)
            if self.parked:
                self.regroup()
            if every and self.clock % every == 0:
                yield
        while self.copy_groups or self.open_copies:
            self.finish_copies(0)
        device.memory.acquire(self, None)
        self.synced(None)
        device.memory.release(self, None)
        self.done = True
        device.progress += 1

    def stuck(self):
        self.mask = np.zeros(self.n, bool)
        raise Deadlock("threads wait at a barrier that the others never reach: " + self.standing())

    def standing(self):
        """Where all threads are, for messages."""
        here = 0 if self.exited.all() else self.count_active(self.mask)
        out = [f"{here} threads at {self.where()}"] if here else []
        out += [f"{int(mask.sum())} threads at {self.where(pc)}" for pc, mask in self.parked.items()]
        if not out and not self.barriers:
            out = [f"CTA {self.ctaid} has exited"]
        for ident, (_, resume, _) in self.barriers.items():
            out += [f"{int(mask.sum())} threads in barrier {ident} at {self.where(pc - 1)}"
                    for pc, mask in resume.items()]
        return "; ".join(out)
