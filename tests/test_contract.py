"""The private methods of transformers that a wrapped model overrides are still what they were."""

import inspect

from transformers import GenerationMixin
from transformers.generation.utils import GENERATION_MODES_MAPPING, GenerationMode

from adaptive_gen.generate import AdaptiveMixin


def parameters(method):
    return list(inspect.signature(method).parameters)


def test_the_sampling_loop_takes_what_we_take():
    for name in ("_sample", "_validate_generation_mode"):
        assert parameters(getattr(AdaptiveMixin, name)) == parameters(
            getattr(GenerationMixin, name)
        )


def test_greedy_and_sampled_decoding_both_end_in_the_loop_we_override():
    for mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        assert GENERATION_MODES_MAPPING[mode] == "_sample"
