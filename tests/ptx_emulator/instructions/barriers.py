"""Barriers of the CTA, the warp and the cluster."""

from ..errors import Unsupported
from ..operands import reader
from .registry import builds


@builds("bar", "barrier")
def build_barrier(prog, ins, parts, args, ty):
    if parts[0] == "barrier" and "cluster" in parts:
        return build_cluster_barrier(ins, parts)
    if "warp" in parts:
        return lambda cta, mask: cta.synced(mask, warp_only=True)
    if "red" in parts:
        raise Unsupported("bar.red")
    ident = reader(prog, args[0], "u32")
    count = reader(prog, args[1], "u32") if len(args) > 1 else None

    def which(cta, mask):
        t = 0 if mask is None else int(mask.argmax())
        return int(ident(cta)[t]), (int(count(cta)[t]) if count else None)
    if "arrive" in parts:
        return lambda cta, mask: cta.arrive(mask, *which(cta, mask), None, wait=False)
    ins.control = "barrier"
    return which


def build_cluster_barrier(ins, parts):
    if "wait" in parts:
        ins.control = "cluster wait"
        return None
    ins.control = "yield"
    release = "relaxed" not in parts
    return lambda cta, mask: cta.cluster.arrive(cta, mask, release)
