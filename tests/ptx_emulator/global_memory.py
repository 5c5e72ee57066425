"""Global memory: bounds checks, and the weak model of what one CTA sees of another's stores.

In the weak model a CTA has, besides the memory that all share,
    snap        its own picture of memory: what it stored, and everything else as of its last acquire
    dirty       bytes 0xFF where it has stored something that is not published yet
    pending     those stores: (time, threads, element indices, element width, elements per thread)
    acquired    threads that have acquired since the snapshot was taken, and so must not see it any more
"""

import mmap

import numpy as np

from .addresses import GLOBAL_BASE
from .errors import Misaligned, OutOfBounds
from .formats import UINT

GAP = 1 << 20  # guard bytes between buffers
WIDTHS = (1, 2, 4, 8)


def zeros(n):
    """n zero bytes.  Only pages that are accessed take memory; these are small, unlike the 2 MiB pages of np.zeros."""
    return np.frombuffer(mmap.mmap(-1, n), np.uint8)


class GlobalMemory:
    """All buffers of one launch in one arena.

    Accesses take byte offsets into the arena, the element width in bytes, and for loads the number of elements.
    `mask` is None when all threads of the CTA are active."""

    def __init__(self, weak=False):
        self.weak = weak
        self.buffers = []  # (offset, bytes, name, initial bytes or None)
        self.size = GAP
        self.version = 0  # changes whenever a store is published

    def add(self, name, nbytes, data=None):
        """Place a buffer and return its address; `data` (uint8) gives its contents and takes the results."""
        off = self.size
        self.buffers.append((off, nbytes, name, data))
        self.size = (off + nbytes + 2 * GAP - 1) // GAP * GAP
        return GLOBAL_BASE + off

    def seal(self):
        """Fill the arena once all buffers are known."""
        self.raw = zeros(self.size)
        self.owner = zeros(self.size)  # 0 in the gaps
        for k, (off, n, _, data) in enumerate(self.buffers):
            self.owner[off:off + n] = 1 + k % 255
            if data is not None:
                self.raw[off:off + n] = data
        self.view = {w: self.raw.view(UINT[8 * w]) for w in WIDTHS}

    def copy_back(self):
        for off, n, _, data in self.buffers:
            if data is not None and data.flags.writeable:
                data[...] = self.raw[off:off + n]

    def index(self, cta, mask, addr, width, what):
        """Checked byte offsets into the arena; inactive threads get offset 0."""
        i = (addr - np.uint64(GLOBAL_BASE)).view(np.int64)
        if mask is not None:
            i = np.where(mask, i, 0)
        bad = (i & (width - 1)) != 0
        if bad.any():
            t = int(bad.argmax())
            raise Misaligned(f"{what} of {width} bytes at {self.describe(int(i[t]))}, thread {t}, {cta.where()}")
        inside = (i >= 0) & (i < self.size - 64)
        j = i if inside.all() else np.where(inside, i, 0)
        ok = (self.owner[j] != 0) & (self.owner[j] == self.owner[j + (width - 1)])
        if mask is not None:
            ok |= ~mask
        if not ok.all():
            t = int(ok.argmin())
            raise OutOfBounds(f"{what} of {width} bytes at {self.describe(int(i[t]))}, thread {t}"
                              f" ({int((~ok).sum())} threads in all), {cta.where()}")
        return i

    def describe(self, off):
        """An offset in terms of the nearest buffer."""
        def distance(buffer):
            start, end = buffer[0], buffer[0] + buffer[1]
            return 0 if start <= off < end else min(abs(off - start), abs(off - end))

        nearest = min(self.buffers, key=distance, default=None)
        if nearest is None or not 0 <= off < self.size:
            return f"address {off + GLOBAL_BASE:#x}"
        return f"'{nearest[2]}' byte {off - nearest[0]} (buffer of {nearest[1]} bytes)"

    # -- accesses
    def load(self, cta, i, width, count, strong=False):
        k = i >> (width.bit_length() - 1)
        shared = self.view[width]
        if not self.weak:
            return [shared[k + j] for j in range(count)]
        out = []
        stale = not strong and cta.device.rng.random() < 0.5
        for j in range(count):
            own, dirty = cta.snap[width][k + j], cta.dirty[width][k + j]
            new = (own & dirty) | (shared[k + j] & ~dirty)
            if stale:
                new = np.where(cta.acquired, new, own)
            out.append(new)
        return out

    def store(self, cta, mask, i, width, values):
        k = i >> (width.bit_length() - 1)
        if mask is not None:
            k = k[mask]
            values = [x[mask] for x in values]
        cta.device.progress += 1
        if not self.weak:
            for j, x in enumerate(values):
                self.view[width][k + j] = x
            return
        for j, x in enumerate(values):
            cta.snap[width][k + j] = x
            cta.dirty[width][k + j] = UINT[8 * width](-1 & (2**(8 * width) - 1))
        threads = cta.tid if mask is None else cta.tid[mask]
        cta.pending.append((cta.cluster.time, threads, k, width, len(values)))

    # -- the weak model
    def start(self, cta):
        """Give a new CTA its picture of memory."""
        if self.weak:
            snap, dirty = zeros(self.size), zeros(self.size)
            for off, n, _, _ in self.buffers:
                snap[off:off + n] = self.raw[off:off + n]
            cta.snap = {w: snap.view(UINT[8 * w]) for w in WIDTHS}
            cta.dirty = {w: dirty.view(UINT[8 * w]) for w in WIDTHS}
            cta.acquired, cta.snap_version = np.zeros(cta.n, bool), self.version

    def publish(self, cta, k, width, count):
        """Write the still private bytes of these elements to memory."""
        for j in range(count):
            own, dirty, shared = cta.snap[width][k + j], cta.dirty[width][k + j], self.view[width]
            shared[k + j] = (own & dirty) | (shared[k + j] & ~dirty)
            cta.dirty[width][k + j] = 0
        self.version += 1
        cta.device.progress += 1

    def publish_last(self, cta):
        """A strong store takes effect at once."""
        _, _, k, width, count = cta.pending.pop()
        self.publish(cta, k, width, count)

    def release(self, cta, mask):
        """Publish the stores that happen before a release by the threads `mask` of this CTA."""
        if not self.weak or not cta.pending:
            return
        releasing = cta.active(mask)
        horizon = cta.barrier_time[cta.warp[releasing]].max() if releasing.any() else -1
        keep = []
        for time, threads, k, width, count in cta.pending:
            before = releasing[threads] | (time < horizon)
            self.publish(cta, k[before], width, count)
            if not before.all():
                keep.append((time, threads[~before], k[~before], width, count))
        cta.pending = keep

    def acquire(self, cta, mask):
        if self.weak:
            cta.acquired |= cta.active(mask)
            if cta.acquired.all():
                self.renew(cta)

    def renew(self, cta):
        """A barrier of the CTA hands what one thread acquired to all of them: take a new snapshot."""
        if self.weak and cta.acquired.any():
            cta.acquired[:] = False
            if cta.snap_version != self.version:
                for off, n, _, _ in self.buffers:
                    own, dirty = cta.snap[1][off:off + n], cta.dirty[1][off:off + n]
                    own[...] = (own & dirty) | (self.raw[off:off + n] & ~dirty)
                cta.snap_version = self.version

    def leak(self, cta):
        """Weak stores may become visible early, in any order."""
        keep = []
        for store in cta.pending:
            if cta.device.rng.random() < 0.3:
                self.publish(cta, *store[2:])
            else:
                keep.append(store)
        cta.pending = keep
