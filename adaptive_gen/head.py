"""The LM head and what its family does to the logits: generation and training share it."""

from typing import Any

import torch
from torch import Tensor, nn

from .errors import ModelError


class Head:
    """Normed hidden states [..., hidden] -> logits [..., vocab], as the model's own forward gives.

    Cohere multiplies the logits, Granite divides them, Gemma 2 caps them softly.
    """

    def __init__(self, model: Any, linear: Any = None):
        """Find the head of a causal LM, or take another `linear` in its place.

        Raises:
            ModelError: it has none.
        """
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if head is None:
            raise ModelError(f"{type(model).__name__} has no LM head; give a causal LM.")
        config = model.config.get_text_config()
        self._model, self._own = model, linear
        self.factor: float | None = getattr(config, "logit_scale", None)
        self.divisor: float | None = getattr(config, "logits_scaling", None)
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)

    @property
    def linear(self) -> Any:
        """The head itself, looked up anew: adapters replace it on a model that is in use."""
        return self._model.get_output_embeddings() if self._own is None else self._own

    @property
    def plain(self) -> bool:
        """Whether the logits are one matrix product, which `F.linear_cross_entropy` fuses."""
        return self.multiplier == 1.0 and self.linear.bias is None and self.softcap is None

    @property
    def multiplier(self) -> float | None:
        """What the logits are before a soft cap, times one linear layer; None if something else."""
        if type(self.linear) is not nn.Linear:
            return None
        factor = 1.0 if self.factor is None else self.factor
        return factor if self.divisor is None else factor / self.divisor

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states that have passed the final norm."""
        logits = self.linear(hidden)
        if self.factor is not None:
            logits = logits * self.factor
        if self.divisor is not None:
            logits = logits / self.divisor
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits
