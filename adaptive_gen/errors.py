"""Expected failures. Each message is one line: what came, what is allowed, what to do next.

The commands turn them into that line on stderr and exit code 2 (1 for `Unreachable`); everything
else that escapes is a defect and keeps its traceback.
"""


class AdaptiveGenError(ValueError):
    """Something the caller can put right; the base of every error raised on purpose."""


class ModelError(AdaptiveGenError):
    """A model or its directory that cannot be loaded, wrapped or run layer by layer."""


class OptionError(AdaptiveGenError):
    """A keyword or option whose value is out of range, or that cannot be honoured."""


class DataError(AdaptiveGenError):
    """A data or prompt file that is missing, empty or broken."""


class OutputError(AdaptiveGenError):
    """A place that cannot be written to."""


class CalibrationError(AdaptiveGenError):
    """A calibration artefact that is missing, broken or does not fit the model."""


class Unreachable(AdaptiveGenError):
    """A target that no operating point of this model on this device reaches."""
