"""The model to train or measure: a saved one, or a new one with an own BPE."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from adaptive_gen import exits
from adaptive_gen.errors import ModelError, OptionError
from adaptive_gen.files import is_nowhere
from adaptive_gen.ui import note


def load_model(name: str, dtype: str = "float32", layers: int = 0) -> tuple[Any, Any]:
    """A saved causal LM and its tokenizer, safetensors only.

    Args:
        name: directory or hub id.
        dtype: float32, bfloat16, float16, auto, or mixed, whose weights are float32.
        layers: how many layers to keep, the first ones; 0 keeps all.

    Raises:
        ModelError: missing, not a causal LM, or broken.
        OptionError: a dtype that does not exist, or more layers than there are.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    known["mixed"] = torch.float32
    if dtype != "auto" and dtype not in known:
        raise OptionError(f"dtype {dtype!r} is unknown; give {', '.join(known)} or auto.")
    folder = Path(name)
    check_place(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(f"{name} has no config.json; give the directory of a saved causal LM.")
    try:
        shape = AutoConfig.from_pretrained(name)
        if layers:
            keep_first(shape, layers)
        model = AutoModelForCausalLM.from_pretrained(
            name, config=shape, dtype=known.get(dtype, "auto"), use_safetensors=True
        )
        tokenizer = AutoTokenizer.from_pretrained(name)
    except OptionError:
        raise
    except Exception as error:  # transformers, safetensors and the hub raise their own kinds
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"cannot load {name} as a causal LM: {lines[0].rstrip('.')}.") from error
    return model, tokenizer


def check_place(name: str) -> None:
    """Raise `ModelError` for a name that is neither a directory nor could be one on the hub."""
    if is_nowhere(name):
        raise ModelError(f"no model directory {name}; check the path.")


def keep_first(shape: Any, layers: int) -> None:
    """Cut a model configuration down to its first layers; exits it names go with the rest."""
    text = shape.get_text_config()
    if not 1 <= layers <= text.num_hidden_layers:
        raise OptionError(
            f"--layers {layers}: the model has {text.num_hidden_layers}; give 1 to that."
        )
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    if getattr(shape, "exit_layers", None):
        shape.exit_layers = [e for e in shape.exit_layers if e < layers] + [layers]


def default_exits(shape: Any) -> tuple[int, ...]:
    """The exits of a run that names none: the model's own, else quarters; full depth last.

    Args:
        shape: configuration of the model; `exit_layers` in it are its own exits.

    Raises:
        OptionError: it names a layer that does not exist.
    """
    depth, own = shape.get_text_config().num_hidden_layers, getattr(shape, "exit_layers", None)
    return exits.normalise(own, depth) if own else exits.quarter_points(depth)


def tell_exits(shape: Any) -> None:
    """Say which exits a run takes that names none, and why those."""
    own = getattr(shape, "exit_layers", None)
    origin = "the model's own" if own else "quarters, as the model names none"
    layers = ", ".join(map(str, default_exits(shape)))
    note(f"exit layers {layers}: {origin}; --exit-layers names others")


def new_tokenizer(texts: Iterable[str], shape: Any, vocab_size: int) -> Any:
    """An own BPE for a model of this shape, learnt from the texts."""
    from .tokenizer import train_bpe

    return train_bpe(texts, vocab_size, getattr(shape, "max_position_embeddings", None))


def read_shape(path: Path) -> Any:
    """The model configuration in a config.json.

    Raises:
        ModelError: missing, broken, or of no known model type.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"cannot read the model config {path}: {reason}; give a config.json with a model_type."
        ) from None


def new_model(shape: Any, tokenizer: Any, seed: int) -> Any:
    """A causal LM with new weights that fits the tokenizer.

    What each layer adds is scaled by 1/sqrt(2 * layers), so that depth does not blow up at start.
    """
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    shape.vocab_size = len(tokenizer)
    shape.bos_token_id = tokenizer.bos_token_id
    shape.eos_token_id = tokenizer.eos_token_id
    shape.pad_token_id = tokenizer.pad_token_id
    set_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(shape)
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{shape.model_type} is no causal LM: {reason}.") from None
    factor = (2 * shape.num_hidden_layers) ** -0.5
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(factor)
    return model
