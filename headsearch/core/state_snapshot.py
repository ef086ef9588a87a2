"""Copies of a training's state, made without waiting for the device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from headsearch.core.memory import memory_checked
from headsearch.errors import TrialFailure


class Snapshot:
    """A copy of a state on the devices where its tensors are, to be brought to the host by another thread."""

    def __init__(self, state: dict[str, Any], ready: dict[torch.device, torch.cuda.Event]) -> None:
        self._state, self._ready = state, ready

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Snapshot | None:
        """Copy `state` as of the work that its devices were given so far; None without memory for it."""
        devices: set[torch.device] = set()

        def clone(tensor: Tensor) -> Tensor:
            devices.add(tensor.device)
            return tensor.detach().clone()

        try:
            with memory_checked():
                copies = with_tensors(dict(state), clone)
        except TrialFailure:
            return None  # the copies made so far are free only now: the error's traceback refers to them
        on_gpus = [device for device in devices if device.type == "cuda"]
        return cls(copies, {each: torch.cuda.current_stream(each).record_event() for each in on_gpus})

    def on_host(self) -> dict[str, Any]:
        """The state on the CPU, tensors of the CPU as they are. Call it once: it gives the copies away."""
        # The clones are queued on the training's stream, between the steps before the save and those after.
        # A copy to the host on that stream would wait for the steps that were queued since, and a new
        # thread's current stream is the default one, which may well be the training's. So the copies have a
        # stream of their own. It waits for the event that follows the clones, and for nothing else.
        # When a clone's last reference goes, the allocator may give its memory to the training's stream at
        # once. That is safe without `record_stream`: `cpu` returns only when its copy is done.
        # Host memory is not pinned: to allocate pinned memory keeps streams from running at the same time.
        state, self._state = self._state, {}
        with ExitStack() as streams:
            for device, ready in self._ready.items():
                side = torch.cuda.Stream(device)
                side.wait_event(ready)
                streams.enter_context(torch.cuda.stream(side))
            found: dict[str, Any] = with_tensors(state, Tensor.cpu)
        return found


def with_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` in new containers of the same kinds, with `change` of each tensor."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        found = copy.copy(value)  # with its attributes: state_dicts have `_metadata`
        found.update({key: with_tensors(entry, change) for key, entry in value.items()})
        return found
    if isinstance(value, (list, tuple)):
        return type(value)(with_tensors(entry, change) for entry in value)
    return value
