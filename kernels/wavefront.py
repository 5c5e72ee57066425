"""The order of a wavefront: which layer runs over which chunk of steps, and on CUDA in which stream."""
import contextlib
import functools

import torch


@functools.lru_cache
def side_streams(device, count):
    """``count`` streams of a CUDA device, always the same."""
    return [torch.cuda.Stream(device) for _ in range(count)]


def run_diagonals(layers, count, before, device):
    """Run ``count`` chunks of each of ``layers``, which feed each other in this order.

    layers    generators that are set up and then run a chunk at each ``next``
    before    called with (n, k) before chunk k of layer n, to prepare what it reads

    Chunk k of layer n may read what chunks up to k of the layer before it wrote, so the pairs of one n + k run side by
    side. On CUDA each layer has a stream of its own. They begin after what the caller's stream was given before, and it
    goes on after all of them, even when one raises; so what was allocated in the caller's stream may be freed there.
    Nothing but events is waited for: a CUDA graph may capture it.
    """
    on_cuda = device.type == "cuda"
    streams = side_streams(device, len(layers)) if on_cuda else []
    caller = torch.cuda.current_stream(device) if on_cuda else None
    for stream in streams:
        stream.wait_stream(caller)
    try:
        for diagonal in range(len(layers) + count - 1):
            # the last layer first: then the stream before it ends with just what its chunk reads
            for n in reversed(range(max(diagonal - count + 1, 0), min(diagonal + 1, len(layers)))):
                with torch.cuda.stream(streams[n]) if on_cuda else contextlib.nullcontext():
                    if on_cuda and n:
                        streams[n].wait_stream(streams[n - 1])
                    before(n, diagonal - n)
                    next(layers[n])
    finally:
        for stream in streams:
            caller.wait_stream(stream)
