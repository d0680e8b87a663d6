"""What `model.generate(adaptive=True, ...)` reaches.

A wrapped model is the same object with a subclass of its own class, of the same name, that
overrides `_sample`: transformers' `generate` prepares inputs, logits processors, stopping criteria
and the generation config as always, and our loop takes over where its loop would start.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation.streamers import BaseStreamer

from .coverage import otherwise, withdrawn
from .decoding import TokenLoop
from .errors import OptionError
from .refusals import check_arguments, check_processors
from .resume import AdaptiveCache
from .settings import Settings, resolve, state

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    class _CausalLM(PreTrainedModel, GenerationMixin):
        """Any of transformers' causal LMs, for the type checker."""
else:
    _CausalLM = object


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

    @functools.wraps(GenerationMixin.generate)  # type: ignore[reportAttributeAccessIssue]
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse by name what `adaptive` cannot honour; the rest is transformers'."""
        check_arguments(self, *args, **kwargs)
        return super().generate(*args, **kwargs)  # type: ignore[reportAttributeAccessIssue]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the model's own class, which can be imported by its name, as ours cannot."""
        made, args, *contents = super().__reduce_ex__(protocol)
        ours, *others = type(self).__bases__
        if ours is not AdaptiveMixin or args[:1] != (type(self),):
            return made, args, *contents
        return _new, (*others, *args[1:]), *contents

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
        if synced_gpus:  # transformers decides for it by itself where a model is sharded
            check_arguments(self, adaptive=True, synced_gpus=True)
        lengths = _prompt_lengths(input_ids, model_kwargs)
        settings = resolve(generation_config, state(self), rows=len(lengths))
        check_processors(
            logits_processor, len(lengths) == 1 and not (settings.lossless or settings.audit)
        )
        settings = self._covered(settings, generation_config, input_ids, logits_processor)
        handover = isinstance(streamer, LoopHandover)
        if streamer is not None and len(lengths) > 1:
            raise OptionError(
                f"a streamer shows one text and got {len(lengths)}; leave streamer out, or "
                "generate them one by one."
            )
        loop = TokenLoop(
            state(self).backend,
            settings,
            generation_config,
            input_ids,
            lengths,
            logits_processor,
            stopping_criteria,
            None if handover else streamer,
            _past(model_kwargs, len(lengths)),
        )
        if self.training:
            state(self).tell_once(
                "the model is in training mode: its own layers run, dropout included; call "
                "model.eval() before generate."
            )
        if state(self).backend.widens:
            state(self).tell_once(_widened(state(self).decoder.dtype))
        if handover:
            return loop
        for _ in loop:
            pass
        return (
            loop.output() if generation_config.return_dict_in_generate else loop.texts.sequences()
        )

    def _covered(
        self, settings: Settings, config: Any, input_ids: Tensor, processors: Any
    ) -> Settings:
        """The settings without their certificate if the call does what that is not for."""
        changes = settings.changed
        if settings.certificate is not None:
            rows, width = input_ids.shape
            room = (config.max_length or 0) - width
            changes = otherwise(settings.certificate, config, rows, room, processors)
        if not changes:
            return settings
        if not settings.unchecked:  # full depth takes nothing back
            state(self).tell_once(withdrawn(changes))
        return dataclasses.replace(settings, certificate=None)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Make no cache for a text that has one of ours."""
        given = model_kwargs.get("past_key_values") is not None
        if given or not getattr(generation_config, "adaptive", None):
            super()._prepare_cache_for_generation(  # type: ignore[reportAttributeAccessIssue]
                generation_config, model_kwargs, *args, **kwargs
            )

    def _validate_generation_mode(
        self, generation_mode: Any, generation_config: Any, generation_mode_kwargs: dict[str, Any]
    ) -> None:
        """Check the adaptive settings before anything runs."""
        if getattr(generation_config, "adaptive", None):
            resolve(generation_config, state(self))
        super()._validate_generation_mode(  # type: ignore[reportAttributeAccessIssue]
            generation_mode, generation_config, generation_mode_kwargs
        )


@functools.cache
def adaptive_class(cls: type) -> type:
    """The class of a wrapped model whose own class is `cls`."""
    # The same name and module: transformers writes the class name into a saved configuration.
    namespace = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (AdaptiveMixin, cls), namespace)


def _new(cls: type, *args: Any) -> Any:
    """A wrapped model without contents: what a pickled or copied one starts as."""
    adaptive = adaptive_class(cls)
    return adaptive.__new__(adaptive, *args)


def _widened(dtype: torch.dtype) -> str:
    """What a user of a checkpoint in half precision is told."""
    name = str(dtype).removeprefix("torch.")
    return (
        f"the weights are {name} and are read as they are, with hidden states in float32: where "
        f"two tokens are as likely but for {name}'s rounding, the text may differ from "
        "transformers'. wrap(engine='module') rounds as transformers does."
    )


def _past(model_kwargs: dict[str, Any], rows: int) -> AdaptiveCache | None:
    """What an earlier adaptive generation left, if it was given."""
    cache = model_kwargs.get("past_key_values")
    if not isinstance(cache, AdaptiveCache):
        return None
    if rows > 1:
        raise OptionError(
            f"past_key_values of one text cannot be continued by {rows}; leave them out."
        )
    return cache


def _prompt_lengths(input_ids: Tensor, model_kwargs: dict[str, Any]) -> list[int]:
    """Tokens of each prompt [rows, time] without its left padding.

    Raises:
        OptionError: an empty prompt, holes in the attention mask, other positions than 0, 1, 2,
            ..., or inputs besides tokens.
    """
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
    if isinstance(cache, AdaptiveCache):
        cache = None
    if cache is not None:  # the caller's: we let transformers make none
        extra.append("past_key_values")
    if extra:
        raise OptionError(
            f"adaptive=True cannot honour {', '.join(extra)}: it starts from input_ids alone. "
            "Leave that out, or leave adaptive out."
        )
    rows, width = input_ids.shape
    if width == 0:
        raise OptionError("the prompt is empty; give at least one token, such as the BOS token.")
    mask = model_kwargs.get("attention_mask")
    mask = None if mask is None else mask != 0  # it may come as floats
    lengths = [width] * rows if mask is None else mask.sum(-1).tolist()
    if min(lengths) == 0:
        raise OptionError("the attention mask hides a whole prompt; give it at least one token.")
    for row, length in enumerate(lengths):
        if mask is not None and not bool(mask[row, -length:].all()):
            raise OptionError(
                "the attention mask has holes or right padding; adaptive=True takes left padding."
            )
        _check_positions(model_kwargs.get("position_ids"), row, length)
    return lengths


def _check_positions(positions: Tensor | None, row: int, length: int) -> None:
    if positions is None:
        return
    plain = torch.arange(length, device=positions.device)
    if positions.dim() != 2 or not torch.equal(
        positions[min(row, len(positions) - 1), -length:], plain
    ):
        raise OptionError(
            "position_ids other than 0, 1, 2, ... cannot be honoured with adaptive=True; leave "
            "them out."
        )
