"""The switch by which torch's products on CUDA are in TF32 or in fp32."""
import contextlib
import threading
import warnings

import torch

# Held while products are queued, by every thread that cares how they are computed. It is the process's switch: a thread
# that does not ask here and multiplies meanwhile still sees it.
_lock = threading.RLock()
_warned = False


def _in_tf32():
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


def _set(tf32):
    """Set the older of torch's two interfaces, which sets the newer one too: the other way round whoever asks the older
    one gets a RuntimeError. Off by ``set_float32_matmul_precision``, for what it once set must agree with the rest."""
    global _warned
    with contextlib.ExitStack() as stack:
        if not _warned:         # some versions of torch warn once that it is the older one
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            _warned = True
        if tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
        else:
            torch.set_float32_matmul_precision("highest")


@contextlib.contextmanager
def products_in_tf32(tf32):
    """Products of fp32 tensors on CUDA are in TF32, or are not; torch's switch is touched only where it differs, and is
    as it was afterwards, by either interface."""
    with _lock:
        if _in_tf32() == tf32:
            yield
            return
        newer = [backend.matmul for backend in (torch.backends.cuda, torch.backends.mkldnn)
                 if hasattr(getattr(backend, "matmul", None), "fp32_precision")]
        before = [matmul.fp32_precision for matmul in newer]
        try:
            older = torch.get_float32_matmul_precision()
        except RuntimeError:            # the user has set the newer one, and torch does not tell the older one then
            older = None
        _set(tf32)
        try:
            yield
        finally:
            if older is not None:
                torch.set_float32_matmul_precision(older)
            for matmul, value in zip(newer, before):
                matmul.fp32_precision = value
