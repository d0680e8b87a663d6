"""What a run shows and how it stops: a bar and log lines on stderr, Ctrl-C with a checkpoint."""

import json
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from adaptive_gen.errors import OptionError
from adaptive_gen.ui import Pulse

from .saving import write_text


class Progress(TrainerCallback):
    """A bar, or without a terminal a pulse, and log lines on stderr: stdout is for answers."""

    def __init__(self):
        self.bar: Any = None
        self.pulse = Pulse()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar where a resumed run left it."""
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            disable=not (sys.stderr.isatty() and state.is_world_process_zero),
        )
        self.pulse.rest()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance."""
        self.bar.update(state.global_step - self.bar.n)
        if self.bar.disable and state.is_world_process_zero:
            self.pulse.beat(f"step {state.global_step}/{state.max_steps}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """One line: step, loss, and the loss of each exit."""
        if not logs or not state.is_world_process_zero:
            return
        for prefix, name in (("", "loss"), ("eval_", "held-out loss")):
            if f"{prefix}loss" not in logs:
                continue
            start = f"{prefix}loss_exit_"
            exits = " ".join(
                f"{key.removeprefix(start)}:{value:.3f}"
                for key, value in logs.items()
                if key.startswith(start)
            )
            line = f"step {state.global_step}/{state.max_steps} {name} {logs[f'{prefix}loss']:.4f}"
            rate = "" if prefix else f" | lr {logs['learning_rate']:.2e}"
            self.bar.write(f"{line} | per exit {exits}{rate}", sys.stderr)
            self.pulse.rest()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self.bar.close()


class EvaluateAtEnd(TrainerCallback):
    """The last checkpoint is scored too, at whatever step it comes."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask the Trainer to score what was held out, if anything was."""
        if args.eval_strategy != "no" and state.global_step >= state.max_steps:
            control.should_evaluate = True


class History(TrainerCallback):
    """The log as JSON lines: what the progress lines say, and the rest of what is logged."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start with what a resumed run had logged by its checkpoint."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in state.log_history))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """One line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**(logs or {}), "step": state.global_step}) + "\n")


class TensorBoard(TrainerCallback):
    """Every number that is logged as a curve.

    Raises:
        OptionError: tensorboard is not installed.
    """

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise OptionError(
                "--tensorboard needs tensorboard; `pip install adaptive-gen[tensorboard]` has it."
            ) from None
        self._writer = SummaryWriter
        self.folder = folder
        self.curves: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the curves; those of a resumed run end where it goes on."""
        self.curves = self._writer(str(self.folder), purge_step=state.global_step + 1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """One point on every curve."""
        for name, value in (logs or {}).items():
            if isinstance(value, int | float):
                part = "held-out" if name.startswith("eval_") else "train"
                self.curves.add_scalar(
                    f"{part}/{name.removeprefix('eval_')}", value, state.global_step
                )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the file."""
        self.curves.close()


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
