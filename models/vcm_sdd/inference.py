"""Make a trained model faster without changing what it says: for labelling and evaluation.

Works for any kinoray model, most for networks with convolutions and batch norms. The copy that comes out is for
inference only: it has other parameters than the model it was made of and cannot be trained or saved in its place.
"""

import copy
import logging
import math
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_eval

from vcm_sdd.compiled import Compiled, Repeated
from vcm_sdd.fusion import CrossModalFusion
from vcm_sdd.pointwise import fuse_pointwise

__all__ = [
    "BF16_TOLERANCE",
    "FP32_TOLERANCE",
    "compile_fusion",
    "compile_pays",
    "fold_batch_norms",
    "prepare_for_inference",
]

FP32_TOLERANCE = 1e-4
"""Largest change of a logit, relative to the largest logit, with precision="fp32" (2e-6 on features was seen)."""
BF16_TOLERANCE = 5e-2
"""The same with precision="bf16", whose numbers have 8 bits (1.4e-2 on features was seen)."""

_LOG = logging.getLogger(__name__)

# Tracing runs a module's own code with stand-ins for tensors; these are what comes of code that looks at them.
_UNTRACEABLE = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

# Pixels a call: 12 frames of 224 x 224 keep a ResNet-101's activations in a CPU's cache (48 at once took 1.4 times the
# time a frame in float32, 6 at once 1.1 times in bfloat16); a GPU wants many at once.
_CPU_PIXELS, _DEVICE_PIXELS = 12 * 224**2, 384 * 224**2
# Frames of a ResNet-101 from which compiling pays: it took 19 (bf16) to 32 (fp32) CPU seconds more at the start and
# 7 to 8 ms less a frame (benchmarks/inference.py).
_PAYS_FROM = 4_000


def compile_pays(num_frames: int) -> bool:
    """Return whether compiling is worth its start for a process that will run this many frames, streams added."""
    return num_frames >= _PAYS_FROM


def prepare_for_inference(
    model: nn.Module, *, precision: Literal["fp32", "bf16"] = "fp32", compile: bool = False, fold: bool = True
) -> nn.Module:
    """Return a faster copy of a model in eval mode: same inputs, same `input_spec`, float32 logits.

    Batch norms are folded into the convolutions in front of them, and weights are laid out channels_last, wherever a
    part of the model can be traced; `bf16` rounds those parts to bfloat16 (fast on CPUs with AVX512-BF16 or AMX and
    on GPUs). `compile` also compiles them, on the first call: minutes on a busy machine, see compile_pays; where
    there is no compiler the model runs uncompiled and says so in the log. A network without such parts (a transformer)
    runs whole under autocast, and is compiled whole; so does any with fold=False, which is for networks whose modules
    reach into one another: a folded part has other insides.

    On CUDA `compile` also compiles the fusion of the streams, runs 1 x 1 convolutions in bf16 with what follows them in
    one pass (vcm_sdd.pointwise), and records each call as a CUDA graph for a fixed number of clips
    (vcm_sdd.compiled.Repeated): the model must be there already.

    Logits change by at most FP32_TOLERANCE or BF16_TOLERANCE of the largest. Raises ValueError for another precision.
    """
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision must be fp32 or bf16, got {precision!r}")
    prepared = copy.deepcopy(model).eval().requires_grad_(False)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # Unless a model says so, we do not know that what follows its backbones reads bfloat16.
    keep_dtype = bool(getattr(model, "reads_bf16_features", False))
    on_cuda = next((x.device.type for x in prepared.parameters()), "cpu") == "cuda"

    def trunk(traced: fx.GraphModule) -> nn.Module:
        if compile and on_cuda and dtype == torch.bfloat16:
            fuse_pointwise(traced)
        return _Trunk(traced, dtype=dtype, keep_dtype=keep_dtype, compile=compile)

    if fold:
        _replace_trunks(prepared, trunk)
    if any(isinstance(part, _Trunk) for part in prepared.modules()):
        if compile and on_cuda:
            compile_fusion(prepared)
        return Repeated(prepared) if compile and on_cuda else prepared
    if dtype == torch.float32 and not compile:
        return prepared
    whole = _Whole(prepared, dtype=dtype, compile=compile)
    return Repeated(whole) if compile else whole


def compile_fusion(prepared: nn.Module) -> None:
    """Have the passes over the scores of MFF compiled: on a GPU each of them costs as much as the product before it."""
    for name, part in list(prepared.named_modules()):
        if isinstance(part, CrossModalFusion):
            prepared.set_submodule(name, Compiled(part))


