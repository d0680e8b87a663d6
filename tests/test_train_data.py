"""Files become rows, rows become sequences: nothing wasted, prompts not learnt, errors named."""

import gzip
import json
from pathlib import Path

import pytest

from adaptive_gen.errors import DataError
from adaptive_gen.train.data import answer_only, documents, load
from adaptive_gen.train.packing import IGNORE, collator, stream
from adaptive_gen.train.reading import read_rows
from adaptive_gen.train.rows import Dialogue, Pair, Text
from adaptive_gen.train.tokenizer import ASSISTANT, END, USER, train_bpe

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def written(path, content):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(content)
    return path


def learnt(example, tokenizer):
    return tokenizer.decode([label for label in example["labels"] if label != IGNORE])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "Once."}, Text("Once.")),
        ({"prompt": "2+2=", "completion": "4"}, Pair("2+2=", "4")),
        (
            {"instruction": "Add.", "input": "2 2", "output": "4"},
            Dialogue(
                [{"role": "user", "content": "Add.\n\n2 2"}, {"role": "assistant", "content": "4"}]
            ),
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Yo"},
                ]
            },
            Dialogue([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]),
        ),
        (
            {"question": "2+2?", "answers": ["4", "four"]},
            Dialogue([{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]),
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Yo"},
                ]
            },
            Dialogue([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]),
        ),
        (
            {"turns": [["a", "Hi"], ["b", "Yo"], ["b", "There"]]},
            Dialogue(
                [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo\nThere"}]
            ),
        ),
    ],
)
@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.json"])
def test_every_shape_is_read_from_every_kind_of_file(tmp_path, row, expected, name):
    content = json.dumps([row, row]) if name.endswith(".json") else f"{json.dumps(row)}\n\n" * 2
    assert list(read_rows(written(tmp_path / name, content))) == [expected, expected]


@pytest.mark.parametrize("name", ["d.txt", "d.txt.gz"])
def test_text_files_hold_documents(tmp_path, name):
    path = written(tmp_path / name, f"One.\nTwo.\n{END}\nThree.\n{END}\n")
    assert list(read_rows(path)) == [Text("One.\nTwo."), Text("Three.")]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": ', "not JSON"),
        ("[1]", "list"),
        ('{"body": "x"}', "body"),
        ('{"text": 3}', "int"),
        ('{"messages": [{"role": "user"}]}', "content"),
        ('{"messages": [{"role": "user", "content": "Hi"}]}', "assistant"),
        ('{"turns": [["a"]]}', "turns"),
        ('{"question": "2+2?", "answers": []}', "answers"),
        ('{"conversations": [{"from": "human"}]}', "value"),
    ],
)
def test_a_bad_row_is_one_line_with_its_number(tmp_path, line, says):
    path = written(tmp_path / "d.jsonl", f'{{"text": "good"}}\n\n{line}\n')
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    message = str(caught.value)
    assert "line 3" in message and says in message and "\n" not in message


def test_bad_rows_are_named_and_skipped_up_to_a_number(tmp_path, byte_tokenizer, capsys):
    lines = ['{"text": "one two"}', "{", '{"text": "three"}', '{"body": 1}', "[]"]
    path = written(tmp_path / "d.jsonl", "\n".join(lines))
    good = load([path], byte_tokenizer, 64, max_bad_rows=3)
    shown = capsys.readouterr().err
    assert good == load(
        [written(tmp_path / "good.jsonl", f"{lines[0]}\n{lines[2]}")], byte_tokenizer, 64
    )
    for place in ("line 2", "line 4", "line 5"):
        assert f"{path} {place}" in shown.replace("\n", "")
    with pytest.raises(DataError, match=r"line 5.*3 bad rows; --max-bad-rows allows 2"):
        load([path], byte_tokenizer, 64, max_bad_rows=2)
    with pytest.raises(DataError, match="line 2"):
        load([path], byte_tokenizer, 64)


def test_bad_rows_are_counted_over_all_files(tmp_path, byte_tokenizer):
    paths = [written(tmp_path / f"{i}.jsonl", '{"text": "good"}\n{') for i in range(2)]
    assert load(paths, byte_tokenizer, 64, max_bad_rows=2)
    with pytest.raises(DataError, match=r"1.jsonl line 2"):
        load(paths, byte_tokenizer, 64, max_bad_rows=1)


ALPACA = [{"instruction": "Add.", "input": "", "output": str(i)} for i in range(3)]


def test_parquet_and_saved_data_sets_hold_the_same_rows(tmp_path):
    pytest.importorskip("pyarrow")
    datasets = pytest.importorskip("datasets")
    expected = list(read_rows(written(tmp_path / "d.json", json.dumps(ALPACA))))
    found = datasets.Dataset.from_list(ALPACA)
    found.to_parquet(tmp_path / "d.parquet")
    found.save_to_disk(tmp_path / "saved")
    assert list(read_rows(tmp_path / "d.parquet")) == expected
    assert list(read_rows(tmp_path / "saved")) == expected
    datasets.DatasetDict({"train": found}).save_to_disk(tmp_path / "splits")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    for name in ("splits", "broken.parquet", "missing.parquet"):
        with pytest.raises(DataError) as caught:
            list(read_rows(tmp_path / name))
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_data_set_that_cannot_be_had_is_one_line(monkeypatch):
    pytest.importorskip("datasets")
    with pytest.raises(DataError) as caught:
        list(read_rows(Path("hf:nobody/nothing:train")))
    assert "nobody/nothing" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["pyarrow", "datasets"])
def test_a_missing_extra_is_named(tmp_path, monkeypatch, kind):
    import sys

    monkeypatch.setitem(sys.modules, kind, None)
    monkeypatch.setitem(sys.modules, f"{kind}.parquet", None)
    path = written(tmp_path / "d.parquet", "x") if kind == "pyarrow" else Path("hf:a/b")
    with pytest.raises(DataError, match=r"pip install adaptive-gen\[data\]"):
        list(read_rows(path))


