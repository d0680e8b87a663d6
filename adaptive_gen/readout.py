"""Exits read out and scored a few positions at a time, with one block of logits alive.

A readout's gradient needs its logits only to be made, so each block makes it at once and lets the
logits go: what is kept until the backward pass is one gradient per hidden state and one per
parameter of norm and head, however many exits there are.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .head import Head


class Readout(NamedTuple):
    """Final norm and LM head: hidden states [..., hidden] of any layer -> logits [..., vocab]."""

    norm: nn.Module
    head: Head

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits, with the model's own scale and soft-capping."""
        return self.head(self.norm(hidden))

    def parameters(self) -> list[nn.Parameter]:
        """What of it learns."""
        both = (*self.norm.parameters(), *self.head.linear.parameters())
        return [p for p in both if p.requires_grad]


class Goal(NamedTuple):
    """What every position of every exit is to learn."""

    targets: Tensor  # [positions] token ids
    shares: Tensor  # [exits] or [exits, positions]: weight in the objective
    distil: float  # share of the divergence from full depth, in an intermediate exit
    chunk_size: int  # positions whose logits exist at once


def score(
    readouts: Sequence[Readout], states: Sequence[Tensor], goal: Goal
) -> tuple[Tensor, Tensor]:
    """Sum over exits and positions of the objective, and the cross-entropies in it.

    Args:
        readouts: one per exit, full depth last.
        states: per exit, [positions, hidden] after its last layer, not normed.
        goal: targets and weights. An exit that weighs nothing is not read out.

    Returns:
        The objective, a scalar with a gradient, and per exit the summed cross-entropy [exits],
        detached, over positions that weigh something; 0 where nothing was read out.
    """
    learning = list({id(p): p for readout in readouts for p in readout.parameters()}.values())
    return _Score.apply(list(readouts), goal, learning, len(states), *states, *learning)


