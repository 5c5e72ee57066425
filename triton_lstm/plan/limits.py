"""``Limits``: what a plan for a device must fit. ``SINCE``: which kernels run on which GPU."""
import dataclasses

import torch

from ..kernels.language import VERSION
from .cost import HOPPER_MULTIPLY_ADDS
from .plan import PlanError

NEVER = (99, 0)
# The oldest Triton whose compiler takes these kernels, by the GPU's compute capability:
#   gluon     Gluon kernels of one program: resident and split
#   cluster   clusters of programs. For 12.0 and 12.1 Triton refuses them: "requires cluster-capable SM90+"
#   wgmma     products by warp groups. Newer GPUs have tcgen05 in their place, for which there are no kernels
# Found by compiling every kind in every type with Triton 3.6, 3.7, 3.8 and 3.9 (bench/NOTES.md). A GPU that is not
# listed runs the plain Triton kernels.
SINCE = {
    (8, 0): dict(gluon=(3, 6), cluster=NEVER, wgmma=NEVER),         # A100
    (8, 6): dict(gluon=(3, 6), cluster=NEVER, wgmma=NEVER),         # A10, A40, RTX 30
    (8, 7): dict(gluon=(3, 6), cluster=NEVER, wgmma=NEVER),         # Jetson Orin
    (8, 9): dict(gluon=(3, 6), cluster=NEVER, wgmma=NEVER),         # L4, L40S, RTX 40
    (9, 0): dict(gluon=(3, 6), cluster=(3, 9), wgmma=(3, 6)),       # H100, H200
    (10, 0): dict(gluon=(3, 6), cluster=(3, 9), wgmma=NEVER),       # B200
    (10, 3): dict(gluon=(3, 6), cluster=(3, 9), wgmma=NEVER),       # B300
    (12, 0): dict(gluon=(3, 6), cluster=NEVER, wgmma=NEVER),        # RTX PRO 6000, RTX 50
    (12, 1): dict(gluon=(3, 6), cluster=NEVER, wgmma=NEVER),        # DGX Spark
}
# Multiply-adds of 16-bit operands with fp32 sums that the tensor cores of one multiprocessor do in a cycle by mma.sync,
# by compute capability. TF32 has half of it. GeForce cards of 8.6 and newer have half. Those of 9.0 reach 63 % of their
# peak by mma.sync, as a public measurement found; for 10.0 and 10.3, whose peak needs tcgen05, the same is assumed.
MULTIPLY_ADDS = {(8, 0): 1024, (8, 6): 512, (8, 7): 1024, (8, 9): 512, (9, 0): 1280, (10, 0): 1280, (10, 3): 1280,
                 (12, 0): 512, (12, 1): 512}
AMD = "the kernels contain instructions of NVIDIA GPUs, so they do not run on AMD GPUs"
OLDEST = (8, 0)         # compute capability. For older ones Triton cannot compile the plain kernels either
TRITON = tuple(map(int, VERSION.split(".")[:2])) if VERSION else (0, 0)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a device has room for, and which kernels run on it.

    multiprocessors    how many there are
    shared_memory      bytes of shared memory that one program may have
    cluster            the most programs of a thread-block cluster. 1: Gluon kernels run, but no clusters. 0: only the
                       plain Triton kernels run
    mhz                the highest clock rate in MHz; ``explain`` converts predicted cycles to time by it
    wgmma              whether warp groups can multiply
    multiply_adds      of 16-bit operands, that one multiprocessor does in a cycle by mma.sync
    """
    multiprocessors: int
    shared_memory: int
    cluster: int = 0
    mhz: int = 1980
    wgmma: bool = False
    multiply_adds: int = HOPPER_MULTIPLY_ADDS

    @staticmethod
    def of(device):
        """The limits of a CUDA device. Raises PlanError if no kernel runs there."""
        if reason := none_on(device):
            raise PlanError(reason)
        p = torch.cuda.get_device_properties(device)
        mhz = getattr(p, "clock_rate", 1000 * Limits.mhz) // 1000       # older versions of torch tell none
        return Limits.like((p.major, p.minor), p.multi_processor_count, p.shared_memory_per_block_optin, mhz,
                           geforce="GeForce" in p.name)

    @staticmethod
    def like(capability, multiprocessors, shared_memory, mhz, version=TRITON, geforce=False):
        """The limits of a GPU of compute ``capability``, (major, minor), with a ``version`` of Triton.

        All programs of a cluster run on the multiprocessors of one GPC. Only GPUs with 132 multiprocessors or more have
        several GPCs with 16 of them.
        """
        cluster = 0
        if runs("gluon", capability, version):
            cluster = 1 if not runs("cluster", capability, version) else 16 if multiprocessors >= 132 else 8
        multiply_adds = MULTIPLY_ADDS.get(capability, HOPPER_MULTIPLY_ADDS) // (2 if geforce else 1)
        return Limits(multiprocessors, shared_memory, cluster, mhz, runs("wgmma", capability, version), multiply_adds)


def runs(kernels, capability, version=TRITON):
    """Whether a ``version`` of Triton compiles ``kernels`` ("gluon", "cluster" or "wgmma") for a compute capability."""
    return version >= SINCE.get(capability, {}).get(kernels, NEVER)


def needed(kernels):
    """In words, what ``kernels`` of ``SINCE`` need."""
    since = {capability: of[kernels] for capability, of in SINCE.items() if of[kernels] != NEVER}
    *first, last = [f"{major}.{minor}" for major, minor in since]
    major, minor = max(since.values())
    return f"compute capability {', '.join(first) + ' or ' if first else ''}{last} and Triton {major}.{minor}"


def none_on(device):
    """Why no kernel runs on a device that torch calls CUDA; None if kernels do."""
    if VERSION is None:
        return "Triton is not installed"
    if torch.version.hip is not None:
        return AMD
    p = torch.cuda.get_device_properties(device)
    if (p.major, p.minor) < OLDEST:
        return f"the kernels need compute capability {OLDEST[0]}.{OLDEST[1]}, the GPU has {p.major}.{p.minor}"
    return None


# Multiprocessors, bytes of shared memory of a program and boost clock: bench/NOTES.md has the sources.
A100 = Limits.like((8, 0), 108, 166912, 1410)
RTX_3090 = Limits.like((8, 6), 82, 101376, 1695, geforce=True)
RTX_4090 = Limits.like((8, 9), 128, 101376, 2520, geforce=True)
H200 = H100 = Limits.like((9, 0), 132, 232448, 1980)
B200 = Limits.like((10, 0), 148, 232448, 1965)
RTX_5090 = Limits.like((12, 0), 170, 101376, 2407, geforce=True)
