"""Where the tokens of a block stand: rotary embeddings and attention masks.

A block is, for each row, `time` consecutive positions from the row's own start on, attending to
every position of the row below them and causally to each other. Families differ in which layers
look through a sliding window and in whether the rotary embedding depends on the layer's type; both
are read off the model here.
"""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import OptionError
from .cache import Span

FULL, SLIDING = "full_attention", "sliding_attention"
# Rotary embeddings of these types do not depend on the length of the text, so a table serves.
_STATIC_ROPE = {"default", "linear", "llama3", "yarn"}


class Block(NamedTuple):
    """What every layer needs besides hidden states; dictionaries are keyed by layer type."""

    position_ids: Tensor  # [rows, time], or [1, time] where all rows have the same
    embeddings: dict[str, tuple[Tensor, Tensor]]  # cos, sin: [rows or 1, time, head_dim] each
    masks: dict[str, Tensor | None]  # [rows or 1, 1, time, keys]; None where causality is implied


class Positions:
    """Builds a `Block` for any run of positions of one model."""

    def __init__(self, base_model: Any, config: Any, n_layers: int):
        """Read layer types, window and rotary embedding off a decoder.

        Args:
            base_model: the decoder without its head.
            config: its text configuration.
            n_layers: decoder layers.
        """
        self._config = config
        self._rotary = base_model.rotary_emb
        self.rotary_by_type = "layer_type" in inspect.signature(self._rotary.forward).parameters
        self.window: int | None = getattr(config, "sliding_window", None)
        listed = getattr(config, "layer_types", None)
        default = FULL if self.window is None else SLIDING
        self.layer_types: list[str] = list(listed) if listed else [default] * n_layers
        self.types = sorted(set(self.layer_types))
        rope = getattr(self._rotary, "rope_type", "default")
        rope_types = set(rope.values()) if isinstance(rope, dict) else {rope}
        # Whether one table of rotary embeddings serves texts of any length.
        self.tabled = rope_types <= _STATIC_ROPE
        self._tables: dict[Any, Block] = {}  # by dtype and device

    def block(self, hidden: Tensor, where: Span | int) -> Block:
        """Positions, rotary embeddings and masks for a block.

        Args:
            hidden: [rows, time, hidden]; its dtype and device decide those of the result.
            where: the block's place, or the position at which all its rows start.
        """
        if isinstance(where, int):
            where = Span((where,), (hidden.shape[1],))
        if not self.tabled:
            ids = where.positions(hidden.device)
            embeddings = self.embeddings(hidden, ids)
        else:
            table = self._grown_table(hidden, where.stop)
            if where.even:
                ids, embeddings = _cut(table, where.starts[0], where.stop)
            else:
                ids = where.positions(hidden.device)
                embeddings = {k: (c[0, ids], s[0, ids]) for k, (c, s) in table.embeddings.items()}
        attention = self._config._attn_implementation
        masks = {kind: self._mask(kind, attention, hidden, where, ids) for kind in self.types}
        return Block(ids, embeddings, masks)

    def masks(self, hidden: Tensor, where: Span) -> dict[str, Tensor | None]:
        """Which keys a block's tokens see, by layer type: as `Block` has it, true where they do."""
        ids = where.positions(hidden.device)
        return {kind: self._mask(kind, "sdpa", hidden, where, ids) for kind in self.types}

    def table(self, hidden: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Rotary cos and sin of the positions below `length`, [length, head_dim] each.

        Only where one table serves all layers and lengths.
        """
        ids = torch.arange(length, device=hidden.device)[None]
        cos, sin = self.embeddings(hidden, ids)[self.types[0]]
        return cos[0], sin[0]

    @property
    def width(self) -> int:
        """Coordinates of each query and key that the rotary embedding turns, in all layers."""
        ids = torch.zeros(1, 1, dtype=torch.long)
        return self.embeddings(torch.zeros(1), ids)[self.types[0]][0].shape[-1]

    def embeddings(self, hidden: Tensor, ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Rotary cos and sin at positions [rows, time], by layer type: [rows, time, width] each.

        They are on the device of `hidden`, and in its dtype or in float32, as the family has it.
        """
        if self.rotary_by_type:
            return {kind: self._rotary(hidden, ids, kind) for kind in self.types}
        embedding = self._rotary(hidden, ids)
        return {kind: embedding for kind in self.types}

    def _grown_table(self, hidden: Tensor, length: int) -> Block:
        """Rotary embeddings of all positions up to `length` and some more, computed once."""
        table = self._tables.get((hidden.dtype, hidden.device))
        if table is not None and table.position_ids.shape[1] >= length:
            return table
        ids = torch.arange(max(256, 1 << length.bit_length()), device=hidden.device)[None]
        table = Block(ids, self.embeddings(hidden, ids), {})
        self._tables[hidden.dtype, hidden.device] = table
        return table

    def _mask(
        self, kind: str, attention: str, hidden: Tensor, where: Span, ids: Tensor
    ) -> Tensor | None:
        limited = kind == SLIDING and self.window is not None and where.stop > self.window
        if "flash" in attention:
            if where.even:
                return None  # flash attention is causal from the last key back, knows the window
            raise OptionError(
                f"attn_implementation={attention!r} cannot mask rows of different lengths; use "
                "'sdpa' or 'eager', or generate the rows one by one."
            )
        if where.even and not limited:
            if where.time == 1:
                return None
            if attention == "sdpa" and where.starts[0] == 0:
                return None  # sdpa is causal by itself while queries and keys are the same tokens
        query = ids[:, :, None]
        key = torch.arange(where.stop, device=hidden.device)
        allowed = key <= query
        if limited and self.window is not None:
            allowed &= key > query - self.window
        allowed = allowed[:, None]
        if attention == "sdpa":
            return allowed
        return torch.zeros_like(allowed, dtype=hidden.dtype).masked_fill_(
            ~allowed, torch.finfo(hidden.dtype).min
        )


def _cut(table: Block, start: int, stop: int) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Positions and embeddings from `start` to `stop` of a table that begins at 0."""
    embeddings = {
        kind: (cos[:, start:stop], sin[:, start:stop])
        for kind, (cos, sin) in table.embeddings.items()
    }
    return table.position_ids[:, start:stop], embeddings
