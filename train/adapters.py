"""What `--adapter` trains instead of all weights: LoRA, DoRA, or readouts of the exits' own.

LoRA and DoRA come from peft and are merged into the model at the end.
"""

from typing import Any

from adaptive_gen.errors import OptionError
from adaptive_gen.exit_readouts import KINDS

EXITS = {f"exit-{kind}": kind for kind in KINDS}


def exit_readout(text: str | None) -> str | None:
    """The kind of readout that `exit-norm` or `exit-block` asks for; None for another adapter."""
    return EXITS.get(text or "")


def add_adapter(model: Any, text: str) -> Any:
    """`model` with trainable low-rank updates in all linear layers but the LM head.

    Args:
        model: a causal LM.
        text: `lora:RANK` or `dora:RANK`.

    Raises:
        OptionError: another text, or peft is not installed.
    """
    kind, _, rank = text.partition(":")
    if kind not in ("lora", "dora") or not rank.isdigit() or int(rank) < 1:
        raise OptionError(
            f"adapter {text!r} is unknown; give lora:RANK or dora:RANK, as lora:16, or one of "
            f"{', '.join(EXITS)}."
        )
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise OptionError(
            "--adapter needs peft; install it with `pip install adaptive-gen[peft]`."
        ) from None
    settings = LoraConfig(
        r=int(rank),
        lora_alpha=2 * int(rank),
        target_modules="all-linear",
        use_dora=kind == "dora",
        task_type="CAUSAL_LM",
    )
    # With frozen embeddings, recomputed layers would see no input that needs a gradient.
    model.enable_input_require_grads()
    return get_peft_model(model, settings)


def merged(model: Any) -> Any:
    """The plain model with the updates folded into its weights."""
    return model.merge_and_unload()
