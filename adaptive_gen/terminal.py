"""How every console command of this package fails: one line, exit code 1 or 2, no traceback."""

import os
import sys
from typing import Any

import typer

from .errors import AdaptiveGenError, Unreachable

# What typer raises for words that it cannot parse: click's class or its own copy, by its release.
USAGE_ERROR: Any = typer.BadParameter.__base__


def run_app(app: Any, name: str) -> None:
    """Run the typer application `app` as the console command `name`.

    An expected failure (`AdaptiveGenError`) becomes `name: message` on stderr: exit code 1 for a
    target that cannot be reached, 2 for everything the caller can put right, words that are no
    option or value among it. With `ADAPTIVE_GEN_DEBUG=1` the traceback is shown instead.
    """
    try:
        code = app(prog_name=name, standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except USAGE_ERROR as error:
        if os.environ.get("ADAPTIVE_GEN_DEBUG") == "1":
            raise
        sys.stderr.write(_usage(error, name))
        sys.exit(error.exit_code)
    except typer.Abort:
        sys.exit(1)
    except AdaptiveGenError as error:
        if os.environ.get("ADAPTIVE_GEN_DEBUG") == "1":
            raise
        sys.stderr.write(f"{name}: {error}\n")
        sys.exit(1 if isinstance(error, Unreachable) else 2)
    except BrokenPipeError:
        # The reader (`| head`) has gone: nothing is left to tell it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _usage(error: Any, name: str) -> str:
    """One line about words that mean nothing; the help where there are none at all."""
    message, context = " ".join(error.format_message().split()), error.ctx
    if type(error).__name__ == "NoArgsIsHelpError":
        return f"{error.format_message()}\n"
    command = name if context is None else context.command_path
    return f"{name}: {message.removesuffix('.')}. See `{command} --help`.\n"
