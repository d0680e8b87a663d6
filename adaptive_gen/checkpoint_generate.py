"""Adaptive-depth decoding for the checkpoint that this file lies in.

transformers runs it in place of `model.generate` when the checkpoint is loaded with
`trust_remote_code=True`. Where adaptive_gen is not installed, the model decodes at full depth.
"""

import logging

try:
    from adaptive_gen.custom_generate import generate
except ImportError:
    _told = []

    def generate(*args, model, adaptive=None, **kwargs):
        """Decode at full depth, with transformers' own `generate`."""
        if adaptive:
            raise ImportError("adaptive=True needs the package adaptive_gen; install it first.")
        if adaptive is None and not _told:
            _told.append(True)
            logging.getLogger(__name__).warning(
                "the package adaptive_gen is not installed: decoding at full depth."
            )
        return type(model).generate(model, *args, **kwargs)


__all__ = ["generate"]
