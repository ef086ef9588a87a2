"""CUDA without a GPU: fake tensors that say they are on ``cuda:0``, and a count of what a GPU would be told to do.

Fake tensors (torch's FakeTensorMode) have shapes, types and devices but no values. All of the code runs as it
does on a GPU, down to the ATen calls, which are counted here; whoever reads a value fails. What is not seen:
what autograd's engine adds (it needs a driver, so `backward` walks the graph in its place), how many kernels a call
launches (some batch norms are three), and what cuDNN and cuBLAS choose.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)

SILENT = {
    *("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided", "resize_"),
    *("_unsafe_view", "lift_fresh", "set_", "record_stream"),
    *("device", "is_same_size", "sym_size", "sym_numel", "sym_stride"),
}
"""Calls that launch nothing and are no views: they take memory, or look at shapes."""
READS = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal"),
    *("nonzero", "masked_select", "_unique2", "unique_dim"),
}
"""Calls that need a value, or a size that depends on values: the host waits for the device."""


class Calls(TorchDispatchMode):
    """Within: counts ATen calls on CUDA tensors, by name.

    `launches` are those that launch at least one kernel; `reads` those for which the host waits; `copies` those
    between host and device, which may be both. Reading a number fails, or gives `answer`.
    """

    def __init__(self, answer: float | None = None) -> None:
        super().__init__()
        self.answer = answer
        self.launches: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        given = tensors((args, kwargs))
        on_gpu = any(tensor.device.type == "cuda" for tensor in given)
        # A mask as an index is turned into numbers of rows, of which the host must know how many.
        masked = name.startswith("index") and any(tensor.dtype == torch.bool for tensor in tensors(args[1:2]))
        if on_gpu and (name in READS or masked):
            self.reads[name] += 1
        if on_gpu and name == "_local_scalar_dense" and self.answer is not None:
            return self.answer
        result = func(*args, **(kwargs or {}))
        touched = [*given, *tensors(result)]
        on_gpu = any(tensor.device.type == "cuda" for tensor in touched)
        # A CPU tensor without dimensions is an argument of the launch.
        hosts = [one for one in touched if one.device.type == "cpu" and (one.ndim or name == "_to_copy")]
        if on_gpu and hosts:
            self.copies[name] += 1
        if on_gpu and not func.is_view and name not in SILENT | READS:
            self.launches[name] += 1
        return result

    def waits(self) -> Counter[str]:
        """All for which a step must not wait: reads and copies."""
        return self.reads + self.copies


class Unregistered(TorchDispatchMode):
    """Within: calls that torch has not described for fake tensors. Those below write to their arguments only."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        return None if name in ("_fused_sgd_", "_fused_adamw_") else func(*args, **(kwargs or {}))


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def counted(call: Callable[[], object], answer: float | None = None) -> Calls:
    """What `call` tells the device to do."""
    calls = Calls(answer)
    with calls:
        call()
    return calls


def launches(call: Callable[[], object]) -> Counter[str]:
    """Calls by name that launch a kernel."""
    return counted(call).launches


@contextlib.contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within: new tensors are fake, ``cuda`` is there, autocast works on it, and gradients are computed."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(nn.Module, "_apply", applied)
    monkeypatch.setattr(Tensor, "backward", backward)
    monkeypatch.setattr(torch.autograd, "grad", gradients)
    # A call that torch has not described would be tried on real tensors.
    with FakeTensorMode(allow_fallback_kernels=False), Unregistered():
        yield


def applied(self: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Do what Module.to does, with new parameters: it cannot put fake ones in the place of the old."""
    for child in self.children() if recurse else ():
        child._apply(change)
    for name, weight in self._parameters.items():
        if weight is not None:
            self._parameters[name] = nn.Parameter(change(weight.detach()), weight.requires_grad)
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = change(buffer)
    return self


# Autograd's engine in a few lines


def backward(self: Tensor, gradient: Tensor | None = None) -> None:
    """Do what Tensor.backward does."""
    walk([self], [torch.ones_like(self) if gradient is None else gradient], wanted={})


def gradients(
    outputs: Tensor | Sequence[Tensor],
    inputs: Tensor | Sequence[Tensor],
    grad_outputs: Tensor | Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Do what torch.autograd.grad does."""
    roots, leaves = ([one] if isinstance(one, Tensor) else list(one) for one in (outputs, inputs))
    if grad_outputs is None:
        given = [torch.ones_like(root) for root in roots]
    else:
        given = [grad_outputs] if isinstance(grad_outputs, Tensor) else list(grad_outputs)
    edges = [get_gradient_edge(leaf) for leaf in leaves]
    found = walk(roots, given, wanted={(edge.node, edge.output_nr): None for edge in edges})
    return tuple(found[edge.node, edge.output_nr] for edge in edges)


Edge = tuple[Node, int]


@torch.no_grad()
def walk(roots: list[Tensor], given: list[Tensor], wanted: dict[Edge, Any]) -> dict[Edge, Any]:
    """Send gradients `given` of `roots` down the graph, to the edges `wanted`, or without any to all leaves."""
    begins = [get_gradient_edge(root) for root in roots]
    arrived: dict[Node, list[Tensor | None]] = {}

    def add(edge: Edge, gradient: Tensor) -> None:
        made_of = edge[0]._input_metadata
        slots = arrived.setdefault(edge[0], [None] * len(made_of))
        # What was broadcast or cast on the way up is summed and cast on the way down.
        gradient = gradient.sum_to_size(made_of[edge[1]].shape).to(made_of[edge[1]].dtype)
        before = slots[edge[1]]
        slots[edge[1]] = gradient if before is None else before + gradient

    for edge, gradient in zip(begins, given, strict=True):
        add((edge.node, edge.output_nr), gradient)
    for node in in_order([edge.node for edge in begins]):
        slots = arrived.pop(node, None)
        if slots is None:
            continue
        for place, slot in enumerate(slots):
            if (node, place) in wanted:
                wanted[node, place] = slot
        if node.name().endswith("AccumulateGrad"):
            if not wanted:
                leaf = node.variable
                leaf.grad = slots[0] if leaf.grad is None else leaf.grad + slots[0]
            continue
        call = node.apply if isinstance(node, BackwardCFunction) else node
        results = call(*slots)
        results = results if isinstance(results, tuple) else (results,)
        for (below, place), gradient in zip(node.next_functions, results, strict=False):
            if below is not None and gradient is not None:
                add((below, place), gradient)
    return wanted


def in_order(starts: list[Node]) -> list[Node]:
    """Nodes of the graph, each before those that its gradients go to."""
    done: list[Node] = []
    seen: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(node, False) for node in starts]
    while stack:
        node, left = stack.pop()
        if left:
            done.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((below, False) for below, _ in node.next_functions if below is not None)
    return done[::-1]
