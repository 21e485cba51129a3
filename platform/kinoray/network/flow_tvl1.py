"""Optical flow of many pairs at once on the model's device: TV-L1 (Zach, Pock and Bischof 2007), in fixed steps.

From coarse to fine it minimises, with rho(u) = I1(x + u0) + (u - u0) . grad I1(x + u0) - I0(x) around the last u0,

    sum |grad u1| + |grad u2| + lambda |rho(u)|

by steps that are arithmetic on each pixel and its neighbours. Every pair takes equally many of them, so nothing waits
for the host, and shapes never change. What is easy to break: no operation may mix pairs, or a pair's flow would depend
on its neighbours in the batch.

The steps read and write the same few images again and again, so pairs are taken together only as far as they stay in
the cache: few of the finest level, many of the coarser ones. On CUDA the steps' one function is compiled, once for each
level, since as many pairs come each time. They are thousands of kernels of some microseconds, which the host could not
launch in time: those of a group of pairs are recorded once as a CUDA graph.
"""

import logging
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kinoray.network.prepare import Recording

__all__ = ["tvl1_flow"]

# Shapes: P pairs, H W pixels of a level. Flow is [P, 2, H, W], x then y; its dual is two of these, for the slope of the
# flow across and down: in one tensor they would be written once more each step.

_LEVELS = 4
_MIN_SIDE = 16  # of the coarsest level, in pixels
_WARPS = 3
_STEPS = 15
_LAMBDA = 0.15  # of grey levels 0 .. 255
_THETA = 0.3  # how closely the two halves of the splitting are coupled
_TAU = 0.25  # step of the dual; larger ones need not converge
_GROUP = 96  # pairs that are recorded together
# Pixels of a level at a time: what a step reads and writes of 8 pairs of 224 x 224 is 26 MB, which stays in the cache
# of an H100 (50 MB); on a CPU one pair is too much for it, and more of them are worse.
_DEVICE_PIXELS, _CPU_PIXELS = 8 * 224**2, 224**2
_SMOOTHING = (0.25, 0.5, 0.25)

_LOG = logging.getLogger(__name__)

State = tuple[Tensor, Tensor, Tensor]
"""Flow and its dual."""
Step = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], State]


def _along(x: Tensor, axis: int, ahead: bool) -> Tensor:
    """The neighbour's value, one pixel ahead or behind along an axis; beyond the edge the pixel's own."""
    size = x.shape[axis]
    edge = x.narrow(axis, size - 1 if ahead else 0, 1)
    inner = x.narrow(axis, 1 if ahead else 0, size - 1)
    return torch.cat([inner, edge] if ahead else [edge, inner], axis)


def _step(u: Tensor, across: Tensor, down: Tensor, rest: Tensor, grad: Tensor, scaled: Tensor) -> State:
    """One step of flow and dual.

        v = u - grad * clamp(rho(u) / |grad|^2, -lambda theta, lambda theta)
        u = v + theta div(dual)
        dual = (dual + tau / theta grad u) / (1 + tau / theta |grad u|)

    Args:
        rest: rho(0), [P, 1, H, W].
        grad: of the second image where the flow leads, [P, 2, H, W].
        scaled: 1 / |grad|^2, [P, 1, H, W].
    """
    rho = rest + (grad * u).sum(1, keepdim=True)
    v = u - grad * (rho * scaled).clamp(-_LAMBDA * _THETA, _LAMBDA * _THETA)
    # Backward differences, the negative adjoint of the forward ones below: beyond the edges the dual is 0.
    divergence = across - F.pad(across[..., :-1], (1, 0)) + down - F.pad(down[..., :-1, :], (0, 0, 1, 0))
    u = v + _THETA * divergence
    slope_across, slope_down = _along(u, 3, True) - u, _along(u, 2, True) - u
    share = 1 + (_TAU / _THETA) * (slope_across.square() + slope_down.square()).sqrt()
    return u, (across + (_TAU / _THETA) * slope_across) / share, (down + (_TAU / _THETA) * slope_down) / share


@cache
def _compiled() -> Step:
    return torch.compile(_step, dynamic=False)


def _smoothed(x: Tensor) -> Tensor:
    for axis in (2, 3):
        side, middle, _ = _SMOOTHING
        x = middle * x + side * (_along(x, axis, True) + _along(x, axis, False))
    return x


