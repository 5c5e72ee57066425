"""What a device has room for."""
import dataclasses

import torch
import triton


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a plan must fit.

    multiprocessors
    shared_memory    of one program, in bytes
    cluster          programs of a thread-block cluster at most: 1 where only the Gluon kernels of one program run, 0
                     where only the portable kernels do
    mhz              the highest clock, which turns predicted cycles into time
    wgmma            whether there are the products by warp groups of compute capability 9.0
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
    """``Limits.cluster`` of a device.

    The tests run what the Gluon kernels compile to for these three architectures only. Clusters need the last of them
    and Triton 3.9. The programs of a cluster run on multiprocessors of one GPC; only the full chips have several GPCs
    with 16.
    """
    if capability not in ((8, 0), (8, 9), (9, 0)):
        return 0
    if capability < (9, 0) or tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        return 1
    return 16 if multiprocessors >= 132 else 8


H200 = H100 = Limits(132, 232448, _cluster((9, 0), 132), wgmma=True)
A100 = Limits(108, 166912, _cluster((8, 0), 108), 1410)
RTX_4090 = Limits(128, 101376, _cluster((8, 9), 128), 2520)
