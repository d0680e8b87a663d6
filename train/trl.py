"""SoFT for users of TRL: its SFTTrainer with the sorted loss, its SFTConfig with what that needs.

    from adaptive_gen.train.trl import SoFTConfig, SoFTTrainer

    trainer = SoFTTrainer(
        model="my-model",
        args=SoFTConfig(output_dir="sorted", exit_layers=[4, 8, 12], objective="uniform"),
        train_dataset=dataset,
    )
    trainer.train()

Data, packing and peft are TRL's own.
"""

from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]

from adaptive_gen.losses import resolve_exits

from .objectives import parse
from .trainer import SortedTraining


@dataclass
class SoFTConfig(SFTConfig):  # pyright: ignore[reportGeneralTypeIssues]
    """SFTConfig, and which exits learn what."""

    exit_layers: list[int] | None = field(
        default=None,
        metadata={"help": "Layers after which the model learns to be read out; default: quarters."},
    )
    objective: str = field(
        default="uniform",
        metadata={"help": "What a step minimises, as for `adaptive-train soft`."},
    )
    loss_chunk_size: int = field(
        default=1024, metadata={"help": "Positions whose logits exist at once."}
    )


class SoFTTrainer(SortedTraining, SFTTrainer):  # pyright: ignore[reportGeneralTypeIssues]
    """SFTTrainer whose loss is the sorted loss; logs the mean loss of each exit."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        objective = parse(self.args.objective)
        exits = resolve_exits(self.model, self.args.exit_layers)
        self.sort(exits, objective, self.args.loss_chunk_size)
        self.model.config.exit_layers = list(exits)
        self.model.config.exit_objective = str(objective)
