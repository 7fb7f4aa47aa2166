"""CUDA graphs of the pretended device: torch.cuda's CUDAGraph, graph and generators, over a record of tensor operations.

    capture   every operation that reaches torch's dispatcher is kept with its inputs and outputs
    replay    the same operations on the same memory, in order; no line of the libraries' Python runs again

So what a GPU would get wrong goes wrong here: a number that Python worked out stays what it was at the capture, a tensor that
was freed since is missing, and what a capture computed is not there before the first replay. What CUDA refuses during a
capture is refused: reading a value on the host, pinning memory, a generator that the graph was not told of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

# PRIVATE: torch 2.13 torch.utils._python_dispatch.TorchDispatchMode
from torch.utils._python_dispatch import TorchDispatchMode

# PRIVATE: torch 2.13 torch.utils._pytree.tree_leaves
# PRIVATE: torch 2.13 torch.utils._pytree.tree_map_only
from torch.utils._pytree import tree_leaves, tree_map_only

# Their result is Python's: CUDA ends a capture at them, since no value is there yet.
HOST_READS = {f"aten::{name}" for name in ("_local_scalar_dense", "_unique2", "equal", "masked_select", "nonzero")}


class CaptureError(RuntimeError):
    """What CUDA does not permit while a stream is being captured."""


class State:
    """A generator's state of its own, as `clone_state` gives one: graphs know it, `graphsafe_set_state` puts it to use.

    The pretended device's generator is the CPU's, so the state in use lies there and all others here.
    """

    in_use: State

    def __init__(self, saved: torch.Tensor) -> None:
        self.saved = saved

    def get_state(self) -> torch.Tensor:
        return torch.get_rng_state() if self is State.in_use else self.saved.clone()

    def set_state(self, state: torch.Tensor) -> None:
        if self is State.in_use:
            torch.set_rng_state(state)
        else:
            self.saved = state.clone()

    def manual_seed(self, seed: int) -> State:
        self.set_state(torch.Generator("cpu").manual_seed(seed).get_state())
        return self

    def use(self) -> None:
        State.in_use.saved = torch.get_rng_state()
        torch.set_rng_state(self.saved)
        State.in_use = self


State.in_use = State(torch.empty(0))
_DEFAULT = State.in_use


class DeviceGenerator:
    """torch.cuda.default_generators[0]: whichever state is in use."""

    device = torch.device("cpu")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.default_generator, name)

    def clone_state(self) -> State:
        return State(torch.get_rng_state())

    def graphsafe_get_state(self) -> State:
        return State.in_use

    def graphsafe_set_state(self, state: State) -> None:
        if (recorder := Recorder.active) is not None:
            if state not in recorder.graph.states:
                raise CaptureError("a generator that the graph was not told of: register_generator_state")
            recorder.graph.calls.append(state.use)
        state.use()


class CUDAGraph:
    """torch.cuda.CUDAGraph: what was recorded, and the memory that belongs to it."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.states: set[State] = {_DEFAULT}
        self.calls: list[Callable[[], Any]] = []

    def register_generator_state(self, state: State) -> None:
        self.states.add(state)

    def replay(self) -> None:
        if not self.calls:
            raise RuntimeError("CUDAGraph.replay: nothing was captured")
        with torch.no_grad():
            for call in self.calls:
                call()

    def reset(self) -> None:
        self.calls.clear()


