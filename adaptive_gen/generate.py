"""The Hugging Face face: `wrap`, `load`, and what `model.generate(adaptive=True, ...)` reaches.

A wrapped model is the same object with a subclass of its own class, of the same name, that
overrides `_sample`: transformers' `generate` prepares inputs, logits processors, stopping criteria
and the generation config as always, and our loop takes over where its loop would start.
"""

import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from . import calibration as artefact
from . import exits
from .decoder import Decoder, probe
from .decoding import TokenLoop
from .engine.scheduler import QUEUE_CAP
from .errors import CalibrationError, ModelError, OptionError
from .settings import FIELDS, State, resolve

if TYPE_CHECKING:
    from transformers import GenerationMixin, PreTrainedModel

    class _CausalLM(PreTrainedModel, GenerationMixin):
        """Any of transformers' causal LMs, for the type checker."""
else:
    _CausalLM = object

BUILTIN = Path(__file__).parent / "builtin"
_STATE = "_adaptive_gen_state"


class LoopHandover(BaseStreamer):
    """Passed as `streamer`, makes `generate` return its `TokenLoop` instead of running it.

    That is how `stream` gets the very loop of `generate`, all its preparation included, without a
    thread; and a loop nobody finishes has touched nothing outside itself.
    """

    def put(self, value: Tensor) -> None:
        """Ignore the prompt."""

    def end(self) -> None:
        """Nothing to end."""


class AdaptiveMixin(_CausalLM):
    """What `wrap` puts in front of a model's own class."""

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """Take over from transformers' sampling loop when `adaptive` is set."""
        if not getattr(generation_config, "adaptive", None):
            return super()._sample(  # type: ignore[reportAttributeAccessIssue]
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **model_kwargs,
            )
        prompt = _prompt_without_padding(input_ids, model_kwargs)
        handover = isinstance(streamer, LoopHandover)
        loop = TokenLoop(
            state(self).decoder,
            resolve(generation_config, state(self)),
            generation_config,
            input_ids,
            prompt.to(self.device),
            logits_processor,
            stopping_criteria,
            None if handover else streamer,
        )
        if handover:
            return loop
        for _ in loop:
            pass
        return loop.output() if generation_config.return_dict_in_generate else loop.input_ids

    def _validate_generation_mode(
        self, generation_mode: Any, generation_config: Any, generation_mode_kwargs: dict[str, Any]
    ) -> None:
        """Refuse by name, before anything runs, what adaptive decoding cannot honour."""
        if getattr(generation_config, "adaptive", None):
            _refuse(generation_config, generation_mode_kwargs)
            resolve(generation_config, state(self))
        super()._validate_generation_mode(  # type: ignore[reportAttributeAccessIssue]
            generation_mode, generation_config, generation_mode_kwargs
        )


def _refuse(config: Any, mode_kwargs: dict[str, Any]) -> None:
    asked = {
        "num_beams": (config.num_beams or 1) > 1,
        "assistant_model": mode_kwargs.get("assistant_model") is not None,
        "synced_gpus": bool(mode_kwargs.get("synced_gpus")),
        "use_cache=False": config.use_cache is False,
        **{
            name: getattr(config, name, None) not in (None, False)
            for name in (
                "prompt_lookup_num_tokens",
                "assistant_early_exit",
                "use_mtp",
                "penalty_alpha",
                "constraints",
                "force_words_ids",
                "cache_implementation",
                "output_attentions",
                "output_hidden_states",
            )
        },
    }
    refused = [name for name, is_asked in asked.items() if is_asked]
    if refused:
        raise OptionError(
            f"adaptive=True cannot honour {', '.join(refused)}: it decodes greedily or by sampling "
            "with its own cache. Leave that out, or leave adaptive out."
        )


def _prompt_without_padding(input_ids: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
    """The tokens the layers see: [1, time] without left padding.

    Raises:
        OptionError: several rows, holes in the attention mask, other positions than 0, 1, 2, ...,
            or inputs besides tokens.
    """
    if input_ids.shape[0] != 1:
        raise OptionError(
            f"adaptive=True decodes one sequence at a time and got {input_ids.shape[0]}. "
            "Generate them one by one, or leave adaptive out."
        )
    if input_ids.shape[1] == 0:
        raise OptionError("the prompt is empty; give at least one token, such as the BOS token.")
    known = {
        "attention_mask",
        "position_ids",
        "past_key_values",
        "use_cache",
        "logits_to_keep",
        "tokenizer",
    }
    extra = [k for k, v in model_kwargs.items() if v is not None and k not in known]
    cache = model_kwargs.get("past_key_values")
    if cache is not None and (
        cache.get_seq_length() > 0 or getattr(cache, "_is_user_defined", False)
    ):
        extra.append("past_key_values")
    if extra:
        raise OptionError(
            f"adaptive=True cannot honour {', '.join(extra)}: it starts from input_ids alone. "
            "Leave that out, or leave adaptive out."
        )
    length = input_ids.shape[1]
    mask = model_kwargs.get("attention_mask")
    if mask is not None:
        length = int(mask.sum())
        if not bool(mask[:, -length:].all()):
            raise OptionError(
                "the attention mask has holes or right padding; adaptive=True takes left padding."
            )
    positions = model_kwargs.get("position_ids")
    if positions is not None:
        plain = torch.arange(length, device=positions.device)
        if not torch.equal(positions[0, -length:], plain):
            raise OptionError(
                "position_ids other than 0, 1, 2, ... cannot be honoured with adaptive=True; "
                "leave them out."
            )
    return input_ids[:, -length:]


@functools.cache
def _adaptive_class(cls: type) -> type:
    # The same name and module: transformers writes the class name into a saved configuration.
    namespace = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (AdaptiveMixin, cls), namespace)


