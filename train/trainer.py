"""SoFT on transformers' Trainer: only the loss and what is reported are its own."""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from adaptive_gen.exit_readouts import readouts
from adaptive_gen.losses import IGNORE, exit_states, exit_weights, score_exits
from adaptive_gen.naming import Parts

from .callbacks import EvaluateAtEnd, History, Progress, StopOnInterrupt, TensorBoard
from .objectives import Objective
from .random_depth import Departures, layer_dropout, leaving


@dataclass
class Throughput:
    """Tokens that went through this process, and the time from the first step to the last."""

    tokens: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, with the rate."""
        return {**asdict(self), "tokens_per_s": self.tokens / self.seconds if self.seconds else 0.0}


class SortedTraining:
    """The sorted loss for a Trainer of transformers: put it before that class in the bases."""

    # `score_exits` divides by the labels of the whole optimiser step.
    loss_is_scaled_for_ga = True
    model: Any
    accelerator: Any
    state: Any
    args: Any

    def sort(self, exit_layers: Sequence[int], objective: Objective, chunk_size: int) -> None:
        """Say what is trained; call it once the Trainer is made.

        Args:
            exit_layers: counts of layers, full depth last.
            objective: what a step minimises.
            chunk_size: positions whose logits exist at once.
        """
        self._bare: Any = self.model
        self.model_accepts_loss_kwargs = True  # makes the Trainer count the labels of a step
        self.exit_layers = tuple(exit_layers)
        self.objective = objective
        self.chunk_size = chunk_size
        self.throughput = Throughput()
        self._departures: Departures | None = None
        self._seen: dict[int, list[Any]] = defaultdict(list)
        self._unseen: list[Any] = []  # per held-out batch: summed loss of each exit, and labels

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The sorted loss of one micro-batch, as its share of the optimiser step."""
        if not model.training:
            num_items_in_batch = None
        loss = model(**inputs, num_items_in_batch=num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train with the loss as the model's forward pass.

        DDP, FSDP and DeepSpeed gather weights and reduce gradients around `forward`, so every use
        of a weight, the LM head's at each exit too, has to happen inside it.
        """
        # accelerate binds a method it finds here to the model; a partial it leaves alone.
        self._bare.forward = partial(self._forward)
        started = time.perf_counter()
        try:
            with self._depths():
                return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.throughput.seconds += time.perf_counter() - started
            self._bare.__dict__.pop("forward", None)

    @contextmanager
    def _depths(self) -> Iterator[None]:
        """The random depths that the objective asks for, as long as the training lasts."""
        parts, objective = Parts(self._bare), self.objective
        with ExitStack() as stack:
            if objective.dropout:
                stack.enter_context(layer_dropout(list(parts.layers), objective.dropout))
            if objective.propagated and len(self.exit_layers) > 1:
                self._departures = stack.enter_context(
                    leaving(parts.base, parts.layers, self.exit_layers, objective.propagated)
                )
            yield

    def _forward(
        self, input_ids: Any, labels: Any, num_items_in_batch: Any = None, **inputs: Any
    ) -> Any:
        if not self._bare.training:
            return self._held_out(input_ids, labels, **inputs)
        if num_items_in_batch is not None:  # gradients are averaged over processes, not summed
            num_items_in_batch = num_items_in_batch / self.accelerator.num_processes
        weights = self.objective.weights(
            self.exit_layers, self.state.global_step, self.state.max_steps, self.args.seed
        )
        shares: Any = exit_weights(self.exit_layers, weights)
        states = exit_states(self._bare, input_ids, self.exit_layers, **inputs)
        if self._departures is not None:
            shares = self._departures.shares(shares, self.exit_layers, self.objective.propagated)
        result = score_exits(
            readouts(self._bare, self.exit_layers),
            states,
            labels,
            shares,
            distil=self.objective.distil,
            num_items_in_batch=num_items_in_batch,
            chunk_size=self.chunk_size,
        )
        self.throughput.tokens += input_ids.numel()
        for exit_layer, value in result.per_exit.items():
            self._seen[exit_layer].append(value)
        return result.loss

    def _held_out(self, input_ids: Any, labels: Any, **inputs: Any) -> Any:
        """Mean over exits of one held-out batch's cross-entropy."""
        loader = self.accelerator.gradient_state
        if loader.end_of_dataloader and loader.remainder > 0:
            # Processes take equally many sequences: what repeats an earlier one counts for nothing.
            here = torch.arange(len(labels), device=labels.device)
            here += self.accelerator.process_index * len(labels)
            labels = labels.masked_fill((here >= loader.remainder)[:, None], IGNORE)
        labelled = (labels[:, 1:] != IGNORE).sum()
        result = score_exits(
            readouts(self._bare, self.exit_layers),
            exit_states(self._bare, input_ids, self.exit_layers, **inputs),
            labels,
            exit_weights(self.exit_layers, None),
            chunk_size=self.chunk_size,
        )
        sums = torch.stack([result.per_exit[e] for e in self.exit_layers]).nan_to_num() * labelled
        self._unseen.append(torch.cat([sums.double(), labelled[None].double()]))
        return result.loss.nan_to_num()

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Score the held-out sequences; the time that takes is not training's."""
        started = time.perf_counter()
        try:
            return super().evaluate(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.throughput.seconds -= time.perf_counter() - started

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the mean loss of each exit: since the last log line, or over the held-out tokens."""
        if "eval_loss" in logs and self._unseen:
            *sums, count = self.accelerator.reduce(sum(self._unseen), "sum").tolist()
            self._unseen.clear()
            for exit_layer, total in zip(self.exit_layers, sums, strict=True):
                logs[f"eval_loss_exit_{exit_layer}"] = round(total / max(count, 1), 4)
            logs["eval_loss"] = round(sum(sums) / len(sums) / max(count, 1), 4)
        if "loss" in logs and self._seen:
            for exit_layer, values in sorted(self._seen.items()):
                logs[f"loss_exit_{exit_layer}"] = round(float(sum(values)) / len(values), 4)
            self._seen.clear()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class SoFTTrainer(SortedTraining, Trainer):
    """Trains all exits of every batch; plain fine-tuning is the case of full depth alone.

    Args:
        exit_layers: counts of layers, full depth last.
        objective: what a step minimises.
        chunk_size: positions whose logits exist at once.
        log_dir: where `log.jsonl` is written, and `tensorboard/` if that is wanted; None: nowhere.
        tensorboard: whether it is.
    """

    def __init__(
        self,
        *args: Any,
        exit_layers: Sequence[int],
        objective: Objective | None = None,
        chunk_size: int = 1024,
        log_dir: Path | None = None,
        tensorboard: bool = False,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.sort(exit_layers, objective or Objective(), chunk_size)
        sizes = [(p.numel(), p.requires_grad) for p in self._bare.parameters()]
        self.parameters = sum(size for size, _ in sizes)
        self.trained_parameters = sum(size for size, learns in sizes if learns)
        for noisy in (PrinterCallback, ProgressCallback):  # they write to stdout
            self.remove_callback(noisy)
        self.add_callback(Progress())
        self.add_callback(EvaluateAtEnd())
        if log_dir is not None:
            self.add_callback(History(log_dir / "log.jsonl"))
            if tensorboard:
                self.add_callback(TensorBoard(log_dir / "tensorboard"))
        self._stop = StopOnInterrupt()
        self.add_callback(self._stop)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; the first Ctrl-C ends it with a checkpoint."""
        with self._stop:
            return super().train(*args, **kwargs)

    def gathered(self) -> dict[str, Any] | None:
        """All weights where processes hold shards of them; every process has to ask.

        None where the model holds its weights itself, and in all processes but the first.
        """
        if not self.is_fsdp_enabled:
            return None
        return self.accelerator.get_state_dict(self.model_wrapped) or None

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended the training; a checkpoint of the last step is then on disk."""
        return self._stop.asked
