"""A whole training step as one CUDA graph: recorded once, then replayed without Python."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

WARM_UPS = 3  # runs before the recording, so that libraries choose kernels and allocate


def captured(
    step: Callable[..., Tensor], inputs: tuple[Tensor, ...], state: Iterable[Tensor]
) -> Callable[..., Tensor]:
    """Record ``step`` and return a function that replays it on other inputs of the same shapes.

    Recording trains nothing: ``state`` and the random state are put back.

    Args:
        step: Maps tensors to a tensor and never waits for the device.
        inputs: Example inputs, on the GPU.
        state: Every tensor that ``step`` changes in place.

    Returns:
        A function like ``step``, whose result is overwritten by its next call.
    """
    held = [tensor.clone() for tensor in inputs]
    state = list(state)
    before, rng = [tensor.clone() for tensor in state], torch.cuda.get_rng_state()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            step(*held)
    torch.cuda.current_stream().wait_stream(side)
    recording = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recording):
        result = step(*held)
    with torch.no_grad():
        torch._foreach_copy_(state, before)
    torch.cuda.set_rng_state(rng)

    def replay(*values: Tensor) -> Tensor:
        for slot, value in zip(held, values, strict=True):
            slot.copy_(value)
        recording.replay()
        return result

    replay.recorded = step  # what it holds stays alive: the recording knows addresses only
    return replay
