"""A certificate: what a calibration promises of one operating point, in words no stronger than it.

The promise is of a mean over prompts. It is made by a procedure that breaks it in at most
1 - `level` of all calibrations, whatever the model and the prompts' distribution are.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

LOSSES = {
    "prefix": "share of a text from its first token on that full depth would not have written",
    "exact": "share of texts that differ anywhere from full depth's",
    "rouge": "1 - ROUGE-L (token ids) of a text against full depth's",
    "em": "share of texts that are not full depth's answer (exact match of the words, case, "
    "articles, punctuation and white space aside)",
}


@dataclasses.dataclass(frozen=True)
class Certificate:
    """One promise and the evidence for it."""

    loss: str  # a key of LOSSES
    max_risk: float  # the mean loss that is not exceeded
    level: float  # confidence of the promise, such as 0.95
    risk: float  # mean loss on the prompts it was certified on
    p_value: float  # of "the mean loss is above max_risk"
    prompts: int  # certified on; used for nothing before
    test: str  # "binomial" or "betting"
    max_new_tokens: int
    steps: tuple[Mapping[str, Any], ...] = ()  # settings tested, in the order fixed beforehand
    decoded_risk: float | None = None  # mean loss of really decoding those prompts with the setting

    def statement(self, kv: str, fingerprint: Mapping[str, Any]) -> str:
        """What is promised, of which prompts and settings, and what is not.

        Args:
            kv: the KV policy of the calibration.
            fingerprint: what the calibration was made on.
        """
        dtype, device = fingerprint.get("dtype", "its dtype"), fingerprint.get("device", "device")
        return (
            f"Certified: on new prompts from the same source as the {self.prompts} prompts of the "
            f"certification, drawn independently, the mean loss is at most {self.max_risk:g}. The "
            f"loss is the {LOSSES[self.loss]}; its mean on those prompts was {self.risk:.4f}. A "
            "calibration "
            f"like this one gives a false certificate with a chance of at most "
            f"{1 - self.level:.2g}, over the draw of its prompts. It covers this model and "
            f"tokenizer in {dtype} on {device}, kv={kv}, greedy decoding of one text at a time, up "
            f"to {self.max_new_tokens} new tokens. It says nothing of a single text, of other "
            "kinds of prompts, of longer texts, of sampling, or of whether a text is right."
        )


def parse(document: Mapping[str, Any] | None) -> Certificate | None:
    """A certificate from its JSON.

    Raises:
        ValueError, TypeError: a field is missing, unknown or out of range.
    """
    if document is None:
        return None
    found = Certificate(**{**document, "steps": tuple(document["steps"])})
    if found.loss not in LOSSES or not 0 < found.max_risk < 1 or not 0 < found.level < 1:
        raise ValueError(f"a certificate of {found.loss!r} {found.max_risk!r} at {found.level!r}")
    return found
