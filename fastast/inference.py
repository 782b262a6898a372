"""The fastest form of a model for inference on the device that it is on."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastast import linear
from fastast_kernels.backends import forced

KEPT_GRAPHS = 8
REMEMBERED_SHAPES = 64  # of calls that were not captured yet


def optimize(
    model: nn.Module,
    dtype: torch.dtype | Literal["int8"] | None = None,
    graphs: int = KEPT_GRAPHS,
) -> Optimized:
    """Make a (patched) model as fast as it goes on its device, for inference.

    ::

        model = fastast.AST.from_pretrained(...).cuda()
        fastast.patch(model, r=20)
        model = fastast.optimize(model, dtype=torch.bfloat16)
        logits = model(features)
        model.r = 40                      # still works

    On a GPU the whole forward of one shape and schedule becomes one CUDA graph, so that a small
    batch does not wait for Python: the first call of a shape runs as it is, the second is captured,
    later ones are replayed. The graphs read the weights in place: change them in place, or optimize
    again.

    On a CPU linear layers are packed where that is faster, with their GELU, and run without
    autograd: the model can be saved, and optimized again, but not be trained. In bf16 on a CPU with
    AMX they run in a kernel of ours, and a block of :class:`fastast.AST` is one op; else in oneDNN.
    In fp32 the faster of oneDNN and what torch calls is measured, once a process.

    ``"int8"`` (CPU only) rounds the weights of the blocks' linear layers, with one scale an output
    channel, and at every call their inputs, with one scale a row in our kernel, and for all in
    oneDNN's. The rest of the model, and what goes in and out of these layers, is bf16 where the CPU
    multiplies it, else fp32. Compare the accuracy on your data: ``fastast sweep --dtype int8``.

    Args:
        model: any module on one device; it is put into eval mode, into ``dtype`` and on a CPU into
            packed layers, itself.
        dtype: to cast floating-point weights to, or ``"int8"``; None leaves them.
        graphs: CUDA graphs to keep, of the shapes used last. Each keeps the memory of its
            activations, which graphs of one model share.

    Raises:
        TypeError: ``model`` or ``dtype`` is of another kind.
        ValueError: ``graphs`` is less than 1, the model is on several devices, or ``dtype`` is
            ``"int8"`` and the model on a GPU or without blocks, or another while it is int8.
        RuntimeError: torch has no int8 products here.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, Optimized):
        model = model.module
    floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    if not (dtype is None or dtype == "int8" or floating):
        wrong = ValueError if isinstance(dtype, str) else TypeError
        raise wrong(f'dtype must be a floating torch.dtype, "int8" or None, got {dtype!r}')
    if graphs < 1:
        raise ValueError(f"graphs must be 1 or more, got {graphs}")
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"model must be on one device, got {names}")
    on_cpu = devices == {torch.device("cpu")}
    if dtype == "int8":
        if not on_cpu:
            where = ", ".join(map(str, devices)) or "no device"
            raise ValueError(f'dtype "int8" is for a model on the CPU so far, got one on {where}')
    elif dtype is not None and linear.is_int8(model):
        raise ValueError(
            f'dtype must be "int8" or None for a model that is int8 already, got {dtype}'
        )
    model.eval()
    if on_cpu:
        linear.unpack(model)  # of an earlier call
    if dtype == "int8":
        dtype = linear.fastest_dtype()
        linear.round_to_int8(model, dtype)  # from the weights as they were
    if dtype is not None:
        model.to(dtype)
    if on_cpu:
        linear.pack(model)
    return Optimized(model, graphs)


