"""``Limits``: what a plan for a device must fit."""
import dataclasses

import torch
import triton


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a device has room for, and which kernels run on it.

    multiprocessors    how many there are
    shared_memory      bytes of shared memory that one program may have
    cluster            the most programs of a thread-block cluster. 1: Gluon kernels run, but no clusters. 0: only the
                       plain Triton kernels run
    mhz                the highest clock rate in MHz; ``explain`` converts predicted cycles to time by it
    wgmma              whether warp groups can multiply, as on compute capability 9.0
    """
    multiprocessors: int
    shared_memory: int
    cluster: int = 0
    mhz: int = 1980
    wgmma: bool = False

    @staticmethod
    def of(device):
        """The limits of a CUDA device."""
        p = torch.cuda.get_device_properties(device)
        return Limits(p.multi_processor_count, p.shared_memory_per_block_optin,
                      _cluster((p.major, p.minor), p.multi_processor_count),
                      getattr(p, "clock_rate", 1000 * Limits.mhz) // 1000,      # older versions of torch tell none
                      (p.major, p.minor) == (9, 0))


def _cluster(capability, multiprocessors):
    """``Limits.cluster`` of a device with this compute capability, (major, minor).

    The tests cover the machine code of the Gluon kernels for the three capabilities below only. Clusters need 9.0 and
    Triton 3.9. All programs of a cluster run on the multiprocessors of one GPC. Only GPUs with 132 multiprocessors or
    more have several GPCs with 16 of them.
    """
    if capability not in ((8, 0), (8, 9), (9, 0)):
        return 0
    if capability < (9, 0) or tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        return 1
    return 16 if multiprocessors >= 132 else 8


H200 = H100 = Limits(132, 232448, _cluster((9, 0), 132), wgmma=True)
A100 = Limits(108, 166912, _cluster((8, 0), 108), 1410)
RTX_4090 = Limits(128, 101376, _cluster((8, 9), 128), 2520)
