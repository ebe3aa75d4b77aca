"""What a step's operators ask of host and GPU, in order: memory/recorder.py notes it, memory/step_time.py prices it.

    work = Work()
    work.start()           # before the update that counts
    ...                    # a recorder notes each operator
    work.micro_batches     # a list of operations for each micro-batch of the update

An operation counts what no card changes: floating-point operations, bytes, launches. Shapes are enough for that, so
tensors may be fake.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.flop_counter import flop_registry


# They look at memory or set it aside, and launch nothing. Their schemas do not say so, as those of views do.
FREE = (
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh",
    "resize_", "set_",
)  # fmt: skip
# Launches of operators that take several (PyTorch's CUDA kernels; bitsandbytes unpacks scales, then the weight).
LAUNCHES = {
    "convolution": 2,
    "embedding_dense_backward": 8,
    "gemm_4bit": 4,
    "index_put": 4,
    "index_put_": 4,
    "masked_scatter": 3,
    "masked_scatter_": 3,
    "nonzero": 4,
    "sort": 4,
    "topk": 2,
    "_scaled_dot_product_flash_attention_backward": 3,
    "_scaled_dot_product_efficient_attention_backward": 3,
}
# Of their first argument they read only what they select.
SELECTING = ("embedding", "gather", "index", "index_select", "_unsafe_index")
# Of their first argument they take the dtype, the device and perhaps the shape.
FILLING = ("new_full", "new_ones", "new_zeros", "full_like", "ones_like", "zeros_like")
# Of their first argument, which they return, they touch only what they write.
WRITING = ("fill_", "zero_", "index_put_", "index_add_", "scatter_", "scatter_add_", "index_copy_", "masked_fill_")
COPYING = ("copy_", "_to_copy")
PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1}  # where the two factors begin
# The size of what they return, or the branch that follows, depends on values: the host must have them.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "equal")
# A GPU computes the norms of all gradients in one operator, and scales them in one; a CPU one by one.
CLIPPING = ("linalg_vector_norm", "mul_")
# DeepSpeed's Adam on the host reads parameter, gradient and two moments, writes all but the gradient, in fp32.
HOST_ADAM_BYTES = 7 * 4


@dataclass(slots=True)
class Operation:
    """One operator, or a wait.

    Args:
        kind: kernel | transfer (between host and device, or processes) | host (computed there) | wait (of the host for
            the device).
        phase: of the update, as in a record.
        is_python: Python code issues it; else autograd's engine, which is written in C++.
        nbytes: read and written; of a transfer, those that it moves.
        product: batch, m, k, n of a matrix product [m, k] @ [k, n].
        views: operators before it that launch nothing.
        modules: modules that were entered before it.
    """

    kind: str
    name: str
    phase: str
    is_python: bool
    nbytes: int = 0
    launches: int = 0
    flops: int = 0
    dtype: torch.dtype = torch.float32
    product: tuple[int, int, int, int] | None = None
    stream: int = 0
    views: int = 0
    modules: int = 0


class Work:
    """The operations of an update, by micro-batch. Before `start` and after `stop` nothing is noted."""

    def __init__(self) -> None:
        self.micro_batches: list[list[Operation]] = []
        self.is_noting = False
        self.phase = ""
        self._is_optimizing = False
        self._views = self._modules = 0
        self._kinds: dict[Any, str] = {}
        self._costs: dict[tuple, tuple[int, tuple[int, int, int, int] | None]] = {}

    def start(self) -> None:
        self.micro_batches, self.is_noting = [], True
        self._views = self._modules = 0

    def stop(self) -> None:
        self.is_noting = False

    def enter_phase(self, phase: str) -> None:
        self.phase = phase
        if self.is_noting and phase == "forward":
            self.micro_batches.append([])

    def enter_module(self) -> None:
        self._modules += 1

    def begin_optimizer(self) -> None:
        """The optimizer's own counters lie in host memory: to read them is no wait."""
        self._is_optimizing = True

    def end_optimizer(self, num_on_host: int = 0) -> None:
        """`num_on_host`: the parameters' elements that the host has updated."""
        self._is_optimizing = False
        if num_on_host:
            self._add(Operation("host", "Adam", self.phase, True, num_on_host * HOST_ADAM_BYTES))

    def wait(self) -> None:
        """The host waits for the device."""
        self._add(Operation("wait", "wait", self.phase, True))

    def note(
        self,
        func: Any,
        args: tuple,
        output: Any,
        inputs: list[torch.Tensor],
        outputs: list[torch.Tensor],
        *,
        is_python: bool,
        stream: int = 0,
        from_host: bool = False,
        to_host: bool = False,
        workspace_bytes: int = 0,
    ) -> None:
        """Note an operator.

        Args:
            output: what it returns.
            inputs, outputs: the tensors among its arguments, and in what it returns.
            from_host, to_host: whether what it reads, and what it returns, lies in host memory.
            workspace_bytes: what it writes and reads besides.
        """
        name = func.overloadpacket.__name__
        if not outputs and name.startswith(("_foreach", "_fused")):
            outputs = written_in_place(name, args)
        kind = self._kinds.get(func)
        if kind is None:
            kind = self._kinds[func] = kind_of(func, name)
        if kind == "view" or (name == "_to_copy" and outputs[0] is inputs[0]):
            self._views += 1
        elif kind == "wait" or (name.startswith("index") and masks(inputs[1:])):
            if self._is_optimizing or from_host:
                self._views += 1
            else:
                self.wait()
        elif kind == "collective":
            if nbytes := sent_bytes(name, inputs, dist.get_world_size()):
                self._add(Operation("transfer", name, self.phase, is_python, nbytes, stream=stream))
        elif name in COPYING and from_host != to_host:
            nbytes = sum(map(size_of, outputs))
            self._add(Operation("transfer", name, self.phase, is_python, nbytes, stream=stream))
            if to_host and not is_non_blocking(args):
                self.wait()
        elif to_host:
            if not self._is_optimizing:  # end_optimizer says what that takes
                self._add(Operation("host", name, self.phase, is_python, num_bytes(name, inputs, outputs)))
        else:
            nbytes = num_bytes(name, inputs, outputs) + 2 * workspace_bytes
            if self.phase == "step" and name in CLIPPING and self._is_last(name):
                self.micro_batches[-1][-1].nbytes += nbytes
                return
            flops, product = self._cost(func, name, args, output, inputs)
            dtype = outputs[0].dtype if outputs else torch.float32
            launches = LAUNCHES.get(name, 1)
            kernel = Operation("kernel", name, self.phase, is_python, nbytes, launches, flops, dtype, product, stream)
            self._add(kernel)

    def _add(self, operation: Operation) -> None:
        if self.is_noting and self.micro_batches:
            operation.views, operation.modules = self._views, self._modules
            self._views = self._modules = 0
            self.micro_batches[-1].append(operation)

    def _is_last(self, name: str) -> bool:
        return bool(self.micro_batches and self.micro_batches[-1]) and self.micro_batches[-1][-1].name == name

    def _cost(
        self, func: Any, name: str, args: tuple, output: Any, inputs: list[torch.Tensor]
    ) -> tuple[int, tuple[int, int, int, int] | None]:
        """Floating-point operations, and a matrix product's sizes. Most operators have neither."""
        if not counts_flops(func):
            return 0, None
        key = (func, is_causal(func, args), *(tensor.shape for tensor in inputs))
        if key not in self._costs:
            self._costs[key] = flops_of(func, args, output), product_of(name, args, inputs)
        return self._costs[key]