class Optimized(nn.Module):
    """What :func:`optimize` returns: called like the model, and its attributes are the model's.

    Attributes:
        module: the model itself.
    """

    def __init__(self, module: nn.Module, graphs: int) -> None:
        super().__init__()
        self.module = module
        self.training = False
        self._kept = graphs
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self._graphs: OrderedDict[Hashable, Graph] = OrderedDict()
        self._pool: Any = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:  # of copies too: graphs are not copied
        return Optimized, (self.module, self._kept)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, without autograd; results are the caller's to keep."""
        leaves, structure = pytree.tree_flatten((args, kwargs))
        if not _capturable(leaves):
            return self.module(*args, **kwargs)
        # A graph outlives the inference mode that it may be captured in, whose tensors may not be
        # written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            return self._replayed(leaves, structure)

    def _replayed(self, leaves: list[Any], structure: Any) -> Any:
        key = (structure, *map(_key, leaves), *self._settings())
        with self._lock:
            if key in self._graphs:
                self._graphs.move_to_end(key)
            elif key in self._seen:
                del self._seen[key]
                while len(self._graphs) >= self._kept:
                    self._graphs.popitem(last=False)
                self._graphs[key] = Graph(self.module, leaves, structure, self._shared())
            else:
                # Seen once, as the last batch of a data set often is, a shape is not worth a
                # capture. This call also compiles what the capture may not.
                self._seen[key] = None
                if len(self._seen) > REMEMBERED_SHAPES:
                    self._seen.popitem(last=False)
                args, kwargs = pytree.tree_unflatten(leaves, structure)
                return self.module(*args, **kwargs)
            return self._graphs[key](leaves)

    def _settings(self) -> tuple[Hashable, ...]:
        """What a forward depends on beside its arguments."""
        tome = getattr(self.module, "tome", None)
        return (
            repr(getattr(self.module, "r", None)),
            repr(tome),
            torch.is_autocast_enabled("cuda"),
            torch.get_autocast_dtype("cuda"),
            self.module.training,
            forced(),
        )

    def _shared(self) -> Any:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool

    def train(self, mode: bool = True) -> Optimized:
        """Only ``train(False)``: an optimized model is for inference.

        Raises:
            RuntimeError: ``mode`` is true.
        """
        if mode:
            raise RuntimeError(
                "an optimized model is for inference only; train the model itself, its .module"
            )
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "r":  # the one setting of a patched model that is meant to change
            setattr(self.module, name, value)
        else:
            super().__setattr__(name, value)


class Graph:
    """One forward as a CUDA graph, with its own copy of the tensors that it reads and writes.

    Args:
        module: what to capture.
        leaves: arguments of the forward, flattened.
        structure: and how they belong together.
        pool: of the memory that graphs share.
    """

    def __init__(self, module: nn.Module, leaves: list[Any], structure: Any, pool: Any) -> None:
        self.inputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(self.inputs, structure)
        self.module = module

        def call() -> tuple[Any, Any]:
            result = module(*args, **kwargs)
            return result, getattr(getattr(module, "tome", None), "source", None)

        self.replay, (result, self.source) = captured(call, pool=pool)
        self.outputs, self.structure = pytree.tree_flatten(result)

    def __call__(self, leaves: list[Any]) -> Any:
        """The forward of other arguments of the same shapes."""
        for own, given in zip(self.inputs, leaves, strict=True):
            if isinstance(own, Tensor):
                own.copy_(given)
        self.replay()
        # The next replay writes into the same memory.
        if self.source is not None:
            cast(Any, self.module).tome.source = self.source.clone()
        outputs = [t.clone() if isinstance(t, Tensor) else t for t in self.outputs]
        return pytree.tree_unflatten(outputs, self.structure)


def captured(
    function: Callable[[], Any], warm_up: int = 2, pool: Any = None
) -> tuple[Callable[[], None], Any]:
    """Capture a call as a CUDA graph.

    Args:
        function: the call; it must not synchronise.
        warm_up: times it is called before, on another stream, so that whatever happens once is
            not part of it.
        pool: of memory, from ``torch.cuda.graph_pool_handle``, that several graphs share.

    Returns:
        The graph's replay, and the call's result, which every replay writes anew.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = function()
    return graph.replay, result


def _capturable(leaves: list[Any]) -> bool:
    """Whether the arguments are tensors of one GPU, outside a capture and a compilation."""
    if torch.compiler.is_compiling():
        return False
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    devices = {t.device for t in tensors}
    if len(devices) != 1 or not tensors[0].is_cuda:
        return False
    return not torch.cuda.is_current_stream_capturing()


def _key(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device, leaf.stride()
    return repr(leaf)
