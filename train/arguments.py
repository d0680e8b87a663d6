"""The Trainer's own arguments, from the settings of a run."""

import os
from typing import Any

from adaptive_gen.errors import OptionError

from .checks import CHECKPOINTS
from .config import TrainConfig


def training_arguments(config: TrainConfig, *, partial: bool, held_out: bool = False) -> Any:
    """Arguments for transformers' Trainer.

    Args:
        config: the run.
        partial: whether steps leave parameters without a gradient, which DDP must look out for.
        held_out: whether there are held-out sequences, to be scored whenever a checkpoint is saved.

    Raises:
        OptionError: a batch that the processes cannot share evenly.
    """
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
    no_gpu = not torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(config.out / CHECKPOINTS),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=config.batch_size // together,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps,
        learning_rate=config.lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": config.min_lr},
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        adam_beta2=0.95,
        bf16=config.dtype == "mixed",
        **_recomputing(TrainingArguments, config.gradient_checkpointing),
        logging_steps=config.log_steps,
        save_steps=config.save_steps,
        eval_strategy="steps" if held_out else "no",
        eval_steps=config.save_steps,
        per_device_eval_batch_size=micro,
        prediction_loss_only=True,
        save_total_limit=2,
        seed=config.seed,
        report_to=[],
        use_cpu=no_gpu and (processes > 1 or config.dtype == "mixed"),
        ddp_backend="gloo" if no_gpu and processes > 1 else None,
        ddp_find_unused_parameters=partial,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        average_tokens_across_devices=True,  # makes the label count that of all processes
    )


def _recomputing(arguments: Any, wanted: bool) -> dict[str, Any]:
    """The keyword that asks for it: transformers renamed it on the way from 5.17 to 5.23."""
    new, old = "activation_checkpointing", "gradient_checkpointing"
    return {new if new in arguments.__dataclass_fields__ else old: True} if wanted else {}
