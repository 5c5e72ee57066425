"""The race check of shared memory.

Time is the cluster's clock, which ticks at every synchronisation.  Two accesses are ordered when the earlier one lies
before the last barrier that both threads have passed (`Cluster.ordered`).  Only the last accesses are kept per word,
so the check can miss a race.
"""

import numpy as np

from .errors import SharedRace

SEVERAL = -2


class Races:
    """Last writers and readers of every word of one CTA's shared memory.

    Threads are numbered within the cluster, `word_bytes` is the narrowest access of the program."""

    def __init__(self, size, word_bytes, first_thread):
        n = size // word_bytes + 2
        self.word_bytes, self.first = word_bytes, first_thread
        self.write_time, self.read_time = np.full(n, -1, np.int64), np.full(n, -1, np.int64)  # -1: never
        self.top_writer, self.low_writer = np.zeros(n, np.int32), np.zeros(n, np.int32)  # several may write at once
        self.reader = np.zeros(n, np.int32)  # reading thread of this CTA, or SEVERAL
        self.reader_warp = np.zeros(n, np.int32)  # its warp, or SEVERAL
        self.far_read_time = np.full(n, -1, np.int64)  # last read by another CTA ...
        self.far_read_phase = np.full(n, -1, np.int64)  # ... and how often that CTA had arrived at the cluster barrier
        self.unnoted = []  # reads by a CTA outside any cluster: usually a barrier comes before a write to their words

    def words(self, offsets, nbytes):
        k = offsets // self.word_bytes
        if nbytes > self.word_bytes:
            k = k[:, None] + np.arange(nbytes // self.word_bytes)
        return k

    @staticmethod
    def settled(cta):
        """For a CTA outside any cluster: all accesses before this time are ordered before what it does now."""
        return cta.cluster.cta_barrier_time[cta.rank] if len(cta.cluster.ctas) == 1 else 0

    def read(self, cta, offsets, nbytes, threads):
        """Threads of `cta` read `nbytes` at each offset."""
        k = self.words(offsets, nbytes)
        t = threads[:, None] if k.ndim == 2 else threads
        write_time, now = self.write_time[k], cta.cluster.time
        bad = write_time >= self.settled(cta)
        if bad.any():
            writer = self.top_writer[k]
            bad &= (writer < t) | (self.low_writer[k] > t)
            if bad.any():
                bad &= write_time >= cta.cluster.ordered(cta, t, writer)
                if bad.any():
                    self.fail(cta, "reads", k, bad, t, writer)
        if cta.first != self.first:
            self.far_read_time[k] = now
            self.far_read_phase[k] = np.maximum(self.far_read_phase[k], cta.cluster_arrivals)
        elif len(cta.cluster.ctas) > 1:
            self.note_read(cta, k, t, now)
        else:
            self.unnoted.append((k, t, now))
            if len(self.unnoted) > 200:
                self.note_reads(cta)

    def note_reads(self, cta):
        """Note the reads that no barrier has settled since."""
        for k, t, now in self.unnoted:
            if now >= self.settled(cta):
                self.note_read(cta, k, t, now)
        self.unnoted.clear()

    def note_read(self, cta, k, t, now):
        tt = np.broadcast_to(t, k.shape)
        reader, reader_warp = self.reader[k], self.reader_warp[k]
        fresh = self.read_time[k] < cta.cluster.cta_barrier_time[cta.rank]  # earlier readers no longer matter
        warp = tt >> 5
        self.reader[k] = np.where(fresh | (reader == tt), tt, SEVERAL)
        self.reader_warp[k] = np.where(fresh | (reader_warp == warp), warp, SEVERAL)
        # if several threads read one word in this access, the assignment keeps only the last of them
        lost = self.reader[k] != tt
        lost &= self.reader[k] != SEVERAL
        if lost.any():
            self.reader[k[lost]] = SEVERAL
        lost = (self.reader_warp[k] != warp) & (self.reader_warp[k] != SEVERAL)
        if lost.any():
            self.reader_warp[k[lost]] = SEVERAL
        self.read_time[k] = now

    def write(self, cta, offsets, nbytes, threads, same=None, any_thread=False):
        """Threads of `cta` write `nbytes` at each offset.  Returns which words several of them write at once.

        `same()`: per offset, true where the stored bytes equal what is there.  `any_thread`: the write is nobody's
        (st.async), so that every later access needs an ordering of its own."""
        if self.unnoted:
            self.note_reads(cta)
        k = self.words(offsets, nbytes)
        t = threads[:, None] if k.ndim == 2 else threads
        settled, write_time, read_time = self.settled(cta), self.write_time[k], self.read_time[k]
        bad = write_time >= settled
        if bad.any():
            writer = self.top_writer[k]
            bad &= (writer < t) | (self.low_writer[k] > t)
            if same is not None and bad.any():
                bad &= ~(same()[:, None] if k.ndim == 2 else same())
            if bad.any():
                bad &= write_time >= cta.cluster.ordered(cta, t, writer)
                if bad.any():
                    self.fail(cta, "writes", k, bad, t, writer)
        bad = read_time >= settled
        if bad.any():
            reader, reader_warp = self.reader[k], self.reader_warp[k]
            bad &= reader != t
            if bad.any():
                unknown = -1 if cta.first == self.first else self.first
                known = np.where(reader >= 0, reader, np.where(reader_warp >= 0, reader_warp * 32, unknown))
                bad &= read_time >= cta.cluster.ordered(cta, t, known)
                if bad.any():
                    self.fail(cta, "writes (read before)", k, bad, t, reader)
        if len(cta.cluster.ctas) > 1:
            bad = (self.far_read_phase[k] >= cta.cluster_waits) & (self.far_read_time[k] >= cta.mbarrier_wait_time)
            if bad.any():
                self.fail(cta, "writes (read by another CTA before)", k, bad, t, -1)
        self.top_writer[k] = t
        self.low_writer[k] = t
        duplicate = self.top_writer[k] != t
        if duplicate.any():
            tt = np.broadcast_to(t, k.shape)
            np.maximum.at(self.top_writer, k, tt)
            np.minimum.at(self.low_writer, k, tt)
        if any_thread:
            self.top_writer[k], self.low_writer[k] = 2**31 - 1, -1
        self.write_time[k] = cta.cluster.time
        return duplicate

    def fail(self, cta, verb, k, bad, thread, other):
        p = np.unravel_index(int(bad.argmax()), bad.shape)
        thread, other, k = (int(np.broadcast_to(x, bad.shape)[p]) for x in (thread, other, k))
        raise SharedRace(f"thread {thread} {verb} shared byte {k * self.word_bytes}, "
                         f"unordered with thread {other if other >= 0 else '(several)'} "
                         f"({int(bad.sum())} conflicts), {cta.where()}")
