"""What all baselines share: input checks, segments into clips, averages over segments, one or two streams.

A network here maps clips [M, T, C, Y, X] to logits [M, K]; ClipClassifier makes a kinoray model out of one or two.

Shapes: B videos, S segments, T frames a segment, C channels, Y X pixels, M clips, K classes
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Literal, cast

from torch import Tensor, nn

from kinoray.network import InputSpec

__all__ = [
    "ClipClassifier",
    "DepthParts",
    "Modality",
    "build_streams",
    "require_choice",
    "require_count",
    "require_fraction",
    "under",
]

Modality = Literal["rgb", "flow", "two_stream"]
DepthParts = tuple[tuple[str, ...], ...]


def under(name: str, groups: DepthParts) -> DepthParts:
    """The depth_parts of a submodule, as the module that has it under this name calls them."""
    return tuple(tuple(f"{name}.{part}" for part in group) for group in groups)


def require_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Raise ValueError naming the option unless its value is one of the choices."""
    known = list(choices)
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {value!r}")


def require_count(name: str, value: object, minimum: int = 1) -> None:
    """Raise ValueError naming the option unless its value is a whole number of at least `minimum`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} must be a whole number of at least {minimum}, got {value!r}")


def require_fraction(name: str, value: object) -> None:
    """Raise ValueError naming the option unless its value lies in 0 .. 1, without 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"{name} must be a number in 0 .. 1 (1 excluded), got {value!r}")


class ClipClassifier(nn.Module):
    """One network a modality over clips, averaged over segments, then over streams (weighted).

        logits = mean_s rgb_net(rgb_s)                        one stream
        logits = (rgb logits + w * flow logits) / (1 + w)     two streams, w = flow_weight

    A clip is one segment of T frames (grouping="segment"), or all S*T frames of a video in order of time, with no
    average left to take (grouping="video"). Averages are of logits, before any softmax.
    """

    def __init__(
        self,
        spec: InputSpec,
        *,
        rgb_net: nn.Module | None = None,
        flow_net: nn.Module | None = None,
        grouping: Literal["segment", "video"] = "segment",
        flow_weight: float = 1.0,
    ) -> None:
        super().__init__()
        assert spec.rgb == (rgb_net is not None)
        assert (spec.flow_channels > 0) == (flow_net is not None)
        assert spec.rgb or spec.flow_channels
        if not 0 < flow_weight < math.inf:
            raise ValueError(f"flow_weight must be greater than 0, got {flow_weight!r}")
        self.input_spec = spec
        self.rgb_net = rgb_net
        self.flow_net = flow_net
        self.grouping = grouping
        self.flow_weight = flow_weight

    @property
    def segment_consensus(self) -> Literal["logits"] | None:
        """ "logits" where the answer is their mean over segments that do not see each other; None for whole videos."""
        return "logits" if self.grouping == "segment" else None

    @property
    def depth_parts(self) -> DepthParts:
        """The streams' own; what is equally deep in two streams is one group. None where a stream does not say."""
        streams = [
            under(name, getattr(net, "depth_parts", ()))
            for name, net in (("rgb_net", self.rgb_net), ("flow_net", self.flow_net))
            if net is not None
        ]
        return tuple(sum(groups, ()) for groups in zip(*streams, strict=True))

    def forward(self, *, rgb: Tensor | None, flow: Tensor | None) -> Tensor:
        """Return logits [B, K] for rgb [B, S, T, 3, Y, X] and flow [B, S, T, flow_channels, Y, X], both float.

        A modality that the model does not use is not looked at. Raises ValueError stating expected and received.
        """
        logits = [self._average(net, x) for net, x in self.streams(rgb, flow).values()]
        if any(stream.shape != logits[0].shape for stream in logits):
            assert rgb is not None
            assert flow is not None
            raise ValueError(
                f"rgb and flow must hold the same videos, got rgb {tuple(rgb.shape)} and flow {tuple(flow.shape)}"
            )
        return self.joined(logits)

    def streams(self, rgb: Tensor | None, flow: Tensor | None) -> dict[str, tuple[nn.Module, Tensor]]:
        """The network of each stream and what it is fed, by the stream's name; checked as forward says."""
        found: dict[str, tuple[nn.Module, Tensor]] = {}
        if self.rgb_net is not None:
            found["rgb"] = self.rgb_net, self._checked("rgb", rgb, 3)
        if self.flow_net is not None:
            found["flow"] = self.flow_net, self._checked("flow", flow, self.input_spec.flow_channels)
        return found

    def joined(self, logits: Sequence[Tensor]) -> Tensor:
        """The answer of the streams, of which there are one or two (RGB first)."""
        if len(logits) == 1:
            return logits[0]
        return (logits[0] + self.flow_weight * logits[1]) / (1 + self.flow_weight)

    def _average(self, net: nn.Module, x_BSTCYX: Tensor) -> Tensor:
        if self.grouping == "video":
            return cast(Tensor, net(x_BSTCYX.flatten(1, 2)))
        logits_MK: Tensor = net(x_BSTCYX.flatten(0, 1))
        num_videos, num_segments = x_BSTCYX.shape[:2]
        return logits_MK.reshape(num_videos, num_segments, -1).mean(dim=1)

    def _checked(self, name: str, x: Tensor | None, channels: int) -> Tensor:
        spec = self.input_spec
        sizes = (spec.num_segments, spec.frames_per_segment, channels, spec.crop_px, spec.crop_px)
        words = ("segments", "frames", "channels", "height", "width")
        shape = ", ".join(["videos", *(str(size or word) for size, word in zip(sizes, words, strict=True))])
        expected = f"{name} must be float [{shape}]"
        if x is None:
            raise ValueError(f"{expected}, got None: this model needs {name}")
        fits = x.ndim == 6 and all(found == (size or found) for size, found in zip(sizes, x.shape[1:], strict=True))
        if not fits or 0 in x.shape:
            raise ValueError(f"{expected}, none of them 0, got shape {list(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"{expected}, normalised as its input_spec says, got dtype {x.dtype}")
        return x


def build_streams(
    modality: Modality,
    make: Callable[[Literal["rgb", "flow"]], nn.Module],
    *,
    spec: InputSpec,
    flow_channels: int = 2,
    grouping: Literal["segment", "video"] = "segment",
    flow_weight: float = 1.0,
    join: type[ClipClassifier] = ClipClassifier,
) -> ClipClassifier:
    """Build one network a stream with `make` and join them; `spec` is the RGB model's, its modalities are set here."""
    require_choice("modality", modality, ("rgb", "flow", "two_stream"))
    require_count("flow_channels", flow_channels)
    wants_rgb, wants_flow = modality != "flow", modality != "rgb"
    return join(
        replace(spec, rgb=wants_rgb, flow_channels=flow_channels if wants_flow else 0),
        rgb_net=make("rgb") if wants_rgb else None,
        flow_net=make("flow") if wants_flow else None,
        grouping=grouping,
        flow_weight=flow_weight,
    )
