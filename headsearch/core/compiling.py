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
        self._encoder = encoder
        self._compiled = torch.compile(encoder, mode=mode, dynamic=False)

    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, F) of views (B, 3, S, S)."""
        from torch._dynamo.exc import TorchDynamoException

        try:
            features: Tensor = self._compiled(images)
        except TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            logger.warning("training.compile_encoder: not compiled, %s", reason)
            self._compiled = self._encoder
            features = self._encoder(images)
        return features