class graph:
    """torch.cuda.graph: what is called inside is captured, and leaves no trace outside of the graph's own memory."""

    def __init__(self, cuda_graph: CUDAGraph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global") -> None:
        self.recorder, self.stack = Recorder(cuda_graph), ExitStack()

    def __enter__(self) -> None:
        if Recorder.active is not None:
            raise CaptureError("a capture inside of another one")
        self.states = {state: state.get_state() for state in self.recorder.graph.states}
        self.in_use = State.in_use
        self.stack.enter_context(self.recorder)
        Recorder.active = self.recorder

    def __exit__(self, *error: Any) -> None:
        Recorder.active = None
        self.stack.close()
        self.in_use.use()
        for state, value in self.states.items():
            state.set_state(value)
        self.recorder.undo()


class Recorder(TorchDispatchMode):
    """Records operations below autograd, and keeps what they overwrite outside of the graph's memory."""

    active: Recorder | None = None
    paused = False

    def __init__(self, graph: CUDAGraph) -> None:
        super().__init__()
        self.graph = graph
        self.inside: dict[int, torch.UntypedStorage] = {}  # by address: the graph's own memory, which it keeps
        self.before: dict[int, tuple[torch.UntypedStorage, torch.Tensor]] = {}  # by address: what was there outside
        self.computed: list[torch.Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if any(kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ for kind in types):
            return NotImplemented  # a quantized tensor: it calls operations on its parts, which come here
        name = func._schema.name
        if name in HOST_READS or _counts(name, args):
            raise CaptureError(f"{name}: the host reads a tensor while a CUDA graph is captured")
        inputs = list(_tensors((args, kwargs)))
        addresses = {_address(tensor) for tensor in inputs}
        for tensor in _written(func, args, kwargs):
            if (at := _address(tensor)) not in self.inside and at not in self.before:
                storage = tensor.untyped_storage()
                self.before[at] = storage, _bytes(storage).clone()
        references = tree_map_only(torch.Tensor, self._reference, (args, kwargs))
        result = func(*args, **kwargs)
        fresh = []
        for place, tensor in enumerate(_tensors(result)):
            if _address(tensor) not in addresses:
                self.inside[_address(tensor)] = tensor.untyped_storage()
                fresh.append((place, tensor.data))
                self.computed.append(tensor.data)
        if fresh or _writes(func):
            self.graph.calls.append(lambda: _again(func, *references, fresh))
        return result

    def undo(self) -> None:
        """A capture computes nothing: outside all is as it was, and the graph's own numbers are not there yet."""
        for storage, value in self.before.values():
            _bytes(storage).copy_(value)
        for tensor in self.computed:
            if tensor.dtype in (torch.float32, torch.float64):
                tensor.fill_(torch.nan)

    def _reference(self, tensor: torch.Tensor) -> Reference:
        # A number's value travels with the launch
        return Reference(tensor, own=_address(tensor) in self.inside or not tensor.dim())


class Reference:
    """A tensor as an operation of a graph knows it: a place in memory. Only the graph's own memory is kept by the graph."""

    def __init__(self, tensor: torch.Tensor, own: bool) -> None:
        self.tensor = tensor.data if own else None
        if not own:
            self.shape = tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
            self.dtype, self.storage = tensor.dtype, StorageWeakRef(tensor.untyped_storage())

    def __call__(self) -> torch.Tensor:
        if self.tensor is not None:
            return self.tensor
        # PRIVATE: torch 2.13 torch.UntypedStorage._new_with_weak_ptr
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            raise RuntimeError(f"a CUDA graph reads memory that was freed: {self.dtype}, {list(self.shape[1])}")
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.shape)


def _again(func: Any, args: Any, kwargs: Any, fresh: list[tuple[int, torch.Tensor]]) -> None:
    try:
        args, kwargs = tree_map_only(Reference, lambda reference: reference(), (args, kwargs))
    except RuntimeError as error:
        raise RuntimeError(f"{func._schema.name}: {error}") from None
    result = func(*args, **kwargs)
    for work in _works(result):
        work.wait()
    new = list(_tensors(result))
    for place, tensor in fresh:
        tensor.copy_(new[place])


def _counts(name: str, args: tuple[Any, ...]) -> bool:
    """Whether an index by truth values is made one by numbers, which must be counted; setting all of them to one is not."""
    if name not in ("aten::index", "aten::index_put", "aten::index_put_") or not any(
        i.dtype == torch.bool for i in _tensors(args[1])
    ):
        return False
    return name == "aten::index" or args[2].numel() > 1


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata  # PRIVATE: torch 2.13 torch.UntypedStorage._cdata


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    yield from (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def _works(tree: Any) -> Iterator[Any]:
    """Collectives run on; on a GPU the next kernel waits for them."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.ScriptObject) and "Work" in str(leaf._type()):
            yield torch.distributed.Work.unbox(leaf)


def _writes(func: Any) -> bool:
    return func.namespace == "c10d" or func._schema.is_mutable


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    """The inputs that an operation writes to; a collective's schema does not say which."""
    if func.namespace == "c10d":
        yield from _tensors((args, kwargs))
        return
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors(args[place] if place < len(args) else kwargs.get(argument.name))


_WAIT = torch.distributed.Work.wait


def _wait(work: Any, *arguments: Any) -> Any:
    """What gloo copies at the end of a wait is part of the collective, which is recorded as one call and waited for."""
    if Recorder.active is None:
        return _WAIT(work, *arguments)
    Recorder.active.paused = True
    try:
        return _WAIT(work, *arguments)
    finally:
        Recorder.active.paused = False


def stand_ins() -> Iterator[tuple[Any, str, Any]]:
    """Yield (owner, name, what it is meanwhile). torch 2.13, megatron-core 0.15.3, Transformer Engine 2.9."""
    yield torch.cuda, "CUDAGraph", CUDAGraph
    yield torch.cuda, "graph", graph
    yield torch.distributed.Work, "wait", _wait
    yield torch.cuda, "graph_pool_handle", lambda: (0, 0)
    yield torch.cuda, "is_current_stream_capturing", lambda: Recorder.active is not None
