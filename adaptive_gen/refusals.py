"""What `generate(adaptive=True)` refuses by name, and why; docs/generate.md has the whole contract.

transformers picks its decoding loop before it asks the model anything, so most of these would never
reach ours: they are looked for in the arguments as given, before anything is prepared.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation.logits_process import (
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from .errors import OptionError
from .keywords import check_switch
from .resume import AdaptiveCache
from .settings import FIELDS

_TEXTS = "it decodes each text by itself, greedily or by sampling"
_DRAFTS = "its own exits propose tokens when lossless=True asks for that"
_CACHE = "it keeps keys and values in a cache of its own"
_LAYERS = "the layers after an exit have not run yet when a token is chosen"
_GUIDANCE = "that runs the whole model on a second text at every token"
_INPUTS = "it starts from input_ids alone"
_SIGNATURE = inspect.signature(GenerationMixin.generate)  # type: ignore[reportAttributeAccessIssue]


def _given(value: Any) -> bool:
    # Not `in (None, False)`: transformers takes a 0 for an answer, and 0 == False.
    return value is not None and value is not False


def _above(least: float) -> Callable[[Any], bool]:
    return lambda value: value is not None and value > least


# Keyword or configuration field -> (whether a value asks for it, why it cannot be honoured).
REFUSED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "num_beams": (_above(1), _TEXTS),
    "num_beam_groups": (_above(1), _TEXTS),
    "constraints": (_given, _TEXTS),
    "force_words_ids": (_given, _TEXTS),
    "penalty_alpha": (_above(0), _TEXTS),
    "dola_layers": (_given, "it reads one exit at a time"),
    "assistant_model": (_given, _DRAFTS),
    "assistant_early_exit": (_given, _DRAFTS),
    "prompt_lookup_num_tokens": (_given, _DRAFTS),
    "use_mtp": (_given, _DRAFTS),
    "is_assistant": (_given, _DRAFTS),
    "use_cache": (lambda value: value is False, _CACHE),
    # Some checkpoints say "hybrid", by which transformers too now means its dynamic cache.
    "cache_implementation": (lambda value: value not in (None, "dynamic", "hybrid"), _CACHE),
    "output_attentions": (_given, _LAYERS),
    "output_hidden_states": (_given, _LAYERS),
    "guidance_scale": (lambda value: value not in (None, 1), _GUIDANCE),
    "inputs_embeds": (_given, _INPUTS),
    "custom_generate": (_given, "that replaces the decoding loop"),
    "synced_gpus": (_given, "every process would have to exit at the same layer"),
}


def check_arguments(model: Any, *args: Any, **kwargs: Any) -> None:
    """Refuse, by name, arguments of `model.generate` that adaptive decoding cannot honour.

    Raises:
        OptionError: `adaptive` is asked for, and so is something of `REFUSED`, or the prompt is no
            tensor of token ids; or it is not, and the cache of an adaptive generation is given; or
            nothing is said of it, and a keyword of ours is given.
    """
    bound = _SIGNATURE.bind_partial(model, *args, **kwargs)
    arguments = {**bound.arguments, **bound.arguments.get("kwargs", {})}
    configs = (arguments.get("generation_config"), model.generation_config)

    def asked(name: str) -> Any:
        # An argument goes before the configuration, and that before the model's own.
        values = [arguments.get(name), *(getattr(config, name, None) for config in configs)]
        return next((value for value in values if value is not None), None)

    # What code of one's own reads is its affair.
    silent = asked("adaptive") is None and arguments.get("custom_generate") is None
    if silent and (ours := [f for f in FIELDS if _given(arguments.get(f))]):
        raise OptionError(
            f"{', '.join(ours)} would do nothing without adaptive=True; add that, or leave "
            f"{'it' if len(ours) == 1 else 'them'} out."
        )
    if not asked("adaptive"):
        if isinstance(arguments.get("past_key_values"), AdaptiveCache):
            raise OptionError(
                "past_key_values of an adaptive generation can only be continued by one; give "
                "adaptive=True, or leave past_key_values out."
            )
        return
    check_switch("adaptive", asked("adaptive"))
    for name in ("inputs", "input_ids"):
        _check_ids(arguments.get(name), arguments.get("attention_mask"))
    for name, (asks, reason) in REFUSED.items():
        if asks(value := asked(name)):
            shown = f"{name}={value!r}" if isinstance(value, bool | int | float | str) else name
            raise OptionError(
                f"adaptive=True cannot honour {shown}: {reason}. Leave that out, or leave adaptive "
                "out."
            )


def _check_ids(ids: Any, mask: Any) -> None:
    if ids is None:
        return
    if isinstance(ids, Tensor):
        if ids.dim() == 2 and len(ids) and ids.dtype in (torch.int64, torch.int32):
            # transformers would lengthen one that is too short.
            if isinstance(mask, Tensor) and mask.shape != ids.shape:
                raise OptionError(
                    f"attention_mask is {list(mask.shape)} and the prompt {list(ids.shape)}; give "
                    "one 0 or 1 for each token."
                )
            return
        came = f"a {list(ids.shape)} tensor of {str(ids.dtype).removeprefix('torch.')}"
    else:
        came = type(ids).__name__
    raise OptionError(
        f"the prompt is {came}; give token ids [batch, time], at least one text of int64, as "
        "generate(**tokenizer(text, return_tensors='pt'), ...) does."
    )


def check_processors(processors: Any, once: bool) -> None:
    """Refuse logits processors that would be wrong without a word.

    Args:
        processors: transformers' list, as prepared.
        once: whether each is called exactly once for every token, in the order of the text.

    Raises:
        OptionError: one that counts on being called like that, or that runs the model itself.
    """
    for processor in processors:
        if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
            raise OptionError(
                f"adaptive=True cannot honour {type(processor).__name__}: {_GUIDANCE}. Leave that "
                "out, or leave adaptive out."
            )
        if isinstance(processor, SynthIDTextWatermarkLogitsProcessor) and not once:
            raise OptionError(
                "a SynthID watermark remembers each call, and batches, lossless and audit call it "
                "out of turn; generate one text without them, or use WatermarkingConfig."
            )