class _Trunk(nn.Module):
    """A traced part of a network: casts its input, calls it on batches that suit the device, casts its output."""

    def __init__(self, traced: nn.Module, *, dtype: torch.dtype, keep_dtype: bool, compile: bool) -> None:
        super().__init__()
        self.traced = traced.to(dtype)
        for parameter in traced.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self.dtype, self.keep_dtype = dtype, keep_dtype
        self.compiled = Compiled(self.traced, {"freezing": True}) if compile else None
        self._sizes: dict[torch.Size, int] = {}

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Return the part's output for a batch of frames or clips, first dimension free."""
        size, call = self._batch(x), self.compiled or self.traced
        outputs = [call(self._arranged(part, size))[: part.shape[0]] for part in torch.split(x, size)]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return cast(Tensor, y if self.keep_dtype else y.to(x.dtype))

    def _batch(self, x: Tensor) -> int:
        """Frames (clips) a call. Compiled code is made for one size, so the first call's choice stays."""
        num, limit = x.shape[0], _CPU_PIXELS if x.device.type == "cpu" else _DEVICE_PIXELS
        if self.compiled is not None and x.shape[1:] in self._sizes:
            return self._sizes[x.shape[1:]]
        pixels = x.shape[-1] * x.shape[-2] * (x.shape[1] if x.ndim > 4 else 1)
        num_calls = math.ceil(num / max(1, limit // pixels))
        size = math.ceil(num / num_calls)
        if self.compiled is not None:
            self._sizes[x.shape[1:]] = size
        return size

    def _arranged(self, part: Tensor, size: int) -> Tensor:
        part = part.to(self.dtype)
        missing = size - part.shape[0]
        if missing and self.compiled is not None:
            part = torch.cat([part, part.new_zeros(missing, *part.shape[1:])])
        return part.contiguous(memory_format=torch.channels_last) if part.ndim == 4 else part


class _Whole(nn.Module):
    """A network of which no part can be folded: the same module under autocast, or compiled, or both."""

    def __init__(self, model: nn.Module, *, dtype: torch.dtype, compile: bool) -> None:
        super().__init__()
        self.model = Compiled(model) if compile else model
        self.dtype = dtype
        self.input_spec = getattr(model, "input_spec", None)

    @torch.no_grad()
    def forward(self, **inputs: Tensor | None) -> Tensor:
        """Return float32 logits [B, C]."""
        device = next(tensor.device.type for tensor in inputs.values() if tensor is not None)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return cast(Tensor, self.model(**inputs)).float()


def _replace_trunks(module: nn.Module, make: Callable[[fx.GraphModule], nn.Module]) -> None:
    """Replace the largest traceable children that hold batch norms."""
    for name, child in module.named_children():
        if not any(isinstance(part, _BatchNorm) for part in child.modules()):
            continue
        folded = fold_batch_norms(child)
        if folded is not None:
            setattr(module, name, make(folded))
        else:
            _replace_trunks(child, make)


def fold_batch_norms(module: nn.Module) -> fx.GraphModule | None:
    """Return a traced copy in eval mode with its batch norms inside the convolutions in front of them.

        W' = W * gamma / sqrt(var + eps),   b' = (b - mean) * gamma / sqrt(var + eps) + beta

    A batch norm stays where something else stands in front of it or also reads the convolution's output. Returns
    None if the module cannot be traced or is not a map from one tensor to one.
    """
    try:
        traced = fx.symbolic_trace(copy.deepcopy(module).eval())
    except _UNTRACEABLE as error:
        _LOG.debug("%s is not traceable: %s", type(module).__name__, error)
        return None
    if sum(node.op == "placeholder" for node in traced.graph.nodes) != 1:
        return None
    modules = dict(traced.named_modules())
    uses: dict[str, int] = {}
    for node in traced.graph.nodes:
        if node.op == "call_module":
            uses[node.target] = uses.get(node.target, 0) + 1
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or not isinstance(modules[node.target], _BatchNorm):
            continue
        before = node.args[0]
        if before.op != "call_module" or not isinstance(modules[before.target], _ConvNd) or len(before.users) > 1:
            continue
        if uses[before.target] > 1 or uses[node.target] > 1 or modules[node.target].running_mean is None:
            continue
        conv, norm = cast(Any, modules[before.target]), cast(Any, modules[node.target])
        traced.set_submodule(before.target, fuse_conv_bn_eval(conv, norm))
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)
    traced.recompile()
    traced.delete_all_unused_submodules()
    return traced
