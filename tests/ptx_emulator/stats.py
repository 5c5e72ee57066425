"""Counts of what one launch does."""

from collections import Counter


class Stats:
    """Dynamic counts of one launch.  Instructions are counted per warp, as a GPU issues them."""

    def __init__(self):
        self.instructions = Counter()  # opcode -> warp instructions, all CTAs
        self.per_cta = {}  # (x, y, z) of the CTA -> Counter
        self.barriers = 0  # completed CTA-wide and named barriers
        self.cluster_barriers = 0
        self.global_load = self.global_store = self.shared_load = self.shared_store = 0  # bytes

    def __repr__(self):
        top = ", ".join(f"{opcode} {n}" for opcode, n in self.instructions.most_common(8))
        return (f"Stats({sum(self.instructions.values())} warp instructions; {top}; barriers {self.barriers}, "
                f"cluster barriers {self.cluster_barriers}; global load/store {self.global_load}/"
                f"{self.global_store} B, shared {self.shared_load}/{self.shared_store} B)")
