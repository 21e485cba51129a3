"""Make a trained network faster without changing what it says: for labelling and evaluation.

Works for any network, most for those with convolutions and batch norms. The copy that comes out is for inference only:
it has other parameters than the network it was made of and cannot be trained or saved in its place.
"""

import copy
import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kinoray.config.shared import ClipConfig, InferenceConfig
from kinoray.console import many
from kinoray.errors import ModelError
from kinoray.network import InputSpec
from kinoray.network.build import VideoModel

__all__ = [
    "BF16_TOLERANCE",
    "FP32_TOLERANCE",
    "Compiled",
    "Recording",
    "Repeated",
    "compile_advice",
    "compile_named_parts",
    "compile_pays",
    "fold_batch_norms",
    "prepare_for_inference",
    "prepare_model",
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

_WARM_UPS = 3  # calls before the recording: they compile, choose algorithms and fill caches
Shape = tuple[tuple[str, torch.Size], ...]


def compile_pays(num_frames: int) -> bool:
    """Return whether compiling is worth its start for a process that will run this many frames, streams added."""
    return num_frames >= _PAYS_FROM


def compile_advice(spec: InputSpec, clip: ClipConfig, inference: InferenceConfig, clips_per_worker: int) -> str:
    """One sentence if inference.compile is set where it costs more than it saves, or not set where it pays; else ""."""
    streams = int(spec.rgb) + int(spec.flow_channels > 0)
    frames_per_clip = streams * clip.sample.num_segments * clip.sample.frames_per_segment
    pays = compile_pays(clips_per_worker * frames_per_clip)
    if pays == inference.compile:
        return ""
    if pays:
        return f"with {many(clips_per_worker, 'clip')} a worker --inference.compile would save more time than it takes"
    return f"with {many(clips_per_worker, 'clip')} a worker inference.compile takes longer than it saves"


def prepare_model(model: VideoModel, clip: ClipConfig, inference: InferenceConfig) -> VideoModel:
    """A copy for inference on the model's device, in eval mode: folded batch norms, precision, compiled if asked for.

    The folded copy is compared with the model itself on one seeded clip; a network whose folding changes its logits,
    or fails, keeps its batch norms.

    Raises:
        ModelError: the model cannot be run.
    """
    plain = cast(nn.Module, model).eval()
    has_norms = any(isinstance(part, _BatchNorm) for part in plain.modules())
    prepared = prepare_for_inference(
        plain,
        precision=inference.precision,
        compile=inference.compile,
        fold=not has_norms or _folds(plain, clip),
    )
    return cast(VideoModel, prepared)


def _folds(model: nn.Module, clip: ClipConfig) -> bool:
    """Whether folding its batch norms leaves the logits of a seeded clip as they are; if not, the log says so."""
    device = next(iter(model.parameters()), torch.empty(0)).device
    inputs = _noise(cast(VideoModel, model).input_spec, clip, device)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # its 10 bits would hide what folding changes
        return _folds_exactly(model, inputs)


def _folds_exactly(model: nn.Module, inputs: dict[str, Tensor | None]) -> bool:
    try:
        with torch.inference_mode():
            expected = model(**inputs).float()
    except (RuntimeError, TypeError, ValueError) as error:
        shapes = {name: list(tensor.shape) for name, tensor in inputs.items() if tensor is not None}
        raise ModelError(f"the model failed on a clip {shapes}: {error}") from error
    try:
        with torch.inference_mode():
            found = prepare_for_inference(model)(**inputs).float()
    except Exception as error:  # noqa: BLE001  (it runs unfolded, so what breaks here is the folding)
        _LOG.info("batch norms stay: %s: %s", type(error).__name__, error)
        return False
    off, largest = float((found - expected).abs().max()), float(expected.abs().max())
    folds: bool = off <= FP32_TOLERANCE * max(largest, 1.0)
    if not folds:
        _LOG.warning("batch norms stay: folding them changes a logit by %.1e of %.1e", off, largest)
    return folds


def _noise(spec: InputSpec, clip: ClipConfig, device: torch.device) -> dict[str, Tensor | None]:
    """One video of as few segments as the model accepts, the same numbers everywhere."""
    size = clip.view.crop_px
    shape = (1, spec.num_segments or 1, clip.sample.frames_per_segment)
    generator = torch.Generator().manual_seed(0)
    rgb, flow = (
        torch.randn(*shape, channels, size, size, generator=generator).to(device) if channels else None
        for channels in (3 * spec.rgb, spec.flow_channels)
    )
    return {"rgb": rgb, "flow": flow}


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

    On CUDA `compile` also compiles what the network names in `compile_parts`, runs 1 x 1 convolutions in bf16 with what
    follows them in one pass (kinoray.network.pointwise), and records each call as a CUDA graph for a fixed number of
    clips (kinoray.network.prepare.Repeated): the model must be there already.

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
            from kinoray.network.pointwise import fuse_pointwise  # here: to register its operation takes 0.3 s

            fuse_pointwise(traced)
        return _Trunk(traced, dtype=dtype, keep_dtype=keep_dtype, compile=compile)

    if fold:
        _replace_trunks(prepared, trunk)
    if any(isinstance(part, _Trunk) for part in prepared.modules()):
        if compile and on_cuda:
            compile_named_parts(prepared)
        return Repeated(prepared) if compile and on_cuda else prepared
    if dtype == torch.float32 and not compile:
        return prepared
    whole = _Whole(prepared, dtype=dtype, compile=compile)
    return Repeated(whole) if compile else whole


def compile_named_parts(prepared: nn.Module) -> None:
    """Have compiled, in place, what the network names in `compile_parts`."""
    parts = dict(prepared.named_modules())
    for name in getattr(prepared, "compile_parts", ()):
        if name in parts:  # not there with an option that turns it off
            prepared.set_submodule(name, Compiled(parts[name]))


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


class Compiled(nn.Module):
    """A module that torch.compile takes on its first call, for each shape anew; uncompiled where it cannot."""

    def __init__(self, module: nn.Module, options: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.module = module
        self._compiled: Callable[..., Any] | None = torch.compile(module, dynamic=False, options=options)

    @property
    def is_compiled(self) -> bool:
        """Whether the next call tries it."""
        return self._compiled is not None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module returns."""
        if self._compiled is not None:
            try:
                return self._compiled(*args, **kwargs)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, OSError) as error:  # failed compilations are RuntimeErrors of many names;
                _say("torch.compile", error)  # a real fault comes again, uncompiled
                self._compiled = None
        return self.module(*args, **kwargs)


class Recording:
    """A call as a CUDA graph: its kernels are launched at once, without Python between them.

    What the call caches is read where it lay when it was recorded, so it must stay there. What a replay gives is
    overwritten by the next one.
    """

    def __init__(self, call: Callable[..., Tensor], **inputs: Tensor) -> None:
        device = next(iter(inputs.values())).device
        with torch.inference_mode(False):  # tensors that may be written to in any mode
            self._inputs = {name: torch.empty_like(x) for name, x in inputs.items()}
        self._write(inputs)
        here, aside = torch.cuda.current_stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UPS):
                call(**self._inputs)
        here.wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        # Threads that decode may use the device meanwhile. The outer stream is there for a recording that fails: torch
        # then leaves its own stream in place.
        with torch.cuda.stream(here), torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._output = call(**self._inputs)

    def _write(self, inputs: dict[str, Tensor]) -> None:
        for name, x in inputs.items():
            self._inputs[name].copy_(x)

    def __call__(self, **inputs: Tensor) -> Tensor:
        """The output for inputs of the recorded shapes, until the next call."""
        self._write(inputs)
        self._graph.replay()
        return self._output


class Repeated(nn.Module):
    """A network that always sees full batches: short ones are filled up with zeros, their logits cut off again.

    The size is that of the largest batch so far of clips of a shape. On CUDA a call is recorded for each shape and
    replayed; a network that waits for the host (`.item()`, a choice by a tensor's value) cannot be, and is called.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.input_spec = getattr(model, "input_spec", None)
        self._sizes: dict[Shape, int] = {}
        self._recordings: dict[Shape, Recording | None] = {}

    @torch.no_grad()
    def forward(self, **inputs: Tensor | None) -> Tensor:
        """Return logits [B, C] for inputs [B, ...]; a stream that the network does not look at may be None."""
        present = {name: x for name, x in inputs.items() if x is not None}
        absent = dict.fromkeys(inputs.keys() - present.keys())
        shape = tuple((name, x.shape[1:]) for name, x in present.items())
        count, device = next((len(x), x.device) for x in present.values())
        if count > self._sizes.get(shape, 0):
            self._sizes[shape] = count
            self._recordings.pop(shape, None)
        full = {name: _filled(x, self._sizes[shape]) for name, x in present.items()}
        if device.type == "cuda":
            if shape not in self._recordings:
                self._recordings[shape] = self._record(full, absent)
            if (recording := self._recordings[shape]) is not None:
                return recording(**full).clone()[:count]
        return cast(Tensor, self.model(**full, **absent))[:count]

    def _record(self, inputs: dict[str, Tensor], absent: dict[str, None]) -> Recording | None:
        try:
            return Recording(partial(self.model, **absent), **inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            _say("CUDA graphs", error)
            return None


def _filled(x: Tensor, size: int) -> Tensor:
    missing = size - len(x)
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x


def _say(what: str, error: Exception) -> None:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    _LOG.warning("running without %s: %s: %s", what, type(error).__name__, reason)
