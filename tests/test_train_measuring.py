"""`eval` and `compare`: calibration error, written answers, judges, and what is written down."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from training import run

from adaptive_gen.errors import OptionError
from adaptive_gen.train.answering import likelihood, prompt_of
from adaptive_gen.train.evaluate import BINS, evaluate
from adaptive_gen.train.judge import Judge
from adaptive_gen.train.metrics import resampled_sums

QUESTIONS = [
    {"question": "Who?", "answers": ["ok!", "fine"]},
    {"instruction": "Say it.", "input": "Now", "output": "ok!"},
]


@pytest.fixture
def asked_file(tmp_path):
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return path


@pytest.fixture
def sure_dir(tmp_path, bigram_llama, byte_tokenizer):
    """A saved model that answers ok! at every exit."""
    folder = tmp_path / "sure"
    bigram_llama(b"\nok!").save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


def test_the_error_of_a_confidence_is_its_distance_from_agreement(tiny_llama):
    model = tiny_llama(layers=4)
    ids = [torch.randint(0, 200, (24,)).tolist() for _ in range(12)]
    examples = [{"input_ids": row, "labels": row} for row in ids]
    shallow, full = evaluate(model, examples, [2, 4], batch_size=5, chunk_size=7).exits
    with torch.no_grad():
        out = model(torch.tensor(ids), output_hidden_states=True)
        early = model.lm_head(model.model.norm(out.hidden_states[2]))[:, :-1]
    same = (early.argmax(-1) == out.logits[:, :-1].argmax(-1)).flatten().numpy()
    sure = early.softmax(-1).amax(-1).flatten().numpy()
    place = np.minimum((sure * BINS).astype(int), BINS - 1)
    expected = sum(
        abs(sure[place == b].mean() - same[place == b].mean()) * (place == b).mean()
        for b in range(BINS)
        if (place == b).any()
    )
    assert shallow.ece["max_prob"] == pytest.approx(expected, abs=1e-6)
    assert shallow.agreement == pytest.approx(same.mean()) and full.ece == {}
    for name, value in (("loss", shallow.loss), ("ece max_prob", shallow.ece["max_prob"])):
        low, high = shallow.intervals[name]
        assert low < high and low <= value * 1.05 and high >= value * 0.95
    assert evaluate(model, examples[:1], [2, 4]).exits[0].intervals == {}


def test_a_bootstrap_draws_whole_rows():
    rows = np.array([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
    drawn = np.stack(list(resampled_sums(rows, draws=200)))
    assert np.allclose(drawn[:, 1], 10 * drawn[:, 0]) and len(set(drawn[:, 0])) > 3
    assert drawn[:, 0].mean() == pytest.approx(7.0, abs=0.6)


def test_the_likelihood_is_of_the_answer_s_tokens_and_its_end(tiny_llama, byte_tokenizer):
    model = tiny_llama()
    answers = ["yes", "a longer one"]
    found = likelihood(model, byte_tokenizer, ["Who?", "What else?"], answers)
    for question, answer, value in zip(["Who?", "What else?"], answers, found, strict=True):
        before = byte_tokenizer(prompt_of(question, byte_tokenizer))["input_ids"]
        if before[-1] == byte_tokenizer.eos_token_id:
            before = before[:-1]
        after = byte_tokenizer(answer, add_special_tokens=False)["input_ids"]
        after = [*after, byte_tokenizer.eos_token_id]
        with torch.no_grad():
            scores = model(torch.tensor([[*before, *after]])).logits[0].log_softmax(-1)
        places = range(len(before) - 1, len(before) + len(after) - 1)
        expected = [float(scores[i, t]) for i, t in zip(places, after, strict=True)]
        assert value == pytest.approx(sum(expected) / len(expected), abs=1e-4)


def test_eval_asks_every_exit_and_draws_it(sure_dir, asked_file, tmp_path, monkeypatch, capsys):
    command = ["eval", sure_dir, "--data", asked_file, "--exit-layers", "1,2"]
    code, printed, err = run(
        monkeypatch, capsys, *command, "--json", "--out", tmp_path / "o", "--max-new-tokens", 3
    )
    assert code == 0, err
    result = json.loads(printed)
    assert result == json.loads((tmp_path / "o/eval.json").read_text())
    assert set(result["exits"][0]["ece"]) == {"margin", "max_prob", "entropy"}
    for answered in result["answers"]:
        assert answered["exact_match"] == {"mean": 1.0, "interval": [1.0, 1.0], "questions": 1}
        assert answered["rouge_l"]["questions"] == 1 and answered["f1"]["mean"] == 1.0
        assert answered["likelihood"]["questions"] == 2
    page = (tmp_path / "o/eval.html").read_text()
    assert page.count("<svg") == 6 and "Exact match" in page
    code, printed, _ = run(monkeypatch, capsys, *command, "--asked", 0)
    assert code == 0 and "ECE margin" in printed and "in writing" not in printed


def test_eval_ends_documents_as_training_did_unless_told_otherwise(
    model_dir, data, monkeypatch, capsys
):
    def tokens(*more):
        command = ["eval", model_dir, "--data", data, "--seq-len", 32, "--json", *more]
        code, printed, err = run(monkeypatch, capsys, *command)
        assert code == 0, err
        return json.loads(printed)["tokens"], "as in training" in err

    ended, open_ended = tokens("--eos"), tokens("--no-eos")
    assert ended[0] > open_ended[0]
    assert tokens() == ended, "nothing recorded"
    record = model_dir / "training.json"
    record.write_text(json.dumps({"settings": {"eos": False}}))
    assert tokens() == (open_ended[0], True)
    assert tokens("--eos") == ended, "told otherwise"
    record.write_text("{")
    code, _, err = run(monkeypatch, capsys, "eval", model_dir, "--data", data)
    assert code == 2 and "no readable record of a training run" in err.splitlines()[-1]


class Biased(BaseHTTPRequestHandler):
    """A judge that prefers the longer answer, and the first of two that are equally long."""

    seen: list = []  # noqa: RUF012
    reply = None

    def do_POST(self):
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((self.path, dict(self.headers), content))
        text = content["messages"][0]["content"]
        first = text.split("[Answer 1]\n")[1].split("\n\n[Answer 2]")[0]
        second = text.split("[Answer 2]\n")[1].split("\n\nReply")[0]
        verdict = self.reply or ("1" if len(first) >= len(second) else "Answer 2.")
        body = json.dumps({"choices": [{"message": {"content": verdict}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def judge_server(monkeypatch):
    """A local endpoint; the tests' ban on connections is lifted for it."""
    monkeypatch.undo()
    Biased.seen, Biased.reply = [], None
    server = HTTPServer(("127.0.0.1", 0), Biased)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_judge_sees_both_orders_so_its_taste_for_a_place_cancels(judge_server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    judge = Judge(judge_server, "m")
    assert judge.compare("q", "longer", "short") == 1.0
    assert judge.compare("q", "short", "longer") == -1.0
    assert judge.compare("q", "same!", "equal") == 0.0 and judge.unclear == 0
    path, headers, content = Biased.seen[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert content["model"] == "m" and content["temperature"] == 0 and len(Biased.seen) == 6
    Biased.reply = "I cannot say"
    assert judge.compare("q", "longer", "short") == 0.0 and judge.unclear == 2


def test_a_judge_that_cannot_be_reached_is_one_error(judge_server, monkeypatch):
    with pytest.raises(OptionError, match="check --endpoint"):
        Judge("http://127.0.0.1:9/v1", "m", timeout=2).compare("q", "a", "b")


def test_compare_judges_every_pair_of_exits(
    sure_dir, model_dir, asked_file, tmp_path, judge_server, monkeypatch, capsys
):
    command = ["compare", sure_dir, model_dir, "--data", asked_file, "--max-new-tokens", 4]
    exits = ["--exit-layers", "1,2", "--other-exit-layers", "2,4", "--json"]
    code, printed, err = run(monkeypatch, capsys, *command, *exits, "--out", tmp_path / "o")
    assert code == 0, err
    plain = json.loads(printed)
    assert set(plain["by"]) == {"exact_match", "f1", "rouge_l", "likelihood"}
    pairs = [(c["exit_layer"], c["other_exit_layer"]) for c in plain["by"]["exact_match"]]
    assert pairs == [(ours, theirs) for ours in (1, 2, 4) for theirs in (2, 4)]
    assert all(c["score"] == 1.0 and c["wins"] == 1 for c in plain["by"]["exact_match"])
    assert (tmp_path / "o/compare.html").read_text().count("<td") == 4 * 6
    more = ["--endpoint", judge_server, "--judge", "m"]
    code, printed, err = run(monkeypatch, capsys, *command, *exits, *more)
    assert code == 0, err
    judged = json.loads(printed)
    assert judged["judge"] == {"model": "m", "unclear_replies": 0}
    assert len(Biased.seen) == 2 * 6 * len(QUESTIONS)
    assert all(-1 <= c["score"] <= 1 for c in judged["by"]["judge"])
