"""One training run: model and data in, a trained model directory out."""

import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptive_gen import exits
from adaptive_gen.errors import OptionError
from adaptive_gen.exit_readouts import add_readouts, exits_of, load_readouts
from adaptive_gen.ui import note

from .adapters import exit_readout
from .arguments import training_arguments
from .checks import check_data, check_length, check_writable, checkpoint_to_resume
from .config import TrainConfig
from .data import hold_out, load, rows_of, sequences, texts_of
from .models import (
    default_exits,
    load_model,
    new_model,
    new_tokenizer,
    read_shape,
    tell_exits,
)
from .objectives import Objective, parse
from .packing import collator
from .saving import record, save, settings_of

if TYPE_CHECKING:
    from .evaluate import Evaluation


def train(config: TrainConfig, method: str) -> Path:
    """Train and save.

    Args:
        config: the run.
        method: `soft` trains all exits, `sft` full depth alone, `ict` a new head per exit of a
            frozen model, `extract` the first layers of a model as a model of its own.

    Returns:
        The directory with the trained model and its tokenizer.
    """
    if bool(config.model) == bool(config.from_config):
        raise OptionError("give either MODEL, a directory or hub id, or --from-config FILE.")
    objective = parse(config.objective)
    check_length(config)
    check_data([*config.data, *config.eval_data])
    if config.eval_data and config.eval_share:
        raise OptionError("--eval-data and --eval-share both say what is held out; give one.")
    check_writable(config.out)
    resume = checkpoint_to_resume(config.out, config.resume)
    model, tokenizer = _start(config)
    layers = _exit_layers(config, model, method)
    kind = "head" if method == "ict" else exit_readout(config.adapter)
    if kind:
        if len(layers) == 1:
            raise OptionError(
                f"--adapter {config.adapter} needs exits before full depth; use soft."
            )
        add_readouts(model, layers, kind)
        objective = replace(objective, full=0.0)  # frozen full depth has nothing to learn
    elif config.adapter:
        from .adapters import add_adapter

        model = add_adapter(model, config.adapter)
    trainer = _trainer(config, model, tokenizer, layers, objective)
    if trainer.is_fsdp_enabled and (config.adapter or kind):
        raise OptionError("adapters and heads of the exits' own are not sharded; use DDP for them.")
    if config.from_config and main_process():
        tokenizer.save_pretrained(config.out)  # a resumed run must not learn another BPE
    if config.compile:
        _compile(model)
    if config.exit_layers is None and len(layers) > 1 and main_process():
        tell_exits(model.config)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if trainer.interrupted:
        raise KeyboardInterrupt
    weights = trainer.gathered()
    if config.adapter and not kind:
        from .adapters import merged

        model = merged(model)
    if method == "soft":
        model.config.exit_layers = list(layers)
        model.config.exit_objective = str(objective)
    if main_process():
        notes = record(config, method, objective, trainer)
        save(model, tokenizer, config.out, notes, weights)
    return config.out


def evaluate_model(
    name: str,
    paths: Sequence[Path],
    exit_layers: str | None,
    *,
    seq_len: int = 512,
    dtype: str = "float32",
    eos: bool | None = None,
    max_tokens: int = 0,
    asked: int = 0,
    max_new_tokens: int = 50,
) -> "Evaluation":
    """Load a model and data, and score the exits.

    Args:
        name: directory or hub id.
        paths: data files.
        exit_layers: as on the command line; None for the model's own, else quarters.
        seq_len: longest sequence.
        dtype: to run in.
        eos: whether plain-text documents end with the EOS token; None as the model was trained.
        max_tokens: cap on the tokens scored; 0 scores all.
        asked: questions and instructions to answer in writing, as far as the data has any.
        max_new_tokens: longest answer.
    """
    from adaptive_gen.losses import resolve_exits

    from .asking import ask, questions_in
    from .evaluate import evaluate

    check_data(paths)
    chosen = exits.parse(exit_layers) if exit_layers else None
    as_trained = eos is None
    if eos is None:
        eos = bool(settings_of(Path(name)).get("eos", True))
    model, tokenizer = load_model(name, dtype)
    load_readouts(model, Path(name))
    layers = resolve_exits(model, chosen or exits_of(model) or None)
    examples = load(paths, tokenizer, fitting(seq_len, model), eos=eos)
    if max_tokens > 0:
        used = accumulate(len(e["input_ids"]) - 1 for e in examples)
        examples = examples[: max(1, sum(count <= max_tokens for count in used))]
    if as_trained and not eos:
        note("documents end without EOS, as in training; --eos ends them with it")
    found = evaluate(model, examples, layers)
    if asked and (rows := questions_in(paths, asked)):
        answered = ask(model, tokenizer, rows, layers, max_new_tokens=max_new_tokens)
        found = replace(found, answers=tuple(answered))
    return found


def fitting(seq_len: int, model: Any) -> int:
    """The sequence length asked for, or the model's longest where that is less."""
    return min(seq_len, getattr(model.config, "max_position_embeddings", None) or seq_len)


def main_process() -> bool:
    """Whether this process writes; `torchrun` and `accelerate launch` start several."""
    return int(os.environ.get("RANK", "0")) == 0


def _start(config: TrainConfig) -> tuple[Any, Any]:
    """The model and tokenizer to start from; a checkpoint's weights come in later."""
    if config.from_config is None:
        return load_model(str(config.model), config.dtype, config.layers)
    shape = read_shape(config.from_config)
    if config.resume and (config.out / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(config.out)
    else:
        tokenizer = new_tokenizer(texts_of(config.data), shape, config.vocab_size)
    return new_model(shape, tokenizer, config.seed), tokenizer


def _exit_layers(config: TrainConfig, model: Any, method: str) -> tuple[int, ...]:
    depth = model.config.get_text_config().num_hidden_layers
    if method in ("sft", "extract"):
        return (depth,)
    if config.exit_layers is None:
        return default_exits(model.config)
    return exits.parse(config.exit_layers, depth)


def _compile(model: Any) -> None:
    """Compile layer by layer, under the hooks that read the exits and with no graph per depth."""
    import torch

    from adaptive_gen.naming import Parts

    for layer in Parts(model).layers:
        layer.forward = torch.compile(layer.forward)


def _trainer(
    config: TrainConfig, model: Any, tokenizer: Any, layers: tuple[int, ...], objective: Objective
) -> Any:
    from .trainer import SoFTTrainer

    rows, held_out = rows_of(config.data, config.max_bad_rows), []
    if config.eval_data:
        held_out = rows_of(config.eval_data, config.max_bad_rows)
    elif config.eval_share:
        rows, held_out = hold_out(rows, config.eval_share, config.seed)
    length = fitting(config.seq_len, model)
    examples, unseen = (
        sequences(part, tokenizer, length, eos=config.eos, packing=config.packing) if part else None
        for part in (rows, held_out)
    )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return SoFTTrainer(
        model=model,
        args=training_arguments(config, partial=objective.partial, held_out=unseen is not None),
        train_dataset=examples,  # type: ignore[arg-type]
        eval_dataset=unseen,  # type: ignore[arg-type]
        data_collator=collator(pad),
        exit_layers=layers,
        objective=objective,
        chunk_size=config.chunk_size,
        log_dir=config.out if main_process() else None,
        tensorboard=config.tensorboard,
    )