def kind_of(func: Any, name: str) -> str:
    """view | wait | collective | kernel"""
    if name in WAITING:
        return "wait"
    if func.namespace == "c10d":
        return "collective"
    aliases = [returned.alias_info for returned in func._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in aliases)
    return "view" if is_view or name in FREE or func.namespace in ("prim", "profiler") else "kernel"


def written_in_place(name: str, args: tuple) -> list[torch.Tensor]:
    """What an optimizer's operator on lists of tensors writes: the first list, or all but the gradients."""
    if name.startswith("_foreach"):
        return args[0]
    lists = [each for each in (args[0], *args[2:]) if isinstance(each, (list, tuple))]
    return [tensor for each in lists for tensor in each]


def masks(tensors: list[torch.Tensor]) -> bool:
    """Whether one of them selects by flags: how much it selects, the host has to ask."""
    return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors)


def is_non_blocking(args: tuple) -> bool:
    """Of copy_(to, from, non_blocking). `.to` to the host waits: it gives its result to whoever reads it."""
    return len(args) > 2 and bool(args[2])


def num_bytes(name: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> int:
    """What an operator reads and writes."""
    read, written = sum(map(size_of, inputs)), sum(map(size_of, outputs))
    if name in SELECTING:
        return 2 * written
    if name in WRITING:
        return 2 * (read - size_of(inputs[0])) or written
    if name == "copy_":
        return read
    if name in FILLING:
        return written
    return read + written


def sent_bytes(name: str, inputs: list[torch.Tensor], world_size: int) -> int:
    """What a process sends in a collective, in a ring: all but its own part of the whole, twice if all get the
    sum of all. Gathering and scattering name the whole and a part of it."""
    whole = sum(map(size_of, inputs))
    if "gather" in name or "scatter" in name:
        whole = whole * world_size // (world_size + 1)
    return (2 if "allreduce" in name else 1) * whole * (world_size - 1) // world_size


def size_of(tensor: torch.Tensor) -> int:
    """The bytes of a tensor's elements, those that it repeats counted once."""
    if 0 in tensor.stride():
        sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
        return math.prod(sizes) * tensor.dtype.itemsize
    return tensor.numel() * tensor.dtype.itemsize


def counts_flops(func: Any) -> bool:
    """Whether an operator is a product, a convolution or attention."""
    return func.overloadpacket in flop_registry or func.overloadpacket.__name__ in OTHER_FLOPS


def flops_of(func: Any, args: tuple, output: Any) -> int:
    """By torch's counter. It counts all pairs of positions; a causal kernel leaves out half."""
    name = func.overloadpacket.__name__
    if name in OTHER_FLOPS:
        return OTHER_FLOPS[name](args)
    if "attention" in name:
        args = with_equal_heads(args)
    elif name in PRODUCTS:
        args = args[: PRODUCTS[name] + 2]  # an overload takes the result's dtype too
    flops = flop_registry[func.overloadpacket](*args, out_val=output)
    return flops // 2 if is_causal(func, args) else flops


def with_equal_heads(args: tuple) -> list[Any]:
    """The tensors' shapes [B, H, T, D] in their place. Heads that share keys compute as much as others; earlier
    versions of torch's counter refuse them."""
    heads = max(tensor.shape[1] for tensor in args[:3])
    return [(x.shape[0], heads, *x.shape[2:]) if isinstance(x, torch.Tensor) and x.dim() == 4 else x for x in args]


def is_causal(func: Any, args: tuple) -> bool:
    for position, argument in enumerate(func._schema.arguments[: len(args)]):
        if argument.name == "is_causal":
            return bool(args[position])
    return False


def product_of(name: str, args: tuple, inputs: list[torch.Tensor]) -> tuple[int, int, int, int] | None:
    if name == "gemm_4bit":
        x, _, (rows, columns), *_ = args
        return 1, x.numel() // columns, columns, rows
    if name not in PRODUCTS:
        return None
    first, second = inputs[PRODUCTS[name]].shape, inputs[PRODUCTS[name] + 1].shape
    return math.prod(first[:-2]), first[-2], first[-1], second[-1]


def _packed_flops(args: tuple) -> int:
    """x [..., k] @ weight^T, of bitsandbytes' gemm_4bit(x, packed, (rows, columns), ...)."""
    x, _, (rows, columns), *_ = args
    return 2 * x.numel() // x.shape[-1] * rows * columns


def _grouped_flops(args: tuple) -> int:
    """Each token [k] times one expert's weight [k, n]."""
    x, weights, *_ = args
    return 2 * x.numel() * weights.shape[-1]


def _product_flops(args: tuple) -> int:
    """Of addmm_, which torch's counter lacks: its first argument is added to."""
    return 2 * args[1].numel() * args[2].shape[-1]


OTHER_FLOPS = {"gemm_4bit": _packed_flops, "_grouped_mm": _grouped_flops, "addmm_": _product_flops}
