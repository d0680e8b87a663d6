"""How every console command of this package fails: one line, exit code 1 or 2, no traceback."""

import os
import sys
from typing import Any

from .errors import AdaptiveGenError, Unreachable


def run_app(app: Any, name: str) -> None:
    """Run the typer application `app` as the console command `name`.

    An expected failure (`AdaptiveGenError`) becomes `name: message` on stderr: exit code 1 for a
    target that cannot be reached, 2 for everything the caller can put right. With
    `ADAPTIVE_GEN_DEBUG=1` the traceback is shown instead.
    """
    try:
        app()
    except AdaptiveGenError as error:
        if os.environ.get("ADAPTIVE_GEN_DEBUG") == "1":
            raise
        sys.stderr.write(f"{name}: {error}\n")
        sys.exit(1 if isinstance(error, Unreachable) else 2)
    except BrokenPipeError:
        # The reader (`| head`) has gone: nothing is left to tell it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
