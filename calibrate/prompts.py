"""The prompts a calibration learns from, and the ones it is measured on."""

import hashlib
import json
import os
from collections.abc import Sequence
from importlib.resources import files

from adaptive_gen.errors import DataError
from adaptive_gen.prompts import Prompt, parse, read

FEWEST = 8  # below this one part is no sample of anything


def prompt_set(path: str | os.PathLike[str] | None) -> list[Prompt]:
    """The prompts of a file, or the 120 that ship with the package.

    Raises:
        DataError: the file is missing or broken, or holds too few different prompts.
    """
    if path is None:
        name = "prompts.jsonl"
        text = files("adaptive_gen.calibrate").joinpath(name).read_text("utf-8")
        return parse(text, name, as_json=True)
    different = {json.dumps(prompt): prompt for prompt in read(path)}
    if len(different) < FEWEST:
        raise DataError(
            f"{path} holds {len(different)} different prompts; calibration needs at least "
            f"{FEWEST}, and 100 or more for numbers to rely on."
        )
    return list(different.values())


def ordered(prompts: Sequence[Prompt], seed: int) -> list[Prompt]:
    """Shuffle by hash: the first ones are searched on, the others measured and certified on.

    A prompt's place in the order depends on its text and the seed alone, not on the file's order.
    """

    def rank(prompt: Prompt) -> str:
        return hashlib.sha256(f"{seed}:{json.dumps(prompt)}".encode()).hexdigest()

    return sorted(prompts, key=rank)
