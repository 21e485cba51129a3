"""What a user may choose of the network: backbones, and readings of the paper. One place says and checks it all."""

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin, get_type_hints

__all__ = ["Options", "require_count"]

_MAX_RADIUS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The keyword arguments of `vcm_sdd`. The defaults are the paper's equations as we read them.

    scale="dim" is what we recommend for accuracy. Raises ValueError naming the option, what it may be and what it was.
    """

    backbone: str = "resnet101"
    """A torchvision ResNet, `tiny` (small frames, small sets), or `timm:NAME`."""
    backbone_weights: str | None = None
    """None (random, the paper's `_NP` rows), `imagenet`, the name of a torchvision weight set, or a .safetensors, .pth
    or .pt file; the flow stem then starts as the mean of the RGB stem over its channels."""
    flow_channels: int = 2
    """2 for one flow field, 2 L for a stack of L."""
    stc: bool = True
    """Spatio-temporal consistency (section 3.1, Eq. 3-10); off = the rows `No_STC` of table 2."""
    mff: bool = True
    """Multi-modal feature fusion (section 3.2, Eq. 11-12); off = the rows `No_MFF` of table 2."""
    heads: int = 8
    """Groups of channels that attend on their own in Eq. 11-12 (the paper gives no number)."""
    scale: Literal["frobenius", "dim"] = "frobenius"
    """Scores are divided by the root of their matrix's Frobenius norm (as printed) or of the channels per head."""
    scope: Literal["segment", "frame"] = "segment"
    """A node attends to all nodes of its segment (the paper) or only to those of its own frame."""
    eq12: Literal["text", "literal"] = "text"
    """Eq. 12 with transposed scores (flow asks, RGB answers: the text) or with the numerator as printed."""
    mff_residual: bool = False
    """Add each asking node to its answer."""
    mff_norm: bool = False
    """LayerNorm on every node's answer before the pool (not in the paper; forbids the pooled short cut)."""
    geometry: Literal["log", "inverse_log"] = "log"
    """Eq. 3-5: -log(u + eps), or 1 / log(u + e) with Euler's e."""
    eps: float = 1e-3
    """Keeps the logarithm of Eq. 6 finite at distance 0 (geometry="log" only)."""
    metric: Literal["box", "l1", "l2"] = "box"
    """Distance that decides who is a neighbour: the largest, the sum, or the root of the squares of the steps."""
    radius: int = 2
    """Neighbours are at most this many cells away (the paper: 2); at most 64, as its table grows with the cube."""
    self_loop: bool = True
    """A node is its own neighbour (distance 0 is at most 2)."""
    share_stc: bool = True
    """One pair of STC weights for both streams (Eq. 10 uses the same s in both lines)."""
    stc_residual: bool = False
    """Add the input of STC to its output."""
    stc_init: Literal["near", "random"] = "near"
    """`near` starts close to the identity; `random`, torch's usual init, is a blur over about 65 neighbours."""
    consensus: Literal["logits", "probs"] = "logits"
    """Average over segments of the logits (Eq. 14), or of the probabilities (then the output is their logarithm)."""
    shared_classifier: bool = False
    """One linear classifier for both streams (M is one letter in Eq. 14)."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        require_count("flow_channels", self.flow_channels)
        for field in fields(self):
            if field.name != "backbone":  # build_backbone knows the names
                _check_type(field.name, hints[field.name], getattr(self, field.name))
        if self.heads < 1:
            raise ValueError(f"heads must be at least 1, got {self.heads}")
        if not (0 < self.eps < 1):
            raise ValueError(f"eps must lie between 0 and 1, got {self.eps}")
        smallest = 0 if self.self_loop else 1
        if self.radius < smallest:
            raise ValueError(f"radius must be at least {smallest} with self_loop={self.self_loop}, got {self.radius}")
        if self.radius > _MAX_RADIUS:
            raise ValueError(f"radius must be at most {_MAX_RADIUS}, got {self.radius}")


def require_count(name: str, value: object) -> None:
    """Raise ValueError unless it is a whole number of at least 1."""
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def _check_type(name: str, hint: object, value: object) -> None:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(hint)))}, got {value!r}")
        return
    if hint == str | None:
        fits = value is None or type(value) is str
    elif hint is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    else:
        fits = type(value) is hint
    if not fits:
        kinds: dict[object, str] = {bool: "true or false", int: "a whole number", float: "a finite number"}
        raise ValueError(f"{name} must be {kinds.get(hint, 'text, or left out')}, got {value!r}")
