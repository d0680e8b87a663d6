"""What each exit writes on its own: the sub-model as a causal LM, and its greedy answers."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adaptive_gen.errors import ModelError
from adaptive_gen.exit_readouts import readouts
from adaptive_gen.ui import progress

from .data import PLAIN_PROMPT


def sub_model(model: Any, exit_layer: int) -> Any:
    """The first `exit_layer` layers of `model` with its norm and head, sharing all weights.

    Args:
        model: a causal LM of the Llama shape; it is not changed.
        exit_layer: count of layers.

    Returns:
        A causal LM. An exit with a readout of its own is read out through that.
    """
    cut = _shallow(model)
    cut.config = copy.deepcopy(model.config)
    text = cut.config.get_text_config()
    text.num_hidden_layers = exit_layer
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:exit_layer]
    decoder = _shallow(model.get_decoder())
    if not {"layers", "norm"} <= set(decoder._modules):
        raise ModelError(
            f"{type(model).__name__} does not call its parts `layers` and `norm`, so its exits "
            "cannot answer alone here; leave the written answers out (--asked 0)."
        )
    decoder.config = text
    decoder.layers = nn.ModuleList(list(decoder.layers)[:exit_layer])
    cut._modules[model.base_model_prefix] = decoder
    readout = readouts(model, [exit_layer])[exit_layer]
    decoder.norm = readout.norm
    cut.set_output_embeddings(readout.head.linear)
    return cut.eval()


def _shallow(module: nn.Module) -> Any:
    """The same module with a list of submodules of its own."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def prompt_of(question: str, tokenizer: Any) -> str:
    """A user's question as the training data writes it."""
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
    return PLAIN_PROMPT.format(question)


def _prompt_ids(questions: Sequence[str], tokenizer: Any) -> list[list[int]]:
    texts = [prompt_of(question, tokenizer) for question in questions]
    special = not tokenizer.chat_template
    ids = tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
    if special and ids[0][-1:] == [tokenizer.eos_token_id]:  # a tokenizer that ends every text
        ids = [row[:-1] for row in ids]
    return ids


@torch.no_grad()
def answers(
    model: Any,
    tokenizer: Any,
    questions: Sequence[str],
    *,
    max_new_tokens: int = 50,
    batch_size: int = 16,
) -> list[str]:
    """Greedy answers of a model at full depth.

    Args:
        model: a causal LM, such as a sub-model.
        tokenizer: of the model.
        questions: what a user asks.
        max_new_tokens: longest answer.
        batch_size: questions at once, padded on the left.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    eos = tokenizer.eos_token_id
    written = []
    longest = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    depth = model.config.get_text_config().num_hidden_layers
    starts = range(0, len(questions), batch_size)
    for start in progress(starts, f"answering at exit {depth}", total=len(starts)):
        ids = _prompt_ids(questions[start : start + batch_size], tokenizer)
        ids = [row[-(longest - max_new_tokens) :] for row in ids]
        width = max(map(len, ids))
        filled = torch.tensor([[pad] * (width - len(row)) + row for row in ids])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
        out = model.generate(
            input_ids=filled.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=eos,
        )
        written += tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    return [text.strip() for text in written]


@torch.no_grad()
def likelihood(
    model: Any,
    tokenizer: Any,
    questions: Sequence[str],
    said: Sequence[str],
    *,
    batch_size: int = 16,
) -> list[float]:
    """How likely a model at full depth finds answers, with the EOS that ends each.

    Args:
        model: a causal LM.
        tokenizer: of the model.
        questions: what was asked.
        said: the answers.
        batch_size: answers at once.

    Returns:
        Mean log-probability of an answer's tokens, in nats.
    """
    longest = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    found: list[float] = []
    starts = range(0, len(said), batch_size)
    for start in progress(starts, "weighing the answers", total=len(starts)):
        part = slice(start, start + batch_size)
        asked, told = _prompt_ids(questions[part], tokenizer), []
        for answer in said[part]:
            ids = tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"]
            told.append([*ids, tokenizer.eos_token_id][: longest // 2])
        rows = [(a + b)[-longest:] for a, b in zip(asked, told, strict=True)]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        logits = model(input_ids=ids, attention_mask=mask.to(model.device), use_cache=False).logits
        for row, answer, scores in zip(rows, told, logits, strict=True):
            found.append(_mean_chance(scores[: len(row) - 1], row, len(answer)))
    return found


def _mean_chance(logits: Tensor, row: list[int], length: int) -> float:
    """Mean log-probability of the last `length` ids of a row; logits [len(row) - 1, vocab]."""
    targets = torch.tensor(row[-length:], device=logits.device)
    chances = logits[-length:].float().log_softmax(-1)
    return float(chances.gather(-1, targets[:, None]).mean())
