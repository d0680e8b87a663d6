"""What a run shows and how it stops: a bar and log lines on stderr, Ctrl-C with a checkpoint."""

import signal
import sys
import threading
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback


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
            disable=not (sys.stderr.isatty() and state.is_world_process_zero),
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance."""
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """One line: step, loss, and the loss of each exit."""
        if not logs or "loss" not in logs or not state.is_world_process_zero:
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
