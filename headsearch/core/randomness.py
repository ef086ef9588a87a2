"""Seeds and generators that depend on what they are for, never on what ran before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Derive a 63-bit seed for one purpose, such as ``derive_seed(seed, "shuffle", epoch)``.

    Hashed, so that neighbouring seeds and purposes share no stream.
    """
    text = json.dumps([seed, *purpose])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(device: torch.device, seed: int, *purpose: str | int) -> torch.Generator:
    """Make a generator on `device`, seeded for one purpose."""
    return torch.Generator(device).manual_seed(derive_seed(seed, *purpose))


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


def stream_states(device: torch.device) -> list[torch.Tensor]:
    """States of the global streams that `streams` seeds, uint8 on the CPU."""
    states = [torch.default_generator.get_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def set_stream_states(device: torch.device, states: list[torch.Tensor]) -> None:
    """Take up what `stream_states` told of a device of the same kind."""
    torch.default_generator.set_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