def wrap(
    model: Any,
    exit_layers: Iterable[int] | None = None,
    calibration: artefact.Calibration | str | os.PathLike[str] | None = None,
    queue_cap: int = QUEUE_CAP,
) -> Any:
    """Teach a loaded causal LM `generate(adaptive=True, ...)`, in place.

    Args:
        model: any transformers causal LM that can be run layer by layer; it is probed for that.
        exit_layers: layers after which a token may leave, counts in 1..n_layers. Default: the
            calibration's, else `model.config.exit_layers`, else the quarter points.
        calibration: an artefact or the path of one.
        queue_cap: most tokens that wait for their deep layers before a deep pass is forced.

    Returns:
        The same object; `isinstance` with its own class still holds.

    Raises:
        ModelError: the model fails the probe.
        OptionError: an exit layer that does not exist.
        CalibrationError: a calibration that cannot be read or is another model's.
    """
    if queue_cap < 1:
        raise OptionError(
            f"queue_cap={queue_cap} leaves no room for a waiting token; give 1 or more."
        )
    if not hasattr(model, "_sample") or not hasattr(model, "generation_config"):
        raise ModelError(
            f"{type(model).__name__} has no generate(); adaptive depth needs a transformers causal "
            "LM, such as AutoModelForCausalLM.from_pretrained(...) gives."
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(f"{type(model).__name__} is an encoder-decoder; a causal LM is needed.")
    decoder = Decoder(model)
    if isinstance(calibration, str | os.PathLike):
        calibration = artefact.load(calibration)
    if calibration is not None:
        _check_fit(calibration, decoder.n_layers)
    if exit_layers is None:
        exit_layers = getattr(decoder.config, "exit_layers", None)
        if calibration is not None:
            exit_layers = calibration.exit_layers
    normalised = exits.normalise(
        exit_layers or exits.quarter_points(decoder.n_layers), decoder.n_layers
    )
    probe(model, decoder)
    setattr(model, _STATE, State(decoder, normalised, calibration, queue_cap))
    if calibration is not None:
        _compare_fingerprint(calibration, model)
    if not isinstance(model, AdaptiveMixin):
        model.__class__ = _adaptive_class(type(model))
    for name in FIELDS:
        if not hasattr(model.generation_config, name):
            setattr(model.generation_config, name, None)
    # Saved as derived from the model configuration, a generation config loses our fields on reload.
    model.generation_config._from_model_config = False
    return model


def _check_fit(calibration: artefact.Calibration, n_layers: int) -> None:
    if calibration.n_layers != n_layers:
        raise CalibrationError(
            f"the calibration is of a model with {calibration.n_layers} layers; this one has "
            f"{n_layers}. Run `calibrate run` for this model."
        )


def _compare_fingerprint(calibration: artefact.Calibration, model: Any) -> None:
    """Say, once, what the calibration was made on if that is not what it is used on."""
    here = artefact.fingerprint(model)
    made = calibration.fingerprint
    differing = [key for key, value in here.items() if made.get(key) not in (None, value)]
    if differing:
        state(model).tell_once(
            f"the calibration was made on another {' and '.join(differing)}: its agreement and "
            "speed are not promised here. Run `calibrate run` to have them measured."
        )


def state(model: Any) -> State:
    """What `wrap` stored on `model`; raises `ModelError` if it is not wrapped."""
    found = getattr(model, _STATE, None)
    if found is None:
        raise ModelError(
            f"this {type(model).__name__} is not wrapped; call adaptive_gen.wrap(model) first."
        )
    return found


def load(
    path: str | os.PathLike[str] | None = None,
    exit_layers: Iterable[int] | None = None,
    calibration: str | os.PathLike[str] | Literal[False] | None = None,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Load and wrap a model with its tokenizer.

    Args:
        path: a checkpoint directory or hub id; None is the built-in model.
        exit_layers: see `wrap`.
        calibration: path of an artefact; default `calibration.json` in the checkpoint directory;
            False is none.
        **kwargs: for `AutoModelForCausalLM.from_pretrained`: dtype, device_map, ...

    Returns:
        (model, tokenizer)

    Raises:
        ModelError: there is no causal LM and tokenizer there.
        CalibrationError, OptionError: see `wrap`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if path is None:
        path = BUILTIN
        if not torch.cuda.is_available():
            kwargs.setdefault("dtype", torch.float32)  # stored in 16 bits, which CPUs are slow in
    directory = Path(path)
    looks_local = str(path).startswith((".", "/", "~")) or str(path).count("/") != 1
    if not directory.is_dir() and looks_local:
        raise ModelError(
            f"there is no model directory {directory}. Give one that holds config.json, weights "
            "and a tokenizer, or leave it out for the built-in model."
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(path, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"{path} cannot be loaded as a causal LM with its tokenizer: {reason[0]} "
            "Give a directory saved with save_pretrained."
        ) from error
    if calibration is None and (directory / artefact.FILE_NAME).is_file():
        calibration = directory
    return wrap(model, exit_layers, calibration or None), tokenizer
