"""A device apart from the host, on the CPU: tensors with values, of which each read and copy is counted.

`fake_cuda` has no values, so what decides by them, such as L-BFGS, cannot be run there. Here tensors say that they
are on ``meta``, which autograd's engine takes for a device of its own, and hold their values on the CPU. Where the
two meet, as on a GPU, only a scalar of the host is let through.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

REMOTE = torch.device("meta")


class Remote(Tensor):
    """A tensor on the device; `held` are its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Remote:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=REMOTE
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func}: outside of RemoteDevice")


class RemoteDevice(TorchDispatchMode):
    """Within: ``meta`` is the device. Counts `reads` of its numbers, copies from it included, and `writes`."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = self.writes = 0

    def put(self, held: Tensor) -> Tensor:
        """Give values of the host as a tensor of the device; not counted."""
        return Remote(held)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = any(isinstance(tensor, Remote) for tensor in given)
        here = any(not isinstance(tensor, Remote) and tensor.ndim for tensor in given)
        target = kwargs.get("device")
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        result = func(*tree_map(held, args), **tree_map(held, kwargs))
        if name == "_to_copy" and target is not None:
            leaves, arrives = there and target.type == "cpu", not there and target == REMOTE
            self.reads, self.writes = self.reads + leaves, self.writes + arrives
            return Remote(result) if target == REMOTE else result
        if name == "copy_" and there and here:
            self.reads += not isinstance(args[0], Remote)
            self.writes += isinstance(args[0], Remote)
            return args[0]
        if there and here:
            raise RuntimeError(f"{name}: tensors of host and device")
        if not there:
            return Remote(result) if target == REMOTE else result
        if name == "_local_scalar_dense":
            self.reads += 1
            return result
        if func._schema.is_mutable:
            return args[0]
        return tree_map(lambda leaf: Remote(leaf) if isinstance(leaf, Tensor) else leaf, result)


def held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, Remote) else leaf
