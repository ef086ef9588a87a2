"""Seeds and generators that depend on what they are for, never on what ran before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Derive a 63-bit seed for one purpose, such as ``derive_seed(seed, "shuffle", epoch)``.

    Hashed, so that neighbouring seeds and purposes share no stream.
    """
    text = json.dumps([seed, *purpose])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(device: torch.device, seed: int, *purpose: str | int) -> torch.Generator:
    """Make a generator on `device`, seeded for one purpose."""
    return torch.Generator(device).manual_seed(derive_seed(seed, *purpose))


class Philox:
    """A stream of random numbers whose state is on a GPU, where kernels read it.

    Batch number n of a seed has its own numbers, which depend on nothing else (Philox4x32-10, Salmon et al.
    2011), so the state is the seed and the number of the next batch. The host only tells the device to count
    on: nothing waits, and the replays of a CUDA graph go through the batches one after the other.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.at = torch.zeros(2, dtype=torch.int64, device=device)
        """Seed and number of the next batch, int64 (2,). Always the same memory, which a graph may hold."""
        self.at[:1].fill_(seed)
        self._batch = self.at[1:]

    def advance(self) -> None:
        """Go on to the next batch, on the device."""
        self._batch.add_(1)

    def get_state(self) -> Tensor:
        """Copy the state to the CPU, int64 (2,). Waits for the device."""
        return self.at.cpu().clone()

    def set_state(self, state: Tensor) -> None:
        """Go on from what `get_state` told. Raises ValueError if `state` is not of this kind."""
        if state.shape != self.at.shape or state.dtype != self.at.dtype:
            raise ValueError(
                f"state of a Philox: {state.dtype} {tuple(state.shape)}, expected torch.int64 (2,)"
            )
        self.at.copy_(state)


@contextmanager
def initialisation(seed: int, *purpose: str | int) -> Iterator[None]:
    """Within: CPU modules draw their weights from `seed`. The caller's stream goes on untouched."""
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed, which would reseed accelerators too
        torch.default_generator.manual_seed(derive_seed(seed, *purpose))
        yield


@contextmanager
def streams(device: torch.device, seed: int, *purpose: str | int) -> Iterator[None]:
    """Within: modules that draw from the global streams, such as dropout, draw from `seed`."""
    accelerators = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=accelerators):
        torch.default_generator.manual_seed(derive_seed(seed, *purpose))
        if accelerators:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(derive_seed(seed, *purpose))
        yield


def stream_states(device: torch.device) -> list[Tensor]:
    """States of the global streams that `streams` seeds, uint8 on the CPU."""
    states = [torch.default_generator.get_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def set_stream_states(device: torch.device, states: list[Tensor]) -> None:
    """Take up what `stream_states` told of a device of the same kind."""
    torch.default_generator.set_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
