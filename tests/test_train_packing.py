"""Documents that share a sequence learn as if each were alone, and waste little."""

import pytest
import torch
from training import losses, options

from adaptive_gen.losses import sorted_losses
from adaptive_gen.train.data import load
from adaptive_gen.train.packing import IGNORE, collator, fill, stream
from adaptive_gen.train.run import train


def texts(lengths):
    return [torch.randint(3, 200, (length,)).tolist() for length in lengths]


def answer(length, prompt):
    ids = texts([length])[0]
    return {"input_ids": ids, "labels": [IGNORE] * prompt + ids[prompt:]}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_document_sees_itself_alone(tiny_llama, attention):
    """Loss and gradient of packed batches, padding included, are those of the documents apart."""
    model = tiny_llama(attn_implementation=attention).double()
    documents, answers = texts([5, 9, 20, 3, 14]), [answer(8, 3), answer(12, 4)]
    examples = list(fill(documents, answers, 32))
    assert [len(e["input_ids"]) for e in examples] == [14, 23, 22, 12]
    inputs = collator(0)(examples)
    assert "attention_mask" not in inputs
    packed = sorted_losses(model, exit_layers=[2, 6], **inputs).loss
    packed.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    items = int((inputs["labels"][:, 1:] != IGNORE).sum())
    total = 0.0
    apart = [{"input_ids": ids, "labels": ids} for ids in documents]
    for one in (*apart, *answers):
        row = torch.tensor([one["input_ids"]]), torch.tensor([one["labels"]])
        part = sorted_losses(model, *row, exit_layers=[2, 6], num_items_in_batch=items).loss
        part.backward()
        total += part.item()
    assert packed.item() == pytest.approx(total, abs=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-5, rtol=1e-4)


def test_joined_texts_do_see_what_stands_before_them(tiny_llama):
    """The other packing is another task: the claim above can fail."""
    model = tiny_llama().double()
    some = texts([15, 15])
    found = [
        sorted_losses(model, exit_layers=[6], **collator(0)(list(examples))).loss.item()
        for examples in (fill(some, [], 30), stream(some, 30))
    ]
    assert abs(found[0] - found[1]) > 1e-3


def test_a_long_text_is_cut_and_every_token_but_its_first_is_learnt_once():
    (text,) = texts([70])
    examples = list(fill([text], [], 16))
    assert all(len(e["input_ids"]) <= 16 for e in examples)
    learnt = [t for e in examples for t in e["labels"] if t != IGNORE]
    assert learnt == text[1:]


def test_packing_by_documents_trains_and_takes_fewer_sequences(
    tmp_path, model_dir, data, byte_tokenizer
):
    packed = load([data], byte_tokenizer, 256, packing="documents")
    assert 1 < len(packed) <= 20  # forty stories of about ninety tokens
    out = train(
        options(model_dir, data, tmp_path / "out", packing="documents", seq_len=256), "soft"
    )
    assert all(row["loss"] > 0 for row in losses(out))
