"""One training run: model and data in, a trained model directory out."""

import os
import tempfile
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptive_gen import exits
from adaptive_gen.errors import OptionError

from .checks import CHECKPOINTS, check_data, check_writable, checkpoint_to_resume
from .config import TrainConfig
from .data import Example, collator, load, texts_of
from .models import load_model, new_model, new_tokenizer, read_shape

if TYPE_CHECKING:
    from .evaluate import Evaluation


def train(config: TrainConfig, *, sorted_exits: bool) -> Path:
    """Train and save.

    Args:
        config: the run.
        sorted_exits: whether intermediate exits are trained (`soft`) or full depth alone (`sft`).

    Returns:
        The directory with the trained model and its tokenizer.
    """
    if bool(config.model) == bool(config.from_config):
        raise OptionError("give either MODEL, a directory or hub id, or --from-config FILE.")
    check_data(config.data)
    check_writable(config.out)
    resume = checkpoint_to_resume(config.out, config.resume)
    model, tokenizer = _start(config)
    layers = _exit_layers(config, model, sorted_exits)
    examples = load(config.data, tokenizer, fitting(config.seq_len, model), eos=config.eos)
    trainer = _trainer(config, model, tokenizer, layers, examples)
    if config.from_config and _main_process():
        tokenizer.save_pretrained(config.out)  # a resumed run must not learn another BPE
    if config.compile:
        _compile(model)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if trainer.interrupted:
        raise KeyboardInterrupt
    if sorted_exits:
        model.config.exit_layers = list(layers)
    if _main_process():
        save(model, tokenizer, config.out)
    return config.out


def evaluate_model(
    name: str,
    paths: Sequence[Path],
    exit_layers: str | None,
    *,
    seq_len: int = 512,
    dtype: str = "float32",
    eos: bool = True,
    max_tokens: int = 0,
) -> "Evaluation":
    """Load a model and data, and score the exits.

    Args:
        name: directory or hub id.
        paths: data files.
        exit_layers: as on the command line; None for the model's own, else quarters.
        seq_len: longest sequence.
        dtype: to run in.
        eos: whether plain-text documents end with the EOS token.
        max_tokens: cap on the tokens scored; 0 scores all.
    """
    from adaptive_gen.losses import resolve_exits

    from .evaluate import evaluate

    check_data(paths)
    chosen = exits.parse(exit_layers) if exit_layers else None
    model, tokenizer = load_model(name, dtype)
    layers = resolve_exits(model, chosen)
    examples = load(paths, tokenizer, fitting(seq_len, model), eos=eos)
    if max_tokens > 0:
        used = accumulate(len(e["input_ids"]) - 1 for e in examples)
        examples = examples[: max(1, sum(count <= max_tokens for count in used))]
    return evaluate(model, examples, layers)


def fitting(seq_len: int, model: Any) -> int:
    """The sequence length asked for, or the model's longest where that is less."""
    return min(seq_len, getattr(model.config, "max_position_embeddings", None) or seq_len)


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """Save beside the target and move file by file: a reader never sees half a model."""
    out.mkdir(parents=True, exist_ok=True)
    model.config.use_cache = True  # the Trainer turned it off
    with tempfile.TemporaryDirectory(dir=out, prefix=".saving-") as name:
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
        for file in Path(name).iterdir():
            file.chmod(0o644)  # safetensors writes for its owner alone
            os.replace(file, out / file.name)


def _main_process() -> bool:
    """Whether this process writes; `torchrun` and `accelerate launch` start several."""
    return int(os.environ.get("RANK", "0")) == 0


def _start(config: TrainConfig) -> tuple[Any, Any]:
    """The model and tokenizer to start from; a checkpoint's weights come in later."""
    if config.from_config is None:
        return load_model(str(config.model), config.dtype)
    shape = read_shape(config.from_config)
    if config.resume and (config.out / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(config.out)
    else:
        tokenizer = new_tokenizer(texts_of(config.data), shape, config.vocab_size)
    return new_model(shape, tokenizer, config.seed), tokenizer


def _exit_layers(config: TrainConfig, model: Any, sorted_exits: bool) -> tuple[int, ...]:
    depth = model.config.get_text_config().num_hidden_layers
    if not sorted_exits:
        return (depth,)
    if config.exit_layers is None:
        return exits.quarter_points(depth)
    return exits.parse(config.exit_layers, depth)


def _compile(model: Any) -> None:
    """Compile layer by layer, under the hooks that read the exits and with no graph per depth."""
    import torch

    for layer in model.get_decoder().layers:
        layer.forward = torch.compile(layer.forward)


def _trainer(
    config: TrainConfig,
    model: Any,
    tokenizer: Any,
    layers: tuple[int, ...],
    examples: Sequence[Example],
) -> Any:
    from .trainer import SoFTTrainer

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return SoFTTrainer(
        model=model,
        args=_arguments(config),
        train_dataset=examples,  # type: ignore[arg-type]
        data_collator=collator(pad),
        exit_layers=layers,
        distil=config.distill,
        weights={layers[-1]: config.full_weight},
        chunk_size=config.chunk_size,
    )


def _arguments(config: TrainConfig) -> Any:
    """The Trainer's own arguments for this run."""
    import torch
    from transformers import TrainingArguments

    micro = min(config.micro_batch, config.batch_size)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    together = micro * processes
    if config.batch_size % together:
        raise OptionError(
            f"--batch-size {config.batch_size} is no multiple of the {together} sequences that all "
            "processes take at once (--micro-batch each); choose one that is."
        )
    cores_only = processes > 1 and not torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(config.out / CHECKPOINTS),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=config.batch_size // together,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps,
        learning_rate=config.lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.05},
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        adam_beta2=0.95,
        logging_steps=config.log_steps,
        save_steps=config.save_steps,
        save_total_limit=2,
        seed=config.seed,
        report_to=[],
        use_cpu=cores_only,
        ddp_backend="gloo" if cores_only else None,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        average_tokens_across_devices=True,  # makes the label count that of all processes
    )
