"""The `adaptive-gen` command as its user meets it: transcripts, JSON, one line for each mistake."""

import importlib
import io
import json
import re
import sys
from typing import NamedTuple

import pytest
from transformers import BertConfig, BertForMaskedLM

from adaptive_gen import cli, ui
from adaptive_gen.calibration import Calibration, ConfidenceMap, OperatingPoint, save

TEMPLATE = "{% for m in messages %}{{ m.content }};{% endfor %}:"


class Shown(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `adaptive-gen` with the given words and a pipe on stdin; speeds are shown as N."""

    def run(*words, stdin=""):
        monkeypatch.setattr(sys, "argv", ["adaptive-gen", *map(str, words)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return Shown(stop.value.code or 0, out, re.sub(r"\d+ tok/s", "N tok/s", err))

    return run


@pytest.fixture
def model(tmp_path, bigram_llama, byte_tokenizer):
    """A directory with a 4-layer model that answers "ok!" to whatever ends with a colon."""
    folder = tmp_path / "model"
    bigram_llama(b":ok!", layers=4).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def calibrated(model):
    """The same model with two operating points, of which the second is the default."""
    curve = ConfidenceMap(raw=(0.0, 1.0), chance=(0.0, 1.0))
    points = (
        OperatingPoint(0.95, (2, 4), 2.6, 1.54, agreement=0.99, wall_speedup=1.2, tokens=100),
        OperatingPoint(0.9, (2, 4), 2.0, 2.0, agreement=0.97, wall_speedup=1.5, tokens=100),
    )
    maps = {"margin": {2: curve}}
    save(Calibration(4, "margin", "recompute", maps, points, 1, {}, {}), model)
    return model


def test_generate_answers_on_stdout_and_accounts_on_stderr(run, model, caplog):
    shown = run("generate", "say:", "--model", model, "--threshold", "0.9")
    # The first token comes from the prefill, at full depth; "k", "!" and the end leave at layer 1.
    footer = "4 tokens · N tok/s · depth 1.8/4 · layer_speedup 2.29x\n"
    assert shown == Shown(0, "ok!\n", footer)
    # pytest catches the log, which otherwise goes to stderr as it is.
    [told] = caplog.messages
    assert "no calibration" in told and "calibrate run" in told


def test_generate_reads_a_pipe(run, model):
    shown = run("generate", "-m", model, "--threshold", "1", stdin="say:\n")
    assert shown == Shown(0, "ok!\n", "4 tokens · N tok/s · depth 4.0/4 · layer_speedup 1.00x\n")


def test_generate_stops_at_max_new_tokens(run, model):
    assert run("generate", "say:", "-m", model, "--max-new-tokens", 2).out == "ok\n"


def test_generate_prints_one_json_document(run, model):
    shown = run("generate", "say:", "-m", model, "--json", "--threshold", "0.9")
    document = json.loads(shown.out)
    assert shown.code == 0
    assert document["text"] == "ok!"
    assert document["exit_histogram"] == {"1": 3, "4": 1}
    assert [t["exit_layer"] for t in document["tokens"]] == [4, 1, 1, 1]
    assert [t["confidence"] is None for t in document["tokens"]] == [True, False, False, False]


def test_chat_answers_a_pipe_line_by_line(run, model):
    shown = run("chat", model, "--threshold", "1", stdin="hello:\n\nand now:\nthis is no question")
    footer = "{} tokens · N tok/s · depth 4.0/4 · layer_speedup 1.00x\n"
    assert shown == Shown(0, "ok!\nok!\n\n", footer.format(4) * 2 + footer.format(1))


def test_chat_uses_the_chat_template(run, model, byte_tokenizer):
    byte_tokenizer.chat_template = TEMPLATE
    byte_tokenizer.save_pretrained(model)
    assert run("chat", model, "--threshold", "1", stdin="hello\nyou\n").out == "ok!\nok!\n"


def test_ctrl_c_ends_the_reply_and_not_the_chat(run, model, monkeypatch):
    shown = []

    def token(content, depth):
        shown.append(content)
        if len(shown) == 2:
            raise KeyboardInterrupt
        sys.stdout.write(content)

    monkeypatch.setattr(ui, "token", token)
    assert run("chat", model, stdin="one:\ntwo:\n")[:2] == (0, "o\nok!\n")


def test_ctrl_c_ends_generate_with_the_signal_s_exit_code(run, model, monkeypatch):
    def interrupt(content, depth):
        raise KeyboardInterrupt

    monkeypatch.setattr(ui, "token", interrupt)
    shown = run("generate", "say:", "-m", model)
    assert shown.code == 130
    assert "1 tokens" in shown.err


def test_the_footer_names_the_measured_speed_only_where_a_calibrated_point_is_in_use(
    run, calibrated
):
    start = "4 tokens · N tok/s · depth 2.5/4 · "
    words = ("generate", "say:", "-m", calibrated)
    assert run(*words).err == f"{start}wall_speedup 1.50x (calibrated)\n"
    assert run(*words, "--target-speedup", "1.1").err == f"{start}wall_speedup 1.20x (calibrated)\n"
    assert "calibrated" not in run(*words, "--temperature", "0.8").err  # greedy texts were measured
    assert run(*words, "--threshold", "0.9").err == f"{start}layer_speedup 1.60x\n"


def test_another_calibration_can_be_named(run, calibrated, model, tmp_path):
    other = tmp_path / "other.json"
    other.write_text((calibrated / "calibration.json").read_text().replace("1.5,", "1.75,"))
    shown = run("generate", "say:", "-m", model, "--calibration", other)
    assert shown.err.endswith("wall_speedup 1.75x (calibrated)\n")


def test_a_target_beyond_every_point_is_one_line_and_exit_code_1(run, calibrated):
    shown = run("generate", "say:", "-m", calibrated, "--target-speedup", "9")
    assert shown.code == 1
    assert shown.out == ""
    assert "1.50x at 97.0% agreement" in shown.err and shown.err.count("\n") == 1


def test_info_describes_a_model(run, calibrated):
    document = json.loads(run("info", calibrated, "--json").out)
    assert document["n_layers"] == 4
    assert document["exit_layers"] == [2, 4]
    assert [p["wall_speedup"] for p in document["points"]] == [1.2, 1.5]
    assert [p["default"] for p in document["points"]] == [False, True]
    table = run("info", calibrated).out
    assert re.search(r"^exit_layers +2,4$", table, re.MULTILINE)
    assert re.search(r"^0.900 +2,4 +2.000 +2.000 +1.500 +0.970 +yes$", table, re.MULTILINE)


def test_bench_ends_with_one_json_document(run, model, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one:\ntwo:\n")
    shown = run(
        *("bench", model, "--threshold", "0.9", "--prompts", prompts),
        *("--rounds", 1, "--max-new-tokens", 3, "--json"),
    )
    *table, last = shown.out.splitlines()
    document = json.loads(last)
    assert {"wall_speedup", "layer_speedup", "mean_depth", "n_layers", "agreement"} <= set(document)
    assert set(document["tokens_per_s"]) == {"transformers", "full_depth", "adaptive"}
    assert document["agreement"] == 1
    assert document["mean_depth"] == 2  # full depth once, the first exit twice
    assert [line.split()[0] for line in table[2:5]] == ["transformers", "full_depth", "adaptive"]
    assert "wall_speedup" in table[5]


def test_weights_in_8_bits_are_an_option(run, model, tmp_path):
    document = json.loads(run("generate", "say:", "-m", model, "--weights", "int8", "--json").out)
    assert document["engine"].endswith("-int8")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one:\ntwo:\n")
    fewest = ("--rounds", 1, "--max-new-tokens", 3)
    shown = run("bench", model, "--prompts", prompts, "--weights", "int8", *fewest)
    assert "int8 weights" in shown.out.splitlines()[0]


COMMANDS = {
    "chat": lambda model: ["chat", model],
    "generate": lambda model: ["generate", "say:", "--model", model],
    "info": lambda model: ["info", model],
    "bench": lambda model: ["bench", model],
}
DEEP = [command for command in COMMANDS if command != "info"]


def assert_one_line(shown, *words):
    assert shown.code in (1, 2)
    assert shown.out == ""
    assert shown.err.startswith("adaptive-gen: ") and shown.err.count("\n") == 1, shown.err
    for word in words:
        assert word in shown.err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_model_directory(run, tmp_path, command):
    assert_one_line(run(*COMMANDS[command](tmp_path / "none")), "none", "there is no model")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_that_is_no_causal_lm(run, tmp_path, byte_tokenizer, command):
    config = BertConfig(
        vocab_size=259,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    assert_one_line(run(*COMMANDS[command](tmp_path)), "causal LM")


@pytest.mark.parametrize("command", COMMANDS)
def test_an_exit_layer_beyond_the_depth(run, model, command):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "exit_layers": [2, 9]}))
    assert_one_line(run(*COMMANDS[command](model)), "exit layer 9", "4 layers")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("broken", ["config.json", "model.safetensors", "calibration.json"])
def test_a_broken_file_in_the_model_directory(run, calibrated, command, broken):
    (calibrated / broken).write_bytes(b'{"broken')
    assert_one_line(run(*COMMANDS[command](calibrated)), str(calibrated))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_without_a_tokenizer(run, model, command):
    for file in model.glob("tokenizer*"):
        file.unlink()
    assert_one_line(run(*COMMANDS[command](model)), "tokenizer")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_calibration_file_that_is_missing(run, model, tmp_path, command):
    shown = run(*COMMANDS[command](model), "--calibration", tmp_path / "none.json")
    assert_one_line(shown, "none.json", "calibrate run")


@pytest.mark.parametrize("command", DEEP)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--threshold", "1.5"], ["--threshold 1.5", "0", "1"]),
        (["--threshold", "-0.1"], ["--threshold -0.1"]),
        (["--threshold", "nan"], ["--threshold nan"]),
        (["--target-speedup", "0.5"], ["--target-speedup 0.5", "1 or more"]),
        (["--target-speedup", "1.5", "--threshold", "0.9"], ["give one"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens 0", "1 or more"]),
        (["--weights", "int4"], ["--weights int4", "own", "int8"]),
    ],
)
def test_an_option_out_of_range_fails_before_anything_is_loaded(
    run, tmp_path, command, options, words
):
    assert_one_line(run(*COMMANDS[command](tmp_path / "none"), *options), *words)


def test_a_target_without_a_calibration(run, model):
    shown = run("generate", "say:", "-m", model, "--target-speedup", "1.5")
    assert_one_line(shown, "calibrate run")


def test_generate_with_a_model_where_the_prompt_belongs(run, model):
    assert_one_line(run("generate", model), "is a model directory", f"--model {model}")
    assert_one_line(run("generate", model, stdin="say:\n"), "stands where the prompt belongs")


def test_a_long_prompt_is_no_directory(run, model):
    assert run("generate", "say:" * 2000, "-m", model, "--max-new-tokens", 2).code != 1


def test_generate_without_a_prompt(run, model):
    assert_one_line(run("generate", "-m", model), "prompt is empty")


@pytest.mark.parametrize("temperature", ["-1", "inf"])
def test_a_temperature_out_of_range(run, model, temperature):
    shown = run("generate", "say:", "-m", model, "--temperature", temperature)
    assert_one_line(shown, "--temperature")


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b'{"prompt": \n'])
def test_prompts_of_bench_that_are_missing_empty_or_broken(run, model, tmp_path, content):
    prompts = tmp_path / "prompts.jsonl"
    if content is not None:
        prompts.write_bytes(content)
    assert_one_line(run("bench", model, "--prompts", prompts), "prompts.jsonl")


def test_bench_needs_a_round(run, model):
    assert_one_line(run("bench", model, "--rounds", 0), "--rounds 0")


@pytest.mark.parametrize(
    "words, says",
    [
        (["chat", "--threshold", "high"], "'--threshold'"),
        (["chat", "--nonsense"], "--nonsense"),
        (["generate", "say:", "--lossles"], "--lossless"),
        (["info", "one", "two"], "(two)"),
        (["export"], "[MODEL] OUT"),
        (["talk"], "'talk'"),
        (["chat", "--threshold"], "'--threshold'"),
    ],
)
def test_words_that_mean_nothing_are_one_line_that_names_the_help(run, words, says):
    shown = run(*words)
    assert_one_line(shown, says)
    assert re.search(r"See `adaptive-gen( \w+)? --help`.$", shown.err)


@pytest.mark.parametrize("program", ["calibrate", "train"])
def test_the_other_commands_say_so_too(monkeypatch, capsys, program):
    main = importlib.import_module(f"adaptive_gen.{program}.cli").main
    monkeypatch.setattr(sys, "argv", ["program", "--nonsense"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "--nonsense" in err and err.endswith("--help`.\n") and err.count("\n") == 1


def test_no_words_at_all_are_answered_with_the_help(run):
    shown = run()
    assert shown.code == 2 and shown.err.startswith("Usage: ") and "chat" in shown.err


def test_debug_shows_the_traceback(run, tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTIVE_GEN_DEBUG", "1")
    with pytest.raises(ValueError, match="no model directory"):
        monkeypatch.setattr(sys, "argv", ["adaptive-gen", "info", str(tmp_path / "none")])
        cli.main()


def test_version(run):
    assert re.fullmatch(r"adaptive-gen \d+\.\d+\.\d+\n", run("--version").out)


def test_info_compiles_nothing(run, calibrated, monkeypatch):
    monkeypatch.setattr("adaptive_gen.engine.backend.Backend.segments", None)
    assert run("info", calibrated).code == 0


def test_what_was_calibrated_on_another_engine_is_not_shown_as_if_it_held_here(
    run, calibrated, caplog
):
    file = calibrated / "calibration.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps({**document, "fingerprint": {"engine": "compiled"}}))
    words = ("generate", "say:", "-m", calibrated)
    assert run(*words).err.endswith("wall_speedup 1.50x (calibrated)\n")
    assert not caplog.messages
    assert run(*words, "--weights", "int8").err.endswith("layer_speedup 1.60x\n")
    assert "made on another engine (compiled, not compiled-int8)" in caplog.text
    caplog.clear()
    assert run("info", calibrated).code == 0
    assert not caplog.messages


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_a_pipe_that_is_not_utf_8(run, model, command):
    words = ("chat", model) if command == "chat" else ("generate", "-m", model)
    assert_one_line(run(*words, stdin="\udcff\udcfe\n"), "not UTF-8", "iconv")


def test_a_hub_id_without_an_owner(run):
    assert_one_line(run("info", "gpt2"), "'gpt2'", "owner/name")


def test_export_with_a_model_in_the_place_of_out(run, model):
    shown = run("export", model, "--exit-layer", 2, "--force")
    assert_one_line(shown, "the one name given is OUT", f"adaptive-gen export {model} OUT")
    assert json.loads((model / "config.json").read_text())["num_hidden_layers"] == 4
