"""Rotary embeddings as complex numbers, which turn pairs of coordinates that lie side by side.

Families differ in what is a pair, in how many coordinates are turned at all, and by layer: some
turn faster in some, and some not at all in others. It is seen in the keys of one token.

Axes: `rows`, `time`, `kinds` (of rotations that a model's layers have), `pairs` (head_dim / 2).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..decoder import Decoder
from .cache import KVCache, Span, side_by_side
from .layer_parts import Unfit
from .positions import Positions

HALVES, NEIGHBOURS = "halves", "neighbours"  # i with i + size / 2 turned; 2 i with 2 i + 1
# Where a token's keys are compared with those at position 0: slow pairs have turned at the last.
_POSITIONS = (7, 911)
# Of each pair's length, which rotations keep: more than half precision rounds off.
_NEAR = 0.05
_NOTHING = 1e-6  # of the longest pair: what is shorter says nothing


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
        types = positions.layer_types
        if not positions.rotary_by_type:  # then all have the same
            types = positions.types[:1] * len(rotations)
        kinds = [None if r is None else types[index] for index, r in enumerate(rotations)]
        self._kinds = list(dict.fromkeys(kinds))
        self.of_layer = [self._kinds.index(kind) for kind in kinds]
        self._positions, self._pairs = positions, head_dim // 2
        self._table = torch.empty(0)
        # How many coordinates have to be put side by side; see `KVCache.pair`.
        self.paired = positions.width if HALVES in pairings else 0

    @property
    def tabled(self) -> bool:
        """Whether one table serves texts of any length."""
        return self._positions.tabled

    def __len__(self) -> int:
        """How many kinds of rotation there are."""
        return len(self._kinds)

    def __call__(self, hidden: Tensor, where: Span) -> Tensor:
        """A block's rotations [rows or 1, time, kinds, pairs], as precise as `hidden`."""
        if not self.tabled:
            return self._at(hidden, where.positions(hidden.device))
        table = self.table(hidden, where.stop)
        if where.even:
            return table[None, where.starts[0] : where.stop]
        return table[where.positions(hidden.device)]

    def table(self, like: Tensor, stop: int) -> Tensor:
        """Those of the positions below `stop` or more, [.., kinds, pairs], if one table serves."""
        table = self._table  # which another thread may put a shorter one in place of
        if len(table) < stop or table.dtype != like.dtype.to_complex():
            ids = torch.arange(max(256, 1 << stop.bit_length()), device=like.device)[None]
            table = self._table = self._at(like, ids)[0]
        return table

    def _at(self, like: Tensor, ids: Tensor) -> Tensor:
        by_type, by_kind = self._positions.embeddings(like, ids), []
        for kind in self._kinds:
            turns = as_complex(*by_type[kind or self._positions.types[0]])
            if kind is None:
                turns = torch.ones_like(turns)
            turns = turns.to(like.dtype.to_complex())
            by_kind.append(F.pad(turns, (0, self._pairs - turns.shape[-1]), value=1.0))
        return torch.stack(by_kind, dim=2)


def as_complex(cos: Tensor, sin: Tensor) -> Tensor:
    """What `cos` and `sin` [..., width], which have each pair's twice, do to pairs.

    Most families have those of all pairs twice in a row, Cohere has each twice in a row.
    """
    half = cos.shape[-1] // 2
    beside = all(torch.equal(part[..., ::2], part[..., 1::2]) for part in (cos, sin))
    pairs = slice(0, None, 2) if beside else slice(half)
    return torch.complex(cos[..., pairs], sin[..., pairs])


@torch.no_grad()
def rotation_of(decoder: Decoder, index: int) -> str | None:
    """How layer `index` of a decoder turns keys: which coordinates it pairs; None if it does not.

    Raises:
        Unfit: it does something else with their positions.
    """
    positions, keys, turns = decoder.positions, [], []
    if not positions.width:
        return None
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 1, decoder.config.hidden_size, generator=generator).to(decoder.dtype)
    for at in (0, *_POSITIONS):
        cache, span = KVCache(decoder.n_layers), Span((at,), (1,))
        decoder.store(hidden, index, index + 1, cache, span)
        keys.append(cache.keys_values(index)[0][0, :, at].float())
        by_type = positions.embeddings(hidden.float(), span.positions(hidden.device))
        turns.append(as_complex(*by_type[positions.layer_types[index]])[0, 0])
    width = positions.width
    found = torch.stack(keys)[..., :width]  # [positions, kv_heads, width]
    angles = torch.stack(turns)[:, None]  # [positions, 1, width / 2]
    pairs = {HALVES: _numbers(side_by_side(found)), NEIGHBOURS: _numbers(found)}
    if _follow(pairs[HALVES], torch.ones_like(angles)):
        return None
    for pairing, numbers in pairs.items():
        if _follow(numbers, angles):
            return pairing
    raise Unfit("its keys are turned in another way")


def _numbers(coordinates: Tensor) -> Tensor:
    """Coordinates [..., width], pairs side by side, as complex numbers [..., width / 2]."""
    return torch.view_as_complex(coordinates.unflatten(-1, (-1, 2)).contiguous())


def _follow(pairs: Tensor, turns: Tensor) -> bool:
    """Whether pairs [positions, kv_heads, width / 2] are those at position 0, turned by `turns`."""
    length = pairs[:1].abs()
    off = (pairs * turns[:1] - pairs[:1] * turns).abs()
    return bool((off <= _NEAR * length)[:, (length > _NOTHING * length.max())[0]].all())
