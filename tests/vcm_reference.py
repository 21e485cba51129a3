"""The equations of section 3, one pair of nodes at a time, in float64: slow, and nothing folded, shared or cached.

It shares no code with models/vcm_sdd: options come in as its Options, weights as a plain dict of tensors. Values
are torch scalars only so that autograd can give the gradients.
"""

import itertools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from vcm_sdd.options import Options

Node = tuple[int, int, int]
"""Frame, row, column."""
Features = dict[Node, Tensor]
"""One vector [D] for each node of a segment."""

NORM_EPS = 1e-12


def logits(rgb: Tensor, flow: Tensor, weights: Mapping[str, Tensor], options: Options) -> Tensor:
    """Logits [B, C] for feature grids [B, S, T, H, W, D] of both streams (Eq. 3-14)."""
    videos = []
    for rgb_video, flow_video in zip(rgb, flow, strict=True):
        segments = [
            segment_logits(rgb_segment, flow_segment, weights, options)
            for rgb_segment, flow_segment in zip(rgb_video, flow_video, strict=True)
        ]
        if options.consensus == "logits":
            videos.append(sum(segments) / len(segments))
        else:
            videos.append((sum(_softmax(list(segment)) for segment in segments) / len(segments)).log())
    return torch.stack(videos)


def segment_logits(rgb: Tensor, flow: Tensor, weights: Mapping[str, Tensor], options: Options) -> Tensor:
    """One segment's logits [C] (the mean of both streams, Eq. 13 or 14) for grids [T, H, W, D]."""
    size = rgb.shape[:3]
    nodes = list(itertools.product(*(range(n) for n in size)))
    rgb_nodes, flow_nodes = ({node: x[node] for node in nodes} for x in (rgb, flow))
    if options.stc:
        rgb_nodes = consistency(rgb_nodes, size[0], weights["w_p"], weights["w_g"], options)
        flow_names = ("w_p", "w_g") if options.share_stc else ("flow_w_p", "flow_w_g")
        flow_nodes = consistency(flow_nodes, size[0], *(weights[name] for name in flow_names), options)
    if options.mff:
        rgb_nodes, flow_nodes = fusion(rgb_nodes, flow_nodes, weights, options)
    rgb_mean = sum(rgb_nodes.values()) / len(nodes)
    flow_mean = sum(flow_nodes.values()) / len(nodes)
    flow_classifier = "rgb" if options.shared_classifier else "flow"
    rgb_logits = weights["rgb_m"] @ rgb_mean + weights["rgb_bias"]
    flow_logits = weights[f"{flow_classifier}_m"] @ flow_mean + weights[f"{flow_classifier}_bias"]
    return (rgb_logits + flow_logits) / 2


def consistency(x: Features, num_frames: int, w_p: Tensor, w_g: Tensor, options: Options) -> Features:
    """Eq. 3-10 for one stream of one segment."""
    out = {}
    for i in x:
        neighbours = [j for j in x if are_neighbours(i, j, options)] or [i]
        s = _softmax([similarity(i, j, num_frames, w_p, w_g, options) for j in neighbours])
        out[i] = sum(s_ij * x[j] for s_ij, j in zip(s, neighbours, strict=True))
        if options.stc_residual:
            out[i] = out[i] + x[i]
    return out


def similarity(i: Node, j: Node, num_frames: int, w_p: Tensor, w_g: Tensor, options: Options) -> Tensor:
    """Eq. 3-7: relu(geom(i, j) W_p) W_g, geom in the order x, y, t."""
    dt, dy, dx = (abs(a - b) for a, b in zip(i, j, strict=True))
    distances = (float(dx), float(dy), dt / num_frames)
    if options.geometry == "log":
        geometry = [-math.log(u + options.eps) for u in distances]
    else:
        geometry = [1 / math.log(u + math.e) for u in distances]
    hidden = sum(value * w_p[row] for row, value in enumerate(geometry))
    return (hidden.clamp(min=0) * w_g[:, 0]).sum()


def are_neighbours(i: Node, j: Node, options: Options) -> bool:
    """The graph's edges: nodes at most `radius` apart."""
    if i == j:
        return options.self_loop
    steps = [abs(a - b) for a, b in zip(i, j, strict=True)]
    if options.metric == "box":
        return max(steps) <= options.radius
    if options.metric == "l1":
        return sum(steps) <= options.radius
    return sum(step * step for step in steps) <= options.radius**2


def fusion(rgb: Features, flow: Features, weights: Mapping[str, Tensor], options: Options) -> tuple[Features, Features]:
    """Eq. 11-12: the answers to every RGB and to every flow node."""
    groups = [[node for node in rgb if node[0] == t] for t in sorted({node[0] for node in rgb})]
    if options.scope == "segment":
        groups = [list(rgb)]
    rgb_out: Features = {}
    flow_out: Features = {}
    for group in groups:
        for head in range(options.heads):
            channels = len(rgb[group[0]]) // options.heads
            part = slice(head * channels, (head + 1) * channels)
            q, k = [rgb[i][part] for i in group], [flow[i][part] for i in group]
            z = scaled(q, k, options)
            for row, i in enumerate(group):
                answer = _attend(z[row], k)
                rgb_out[i] = torch.cat([rgb_out[i], answer]) if head else answer
                asked = z[row] if options.eq12 == "literal" else [z[other][row] for other in range(len(group))]
                answer = _attend(asked, q)
                flow_out[i] = torch.cat([flow_out[i], answer]) if head else answer
    if options.mff_residual:
        rgb_out = {i: value + rgb[i] for i, value in rgb_out.items()}
        flow_out = {i: value + flow[i] for i, value in flow_out.items()}
    if options.mff_norm:
        rgb_out = {i: _layer_norm(x, weights["rgb_gain"], weights["rgb_shift"]) for i, x in rgb_out.items()}
        flow_out = {i: _layer_norm(x, weights["flow_gain"], weights["flow_shift"]) for i, x in flow_out.items()}
    return rgb_out, flow_out


def scaled(q: list[Tensor], k: list[Tensor], options: Options, norm_eps: float = NORM_EPS) -> list[list[Tensor]]:
    """Scores of one head, q_i . k_j, divided by the root of their Frobenius norm or of the channels."""
    scores = [[(q_i * k_j).sum() for k_j in k] for q_i in q]
    if options.scale == "dim":
        root = torch.tensor(float(len(q[0])), dtype=q[0].dtype).sqrt()
    else:
        norm = (sum(score * score for row in scores for score in row) + norm_eps).sqrt()
        root = norm.sqrt()
    return [[score / root for score in row] for row in scores]


def _attend(scores: list[Tensor], values: list[Tensor]) -> Tensor:
    total = torch.zeros_like(values[0])
    for weight, value in zip(_softmax(scores), values, strict=True):
        total = total + weight * value
    return total


def _softmax(values: list[Tensor]) -> Tensor:
    largest = max(value.item() for value in values)
    powers = torch.stack([value - largest for value in values]).exp()
    return powers / powers.sum()


def _layer_norm(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    mean = x.sum() / len(x)
    variance = ((x - mean) ** 2).sum() / len(x)
    return (x - mean) / (variance + 1e-5).sqrt() * gain + shift
