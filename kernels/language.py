"""Triton and Gluon, for all kernels. Where Triton is not installed, as on macOS and Windows, stand-ins let these
modules be imported. No kernel runs then: ``triton_lstm`` leaves every call to torch."""
try:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import CompiledKernel
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.ampere import mma_v2
    from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma
    from triton.runtime import driver
    from triton.runtime.interpreter import InterpretedFunction
    VERSION = triton.__version__
except ModuleNotFoundError as error:
    if error.name != "triton":          # a Triton that is there and broken
        raise
    VERSION = None

    class _Nothing:
        """Has any attribute and takes any argument. As a decorator it returns the function."""

        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return self

        def __call__(self, *args, **kwargs):
            return args[0] if len(args) == 1 and callable(args[0]) else self

    class CompiledKernel:
        pass

    class InterpretedFunction:
        pass

    triton = tl = gluon = gl = driver = mma_v2 = mbarrier = fence_async_shared = warpgroup_mma = GPUTarget = _Nothing()

__all__ = ["VERSION", "CompiledKernel", "GPUTarget", "InterpretedFunction", "driver", "fence_async_shared", "gl",
           "gluon", "mbarrier", "mma_v2", "tl", "triton", "warpgroup_mma"]
