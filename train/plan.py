"""What a run will take, before anything is loaded: parameters, memory, steps, time."""

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adaptive_gen import exits
from adaptive_gen.errors import DataError, ModelError, OptionError

from .checks import check_length
from .config import TrainConfig
from .models import check_place, default_exits, keep_first, read_shape, tell_exits
from .objectives import parse
from .saving import RECORD

BYTES = {"float32": 4, "mixed": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Means:
    """What a run is given.

    Args:
        devices: how many take part.
        sharded: whether weights, gradients and optimiser states are split over them (FSDP, ZeRO-3).
        tokens: of one pass over the data; 0 to count them in the data files.
        tokens_per_s: measured throughput of all devices together; 0 if unknown.
        like: directory of a finished run of ours, whose throughput is scaled by the parameters.
    """

    devices: int = 1
    sharded: bool = False
    tokens: int = 0
    tokens_per_s: float = 0.0
    like: Path | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    weights: int
    gradients: int
    optimiser: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.rows()[-1][1]

    def rows(self) -> list[tuple[str, int]]:
        """Names and bytes; the last is the total."""
        parts = [(name, int(size)) for name, size in asdict(self).items()]
        return [*parts, ("total", sum(size for _, size in parts))]


@dataclass(frozen=True)
class Plan:
    """What a run will take."""

    parameters: int
    n_layers: int
    exit_layers: tuple[int, ...]
    memory: Memory  # on each device
    tokens: int | None  # of the whole run; None without data
    steps: int | None
    seconds: float | None  # None without a throughput

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "memory": {**asdict(self.memory), "total": self.memory.total}}


def plan(config: TrainConfig, means: Means) -> Plan:
    """Parameters, memory, steps and time of a config.

    The layers' activations are counted, not guessed: the model's own code runs forward and backward
    on tensors without data. Two depths are run; every further layer adds their difference. What
    reading out the exits holds is known from its code.

    Raises:
        ModelError: no model configuration there, or one that cannot be config.
        OptionError: an exit, objective or dtype that does not exist.
        DataError: data that cannot be read, or a run to compare with that is none.
    """
    check_length(config)
    if config.dtype not in BYTES:
        raise OptionError(f"dtype {config.dtype!r} cannot be planned; give {', '.join(BYTES)}.")
    parse(config.objective)
    shape = _shape(config)
    depth = shape.get_text_config().num_hidden_layers
    if config.exit_layers is None:
        layers = default_exits(shape)
    else:
        layers = exits.parse(config.exit_layers, depth)
    parameters = _parameters(shape)
    held = parameters * BYTES[config.dtype] // (means.devices if means.sharded else 1)
    memory = Memory(held, held, 2 * held, _activations(config, shape, layers))
    steps = _steps(config, means)
    tokens = None if steps is None else steps * config.batch_size * config.seq_len
    rate = means.tokens_per_s or _scaled_rate(means.like, parameters)
    seconds = tokens / rate if tokens and rate else None
    if config.exit_layers is None:
        tell_exits(shape)
    return Plan(parameters, depth, layers, memory, tokens, steps, seconds)


def _steps(config: TrainConfig, means: Means) -> int | None:
    """Optimiser steps of the run: as told, by the token count, or by the data."""
    if config.max_steps > 0:
        return config.max_steps
    if means.tokens:
        sequences = math.ceil(means.tokens / config.seq_len)
    elif config.data:
        from transformers import AutoTokenizer

        from .data import load

        if not config.model or not Path(config.model).is_dir():
            raise OptionError(
                "the data is counted with the model's tokenizer: give a local MODEL, or --tokens."
            )
        tokenizer = AutoTokenizer.from_pretrained(config.model)
        options = {"eos": config.eos, "packing": config.packing}
        sequences = len(load(config.data, tokenizer, config.seq_len, **options))
    else:
        return None
    return math.ceil(math.ceil(sequences / config.batch_size) * config.epochs)