class _Score(torch.autograd.Function):
    """Makes the gradients in the forward pass; the backward pass scales them."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        readouts: list[Readout],
        goal: Goal,
        learning: list[nn.Parameter],
        exits: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        run = _Run(readouts, tensors[:exits], learning, goal, ctx.needs_input_grad[4:])
        for start in range(0, len(goal.targets), goal.chunk_size):
            part = slice(start, min(start + goal.chunk_size, len(goal.targets)))
            teacher = None
            for index in range(exits - 1, -1, -1):  # full depth first: it teaches the others
                teacher = run.exit(index, part, teacher) or teacher
        ctx.gradients = run.gradients
        ctx.mark_non_differentiable(run.entropies)
        return run.objective, run.entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the sorted loss can be differentiated once; compute it again.")
        scaled = [
            None if g is None else g.mul_(upstream.to(g.dtype)).to(dtype) for g, dtype in gradients
        ]
        return (None, None, None, None, *scaled)


class _Run:
    """One pass over all blocks, and what they add up: objective, cross-entropies, gradients."""

    def __init__(
        self,
        readouts: Sequence[Readout],
        states: Sequence[Tensor],
        learning: Sequence[Tensor],
        goal: Goal,
        wanted: Sequence[bool],
    ):
        self.readouts, self.states, self.learning, self.goal = readouts, states, learning, goal
        exact = torch.promote_types(states[-1].dtype, torch.float32)
        self.objective = states[-1].new_zeros((), dtype=exact)
        self.entropies = states[-1].new_zeros(len(states), dtype=exact)
        self.gradients: list[tuple[Tensor | None, torch.dtype]] = []
        for index, (tensor, needed) in enumerate(zip((*states, *learning), wanted, strict=True)):
            # Parameters gather many blocks, which half precision would round away one by one.
            gathers = tensor.dtype if index < len(states) else exact
            zeros = torch.zeros_like(tensor, dtype=gathers) if needed else None
            self.gradients.append((zeros, tensor.dtype))
        self.learns = any(total is not None for total, _ in self.gradients)
        totals = self.gradients[len(states) :]
        self.totals = {id(p): g for p, (g, _) in zip(learning, totals, strict=True)}

    def exit(self, index: int, part: slice, teacher: "_Teacher | None") -> "_Teacher | None":
        """One exit at some positions; its logits are gone when this returns.

        Returns:
            Full depth's distribution, if this is full depth and it has pupils.
        """
        shares, last = self.goal.shares, index == len(self.states) - 1
        share = shares[index, part] if shares.dim() == 2 else shares[index]
        teaches, weighs = last and self.goal.distil > 0, bool(share.any())
        if not teaches and not weighs:
            return None
        readout = self.readouts[index]
        with torch.set_grad_enabled(self.learns and weighs):
            state = self.states[index][part].detach().requires_grad_(self.learns and weighs)
            normed = readout.norm(state)
            logits = readout.head(normed)
        scores = _exact(logits.detach())
        taught = _Teacher.of(scores) if teaches else None
        distil = 0.0 if last else self.goal.distil
        objective, entropy = _slope_(scores, self.goal.targets[part], teacher, distil)
        self.objective += (objective * share).sum()
        self.entropies[index] += (entropy * (share > 0)).sum() if share.dim() else entropy.sum()
        if self.learns and weighs:
            scores *= share[:, None] if share.dim() else share
            self._descend(index, part, state, normed, logits, scores)
        return taught

    def _descend(
        self, index: int, part: slice, state: Tensor, normed: Tensor, logits: Tensor, slope: Tensor
    ) -> None:
        """Add what the slope of some logits does to the state and to every parameter."""
        top, head, learning = logits, self.readouts[index].head, self.learning
        weight = head.linear.weight
        total = self.totals.get(id(weight))
        if head.plain and normed.dtype == slope.dtype:
            # By hand: autograd would fill another matrix of the head's size for every block.
            if total is not None:
                total.addmm_(slope.T, normed.detach())
                learning = [p for p in learning if p is not weight]
            top, slope = normed, slope @ weight.detach()
        made = torch.autograd.grad(top, [state, *learning], slope.to(top.dtype), allow_unused=True)
        found, _ = self.gradients[index]
        if found is not None and made[0] is not None:
            found[part] = made[0]
        for parameter, gradient in zip(learning, made[1:], strict=True):
            sum_of = self.totals[id(parameter)]
            if sum_of is not None and gradient is not None:
                sum_of += gradient


def _exact(logits: Tensor) -> Tensor:
    """Half precision is too coarse for a softmax over a vocabulary; double stays double."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Products of rows; `linalg.vecdot` would fill another block of logits."""
    return torch.bmm(left[:, None], right[:, :, None]).flatten()


class _Teacher(NamedTuple):
    """Full depth's distribution over the next token."""

    probabilities: Tensor  # [positions, vocab]
    negative_entropy: Tensor  # [positions]

    @classmethod
    def of(cls, scores: Tensor) -> "_Teacher":
        probabilities = scores.softmax(-1)
        # log-sum-exp off the likeliest token: `logsumexp` would fill another block of logits.
        best, where = probabilities.max(-1, keepdim=True)
        normaliser = (scores.gather(-1, where) - best.log()).squeeze(-1)
        return cls(probabilities, _dot(probabilities, scores) - normaliser)


def _slope_(
    scores: Tensor, targets: Tensor, teacher: _Teacher | None, distil: float
) -> tuple[Tensor, Tensor]:
    """Turn logits into the objective's gradient, in place.

    With p = softmax(logits) and t the teacher's probabilities, the gradient of
    (1 - d) * CE + d * KL(t || p) is p - (1 - d) * onehot - d * t.

    Args:
        scores: logits [positions, vocab]; afterwards the gradient.
        targets: [positions].
        teacher: full depth's.
        distil: d.

    Returns:
        Objective and cross-entropy per position.
    """
    rows = torch.arange(len(targets), device=targets.device)
    scores -= scores.amax(-1, keepdim=True)
    chosen = scores[rows, targets]
    crossed = _dot(teacher.probabilities, scores) if teacher and distil else None
    total = scores.exp_().sum(-1)
    normaliser = total.log()
    entropy = normaliser - chosen
    scores /= total[:, None]
    scores[rows, targets] -= 1.0 - distil
    if crossed is None or teacher is None:
        return entropy, entropy
    scores.sub_(teacher.probabilities, alpha=distil)
    gap = teacher.negative_entropy - crossed + normaliser
    return (1.0 - distil) * entropy + distil * gap, entropy
