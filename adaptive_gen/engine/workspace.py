"""Buffers of the back end `fused`, made once in a generation for each shape of block.

On one token of a small model a view costs as much as the arithmetic, so the views are made here,
with the buffers they look into, and every layer and every later token uses them again.

Axes: `rows`, `time`, `hidden`, `heads`, `kv_heads`, `head_dim`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A hidden state's row in its buffer is longer by this, which keeps rows aligned to cache lines.
_MARGIN = 16
_MOST_KEPT = 64  # tokens of a block; buffers of a longer one, a prompt, are let go


@dataclass(frozen=True)
class Sizes:
    """What decides how large the buffers of a model are."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    floor: float  # the least that a norm divides by: sqrt(hidden * eps)
    gated: bool = True  # whether the MLP has a gate, which is as wide again
    centred: bool = False  # whether norms take off the mean
    experts: int = 0  # MLPs of a layer that tokens are given to by a router; 0: there is one

    @property
    def wide(self) -> int:
        """How many numbers the MLP makes of a hidden state at first."""
        return 2 * self.intermediate if self.gated else self.intermediate


class Room:
    """The buffers of a block [rows, time, hidden], and the views into them."""

    def __init__(self, sizes: Sizes, kinds: int, rows: int, time: int, like: Tensor):
        """Make them for `kinds` of rotation, in the dtype and on the device of `like`."""
        heads, kv_heads, head_dim = sizes.heads, sizes.kv_heads, sizes.head_dim
        every = heads + 2 * kv_heads
        # One coordinate behind each hidden state holds the norm's floor: the length of the whole
        # row is then what the norm divides by.
        self._rows = like.new_zeros(rows * time, sizes.hidden + _MARGIN)
        self._rows[:, sizes.hidden] = sizes.floor
        self.floor = like.new_tensor(sizes.floor)
        self.x = self._rows[:, : sizes.hidden]
        self.hidden = self._rows.view(rows, time, -1)[..., : sizes.hidden]
        self._length = like.new_empty(rows * time, 1)
        self._normed = like.new_empty(rows * time, sizes.hidden)
        self._centred = self._rows.clone() if sizes.centred else None

        self.qkv = like.new_empty(rows * time, every * head_dim)
        by_head = self.qkv.view(rows, time, every, head_dim)
        self._qk = by_head[:, :, : heads + kv_heads]
        self._source = torch.view_as_complex(by_head.unflatten(-1, (-1, 2))).transpose(1, 2)
        turned = like.new_empty(rows, every, time, head_dim)
        self._turned = torch.view_as_complex(turned.unflatten(-1, (-1, 2)))
        # [kinds, rows, heads + 2 kv_heads, time, head_dim / 2]; of values it stays 1.
        self.turns = torch.ones_like(self._turned).expand(kinds, *self._turned.shape).clone()
        self._turns_of_qk = self.turns[:, :, : heads + kv_heads]
        self._turns_by_kind = self.turns.unbind()
        self._starts: tuple[int, ...] | None = None

        self.query = turned[:, :heads]  # [rows, heads, time, head_dim]
        # A key/value head sees its query heads' tokens one after the other.
        grouped = (rows * kv_heads, heads // kv_heads * time, head_dim)
        self._grouped = self.query.view(grouped) if rows == 1 else None
        self._group = grouped
        # [2, rows, kv_heads, time, head_dim]: keys and values
        self.kv = turned[:, heads:].unflatten(1, (2, kv_heads)).transpose(0, 1)
        self.mixed = like.new_empty(grouped)
        self._by_token = self.mixed.view(rows, heads, time, head_dim).transpose(1, 2)
        self._joined = self.mixed.view(rows, -1) if time == 1 else None
        self.later = torch.ones(time, time, dtype=torch.bool, device=like.device).triu_(1)

        self.gate_up = like.new_empty(rows * time, sizes.wide)
        self._inner = self.gate_up.chunk(2, dim=-1) if sizes.gated else (self.gate_up,)

    def normed(self) -> Tensor:
        """The hidden states through a norm without its factor."""
        rows, x = self._rows, self.x
        if self._centred is not None:
            rows, x = self._centred, self._centred[:, : x.shape[1]]
            torch.sub(self.x, self.x.mean(-1, keepdim=True), out=x)
        torch.linalg.vector_norm(rows, dim=-1, keepdim=True, out=self._length)
        return torch.div(x, self._length, out=self._normed)

    def activated(self, activate: Callable[[Tensor], Tensor]) -> Tensor:
        """What the MLP makes of `gate_up`, [rows * time, intermediate]."""
        return activated(self._inner, activate)

    def norm_heads(self, gain: Tensor, floors: Tensor, whole: bool) -> None:
        """Norm queries and keys, head by head or as a whole; see `FusedModel`."""
        if not whole:
            norm_heads(self._qk, gain, floors[0], whole)
            return
        heads = self.query.shape[1]
        norm_heads(self._qk[:, :, :heads], gain[:heads], floors[0], whole)
        norm_heads(self._qk[:, :, heads:], gain[heads:], floors[1], whole)

    def place(self, starts: tuple[int, ...], turns: Tensor) -> None:
        """Take the rotations of blocks that begin at `starts`, as `Turns` gives them."""
        self._turns_of_qk.copy_(turns.permute(2, 0, 1, 3)[:, :, None])
        self._starts = starts

    def placed(self, starts: tuple[int, ...]) -> bool:
        """Whether the rotations are those of blocks that begin at `starts`."""
        return self._starts == starts

    def turn(self, kind: int) -> None:
        """Rotate queries and keys in one of the model's ways; values come along as they are."""
        torch.mul(self._source, self._turns_by_kind[kind], out=self._turned)

    def grouped(self) -> Tensor:
        """The rotated queries, [rows * kv_heads, heads / kv_heads * time, head_dim]."""
        return self.query.reshape(self._group) if self._grouped is None else self._grouped

    def joined(self) -> Tensor:
        """What attention has put into `mixed`, [rows * time, heads * head_dim]."""
        return self._by_token.flatten(0, 1).flatten(1) if self._joined is None else self._joined


class Workspace:
    """The rooms of one generation: what runs in two threads must not share them."""

    def __init__(self, sizes: Sizes, kinds: int):
        """Start without any, for a model with so many kinds of rotation."""
        self._sizes, self._kinds = sizes, kinds
        self._rooms: dict[tuple[int, int], Room] = {}

    def room(self, hidden: Tensor) -> Room:
        """The room of a block [rows, time, hidden]."""
        rows, time, _ = hidden.shape
        found = self._rooms.get((rows, time))
        if found is None:
            found = Room(self._sizes, self._kinds, rows, time, hidden)
            if rows * time <= _MOST_KEPT:
                self._rooms[rows, time] = found
        return found


def activated(parts: Sequence[Tensor], activate: Callable[[Tensor], Tensor]) -> Tensor:
    """What a gate, or all of an MLP, lets through: the first part, times the second if any."""
    first, *up = parts
    inner = activate(first)
    return inner.mul_(up[0]) if up else inner


def norm_heads(heads: Tensor, gain: Tensor, floor: Tensor, whole: bool) -> None:
    """Norm [.., heads, head_dim] in place, each by itself or as a whole, see `FusedModel`."""
    dims = (-2, -1) if whole else -1
    length = torch.linalg.vector_norm(heads, dim=dims, keepdim=True)
    heads.div_(length.hypot_(floor)).mul_(gain)
