"""What the parts of a causal LM are called: one view of them for every naming in use.

Most families use Llama's names. GPT-2, GPT-NeoX, OPT, Falcon and Phi have their own; GPT-2 and OPT
also place tokens by learned embeddings instead of rotating keys. Parts are looked up by name at
every use, so a module that is replaced later (an adapter on the embedding, say) is what runs.
"""

import copy
import inspect
from typing import Any, NamedTuple, cast

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
_SOME = torch.arange(2)  # tokens of any vocabulary


class PlainEmbedding(NamedTuple):
    """An embedding that is a row of a table, times a factor, and a row for the token's position."""

    table: Tensor  # [vocab, hidden]
    factor: float
    positions: Tensor | None  # [positions, hidden], where they are learned


class Unrotated(nn.Module):
    """Stands in for the rotary embedding of a family without one: cos and sin of no width."""

    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Two tensors [batch, time, 0] in the dtype of `hidden`."""
        nothing = hidden.new_empty(*position_ids.shape, 0)
        return nothing, nothing


def check_attention(model: Any) -> None:
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


def hooked(module: Any) -> bool:
    """Whether calling a module does more than its class says: by hooks, or a `forward` of its own.

    What is there when accelerate has taken its hooks away is the class's own once more.
    """
    if module._forward_hooks or module._forward_pre_hooks:
        return True
    contents = vars(module)
    if "forward" not in contents:  # as a rule, and this is asked of every module at every call
        return "_hf_hook" in contents
    own = contents["forward"]
    of_its_class = getattr(own, "__func__", None) is getattr(type(module), "forward", None)
    return "_hf_hook" in contents or not (of_its_class and own.__self__ is module)


def _lacking(model: Any, missing: list[str]) -> ModelError:
    return ModelError(
        f"{type(model).__name__} has no {', '.join(missing)}; adaptive depth needs a causal LM "
        "with embed_tokens, layers, norm, rotary_emb (or what GPT-2, GPT-NeoX, OPT, Falcon and "
        "Phi call them) and an LM head."
    )


class Parts:
    """Embeddings, layers and final norm of a causal LM, whatever they are called."""

    def __init__(self, model: Any):
        """Find the parts of `model`.

        Raises:
            ModelError: one is missing.
        """
        base: Any = model.get_decoder() if hasattr(model, "get_decoder") else None
        names = {
            part: next((name for name in known if hasattr(base, name)), None)
            for part, known in _NAMES.items()
        }
        missing = [part for part, name in names.items() if name is None]
        if missing:
            raise _lacking(model, missing)
        self.base, self._names, self._model = base, cast(dict[str, str], names), model
        self._positions = next((name for name in _LEARNED_POSITIONS if hasattr(base, name)), None)
        # OPT 350M embeds in fewer dimensions, Granite scales; modules look long for what they lack.
        self._project_in = getattr(base, "project_in", None)
        self._embedding_multiplier = getattr(base, "embedding_multiplier", None)
        self.rotary_emb: nn.Module = getattr(base, "rotary_emb", None) or Unrotated()
        known = self._layer_keywords()
        self._cache = next((name for name in _CACHE_KEYWORDS if name in known), _CACHE_KEYWORDS[0])
        self._extra = {"alibi": None} if "alibi" in known else {}
        # Falcon's eager attention adds its mask without asking whether there is one.
        self._always_mask = bool(self._extra) and model.config._attn_implementation == "eager"
        self._instead: dict[int, nn.Module] = {}  # layers that `call` runs, not the model's own

    def with_layer(self, index: int, layer: nn.Module) -> "Parts":
        """The same parts, but `call` runs another layer in place of one."""
        parts = copy.copy(self)
        parts._instead = {**self._instead, index: layer}
        return parts

    def check_layers(self) -> None:
        """Raise `ModelError` if the layers need what `call` does not give them."""
        if self._positions is None and isinstance(self.rotary_emb, Unrotated):
            raise _lacking(self._model, ["rotary_emb"])
        config = self._model.config.get_text_config()
        width = getattr(config, "hidden_size_per_layer_input", 0)
        if width and "per_layer_input" in self._layer_keywords():
            raise ModelError(
                f"{type(self._model).__name__} gives every layer an input of its own "
                "(per_layer_input), so it cannot be run layer by layer. Use the model without "
                "adaptive_gen."
            )

    def _layer_keywords(self) -> Any:
        return inspect.signature(type(self.layers[0]).forward).parameters

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, in order."""
        return getattr(self.base, self._names["layers"])

    @property
    def learned_positions(self) -> bool:
        """Whether `embed` adds a learned embedding of each token's position."""
        return self._positions is not None

    @property
    def plain_embedding(self) -> PlainEmbedding | None:
        """What `embed` comes to, where it is no more than that; else None."""
        if self._project_in is not None:
            return None
        positions = None
        if self._positions is not None:
            positions = self._table_of_positions()
            if positions is None:
                return None
        module = getattr(self.base, self._names["embed_tokens"])
        factor = 1.0 if self._embedding_multiplier is None else float(self._embedding_multiplier)
        if isinstance(module, nn.Embedding) and hasattr(module, "embed_scale"):  # Gemma's
            own = torch.as_tensor(module.embed_scale).to(module.weight.dtype)
            ids = _SOME.to(module.weight.device)
            if not torch.equal(module(ids), nn.functional.embedding(ids, module.weight) * own):
                return None
            factor *= float(own)
        elif type(module) is not nn.Embedding:
            return None
        if hooked(module) or module.max_norm is not None:
            return None
        return PlainEmbedding(module.weight, factor, positions)

    def _table_of_positions(self) -> Tensor | None:
        """A learned embedding of every position, as a view; None where there is more to it."""
        module: Any = getattr(self.base, cast(str, self._positions))
        if not isinstance(module, nn.Embedding) or hooked(module) or module.max_norm is not None:
            return None
        table = module.weight[getattr(module, "offset", 0) :]  # OPT's first belong to no position
        some = _SOME.to(table.device)
        return table if torch.equal(self._placed(some[None])[0], table[: len(some)]) else None

    def embed(self, ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Hidden states before the first layer.

        Args:
            ids: token ids, [batch, time].
            position_ids: [1 or batch, time], from 0; only used with `learned_positions`.

        Returns:
            [batch, time, hidden]
        """
        hidden = getattr(self.base, self._names["embed_tokens"])(ids)
        if self._project_in is not None:
            hidden = self._project_in(hidden)
        if self._embedding_multiplier is not None:
            hidden = hidden * self._embedding_multiplier
        if self._positions is not None:
            hidden = hidden + self._placed(position_ids).to(hidden.device)
        return hidden

    def _placed(self, position_ids: Tensor | None) -> Tensor:
        module = getattr(self.base, cast(str, self._positions))
        if "position_ids" in inspect.signature(type(module).forward).parameters:
            return module(None, position_ids=position_ids)  # OPT's adds an offset of its own
        return module(position_ids)

    @property
    def final_norm(self) -> Any:
        """The module between the last layer and the LM head; OPT 350M has none."""
        return getattr(self.base, self._names["norm"])

    @property
    def project_out(self) -> Any:
        """What OPT 350M has in the final norm's place."""
        return getattr(self.base, "project_out", None)

    @property
    def readout_norm(self) -> nn.Module:
        """What `norm` does, as one module with its parameters."""
        if self.final_norm is not None and self.project_out is None:
            return self.final_norm
        parts = (self.final_norm, self.project_out)
        return nn.Sequential(*(module for module in parts if module is not None))

    def norm(self, hidden: Tensor) -> Tensor:
        """What happens between the last layer and the LM head, to [..., hidden]."""
        if self.final_norm is not None:
            hidden = self.final_norm(hidden)
        if self.project_out is not None:
            hidden = self.project_out(hidden)
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
        if not isinstance(self.rotary_emb, Unrotated):
            keywords["position_embeddings"] = position_embeddings
        layer = self._instead[index] if index in self._instead else self.layers[index]
        out = layer(hidden, **keywords)
        return out[0] if isinstance(out, tuple) else out
