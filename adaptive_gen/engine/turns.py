"""Rotary embeddings as complex numbers, which turn pairs of coordinates that lie side by side.

Families differ in what is a pair, in how many coordinates are turned at all, and by layer: some
turn faster in some, and some not at all in others. It is seen in the keys of one token.

Axes: `rows`, `time`, `kinds` (of rotations that a model's layers have), `pairs` (head_dim / 2).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..decoder import Decoder
from .cache import KVCache, Span, side_by_side
from .layer_parts import Unfit
from .positions import Positions

HALVES, NEIGHBOURS = "halves", "neighbours"  # i with i + size / 2 turned; 2 i with 2 i + 1
_POSITION = 7  # where a token's keys are compared with those at position 0
_NEAR = 0.05  # of the largest key: whatever rounding does, and nothing like another rotation


class Turns:
    """What is turned of a prepared model's queries and keys, and how far at each position."""

    def __init__(self, positions: Positions, rotations: Sequence[str | None], head_dim: int):
        """Sort the layers by the rotation that they have.

        Args:
            positions: of the decoder.
            rotations: `rotation_of` each layer.
            head_dim: coordinates of a head.

        Raises:
            Unfit: layers that pair coordinates differently.
        """
        pairings = set(rotations) - {None}
        if len(pairings) > 1:
            raise Unfit("its layers pair coordinates in different ways")
        one = positions.types[:1] * len(rotations)
        types = positions.layer_types if positions.rotary_by_type else one
        kinds = [
            None if rotation is None else kind
            for rotation, kind in zip(rotations, types, strict=True)
        ]
        self._kinds = list(dict.fromkeys(kinds))
        self.of_layer = [self._kinds.index(kind) for kind in kinds]
        self._positions, self._pairs = positions, head_dim // 2
        self._table = torch.empty(0)
        # How many coordinates have to be put side by side; see `KVCache.pair`.
        self.paired = positions.width if HALVES in pairings else 0

    def __len__(self) -> int:
        """How many kinds of rotation there are."""
        return len(self._kinds)

    def __call__(self, hidden: Tensor, where: Span) -> Tensor:
        """A block's rotations [rows or 1, time, kinds, pairs], as precise as `hidden`."""
        if not self._positions.tabled:
            return self._at(hidden, where.positions(hidden.device))
        table = self.table(hidden, where.stop)
        if where.even:
            return table[None, where.starts[0] : where.stop]
        return table[where.positions(hidden.device)]

    def table(self, like: Tensor, stop: int) -> Tensor:
        """Those of the positions below `stop` or more, [.., kinds, pairs], if one table serves."""
        if len(self._table) < stop or self._table.dtype != like.dtype.to_complex():
            ids = torch.arange(max(256, 1 << stop.bit_length()), device=like.device)[None]
            self._table = self._at(like, ids)[0]
        return self._table

    def _at(self, like: Tensor, ids: Tensor) -> Tensor:
        by_type = self._positions.embeddings(like, ids)
        every = like.new_ones(*ids.shape, len(self), self._pairs)
        turns = torch.complex(every, torch.zeros_like(every))
        for index, kind in enumerate(self._kinds):
            if kind is not None:
                some = as_complex(*by_type[kind])
                turns[:, :, index, : some.shape[-1]] = some
        return turns


def as_complex(cos: Tensor, sin: Tensor) -> Tensor:
    """What `cos` and `sin` [..., width], of each pair in their first half, do to pairs."""
    half = cos.shape[-1] // 2
    return torch.complex(cos[..., :half], sin[..., :half])


@torch.no_grad()
def rotation_of(decoder: Decoder, index: int) -> str | None:
    """How layer `index` of a decoder turns keys: which coordinates it pairs; None if it does not.

    Raises:
        Unfit: it does something else with their positions.
    """
    positions, keys, turns = decoder.positions, [], []
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 1, decoder.config.hidden_size, generator=generator).to(decoder.dtype)
    for at in (0, _POSITION):
        cache, span = KVCache(decoder.n_layers), Span((at,), (1,))
        decoder.store(hidden, index, index + 1, cache, span)
        keys.append(cache.keys_values(index)[0][0, :, at].float())
        by_type = positions.embeddings(hidden.float(), span.positions(hidden.device))
        turns.append(as_complex(*by_type[positions.layer_types[index]])[0, 0])
    near = _NEAR * float(keys[0].abs().max())
    if _as_near(*keys, near):
        return None
    width = positions.width
    for pairing in (HALVES, NEIGHBOURS):
        pairs = [key[:, :width] for key in keys]
        if pairing == HALVES:
            pairs = [side_by_side(some) for some in pairs]
        first, later = (torch.view_as_complex(p.unflatten(-1, (-1, 2))) for p in pairs)
        if _as_near(first * turns[1], later * turns[0], near):
            return pairing
    raise Unfit("its keys are turned in another way")


def _as_near(one: Tensor, other: Tensor, near: float) -> bool:
    return float((one - other).abs().max()) <= near