def test_files_that_cannot_be_read_say_so(tmp_path):
    (tmp_path / "zip.txt.gz").write_bytes(b"not gzip")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"some text" * 99)[:-12])
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    written(tmp_path / "empty.txt", f"\n{END}\n")
    written(tmp_path / "object.json", "{}")
    names = ["zip.txt.gz", "cut.txt.gz", "latin.txt", "empty.txt", "object.json", "missing.txt"]
    for name in names:
        with pytest.raises(DataError) as caught:
            list(read_rows(tmp_path / name))
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_packing_predicts_every_token_once():
    texts = [list(range(i, i + 7)) for i in range(0, 70, 7)]
    examples = list(stream(texts, 16))
    targets = [token for e in examples for token in e["labels"][1:]]
    assert targets == list(range(1, 70))
    assert all(len(e["input_ids"]) == 16 for e in examples[:-1])
    assert all(e["input_ids"] == e["labels"] for e in examples)


def test_documents_end_and_a_shared_bos_is_not_doubled(byte_tokenizer):
    eos = byte_tokenizer.eos_token_id
    assert list(documents(["ab"], byte_tokenizer, eos=False)) == [[97, 98]]
    assert list(documents(["ab", "c"], byte_tokenizer)) == [[97, 98, eos], [99, eos]]
    own = train_bpe(["a b c"], 300, 64)
    (ids,) = documents(["a b"], own)
    assert ids.count(own.eos_token_id) == 1 and ids[-1] == own.eos_token_id


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_only_answers_are_learnt(byte_tokenizer, template):
    byte_tokenizer.chat_template = template
    messages = [
        {"role": role, "content": text}
        for role, text in (("user", "Q1"), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2"))
    ]
    example = answer_only(Dialogue(messages), byte_tokenizer)
    assert len(example["input_ids"]) == len(example["labels"])
    expected = "A1;A2;" if template else "A1\n\nA2</s>"
    assert learnt(example, byte_tokenizer) == expected
    everything = byte_tokenizer.decode(example["input_ids"])
    if template:
        assert everything == byte_tokenizer.apply_chat_template(messages, tokenize=False)
    else:
        assert "Q1" in everything and "Q2" in everything


def test_what_follows_the_last_answer_is_dropped_not_learnt(byte_tokenizer):
    messages = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "Z"},
    ]
    for template in (TEMPLATE, None):
        byte_tokenizer.chat_template = template
        assert "Z" not in learnt(answer_only(Dialogue(messages), byte_tokenizer), byte_tokenizer)


def test_a_template_that_hides_earlier_answers_learns_the_last(byte_tokenizer):
    byte_tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}[hidden]"
        "{% else %}[{{ m.role }}]{{ m.content }}{% endif %};{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    roles = ["user", "assistant"] * 2
    messages = [{"role": role, "content": f"{role[0]}{i}"} for i, role in enumerate(roles)]
    example = answer_only(Dialogue(messages), byte_tokenizer)
    assert learnt(example, byte_tokenizer) == "a3;"


@pytest.mark.parametrize("name", ["code.py", "table.csv", "page.md", "noname", "a.tar.gz", "b.gz"])
def test_a_kind_of_file_that_is_not_read_is_refused_with_those_that_are(tmp_path, name):
    path = written(tmp_path / name, "print('hello')\n")
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    said = str(caught.value)
    assert name in said and "\n" not in said
    assert ".txt, .jsonl, .json, .txt.gz" in said and ".parquet" in said and "hf:" in said


def test_the_case_of_an_ending_does_not_matter(tmp_path):
    path = written(tmp_path / "D.JSONL", '{"text": "Once."}\n')
    assert list(read_rows(path)) == [Text("Once.")]
    assert list(read_rows(written(tmp_path / "D.TXT", "Once."))) == [Text("Once.")]


def test_a_completion_is_learnt_with_its_end(byte_tokenizer):
    example = answer_only(Pair("2+2=", "4"), byte_tokenizer)
    assert learnt(example, byte_tokenizer) == "4</s>"
    assert example["labels"][:4] == [IGNORE] * 4


def test_an_answer_beyond_the_sequence_is_cut_or_dropped(tmp_path, byte_tokenizer):
    rows = [{"prompt": "p" * 10, "completion": "c" * 10}, {"prompt": "p" * 40, "completion": "c"}]
    path = written(tmp_path / "d.jsonl", "\n".join(map(json.dumps, rows)))
    (example,) = load([path], byte_tokenizer, 16)
    assert learnt(example, byte_tokenizer) == "c" * 6
    with pytest.raises(DataError):
        load([path], byte_tokenizer, 8)


def test_padding_is_masked_and_full_batches_need_no_mask():
    collate = collator(pad_id=9)
    full = collate([{"input_ids": [1, 2], "labels": [1, 2]}] * 2)
    assert "attention_mask" not in full
    mixed = collate(
        [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    )
    assert mixed["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert mixed["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert mixed["labels"].tolist() == [[IGNORE, 2, 3], [IGNORE] * 3]


def test_own_bpe_round_trips_and_its_chat_looks_like_its_documents():
    tokenizer = train_bpe(["Once upon a time, there was a cat. " * 20], 300, 64)
    assert tokenizer.vocab_size <= 300
    ids = tokenizer("Once upon a été 🐈")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Once upon a été 🐈"
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == f"{END}{USER}Hi{ASSISTANT}Yo{END}"
    example = answer_only(Dialogue(chat), tokenizer)
    assert learnt(example, tokenizer) == f"Yo{END}"
    assert example["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
