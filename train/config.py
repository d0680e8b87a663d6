"""What one training run is told; command line and YAML file are made from these fields."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer


def _option(text: str, *names: str, **more) -> typer.models.OptionInfo:
    return typer.Option(*names, help=text, **more)


@dataclass(frozen=True)
class TrainConfig:
    """One run. `exit_layers`, `objective` and `layers` belong to some methods only."""

    model: Annotated[
        str | None, typer.Argument(help="Directory or hub id of a causal LM.", metavar="[MODEL]")
    ] = None
    data: Annotated[
        list[Path],
        _option("Files (.txt .jsonl .json .parquet), or hf:NAME[:SPLIT].", metavar="FILE..."),
    ] = ()  # type: ignore[assignment]
    eval_data: Annotated[
        list[Path], _option("Held-out files, scored at every checkpoint.", metavar="FILE...")
    ] = ()  # type: ignore[assignment]
    eval_share: Annotated[
        float, _option("Share of the rows of --data to hold out instead.", min=0.0, max=0.5)
    ] = 0.0
    out: Annotated[Path, _option("Directory for the trained model.")] = Path("trained")
    exit_layers: Annotated[
        str | None,
        _option("Layers to train as exits, as 4,8,12. Default: the model's own, else quarters."),
    ] = None
    objective: Annotated[
        str,
        _option(
            "What a step minimises: uniform, linear, quadratic; every, sampled, rotating, gradual; "
            "distil:0.6, full:2, dropout:0.1, propagated:0.5; joined by +."
        ),
    ] = "uniform"
    layers: Annotated[int, _option("Layers of the model to keep; the rest is cut off.", min=1)] = 0
    adapter: Annotated[
        str | None,
        _option(
            "Train lora:RANK or dora:RANK and merge it; or exit-norm, exit-block, exit-head: a "
            "readout for each exit of the frozen model. Default: all weights."
        ),
    ] = None
    from_config: Annotated[
        Path | None, _option("Start a new model from this config.json, with an own BPE.")
    ] = None
    vocab_size: Annotated[int, _option("Size of the own BPE.", min=260)] = 4096
    lr: Annotated[float, _option("Peak learning rate.", min=0.0)] = 2e-5
    min_lr: Annotated[
        float, _option("Share of the peak at which the cosine ends.", min=0.0, max=1.0)
    ] = 0.05
    epochs: Annotated[float, _option("Passes over the data.", min=0.0)] = 1.0
    max_steps: Annotated[int, _option("Optimiser steps, instead of epochs.")] = -1
    batch_size: Annotated[int, _option("Sequences in an optimiser step.", min=1)] = 32
    micro_batch: Annotated[int, _option("Sequences in one forward pass.", min=1)] = 8
    seq_len: Annotated[int, _option("Tokens in a sequence.", min=8)] = 512
    packing: Annotated[
        str,
        _option(
            "stream: texts are one stream, answers stand alone. documents: texts and answers share "
            "sequences and none sees another."
        ),
    ] = "stream"
    max_bad_rows: Annotated[int, _option("Rows to skip with a message.", min=0)] = 0
    eos: Annotated[
        bool, _option("End plain-text documents with the EOS token.", "--eos/--no-eos")
    ] = True
    warmup: Annotated[float, _option("Share of the steps that warm up.", min=0.0, max=1.0)] = 0.03
    weight_decay: Annotated[float, _option("AdamW's decay of matrices.", min=0.0)] = 0.1
    chunk_size: Annotated[int, _option("Positions whose logits exist at once.", min=1)] = 1024
    dtype: Annotated[
        str,
        _option("float32, bfloat16, auto; mixed: float32 weights, bfloat16 products."),
    ] = "float32"
    gradient_checkpointing: Annotated[
        bool,
        _option("Keep one state per layer, compute the rest twice.", "--gradient-checkpointing"),
    ] = False
    compile: Annotated[bool, _option("Compile the decoder layers.", "--compile")] = False
    save_steps: Annotated[int, _option("Steps between checkpoints.", min=1)] = 500
    log_steps: Annotated[int, _option("Steps between log lines.", min=1)] = 20
    tensorboard: Annotated[
        bool, _option("Log to OUT/tensorboard too; OUT/log.jsonl is always there.", "--tensorboard")
    ] = False
    resume: Annotated[bool, _option("Go on from the last checkpoint.", "--resume")] = False
    seed: Annotated[int, _option("Seed of data order and new weights.")] = 0
