"""What each exit writes on its own: the sub-model as a causal LM, and its greedy answers."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from adaptive_gen.exit_readouts import readouts

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
    for start in range(0, len(questions), batch_size):
        texts = [prompt_of(q, tokenizer) for q in questions[start : start + batch_size]]
        special = not tokenizer.chat_template
        ids = tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
        if special and ids[0][-1:] == [eos]:  # a tokenizer that ends every text
            ids = [row[:-1] for row in ids]
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