def _scaled_rate(like: Path | None, parameters: int) -> float:
    """Tokens per second of another run, as if time grew with the parameters."""
    if like is None:
        return 0.0
    try:
        notes = json.loads((like / RECORD).read_text(encoding="utf-8"))
        return notes["tokens_per_s"] * notes["parameters"] / parameters
    except (OSError, ValueError, KeyError):
        raise DataError(f"{like} has no {RECORD} of a finished run; give --tokens-per-s.") from None


def _shape(config: TrainConfig) -> Any:
    from transformers import AutoConfig

    if config.from_config:
        return read_shape(config.from_config)
    if not config.model:
        raise OptionError("give MODEL, a directory or hub id, or --from-config FILE.")
    check_place(config.model)
    if Path(config.model).is_dir():
        return read_shape(Path(config.model) / "config.json")
    try:
        return AutoConfig.from_pretrained(config.model)
    except Exception as error:  # the hub raises its own kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ModelError(f"no model configuration at {config.model}: {reason}.") from None


def _empty(shape: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(shape)
    except ValueError as error:
        raise ModelError(f"{shape.model_type} is no causal LM: {error}") from None


def _parameters(shape: Any) -> int:
    return sum(p.numel() for p in _empty(shape).parameters())


def _activations(config: TrainConfig, shape: Any, layers: Sequence[int]) -> int:
    """Peak bytes of one micro-batch beyond weights and gradients."""
    shallow, deep = 2, 4
    found = {}
    for depth in (shallow, deep):
        cut = copy.deepcopy(shape)
        if depth < layers[-1]:
            keep_first(cut, depth)
        found[depth] = _measured(config, cut)
    per_layer = (found[deep] - found[shallow]) // (deep - shallow)
    stored = per_layer * layers[-1]
    passing = found[shallow] - per_layer * shallow  # of the layer that is just computed
    kept, block = _readouts(config, shape, len(layers))
    return stored + kept + max(passing, block)


def _readouts(config: TrainConfig, shape: Any, count: int) -> tuple[int, int]:
    """Bytes that scoring the exits keeps, and holds for a while: see `adaptive_gen.readout`."""
    text = shape.get_text_config()
    narrow = 4 if config.dtype == "float32" else 2
    positions = config.micro_batch * config.seq_len
    states = count * positions * text.hidden_size * narrow
    head = text.vocab_size * text.hidden_size * 4  # its gradient, gathered in single precision
    # Logits in single precision, beside them those of half precision, and the teacher's.
    logits = min(config.chunk_size, positions) * text.vocab_size
    wide = 4 + (narrow if narrow == 2 else 0) + (4 if parse(config.objective).distil else 0)
    return states + head, states + logits * wide


def _measured(config: TrainConfig, shape: Any) -> int:
    """Peak bytes of the backbone's forward and backward pass beyond weights and gradients."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker
    from transformers import AutoModelForCausalLM

    narrow = torch.float32 if config.dtype == "float32" else torch.bfloat16
    with FakeTensorMode():
        model: Any = AutoModelForCausalLM.from_config(shape, dtype=narrow).train()
        if config.gradient_checkpointing:
            new_name = getattr(model, "activation_checkpointing_enable", None)
            (new_name or model.gradient_checkpointing_enable)()
        backbone = model.get_decoder()
        ids = torch.zeros(config.micro_batch, config.seq_len, dtype=torch.long)
        places = torch.arange(config.seq_len)[None]
        for parameter in backbone.parameters():
            parameter.grad = torch.zeros_like(parameter)
        tracker = MemTracker()
        tracker.track_external(backbone)
        with tracker:
            before = _total(tracker.get_tracker_snapshot("current"))
            states = backbone(input_ids=ids, position_ids=places, use_cache=False)
            states.last_hidden_state.sum().backward()
        return _total(tracker.get_tracker_snapshot("peak")) - before


def _total(snapshot: Any) -> int:
    """Bytes on all devices."""
    return sum(kinds["Total"] for kinds in snapshot.values())
