"""1 x 1 convolutions with what follows them, in one pass over the memory: bias, residual, ReLU.

Two thirds of a ResNet's convolutions, and with cuDNN and torch.compile as they are, their results are written, read and
written again: in bfloat16 an H100 then waits for its memory (by inductor's own count 143 MB a frame of ResNet-101,
99 with this). A 1 x 1 convolution of channels_last pictures is a matrix product, and its kernel can finish the numbers
before they leave the chip. Written in Triton, which comes with torch's builds for CUDA; where it is not, the same
operation is made of torch's.

What is easy to break: a fused operation runs where its last part stood, so nothing in between may write to its input
or to its residual.
"""

import logging
import operator
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

__all__ = ["Pointwise", "fuse_pointwise", "launch", "make_kernel", "pointwise", "require_right"]

_LOG = logging.getLogger(__name__)

_ADD = {operator.add, operator.iadd, torch.add}
_RELU = {F.relu, torch.relu}
# Rows and columns of a product that one program makes, its depth a step and its warps. With 128 registers a thread and
# no spilling, two such programs share a core of an H100 (ptxas of CUDA 13, sm_90).
_ROWS, _COLUMNS, _DEPTH, _WARPS = 128, 128, 64, 8
_STAGES = 3  # steps under way
_TOLERANCE = 2e-2  # of the largest number; bfloat16 rounds by 4e-3, and TensorFloat-32 as much as 1e-3

Launch = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], Tensor]


