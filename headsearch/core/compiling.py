"""torch.compile of an encoder's training passes, where it is asked for and can be had."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


class CompiledEncoder:
    """Calls the compiled encoder; the encoder itself from the moment that compiling it fails.

    A machine without a C++ compiler, or with a GPU that Triton does not know, trains as it would without the
    option, and says so once. Weights and buffers are the encoder's own. The passes of reports and probes have
    batches of other sizes, and would be compiled anew for each: they use the encoder.

    Whether it pays is for `headsearch bench --compile` to say, once per machine. A trial that timed both and
    took the faster would not be the same, to the bit, when it is resumed or trained again: the compiled
    encoder rounds otherwise.
    """

    def __init__(self, encoder: nn.Module, mode: str) -> None:
        import torch._dynamo

        # torch keeps what it compiled for earlier trials: memory would grow with each trial, and after eight
        # variants nothing more would be compiled.
        torch._dynamo.reset()
        self._encoder = encoder
        self._compiled = torch.compile(encoder, mode=mode, dynamic=False)
        self._tried = False

    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, F) of views (B, 3, S, S)."""
        if not self._tried:
            self._tried = True
            self._try(images)
        features: Tensor = self._compiled(images)
        return features

    def _try(self, images: Tensor) -> None:
        """Compile both passes, the backward one too, which is otherwise compiled where nobody looks after it.

        Leaves gradients and batch statistics as they are.
        """
        from torch._dynamo.exc import TorchDynamoException

        buffers = {name: value.clone() for name, value in self._encoder.named_buffers()}
        weights = [weight for weight in self._encoder.parameters() if weight.requires_grad]
        try:
            features = self._compiled(images)
            if features.requires_grad:
                torch.autograd.grad(features, weights, torch.zeros_like(features), allow_unused=True)
        except TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            logger.warning("training.compile_encoder: not compiled, %s", reason)
            self._compiled = self._encoder
        finally:
            with torch.no_grad():
                for name, value in self._encoder.named_buffers():
                    value.copy_(buffers[name])
