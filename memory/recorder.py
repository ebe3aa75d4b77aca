"""Record every allocation and free of the code inside: `with Recorder(model) as recorder: ...`.

Works on real and on fake tensors. It counts untyped storages, each once however many tensors view it, from the
operator that made it until the last reference is gone.
"""

import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch._prims_common import is_non_overlapping_and_dense_or_false
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from memory.known import ItemAnswers
from memory.partly_fake import tensors_in
from memory.record import PHASES, Allocation, Record, TraceError
from memory.work import Work
from models.fsdp2 import own_part


aten = torch.ops.aten
# What autograd computes in place of its first argument, except for fake tensors, as for all subclasses: sums of
# gradients (torch/csrc/autograd/input_buffer.cpp), and what is selected back into zeros (FunctionsManual.cpp).
IN_PLACE_OF_REAL = (
    aten.add.Tensor, aten.index_add.default, aten.index_put.default, aten.scatter.src, aten.scatter_add.default,
)  # fmt: skip
# Bytes that a kernel allocates besides its outputs and frees before it returns, given its arguments.
Workspace = Callable[[tuple], int]


class ModuleTracker:
    """Which module is at work: the innermost running forward, or in the backward pass the module whose forward made
    the autograd node that runs.

    Autograd numbers its nodes in the order of their creation, so the number at each change of module is enough to
    find a node's module again, and nothing has to be attached to the graph.
    """

    def __init__(self, model: nn.Module, on_enter: Callable[[], None]) -> None:
        self.on_enter = on_enter  # called for each module whose forward begins
        self.paths = {module: path for path, module in model.named_modules()}
        self.running: list[nn.Module] = []
        self.first_nodes: list[int] = [0]
        self.node_paths: list[str] = [""]
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "ModuleTracker":
        self._handles = [
            register_module_forward_pre_hook(self._enter_module),
            # Checkpointing leaves the recomputation by an exception as soon as it has what it needs.
            register_module_forward_hook(self._leave_module, always_call=True),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def current(self) -> tuple[str, bool]:
        """The module's path, and whether its forward runs (rather than its backward)."""
        if self.running:
            return self.paths[self.running[-1]], True
        node = torch._C._current_autograd_node()
        if node is None:
            return "", True
        return self.node_paths[bisect_right(self.first_nodes, node._sequence_nr()) - 1], False

    def _enter_module(self, module: nn.Module, args: tuple) -> None:
        if module in self.paths:
            self.running.append(module)
            self._mark_nodes()
            self.on_enter()

    def _leave_module(self, module: nn.Module, args: tuple, output: object) -> None:
        if module in self.running:
            del self.running[self.running.index(module) :]
            self._mark_nodes()

    def _mark_nodes(self) -> None:
        self.first_nodes.append(torch.autograd._get_sequence_nr())
        self.node_paths.append(self.current()[0])  # inside a backward function, that function's module


class Recorder(TorchDispatchMode):
    """A context that records what operators allocate and free.

    Args:
        workspaces: what kernels allocate besides, by operator.
        block_bytes: the device's allocator rounds each request up to a multiple of it.
    """

    def __init__(self, model: nn.Module, workspaces: dict[str, Workspace] | None = None, block_bytes: int = 1) -> None:
        super().__init__()
        self.record = Record()
        self.workspaces = workspaces or {}
        self.block_bytes = block_bytes
        self.work = Work()
        self.modules = ModuleTracker(model, self.work.enter_module)
        self.phase = PHASES[0]
        self.answers_items = False
        self.items = ItemAnswers()
        self.stream = 0  # the current one, where there are several
        self._live: dict[int, Allocation] = {}  # by the address of the storage
        self._references: dict[int, weakref.ref] = {}
        self._addend = self._sum = 0

    def __enter__(self) -> "Recorder":
        self.modules.__enter__()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.modules.__exit__(*error)
        self._references.clear()  # what is freed from now on does not belong to the record

    def __torch_dispatch__(self, func: Any, types: Iterable, args: tuple = (), kwargs: dict | None = None) -> Any:
        if DTensor in types:
            return NotImplemented  # its operators on the local parts come here, too
        if func is torch.ops.prim.device.default:  # only fake tensors are asked, and often
            return args[0].fake_device
        kwargs = kwargs or {}
        self._addend = self._sum = 0
        is_item = func is aten._local_scalar_dense.default
        if is_item and self.answers_items and isinstance(args[0], FakeTensor):
            self._note_work(func, args, None, [])
            return self.items.answer(args[0])
        try:
            output = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            path = self.modules.current()[0] or "the training step"
            raise TraceError(f"{func} in {path} depends on the data: its memory cannot be predicted") from error
        outputs = tensors_in((output,))
        for tensor in outputs:
            self.allocated(tensor, str(func))
        if func in IN_PLACE_OF_REAL and not self._makes_graph():
            self._watch_sum(args[0], output)
        workspace = self.workspaces.get(func.overloadpacket.__name__)
        given = (*args, kwargs["out"]) if "out" in kwargs else args
        nbytes = 0
        if workspace is not None and (nbytes := workspace(given)):
            self._end(self.reserve(nbytes, str(func)))
        if self.work.is_noting:
            self._note_work(func, args, output, outputs, nbytes)
        return output

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in PartlyFakeMode

    def allocated(self, tensor: torch.Tensor, op: str) -> Allocation:
        """The allocation behind a tensor; a new one when its storage was not known yet."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        nbytes = -(-storage.nbytes() // self.block_bytes) * self.block_bytes
        if key in self._live and self._live[key].nbytes != nbytes:  # resized in place
            self._freed(key)
        if key not in self._live:
            self._live[key] = self._begin(nbytes, tuple(tensor.shape), str(tensor.dtype), op)
            self._references[key] = weakref.ref(storage, lambda _: self._freed(key))
        return self._live[key]

    def reserve(self, nbytes: int, op: str) -> Allocation:
        """Bytes that no tensor holds. They stay until the end, or until `_end`."""
        return self._begin(nbytes, (nbytes,), "uint8", op)

    def find(self, tensor: torch.Tensor) -> Allocation | None:
        return self._live.get(own_part(tensor).untyped_storage()._cdata)

    def set_category(self, category: str, values: Iterable[object]) -> None:
        """Of those values that are tensors in memory."""
        for value in values:
            if isinstance(value, torch.Tensor) and (allocation := self.find(value)):
                allocation.category = category

    def mark_state(self, optimizer: torch.optim.Optimizer) -> None:
        self.set_category("optimizer", (value for state in optimizer.state.values() for value in state.values()))

    def in_host_memory(self, tensor: torch.Tensor) -> bool:
        """Rather than in the device's. Here there is one memory."""
        return False

    def is_in_model(self) -> bool:
        """Whether a module's forward runs."""
        return bool(self.modules.running)

    def enter_phase(self, phase: str) -> None:
        self.phase = phase
        self.work.enter_phase(phase)
        self.answers_items = phase == "evaluate"  # generation asks after every token which answers have ended
        self.record.phase_starts.append((len(self.record.events), phase))

    def _note_work(
        self, func: Any, args: tuple, output: Any, outputs: list[torch.Tensor], workspace_bytes: int = 0
    ) -> None:
        inputs = tensors_in(args)
        from_host = bool(inputs) and self.in_host_memory(inputs[-1])
        self.work.note(
            func,
            args,
            output,
            inputs,
            outputs,
            is_python=self._makes_graph(),
            stream=self.stream,
            from_host=from_host,
            to_host=self.in_host_memory(outputs[0]) if outputs else from_host,
            workspace_bytes=workspace_bytes,
        )

    def _begin(self, nbytes: int, shape: tuple[int, ...], dtype: str, op: str) -> Allocation:
        path, is_forward = self.modules.current()
        events = self.record.events
        allocation = Allocation(nbytes, shape, dtype.removeprefix("torch."), op, path, self.phase, len(events))
        allocation.made_in_forward, allocation.stream = is_forward, self.stream
        events.append((nbytes, allocation))
        return allocation

    def _end(self, allocation: Allocation) -> None:
        allocation.end = len(self.record.events)
        allocation.saved_for_backward = allocation.made_in_forward and not self._makes_graph()
        self.record.events.append((-allocation.nbytes, allocation))

    def _freed(self, key: int) -> None:
        self._references.pop(key, None)
        allocation = self._live.pop(key, None)
        if allocation is not None and not self._becomes_sum(key, allocation):
            self._end(allocation)

    def _makes_graph(self) -> bool:
        """Whether a forward pass runs or is run again, maybe without the layer's hooks; else autograd runs."""
        return self.phase != "backward" or bool(self.modules.running) or torch.is_grad_enabled()

    def _watch_sum(self, addend: torch.Tensor, total: torch.Tensor) -> None:
        """Autograd adds in place if nothing else holds the addend (a view is held by its base). A fake addend is freed
        as soon as the sum exists."""
        same_form = addend.shape == total.shape and addend.dtype == total.dtype and not addend._is_view()
        if isinstance(addend, FakeTensor) and same_form and is_non_overlapping_and_dense_or_false(addend):
            self._addend, self._sum = addend.untyped_storage()._cdata, total.untyped_storage()._cdata

    def _becomes_sum(self, key: int, addend: Allocation) -> bool:
        """Whether what was freed is such an addend. Its allocation then becomes the sum's."""
        if self._addend != key or self._sum not in self._live:
            return False
        total = self._live[self._sum]
        self.record.events[total.start] = (0, total)  # as if it had never been made
        total.nbytes, total.end = 0, total.start
        self._live[self._sum] = addend
        return True
