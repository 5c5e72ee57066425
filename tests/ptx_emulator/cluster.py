"""A cluster: CTAs that can reach each other's shared memory, their clock and their barrier."""

import numpy as np


class Cluster:
    """CTAs of one cluster.  A CTA outside any cluster is a cluster of one."""

    def __init__(self, ctas):
        self.ctas = ctas
        self.time = 1  # one tick per synchronisation
        n = len(ctas)
        self.cta_barrier_time = np.zeros(n, np.int64)  # a lower bound of every thread's last barrier
        # up to when a CTA's accesses are released to, and acquired by, the cluster
        self.release_time, self.acquire_time = np.zeros(n, np.int64), np.zeros(n, np.int64)
        self.arrived = [0] * n  # threads that have arrived at the cluster barrier
        self.arrive_time = np.zeros(n, np.int64)
        self.phase = 0  # completed cluster barriers
        self.released = 0  # time of the last one
        self.mbarriers = {}  # (rank, offset) -> Mbarrier

    def ordered(self, cta, thread, other):
        """The time before which all accesses of `other` are ordered before what `thread` of `cta` does now.

        Both are thread numbers within the cluster; a negative `other` stands for unknown readers of the same CTA."""
        passed = cta.barrier_time  # within a CTA: both threads have passed a barrier since
        warp = np.minimum(thread - cta.first, cta.n - 1) >> 5
        other_warp = (other - cta.first) >> 5
        local = (other_warp >= 0) & (other_warp < cta.warps)
        clipped = np.minimum(np.maximum(other_warp, 0), cta.warps - 1)
        before = np.where(other_warp == warp, cta.warp_barrier_time[clipped],
                          np.minimum(passed[clipped], passed[warp]))
        if len(self.ctas) > 1:
            rank = np.clip(other // cta.n, 0, len(self.ctas) - 1)
            remote = np.minimum(self.release_time[rank], self.acquire_time[cta.rank])
            before = np.where(local, before, remote)
        return np.where(other < 0, passed[warp], before)

    def arrive(self, cta, mask, release):
        """Threads of `cta` arrive at the cluster barrier; the last ones complete it."""
        self.time += 1
        self.arrive_time[cta.rank] = self.time
        if release:
            cta.device.memory.release(cta, mask)
        cta.awaited_phase = self.phase
        cta.cluster_arrivals = self.phase + 1
        self.arrived[cta.rank] += cta.count_active(mask)
        if all(n >= x.n - int(x.exited.sum()) for n, x in zip(self.arrived, self.ctas)):
            self.phase += 1
            self.arrived = [0] * len(self.ctas)
            self.release_time[:] = self.arrive_time
            self.time += 1
            self.released = self.time
            cta.device.progress += 1
            cta.device.stats.cluster_barriers += 1

    def waited(self, cta, mask):
        """Threads of `cta` have got through the wait for the cluster barrier."""
        self.acquire_time[cta.rank] = self.released
        cta.cluster_waits = cta.awaited_phase + 1
        cta.synced(mask)
        cta.device.memory.acquire(cta, None)
