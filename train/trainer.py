"""SoFT on transformers' Trainer: only the loss and what is reported are its own."""

import signal
import sys
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from adaptive_gen.losses import sorted_losses


class SoFTTrainer(Trainer):
    """Trains all exits of every batch; plain fine-tuning is the case of full depth alone.

    Args:
        exit_layers: counts of layers, full depth last.
        distil: share of the divergence from full depth.
        weights: exit layer -> weight.
        chunk_size: positions whose logits exist at once.
    """

    # `sorted_losses` divides by the labels of the whole optimiser step.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        exit_layers: Sequence[int],
        distil: float = 0.0,
        weights: Mapping[int, float] | None = None,
        chunk_size: int = 1024,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self._bare: Any = self.model
        self.model_accepts_loss_kwargs = True  # makes the Trainer count the labels of a step
        self._sorted = {
            "exit_layers": list(exit_layers),
            "distil": distil,
            "weights": weights,
            "chunk_size": chunk_size,
        }
        self._seen: dict[int, list[Any]] = defaultdict(list)
        for noisy in (PrinterCallback, ProgressCallback):  # they write to stdout
            self.remove_callback(noisy)
        self.add_callback(Progress())
        self._stop = StopOnInterrupt()
        self.add_callback(self._stop)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The sorted loss of one micro-batch, as its share of the optimiser step."""
        loss = model(**inputs, num_items_in_batch=num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train with the loss as the model's forward pass.

        DDP, FSDP and DeepSpeed gather weights and reduce gradients around `forward`, so every use
        of a weight, the LM head's at each exit too, has to happen inside it.
        """
        self._bare.forward = self._forward
        try:
            with self._stop:
                return super().train(*args, **kwargs)
        finally:
            del self._bare.forward

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended the training; a checkpoint of the last step is then on disk."""
        return self._stop.asked

    def _forward(self, num_items_in_batch: Any = None, **inputs: Any) -> Any:
        if num_items_in_batch is not None:  # gradients are averaged over processes, not summed
            num_items_in_batch = num_items_in_batch / self.accelerator.num_processes
        result = sorted_losses(
            self._bare, **inputs, **self._sorted, num_items_in_batch=num_items_in_batch
        )
        for exit_layer, value in result.per_exit.items():
            self._seen[exit_layer].append(value)
        return result.loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the mean loss of each exit since the last log line."""
        if "loss" in logs and self._seen:
            for exit_layer, values in sorted(self._seen.items()):
                logs[f"loss_exit_{exit_layer}"] = round(float(sum(values)) / len(values), 4)
            self._seen.clear()
        super().log(logs, *args, **kwargs)


class Progress(TrainerCallback):
    """A bar and log lines on stderr: stdout is for answers."""

    def __init__(self):
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar where a resumed run left it."""
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance."""
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """One line: step, loss, and the loss of each exit."""
        if not logs or "loss" not in logs:
            return
        exits = " ".join(
            f"{key.removeprefix('loss_exit_')}:{value:.3f}"
            for key, value in logs.items()
            if key.startswith("loss_exit_")
        )
        line = f"step {state.global_step}/{state.max_steps} loss {logs['loss']:.4f}"
        self.bar.write(f"{line} | per exit {exits} | lr {logs['learning_rate']:.2e}", sys.stderr)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self.bar.close()


class StopOnInterrupt(TrainerCallback):
    """The first Ctrl-C ends the run after its step, with a checkpoint; the second ends it now."""

    def __init__(self):
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._handle)

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _handle(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        sys.stderr.write(
            "\nsaving a checkpoint; --resume goes on from it (Ctrl-C again: stop now)\n"
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask the Trainer to save and stop."""
        if self.asked:
            control.should_save = control.should_training_stop = True
