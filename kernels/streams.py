"""Work that need not wait for what was launched before it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch


@contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """Launch what follows on a second stream, which begins when all before is done and `join` waits for.

    Its kernels go first where they compete, as they are the small ones: large kernels launched between
    this and `join` fill the GPU around them.

    Memory of the second stream is safe without more ado: it is taken again by this stream only, which waits
    for the first before it does anything.
    """
    if device.type != "cuda":
        yield
        return
    main = torch.cuda.current_stream(device)
    side = _side_stream(main)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        yield


def join(device: torch.device) -> None:
    """What follows waits for the work beside."""
    if device.type == "cuda":
        main = torch.cuda.current_stream(device)
        main.wait_stream(_side_stream(main))


@lru_cache
def _side_stream(stream: torch.cuda.Stream) -> torch.cuda.Stream:
    return torch.cuda.Stream(stream.device, priority=-1)
