"""What an exported checkpoint has to pass before it takes its place."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .custom_generate import generate
from .decoder import Decoder
from .errors import ModelError
from .generate import AdaptiveMixin
from .settings import State, log, state

NEW_TOKENS = 4


@torch.no_grad()
def check_equal(model: Any, decoder: Decoder, layers: int, made: Path) -> Any:
    """Load what was written and compare its logits with the model's at that depth: 64 tokens.

    Args:
        model: what is exported.
        decoder: its.
        layers: how many of them were kept.
        made: the checkpoint.

    Returns:
        The checkpoint as stock transformers loads it.

    Raises:
        ModelError: they differ in any bit, or the checkpoint cannot be loaded.
    """
    stock = next(cls for cls in type(model).__mro__ if not issubclass(cls, AdaptiveMixin))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(decoder.config.vocab_size, (1, 64), generator=generator).to(model.device)
    was_training = model.training
    model.eval()
    try:
        loaded: Any = stock.from_pretrained(  # type: ignore[reportAttributeAccessIssue]
            made, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
        loaded = loaded.to(model.device).eval()
        cut = loaded(input_ids=ids, use_cache=False).logits
        whole = _exit_logits(model, decoder, ids, layers)
    except (TypeError, ValueError, KeyError, IndexError, RuntimeError) as error:
        raise ModelError(
            f"{decoder.name} cannot be cut off after {layers} layers ({type(error).__name__}: "
            f"{error}). Use it whole."
        ) from error
    finally:
        model.train(was_training)
    if not torch.equal(cut, whole):
        difference = float((cut.float() - whole.float()).abs().max())
        raise ModelError(
            f"{decoder.name} cut off after {layers} layers differs from its own exit there by "
            f"{difference:.2g} in the logits: its layers depend on how many there are, or it was "
            "cast after loading. Load it with from_pretrained(..., dtype=...), or use it whole."
        )
    return loaded


def _exit_logits(model: Any, decoder: Decoder, ids: Tensor, layers: int) -> Tensor:
    """What transformers' own forward has after `layers` layers, read out: [1, time, vocab]."""
    whole = layers == decoder.n_layers
    out = model(input_ids=ids, use_cache=False, output_hidden_states=not whole)
    return out.logits if whole else decoder.readout(out.hidden_states[layers], layers)


def check_generates(exported: State | None, loaded: Any, tokenizer: Any) -> None:
    """Decode a few tokens by the checkpoint's own `generate`, and compare what it decodes with.

    Args:
        exported: of the model that was exported; None if that was not wrapped.
        loaded: the checkpoint as stock transformers loads it; it gets wrapped.
        tokenizer: for a generation config that stops at strings.

    Raises:
        ModelError: it cannot, or its readouts, its calibration or its gate are not the model's.
    """
    vocab = loaded.config.get_text_config().vocab_size
    ids = torch.arange(8, device=loaded.device)[None] % vocab
    # Without a mask transformers takes a padding token for padding.
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    more = {} if tokenizer is None else {"tokenizer": tokenizer}
    silent, log.disabled = log.disabled, True  # what there is to say was said of the model
    try:
        with torch.random.fork_rng([loaded.device] if loaded.device.type == "cuda" else []):
            generate(**prompt, model=loaded, max_new_tokens=NEW_TOKENS, adaptive=True, **more)
    except ValueError as error:
        raise ModelError(f"the exported checkpoint could not generate: {error}") from error
    finally:
        log.disabled = silent
    if exported is None:
        return
    found = state(loaded)
    differing = [
        name
        for name, of in (("readouts", _readouts), ("calibration", _calibration), ("gate", _gate))
        if of(exported, found.n_layers) != of(found, found.n_layers)
    ]
    if differing:
        raise ModelError(
            f"the exported checkpoint has another {' and '.join(differing)} than the model. "
            "Load the model anew and export that."
        )


def _readouts(of: State, layers: int) -> list[int]:
    return sorted(exit_layer for exit_layer in of.decoder.own if exit_layer < layers)


def _calibration(of: State, layers: int) -> str | None:
    if of.calibration is None or of.calibration.n_layers != layers:
        return None
    # As its file has it, which knows no tuples.
    return json.dumps(dataclasses.asdict(of.calibration.without_certificates()))


def _gate(of: State, layers: int) -> str | None:
    whole = of.calibration is not None and of.calibration.n_layers == layers
    return of.gate.digest if whole and of.gate is not None else None
