"""The order of a wavefront: when each layer runs over each chunk of steps, and on CUDA in which stream."""
import contextlib
import functools

import torch


@functools.lru_cache
def side_streams(device, count):
    """``count`` streams of a CUDA device, always the same."""
    return [torch.cuda.Stream(device) for _ in range(count)]


def run_diagonals(layers, count, before, device):
    """Run ``count`` chunks of each of ``layers``, where each layer reads what the layer before it writes.

    layers    generators, already set up, that run one chunk at each ``next``
    before    called with (n, k) before chunk k of layer n, to prepare what it reads

    Chunk k of layer n reads what chunks 0 to k of layer n - 1 wrote. So all pairs with the same n + k may run side by
    side. On CUDA each layer has a stream of its own. These streams begin after the work that the caller's stream has
    queued, and the caller's stream continues after all of them, even when a layer raises. So memory that was allocated
    in the caller's stream may be freed there. Streams wait only for events, which a CUDA graph can capture.
    """
    on_cuda = device.type == "cuda"
    streams = side_streams(device, len(layers)) if on_cuda else []
    caller = torch.cuda.current_stream(device) if on_cuda else None
    for stream in streams:
        stream.wait_stream(caller)
    try:
        for diagonal in range(len(layers) + count - 1):
            # The last layer goes first: the stream of the layer before it then ends with exactly what its chunk reads.
            for n in reversed(range(max(diagonal - count + 1, 0), min(diagonal + 1, len(layers)))):
                with torch.cuda.stream(streams[n]) if on_cuda else contextlib.nullcontext():
                    if on_cuda and n:
                        streams[n].wait_stream(streams[n - 1])
                    before(n, diagonal - n)
                    next(layers[n])
    finally:
        for stream in streams:
            caller.wait_stream(stream)
