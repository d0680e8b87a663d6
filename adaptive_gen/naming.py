"""What the parts of a causal LM are called: one view of them for every naming in use.

Most families use Llama's names. GPT-2, GPT-NeoX, OPT, Falcon and Phi have their own, and the first
three place tokens by learned embeddings or call the cache otherwise. Parts are looked up by name at
every use, so a module that is replaced later (an adapter on the LM head, say) is the one that runs.
"""

import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn

from .engine.positions import FULL, SLIDING
from .errors import ModelError

# Llama's name first: it is the one that messages use.
_NAMES = {
    "embed_tokens": ("embed_tokens", "wte", "embed_in", "word_embeddings"),
    "layers": ("layers", "h"),
    "norm": ("norm", "ln_f", "final_layer_norm", "final_layernorm"),
}
_LEARNED_POSITIONS = ("wpe", "embed_positions")
_CACHE_KEYWORDS = ("past_key_values", "layer_past")


class Unrotated(nn.Module):
    """Stands in for the rotary embedding of a family without one: cos and sin of no width."""

    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Two tensors [batch, time, 0] in the dtype of `hidden`."""
        nothing = hidden.new_empty(*position_ids.shape, 0)
        return nothing, nothing


def _check_attention(model: Any) -> None:
    """Raise `ModelError` for attention that hidden states, masks and K/V alone do not determine."""
    config = model.config.get_text_config()
    unknown = set(getattr(config, "layer_types", None) or ()) - {FULL, SLIDING}
    if unknown:
        raise ModelError(
            f"{type(model).__name__} has attention of type {', '.join(sorted(unknown))}, which "
            f"cannot be run layer by layer; {FULL} and {SLIDING} can. Use the model without "
            "adaptive_gen."
        )
    if getattr(config, "alibi", False):
        raise ModelError(
            f"{type(model).__name__} places tokens by ALiBi (config.alibi=True), which cannot be "
            "run layer by layer; rotary and learned positions can. Use the model without "
            "adaptive_gen."
        )


class Parts:
    """Embeddings, layers and final norm of a causal LM, whatever they are called."""

    def __init__(self, model: Any):
        """Find the parts of `model`.

        Raises:
            ModelError: one is missing, or its layers need what is not known here.
        """
        base: Any = model.get_decoder() if hasattr(model, "get_decoder") else None
        _check_attention(model)
        names = {
            part: next((name for name in known if hasattr(base, name)), None)
            for part, known in _NAMES.items()
        }
        missing = [part for part, name in names.items() if name is None]
        self._positions = next((name for name in _LEARNED_POSITIONS if hasattr(base, name)), None)
        if self._positions is None and not hasattr(base, "rotary_emb"):
            missing.append("rotary_emb")
        if missing:
            raise ModelError(
                f"{type(model).__name__} has no {', '.join(missing)}; adaptive depth needs a "
                "causal LM with embed_tokens, layers, norm, rotary_emb (or what GPT-2, GPT-NeoX, "
                "OPT, Falcon and Phi call them) and an LM head."
            )
        self.base, self._names = base, cast(dict[str, str], names)
        self.rotary_emb: nn.Module = getattr(base, "rotary_emb", None) or Unrotated()
        self._rotated = hasattr(base, "rotary_emb")
        known = inspect.signature(type(self.layers[0]).forward).parameters
        width = getattr(model.config.get_text_config(), "hidden_size_per_layer_input", 0)
        if "per_layer_input" in known and width:
            raise ModelError(
                f"{type(model).__name__} gives every layer an input of its own (per_layer_input), "
                "so it cannot be run layer by layer. Use the model without adaptive_gen."
            )
        self._cache = next((name for name in _CACHE_KEYWORDS if name in known), _CACHE_KEYWORDS[0])
        self._extra = {"alibi": None} if "alibi" in known else {}
        # Falcon's eager attention adds its mask without asking whether there is one.
        self._always_mask = bool(self._extra) and model.config._attn_implementation == "eager"

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, in order."""
        return getattr(self.base, self._names["layers"])

    @property
    def learned_positions(self) -> bool:
        """Whether `embed` adds a learned embedding of each token's position."""
        return self._positions is not None

    def embed(self, ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Hidden states before the first layer.

        Args:
            ids: token ids, [batch, time].
            position_ids: [1 or batch, time], from 0; only used with `learned_positions`.

        Returns:
            [batch, time, hidden]
        """
        base = self.base
        hidden = getattr(base, self._names["embed_tokens"])(ids)
        if getattr(base, "project_in", None) is not None:  # OPT 350M embeds in fewer dimensions
            hidden = base.project_in(hidden)
        if getattr(base, "embedding_multiplier", None) is not None:  # Granite
            hidden = hidden * base.embedding_multiplier
        if self._positions is not None:
            hidden = hidden + self._placed(position_ids).to(hidden.device)
        return hidden

    def _placed(self, position_ids: Tensor | None) -> Tensor:
        module = getattr(self.base, cast(str, self._positions))
        if "position_ids" in inspect.signature(type(module).forward).parameters:
            return module(None, position_ids=position_ids)  # OPT's adds an offset of its own
        return module(position_ids)

    def norm(self, hidden: Tensor) -> Tensor:
        """What happens between the last layer and the LM head, to [..., hidden]."""
        norm = getattr(self.base, self._names["norm"])
        if norm is not None:  # OPT 350M has none
            hidden = norm(hidden)
        if getattr(self.base, "project_out", None) is not None:
            hidden = self.base.project_out(hidden)
        return hidden

    def call(
        self,
        index: int,
        hidden: Tensor,
        mask: Tensor | None,
        position_ids: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        cache: Any,
    ) -> Tensor:
        """Run layer `index` on a block [batch, time, hidden], under the keywords it knows."""
        if mask is None and self._always_mask:
            mask = torch.zeros((), dtype=hidden.dtype, device=hidden.device)
        keywords = {
            "attention_mask": mask,
            "position_ids": position_ids,
            self._cache: cache,
            "use_cache": True,
            **self._extra,
        }
        if self._rotated:
            keywords["position_embeddings"] = position_embeddings
        out = self.layers[index](hidden, **keywords)
        return out[0] if isinstance(out, tuple) else out