@torch.library.custom_op("kinoray::pointwise", mutates_args=())
def pointwise(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """conv2d(x, weight) + bias, + residual, ReLU, rounded once: [F, N, H, W], channels_last.

    x [F, K, H, W], weight [N, K, 1, 1] and bias [N] of one dtype; the residual is of the result's shape.
    """
    launch = _launcher() if x.is_cuda and x.dtype == torch.bfloat16 else None
    return _of_torch(x, weight, bias, residual, relu) if launch is None else launch(x, weight, bias, residual, relu)


@pointwise.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    shape = (x.shape[0], weight.shape[0], *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _of_torch(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    y = F.conv2d(x, weight, bias)
    if residual is not None:
        y = y + residual
    return (y.relu() if relu else y).contiguous(memory_format=torch.channels_last)


@cache
def _launcher() -> Launch | None:
    """The kernel, if this machine has a GPU with matrix units for bfloat16, and it runs there and is right."""
    if torch.cuda.get_device_capability() < (8, 0):
        return None
    try:
        kernel = make_kernel()
        require_right(kernel, "cuda", torch.bfloat16)
    except Exception as error:  # noqa: BLE001  (whatever keeps it from running, torch's operations give the same)
        _LOG.warning("1 x 1 convolutions are not fused: %s: %s", type(error).__name__, error)
        return None
    return lambda x, weight, bias, residual, relu: launch(kernel, x, weight, bias, residual, relu)


def require_right(kernel: Any, device: str, dtype: torch.dtype) -> None:
    """Try the kernel on small pictures. Raises ArithmeticError if it does not give what torch's operations give."""
    generator = torch.Generator().manual_seed(0)
    for columns in (_DEPTH, 2 * _COLUMNS):
        shapes = (2, 2 * _DEPTH, 9, 11), (columns, 2 * _DEPTH, 1, 1), (columns,), (2, columns, 9, 11)
        x, weight, bias, residual = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
        expected = _of_torch(x.float(), weight.float(), bias.float(), residual.float(), True)
        off = float((launch(kernel, x, weight, bias, residual, True).float() - expected).abs().max() / expected.max())
        if not off <= _TOLERANCE:
            raise ArithmeticError(f"its numbers are off by {off:.1e} of the largest")


def make_kernel() -> Any:
    """The kernel as Triton takes it. Raises ImportError where there is no Triton."""
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def product(  # type: ignore[no-untyped-def]
        x,
        weight,
        bias,
        residual,
        y,
        num_rows,
        num_columns,
        depth: tl.constexpr,
        ADD: tl.constexpr,
        RELU: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        DEPTH: tl.constexpr,
    ):
        """y = relu(x [num_rows, depth] @ weight [num_columns, depth]^T + bias + residual), a tile a program."""
        across = num_columns // COLUMNS
        program = tl.program_id(0)
        rows = (program // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        columns = (program % across) * COLUMNS + tl.arange(0, COLUMNS)
        steps = tl.arange(0, DEPTH)
        inside = rows[:, None] < num_rows
        x += rows[:, None] * depth + steps[None, :]
        weight += columns[None, :] * depth + steps[:, None]
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for _ in range(0, depth, DEPTH):
            total = tl.dot(tl.load(x, mask=inside, other=0.0), tl.load(weight), total)
            x += DEPTH
            weight += DEPTH
        total += tl.load(bias + columns)[None, :].to(tl.float32)
        place = rows[:, None] * num_columns + columns[None, :]
        if ADD:
            total += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
        if RELU:
            total = tl.maximum(total, 0.0)
        tl.store(y + place, total.to(y.dtype.element_ty), mask=inside)

    return product


def launch(kernel: Any, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """`pointwise` by the kernel."""
    num_columns, depth = weight.shape[:2]
    columns = _COLUMNS if num_columns % _COLUMNS == 0 else _DEPTH
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.empty(
        (x.shape[0], num_columns, *x.shape[2:]), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    if residual is not None:
        residual = residual.expand(y.shape).contiguous(memory_format=torch.channels_last)
    num_rows = x.numel() // depth
    kernel[(-(-num_rows // _ROWS) * (num_columns // columns),)](
        x,
        weight.contiguous(),
        bias,
        y if residual is None else residual,
        y,
        num_rows,
        num_columns,
        depth,
        ADD=residual is not None,
        RELU=relu,
        ROWS=_ROWS,
        COLUMNS=columns,
        DEPTH=_DEPTH,
        num_warps=_WARPS if columns == _COLUMNS else _WARPS // 2,
        num_stages=min(_STAGES, depth // _DEPTH),
    )
    return y


class Pointwise(nn.Module):
    """A 1 x 1 convolution with what follows it."""

    def __init__(self, conv: nn.Conv2d, *, relu: bool) -> None:
        super().__init__()
        self.weight, self.relu = conv.weight, relu
        zeros = torch.zeros(conv.out_channels, dtype=conv.weight.dtype, device=conv.weight.device)
        self.bias = nn.Parameter(zeros, requires_grad=False) if conv.bias is None else conv.bias

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return [F, N, H, W] for x [F, K, H, W] and, if there is one, a residual of the result's shape."""
        return cast(Tensor, pointwise(x, self.weight, self.bias, residual, self.relu))


def fuse_pointwise(traced: fx.GraphModule) -> int:
    """Put a `Pointwise` for each 1 x 1 convolution with the addition and ReLU that follow it; return how many."""
    modules = dict(traced.named_modules())
    count = 0
    for node in list(traced.graph.nodes):
        conv = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(conv, nn.Conv2d) or not _fits(conv):
            continue
        parts, residual, relu = [node], None, False
        after = _only_user(node)
        if after is not None and _adds(after, node):
            residual = after.args[1] if after.args[0] is node else after.args[0]
            parts.append(after)
            after = _only_user(after)
        if after is not None and _rectifies(after, modules) and (residual is None or after is parts[-1].next):
            parts.append(after)
            relu = True
        source = node.args[0]
        if any(user not in parts for user in source.users) and parts[-1] not in (node, node.next):
            continue  # what else reads its input may also write to it
        count += 1
        name = f"pointwise_{count}"
        modules[name] = Pointwise(conv, relu=relu)
        traced.add_submodule(name, modules[name])
        with traced.graph.inserting_before(parts[-1]):
            arguments = (source,) if residual is None else (source, residual)
            parts[-1].replace_all_uses_with(traced.graph.call_module(name, arguments))
        for part in reversed(parts):
            traced.graph.erase_node(part)
    traced.graph.lint()
    traced.recompile()
    traced.delete_all_unused_submodules()
    return count


def _fits(conv: nn.Conv2d) -> bool:
    plain = conv.kernel_size == conv.stride == (1, 1) and conv.padding in ((0, 0), "valid") and conv.groups == 1
    return plain and conv.in_channels % _DEPTH == 0 and conv.out_channels % _DEPTH == 0


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _adds(node: fx.Node, one: fx.Node) -> bool:
    """Whether it adds another tensor to this one, and no more."""
    others = [x for x in node.args if x is not one]
    if node.kwargs or len(node.args) != 2 or len(others) != 1 or not isinstance(others[0], fx.Node):
        return False
    return node.target in (_ADD if node.op == "call_function" else ("add", "add_"))


def _rectifies(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], nn.ReLU)
    return node.target in (_RELU if node.op == "call_function" else ("relu", "relu_"))
