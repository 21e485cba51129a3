"""What a network costs: parameters and multiply-accumulates, part by part, for any model with an input_spec.

One MAC (multiply-accumulate) is two FLOP. Published tables mix them up, and mix clips with videos: say which. A model
may name its parts in `cost_parts` (part -> its modules) and add a line with `cost_note(segment_macs, frames)`.
`kinoray import NAME` prints it.
"""

import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from kinoray.config.shared import ModelConfig
from kinoray.console import table
from kinoray.errors import ConfigError
from kinoray.network import ClipRecipe, InputSpec
from kinoray.network.build import build_model, clip_for, factory_options, without_start_weights

__all__ = ["ModelCost", "PartCost", "count_macs", "describe", "describe_model"]

_SEGMENTS, _FRAMES, _SIZE_PX = 16, 6, 224
_CLASSES = 400
_WIDTH = 110


@dataclass(frozen=True, kw_only=True, slots=True)
class PartCost:
    """One part of a model; `macs` is for a whole video of all segments, `segment_macs` for a video of one."""

    name: str
    parameters: int
    segment_macs: int
    macs: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCost:
    """Costs of one video, one view: matrix products and convolutions of every stream; no decoding, no optical flow."""

    model: str
    num_segments: int
    frames_per_segment: int
    size_px: int
    streams: tuple[str, ...]
    parts: tuple[PartCost, ...]
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Parameters of all parts."""
        return sum(part.parameters for part in self.parts)

    @property
    def segment_macs(self) -> int:
        """Multiply-accumulates of a video of one segment."""
        return sum(part.segment_macs for part in self.parts)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the whole video; `flops` is twice that."""
        return sum(part.macs for part in self.parts)

    @property
    def flops(self) -> int:
        """Floating-point operations of the whole video: two for each multiply-accumulate."""
        return 2 * self.macs

    def __str__(self) -> str:
        """Return the costs as a plain table of several lines."""
        views = f"{self.num_segments} segments x {self.frames_per_segment} frames"
        rows = [
            f"{self.model}: {' and '.join(self.streams)}, {self.size_px} x {self.size_px} px, {views}, one view",
        ]
        total = PartCost(name="total", parameters=self.parameters, segment_macs=self.segment_macs, macs=self.macs)
        cells = [
            (
                part.name,
                f"{part.parameters:,}",
                f"{part.segment_macs / 1e9:,.3f}",
                f"{part.macs / 1e9:,.2f}",
                f"{2 * part.macs / 1e9:,.2f}",
            )
            for part in (*self.parts, total)
        ]
        head = ("part", "parameters", "GMAC/segment", "GMAC/video", "GFLOP/video")
        rows += table(cells, head=head, right=range(1, 5))
        rows.append("1 MAC = 2 FLOP. Matrix products and convolutions; decoding and optical flow come on top.")
        return "\n".join([*rows, *self.notes])


def describe(
    model: nn.Module,
    num_segments: int | None = None,
    frames_per_segment: int | None = None,
    size_px: int | None = None,
    *,
    name: str = "",
) -> ModelCost:
    """Count a model's parameters and MACs, on the meta device: nothing is computed, any size is quick.

    model: a module with `input_spec` and forward(*, rgb, flow); it is left as it was. Sizes default to what the spec
    demands, else to the paper's 16 x 6 frames of 224 px. Raises ValueError where a size contradicts the spec.
    """
    spec: Any = model.input_spec
    segments = _size("num_segments", num_segments, spec.num_segments, _SEGMENTS)
    frames = _size("frames_per_segment", frames_per_segment, spec.frames_per_segment, _FRAMES)
    size = _size("size_px", size_px, spec.crop_px, _SIZE_PX)
    groups = _parts(model)
    whole = _macs_by_module(model, _inputs(spec, segments, frames, size))
    # A model that fixes its number of segments cannot be fed one of them alone.
    single = whole if spec.num_segments else _macs_by_module(model, _inputs(spec, 1, frames, size))
    share = spec.num_segments or 1
    parts = [
        PartCost(
            name=part,
            parameters=_count(names, dict(model.named_parameters())),
            segment_macs=_sum(names, single) // share,
            macs=_sum(names, whole),
        )
        for part, names in groups.items()
    ]
    rest = PartCost(
        name="other",
        parameters=sum(p.numel() for p in model.parameters()) - sum(part.parameters for part in parts),
        segment_macs=single[""] // share - sum(part.segment_macs for part in parts),
        macs=whole[""] - sum(part.macs for part in parts),
    )
    if rest.parameters or rest.macs:
        parts.append(rest)
    return ModelCost(
        model=name or type(model).__name__,
        num_segments=segments,
        frames_per_segment=frames,
        size_px=size,
        streams=_streams(spec),
        parts=tuple(parts),
        notes=_notes(model, parts, frames),
    )