def _pyramid(images: Tensor) -> list[Tensor]:
    """[P, 2, H, W] and its halves, coarsest first, each side at least _MIN_SIDE."""
    levels = [_smoothed(images)]
    while len(levels) < _LEVELS and min(levels[-1].shape[2:]) >= 2 * _MIN_SIDE:
        size = [-(-side // 2) for side in levels[-1].shape[2:]]
        levels.append(F.interpolate(levels[-1], size, mode="bilinear", antialias=True))
    return levels[::-1]


def _warped(second: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The second image [P, 1, H, W] and its gradient where the flow leads, 0 where that is outside the picture."""
    height, width = u.shape[2:]
    slope = [0.5 * (_along(second, axis, True) - _along(second, axis, False)) for axis in (3, 2)]
    rows = torch.arange(height, device=u.device, dtype=u.dtype)[:, None]
    columns = torch.arange(width, device=u.device, dtype=u.dtype)
    x, y = columns + u[:, 0], rows + u[:, 1]
    places = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], 3)
    there = F.grid_sample(
        torch.cat([second, *slope], 1), places, mode="bilinear", padding_mode="border", align_corners=False
    )
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    return there[:, :1], there[:, 1:] * inside[:, None]


def _at_once(images: Tensor) -> int:
    """Pairs of a level to take together: so few that they stay in the cache, the same number each time if it can be."""
    count, pixels = len(images), images.shape[2] * images.shape[3]
    most = max(1, (_DEVICE_PIXELS if images.device.type == "cuda" else _CPU_PIXELS) // pixels)
    return max(size for size in range(1, min(most, count) + 1) if count % size == 0)


def _level(images: Tensor, state: State, step: Step) -> State:
    size = _at_once(images)
    parts = zip(torch.split(images, size), *(torch.split(x, size) for x in state), strict=True)
    found = [_minimised(some, (u, across, down), step) for some, u, across, down in parts]
    u, across, down = (torch.cat(column) for column in zip(*found, strict=True))
    return u, across, down


def _minimised(images: Tensor, state: State, step: Step) -> State:
    first, second = images[:, :1], images[:, 1:]
    for _ in range(_WARPS):
        u = state[0]
        there, grad = _warped(second, u)
        rest = there - first - (grad * u).sum(1, keepdim=True)
        scaled = 1 / grad.square().sum(1, keepdim=True).clamp(min=1e-6)
        for _ in range(_STEPS):
            state = step(*state, rest, grad, scaled)
    return state


def _enlarged(u: Tensor, height: int, width: int) -> Tensor:
    """The flow of a coarser level, in pixels of this one."""
    larger = F.interpolate(u, (height, width), mode="bilinear", align_corners=False)
    return torch.stack([larger[:, 0] * (width / u.shape[3]), larger[:, 1] * (height / u.shape[2])], 1)


def _flow_of_group(images: Tensor, step: Step) -> Tensor:
    pyramid = _pyramid(images)
    pairs, _, height, width = pyramid[0].shape
    u, across, down = (images.new_zeros(pairs, 2, height, width) for _ in range(3))
    for level in pyramid:
        height, width = level.shape[2:]
        if u.shape[2:] != level.shape[2:]:
            u = _enlarged(u, height, width)
            across, down = (F.interpolate(x, (height, width), mode="nearest") for x in (across, down))
        u, across, down = _level(level, (u, across, down), step)
    return u


@cache
def _runner(device: torch.device, shape: torch.Size) -> Callable[..., Tensor]:
    """`_flow_of_group` for the `images` of groups of a shape, as quick as the device lets it be."""
    if device.type != "cuda":
        return partial(_flow_of_group, step=_step)
    for name, step in (("compiled and recorded", _compiled()), ("recorded", _step)):
        try:
            return Recording(partial(_flow_of_group, step=step), images=torch.zeros(shape, device=device))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            _LOG.warning("TV-L1 cannot be %s: %s: %s", name, type(error).__name__, str(error).partition("\n")[0])
    return partial(_flow_of_group, step=_step)


@torch.no_grad()
def tvl1_flow(first: Tensor, second: Tensor) -> Tensor:
    """Motion from each first image to its second, grey levels 0 .. 255, uint8 or float [P, H, W]: float32 [P, 2, H, W].

    In pixels, x (to the right) then y (down), on the device of the images: what is at (x, y) in the first is at
    (x, y) + flow in the second. A pair's flow does not depend on the others.

    Raises:
        ValueError: the images are not two of one shape [P, H, W], with sides of at least 2.
    """
    if first.shape != second.shape or first.ndim != 3 or min(first.shape[1:]) < 2:
        raise ValueError(
            f"tvl1_flow needs two stacks of images of one shape [P, H, W], H and W at least 2, got "
            f"{list(first.shape)} and {list(second.shape)}"
        )
    images = torch.stack([first, second], 1)
    on_gpu = images.device.type == "cuda"
    flow = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    for start in range(0, len(images), _GROUP):
        group = images[start : start + _GROUP].float()
        count = len(group)
        if on_gpu and count < _GROUP:  # another number of pairs would be recorded anew
            group = F.pad(group, (0, 0, 0, 0, 0, 0, 0, _GROUP - count))
        flow[start : start + count] = _runner(group.device, group.shape)(images=group)[:count]
    return flow
