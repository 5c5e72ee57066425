"""One launch: memory, CTAs and the scheduler that interleaves them."""

from collections import Counter

import numpy as np

from .cluster import Cluster
from .cta import CTA
from .errors import Deadlock, EmulatorError, OutOfBounds
from .stats import Stats


class Device:
    """Runs the CTAs of one launch.  `progress` counts events that another thread may wait for; `ns` is the time."""

    def __init__(self, prog, grid, memory, params, shared_bytes, cluster, seed, checks, every, resident, patience,
                 turn_ns):
        self.prog, self.memory, self.params, self.checks = prog, memory, params, checks
        self.shared_bytes = shared_bytes + prog.static_shared
        self.grid = tuple(grid) + (1,) * (3 - len(grid))
        self.cluster_size, self.resident, self.patience = cluster, resident, patience
        self.switch_every = every
        self.rng = np.random.default_rng(seed)
        self.stats, self.progress = Stats(), 0
        self.ns, self.turn_ns = 0, turn_ns
        self.async_ops = []  # asynchronous operations under way; each is a function that completes it
        self.stores_under_way = 0  # those of them that are st.async
        self.globals = {}  # global variables of the PTX: name -> address

    def clusters(self):
        """The CTA coordinates of each cluster, in launch order."""
        gx, gy, gz = self.grid
        if gx % self.cluster_size:
            raise EmulatorError("grid.x is not a multiple of the cluster size")
        return [[(x + r, y, z) for r in range(self.cluster_size)]
                for z in range(gz) for y in range(gy) for x in range(0, gx, self.cluster_size)]

    def run(self):
        todo = self.clusters()
        todo.reverse()
        room = len(todo) * self.cluster_size
        if self.resident:
            room = max(1, self.resident // self.cluster_size) * self.cluster_size
        rng, live, generators = self.rng, [], {}
        idle, seen = 0, -1  # turns without progress; progress at the last turn
        weights, turns = None, 0
        while todo or live:
            while todo and len(live) + self.cluster_size <= room:
                started = self.start(todo.pop())
                generators.update((id(cta), cta.run()) for cta in started)
                live += started
                weights = None
            if weights is None or turns % 64 == 0:  # so that some CTAs run far ahead of others
                weights = np.cumsum(rng.exponential(size=len(live)) + 0.02)
            turns += 1
            self.ns += self.turn_ns
            if self.async_ops and rng.random() < 0.5:
                self.async_ops.pop(int(rng.integers(len(self.async_ops))))()
                self.progress += 1
            cta = live[int(np.searchsorted(weights, rng.random() * weights[-1]))] if len(live) > 1 else live[0]
            if self.memory.weak and cta.pending and rng.random() < 0.2:
                self.memory.leak(cta)
            try:
                next(generators[id(cta)])
            except StopIteration:
                live.remove(cta)
                weights = None
                self.collect(cta)
            idle, seen = (idle + 1, seen) if seen == self.progress else (0, self.progress)
            if idle > self.patience * max(1, len(live)) and not self.async_ops:
                raise Deadlock(f"no CTA makes progress; {len(todo)} not started; " +
                               " | ".join(x.standing() for x in live[:16]))
        if self.stores_under_way:
            raise OutOfBounds(f"{self.stores_under_way} st.async under way to CTAs that have exited")
        return self.stats

    def start(self, positions):
        ctas = [CTA(self, self.prog, ctaid, rank) for rank, ctaid in enumerate(positions)]
        cluster = Cluster(ctas)
        for cta in ctas:
            cta.cluster = cluster
            self.memory.start(cta)
        return ctas

    def collect(self, cta):
        """Take the counts of a CTA that has finished, and free its memory."""
        counts = Counter()
        for ins, n in zip(self.prog.instructions, cta.issued):
            if n:
                counts[ins.op] += n
        self.stats.per_cta[cta.ctaid] = counts
        self.stats.instructions.update(counts)
        cta.registers = cta.local = cta.races = cta.snap = cta.dirty = None