def count_macs(call: Callable[[], object]) -> int:
    """Count the multiply-accumulates of matrix products and convolutions in a call (on any device)."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return int(counter.get_total_flops()) // 2


def _size(name: str, asked: int | None, fixed: int | None, default: int) -> int:
    if asked is not None and fixed is not None and asked != fixed:
        raise ValueError(f"{name} must be {fixed} for this model, got {asked}")
    size = asked if asked is not None else fixed if fixed is not None else default
    if size < 1:
        raise ValueError(f"{name} must be at least 1, got {size}")
    return size


def _inputs(spec: Any, segments: int, frames: int, size: int) -> dict[str, Tensor | None]:
    def make(channels: int) -> Tensor:
        return torch.empty(1, segments, frames, channels, size, size, device="meta")

    return {"rgb": make(3) if spec.rgb else None, "flow": make(spec.flow_channels) if spec.flow_channels else None}


def _streams(spec: Any) -> tuple[str, ...]:
    flow = f"flow ({spec.flow_channels} channels)"
    return (*(("rgb",) if spec.rgb else ()), *((flow,) if spec.flow_channels else ()))


def _parts(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Part -> the modules that it is made of."""
    named: Mapping[str, tuple[str, ...]] | None = getattr(model, "cost_parts", None)
    return dict(named) if named is not None else {name: (name,) for name, _ in model.named_children()}


def _macs_by_module(model: nn.Module, inputs: Mapping[str, Tensor | None]) -> dict[str, int]:
    """Module name ("" is the model) -> MACs, in eval mode with every parameter replaced by one without storage."""
    state = {name: value.to("meta") for name, value in [*model.named_parameters(), *model.named_buffers()]}
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            functional_call(model, state, kwargs=dict(inputs))
    finally:
        for module, training in modes:
            module.training = training
    prefix = f"{type(model).__name__}."
    totals = {key.removeprefix(prefix): sum(ops.values()) // 2 for key, ops in counter.get_flop_counts().items()}
    return {**totals, "": int(counter.get_total_flops()) // 2}


def _sum(names: tuple[str, ...], macs: Mapping[str, int]) -> int:
    return sum(macs.get(name, 0) for name in names)


def _count(names: tuple[str, ...], parameters: Mapping[str, Tensor]) -> int:
    prefixes = tuple(f"{name}." for name in names)
    return sum(value.numel() for name, value in parameters.items() if name.startswith(prefixes))


def _notes(model: Any, parts: Sequence[PartCost], frames: int) -> tuple[str, ...]:
    if not hasattr(model, "cost_note"):
        return ()
    return (str(model.cost_note({part.name: part.segment_macs for part in parts}, frames)),)


def describe_model(config: ModelConfig) -> ModelCost:
    """Print the costs of a network with 400 classes, on the clips of its recipe or the paper's; returns them.

    Raises:
        ConfigError: no such network or option.
    """
    model = without_start_weights(config)
    with torch.device("meta"):  # no memory is taken and nothing computed, whatever the size
        network = build_model(model, _CLASSES)
    assert isinstance(network, nn.Module)
    try:
        cost = describe(network, *_sizes(network), name=model.factory)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    print(cost)
    options = " ".join(_option(parameter) for parameter in factory_options(model.factory).values())
    if options:
        text = f"Options (--model.options NAME=VALUE): {options}"
        print(*textwrap.wrap(text, _WIDTH, break_on_hyphens=False), sep="\n")
    return cost


def _sizes(network: nn.Module) -> tuple[int | None, int | None, int | None]:
    """Segments, frames and crop of the network's recipe; None for what is as in the paper."""
    spec = cast(InputSpec, network.input_spec)
    if getattr(spec, "recipe", ClipRecipe()).frames is None:
        return None, None, None
    clip = clip_for(spec)
    return clip.sample.num_segments, clip.sample.frames_per_segment, clip.view.crop_px


def _option(parameter: inspect.Parameter) -> str:
    """`heads=8`, or the name alone where it has no default."""
    if parameter.default is parameter.empty:
        return parameter.name
    default = parameter.default
    words = {None: "null", True: "true", False: "false"}
    return f"{parameter.name}={words[default] if default is None or isinstance(default, bool) else default}"
