"""The back end `fused`: decoder layers as few, plain tensor operations on the CPU.

On small models most of a decoding step is spent between the operations: module calls, norms in six
steps, rotary embeddings that concatenate. Here a layer is four matrix products and eleven cheap
operations over weights prepared once: q, k and v side by side, gate and up side by side, norm gains
and the attention scale folded in. Gemma, OLMo 2 and others norm what attention and the MLP give,
besides what they are given or instead; GPT-2, GPT-NeoX, Phi and others have LayerNorm and no gates,
and some give the MLP what attention is given; Mixtral, OLMoE and others have several MLPs, see
`experts`. `fusing` prepares them, `workspace` has the buffers.

Axes: `rows`, `time`, `hidden`, `heads`, `kv_heads`, `head_dim`; matrix products
see rows and time as one axis.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..decoder import Decoder
from .attention import Attention
from .cache import KVCache, Span
from .experts import add_mixture
from .int8 import Int8Matrix
from .layer_parts import ACTIVATIONS
from .matrices import Matrix, add_product, product
from .narrow import NarrowMatrix
from .turns import Turns
from .workspace import Room, Sizes, Workspace, norm_heads


@dataclass(frozen=True)
class Layer:
    """One decoder layer's weights, as [in, out] matrices with the norm gains.

    The gains are folded in, but for a `NarrowMatrix`.
    """

    qkv: Matrix  # [hidden, (heads + 2 kv_heads) * head_dim]
    qkv_bias: Tensor | None
    qk_gain: Tensor | None  # [heads + kv_heads, head_dim], where queries and keys are normed
    out: Matrix
    out_bias: Tensor | None
    gate_up: Matrix  # [hidden, 2 * intermediate], or [hidden, intermediate] without a gate
    gate_up_bias: Tensor | None
    down: Matrix
    down_bias: Tensor | None
    mixed_gain: Tensor | None = None  # [hidden], where what attention gives is normed
    output_gain: Tensor | None = None  # likewise of the MLP
    # [hidden, experts], where the MLP is a mixture: `gate_up` and `down` have those of all experts
    # side by side.
    router: Matrix | None = None


@dataclass(frozen=True)
class Traits:
    """What all layers of a model have in common besides their sizes."""

    normed_first: bool  # whether attention and the MLP are given normed hidden states
    whole_heads: bool  # whether queries, and keys, are normed all heads together
    parallel: bool  # whether the MLP is given what attention is, and not what that made of it
    activation: str  # see `layer_parts`
    softcap: float | None  # what scores of attention are bent below
    top_k: int  # experts of a token, where there are any
    normalised: bool  # whether its shares of them add up to 1
    eps: tuple[float, ...]  # of the norms of hidden states, and of those of queries and keys
    normed_after: tuple[bool, bool]  # whether what attention, and the MLP, give is normed
    # Queries, keys, values, what attention gives, gate, up, down, and the norms before both.
    biased: tuple[bool, ...]


@dataclass(frozen=True)
class FusedModel:
    """Prepared copies of a decoder's layers.

    A root-mean-square norm is `x / sqrt(|x|^2 + size * eps)` times the square root of the size,
    which goes with the gain. LayerNorm is the same of what x is off its mean; what it adds in the
    end goes with the biases. Queries and keys have the two coordinates that a
    rotary embedding turns together side by side, as one complex number.
    """

    decoder: Decoder
    layers: list[Layer]
    sizes: Sizes
    traits: Traits
    turns: Turns
    qk_floors: Tensor  # what the norms of queries, and of keys, divide by at least, [2]

    @property
    def narrow(self) -> bool:
        """Whether its matrices stay as the modules have them, for kernels to read."""
        return isinstance(self.layers[0].qkv, NarrowMatrix)

    @property
    def rounded(self) -> bool:
        """Whether its matrices are rounded to 8 bits."""
        return isinstance(self.layers[0].qkv, Int8Matrix)


@dataclass(frozen=True)
class FusedSegment:
    """Layers `start`..`stop` of a `FusedModel`."""

    model: FusedModel
    start: int
    stop: int
    stacked: tuple[Matrix, Tensor | None]  # K and V matrices of all its layers, and their bias
    workspace: Workspace  # shared by the segments of one generation

    @torch.no_grad()
    def run(
        self, hidden: Tensor, cache: KVCache, span: Span | None = None, newest_only: bool = False
    ) -> Tensor:
        """Run the layers on a block [rows, time, hidden]; valid until the next run."""
        model, positions = self.model, self.model.decoder.positions
        span = span or cache.span(self.start, (hidden.shape[1],) * cache.batch)
        cache.pair(model.turns.paired)
        room = self._room(hidden, span)
        if hidden is not room.hidden:  # what the segment before this one gave stands there
            room.hidden.copy_(hidden)
        x, parallel = room.x, model.traits.parallel
        activate = ACTIVATIONS[model.traits.activation]
        ways = cache, span, self.start, self.stop
        attend = Attention(room, positions, *ways, model.traits.softcap)
        for index in range(self.start, self.stop):
            layer = model.layers[index]
            given = self._given(room)
            product(given, layer.qkv, layer.qkv_bias, room.qkv)
            if parallel:
                product(given, layer.gate_up, layer.gate_up_bias, room.gate_up)
            if layer.qk_gain is not None:
                room.norm_heads(layer.qk_gain, model.qk_floors, model.traits.whole_heads)
            room.turn(model.turns.of_layer[index])
            if layer.mixed_gain is None:
                add_product(x, attend(index), layer.out, layer.out_bias)
            else:
                mixed = product(attend(index), layer.out, layer.out_bias)
                x += normed(mixed, room.floor, model.sizes.centred) * layer.mixed_gain
            if layer.router is not None:
                add_mixture(x, self._given(room), layer, model.sizes, model.traits)
                continue
            if not parallel:
                product(self._given(room), layer.gate_up, layer.gate_up_bias, room.gate_up)
            inner = room.activated(activate)
            if layer.output_gain is None:
                add_product(x, inner, layer.down, layer.down_bias)
            else:
                made = product(inner, layer.down, layer.down_bias)
                x += normed(made, room.floor, model.sizes.centred) * layer.output_gain
        return room.hidden

    def _given(self, room: Room) -> Tensor:
        """What attention or the MLP is given of the hidden states."""
        return room.normed() if self.model.traits.normed_first else room.x

    def _room(self, hidden: Tensor, span: Span) -> Room:
        room = self.workspace.room(hidden)
        if not room.placed(span.starts):
            room.place(span.starts, self.model.turns(hidden, span))
        return room

    @torch.no_grad()
    def store(self, hidden: Tensor, cache: KVCache, span: Span | None = None) -> None:
        """K/V of a block for all layers: one product, one rotation, and one write."""
        model = self.model
        span = span or cache.span(self.start, (hidden.shape[1],) * cache.batch)
        cache.pair(model.turns.paired)
        room = self._room(hidden, span)
        if hidden is not room.hidden:
            room.hidden.copy_(hidden)
        sizes, layers = model.sizes, self.stop - self.start
        kv = product(self._given(room), *self.stacked).view(
            *hidden.shape[:2], layers, 2, sizes.kv_heads, sizes.head_dim
        )
        gains = [layer.qk_gain for layer in model.layers[self.start : self.stop]]
        if gains[0] is not None:
            gain = torch.stack([g[sizes.heads :] for g in gains if g is not None])
            norm_heads(kv[..., 0, :, :], gain, model.qk_floors[1], model.traits.whole_heads)
        # [layers, 2, rows, kv_heads, time, head_dim], and the rotations of all of a layer's
        kv = kv.permute(2, 3, 0, 4, 1, 5)
        kinds = model.turns.of_layer[self.start : self.stop]
        one = len(model.turns) == 1  # for all layers
        turns = (room.turns if one else room.turns[kinds])[:, :, sizes.heads :]
        turns = turns.unflatten(2, (2, -1)).transpose(1, 2)
        turned = torch.view_as_complex(kv.unflatten(-1, (-1, 2))) * turns
        kv = torch.view_as_real(turned).flatten(-2)
        if span.rows is None and span.even:
            cache.slots(self.start, self.stop, span, kv[0]).places.copy_(kv)
            return
        for index, (key, value) in enumerate(kv, self.start):
            cache.write(key, value, index, span)


def normed(hidden: Tensor, floor: Tensor, centred: bool) -> Tensor:
    """Hidden states [rows, hidden] divided by their length or more; see `FusedModel`."""
    if centred:
        hidden = hidden - hidden.mean(-1, keepdim=True)
    return hidden / torch.linalg.vector_norm(hidden, dim=-1, keepdim=True).hypot_(floor)
