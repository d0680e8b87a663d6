"""Exported checkpoints: stock transformers reads them, and they say what the model's exit says."""

import copy
import json
import shutil

import families
import pytest
import torch
from families import FAMILIES
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import adaptive_gen
from adaptive_gen import cli, exporting
from adaptive_gen.calibration import Calibration, ConfidenceMap, OperatingPoint
from adaptive_gen.errors import ModelError, OptionError, OutputError
from adaptive_gen.settings import FIELDS

IDS = torch.randint(2, 96, (1, 40), generator=torch.Generator().manual_seed(1))


def truncated(model, layers):
    """The same model with the later layers taken out, made without any of our code."""
    model = copy.deepcopy(model)
    base = model.get_decoder()
    [name] = [n for n, part in base.named_children() if isinstance(part, torch.nn.ModuleList)]
    setattr(base, name, getattr(base, name)[:layers])
    model.config.num_hidden_layers = layers
    return model


def files(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def calibrated(tiny_llama):
    """A wrapped 4-layer model with a calibration that knows what exit 2 is worth."""
    curve = ConfidenceMap(raw=(0.0, 1.0), chance=(0.0, 1.0))
    points = (OperatingPoint(0.1, (2, 4), 2.0, 2.0, agreement=0.9, tokens=100),)
    quality = [{"confidence": "margin", "exit_layer": 2, "agreement": 0.8125}]
    calibration = Calibration(
        4, "margin", "recompute", {"margin": {2: curve}}, points, 0, {}, {"quality": quality}
    )
    model = tiny_llama(layers=4, eos_token_id=None)
    return adaptive_gen.wrap(model, [2], calibration)


def check_sub_model(model, folder):
    # Five of six: an odd number of layers where two kinds alternate.
    adaptive_gen.export(model, folder, exit_layer=5)
    stock = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=model.config._attn_implementation
    )
    assert stock.config.num_hidden_layers == 5
    assert torch.equal(stock(IDS).logits, truncated(model, 5)(IDS).logits)
    assert not torch.equal(stock(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sub_model_s_logits_are_the_exit_s_bit_for_bit(family, tmp_path):
    check_sub_model(families.make(family), tmp_path / "sub")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_so_they_are_with_tied_and_untied_heads(family, tied, tmp_path):
    check_sub_model(families.make(family, tie_word_embeddings=tied), tmp_path / "sub")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_sub_model_keeps_the_dtype(dtype, tmp_path):
    families.make("llama", dtype).save_pretrained(tmp_path / "whole")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    adaptive_gen.export(model, tmp_path / "sub", exit_layer=2)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "sub")
    assert stock.dtype == model.dtype == dtype
    assert torch.equal(stock(IDS).logits, truncated(model, 2)(IDS).logits)


def test_a_model_that_was_cast_after_loading_is_refused(tmp_path):
    # transformers keeps the rotary frequencies in float32, `.to` does not: reloaded, it differs.
    with pytest.raises(ModelError, match="cast after loading"):
        adaptive_gen.export(families.make("llama", torch.bfloat16), tmp_path / "sub", exit_layer=2)
    assert not list(tmp_path.iterdir())


def test_the_checkpoint_holds_no_weight_of_a_dropped_layer_and_a_tied_head_once(tmp_path):
    for tied in (True, False):
        model = families.make("llama", tie_word_embeddings=tied)
        adaptive_gen.export(model, tmp_path / f"{tied}", exit_layer=2)
        with safe_open(tmp_path / f"{tied}" / "model.safetensors", "pt") as weights:
            names = set(weights.keys())
        assert {n.split(".")[2] for n in names if ".layers." in n} == {"0", "1"}
        assert ("lm_head.weight" in names) is not tied


def test_a_plain_checkpoint_has_no_field_of_ours(tmp_path, calibrated):
    calibrated.generation_config.threshold = 0.7
    adaptive_gen.export(calibrated, tmp_path / "sub", exit_layer=2)
    for name in ("config.json", "generation_config.json"):
        assert not set(FIELDS) & set(json.loads((tmp_path / "sub" / name).read_text()))
    assert not {"calibration.json", "custom_generate/generate.py"} & files(tmp_path / "sub")


def test_exporting_leaves_the_model_as_it_was(tmp_path, calibrated):
    config, generation = calibrated.config.to_dict(), calibrated.generation_config.to_dict()
    weights = {name: w.clone() for name, w in calibrated.state_dict().items()}
    calibrated.train()
    adaptive_gen.export(calibrated, tmp_path / "sub", exit_layer=2, with_generate=True)
    assert calibrated.training
    assert calibrated.config.to_dict() == config
    assert calibrated.generation_config.to_dict() == generation
    assert all(torch.equal(w, weights[name]) for name, w in calibrated.state_dict().items())


def test_assisted_generation_with_the_sub_model_is_greedy_full_depth(tmp_path):
    model = families.make("llama", torch.float64)
    adaptive_gen.export(model, tmp_path / "sub", exit_layer=3)
    draft = AutoModelForCausalLM.from_pretrained(tmp_path / "sub")
    calls = []
    draft.register_forward_hook(lambda *_: calls.append(1))
    settings = {"max_new_tokens": 40, "do_sample": False}
    alone = model.generate(IDS, **settings)
    assert torch.equal(model.generate(IDS, assistant_model=draft, **settings), alone)
    assert calls


def test_the_tokenizer_of_the_checkpoint_goes_along(tmp_path, tiny_llama, byte_tokenizer):
    tiny_llama(layers=4).save_pretrained(tmp_path / "whole")
    byte_tokenizer.save_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / "LICENSE").write_text("terms")
    model, _ = adaptive_gen.load(tmp_path / "whole")
    adaptive_gen.export(model, tmp_path / "sub", exit_layer=2)
    assert AutoTokenizer.from_pretrained(tmp_path / "sub")("hi")["input_ids"] == [104, 105]
    assert (tmp_path / "sub" / "LICENSE").read_text() == "terms"


def test_the_card_states_what_was_measured_of_this_exit(tmp_path, calibrated, tiny_llama):
    adaptive_gen.export(calibrated, tmp_path / "a", exit_layer=2)
    assert "0.812" in (tmp_path / "a" / "README.md").read_text()
    adaptive_gen.export(calibrated, tmp_path / "b", exit_layer=3)
    assert "Not measured" in (tmp_path / "b" / "README.md").read_text()

    tiny_llama(layers=4).save_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / "README.md").write_text(
        "---\nlicense: cc-by-4.0\npipeline_tag: x\nlanguage:\n- en\n- fr\n---\n# Whole\n\n"
        "| exit layer | loss |\n|---|---|\n| 2 | 2.5 |\n| 3 | 2.25 |\n"
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    adaptive_gen.export(model, tmp_path / "c", exit_layer=3)
    card = (tmp_path / "c" / "README.md").read_text()
    front, body = card.split("\n---\n")
    assert "license: cc-by-4.0\nlanguage:\n- en\n- fr" in front and "pipeline_tag" not in front
    assert "| exit layer | loss |\n|---|---|\n| 3 | 2.25 |" in body and "2.5 " not in body


def test_a_model_whose_layers_depend_on_their_number_is_refused(tmp_path, monkeypatch):
    cut = exporting._cut_config

    def wrongly(config, *depth):
        cut(config, *depth)
        config["layer_types"] = config["layer_types"][::-1]

    monkeypatch.setattr(exporting, "_cut_config", wrongly)
    model = families.make("qwen2")
    with pytest.raises(ModelError, match=r"cut off after 4 layers differs"):
        adaptive_gen.export(model, tmp_path / "sub", exit_layer=4)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("moment", ["_save", "check_equal", "_save_company", "export_place.mark"])
@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_failed_export_leaves_nothing_and_an_earlier_one_whole(
    moment, failure, tmp_path, monkeypatch, tiny_llama
):
    model = tiny_llama(layers=4)
    adaptive_gen.export(model, tmp_path / "sub", exit_layer=3)
    before = {name: (tmp_path / "sub" / name).read_bytes() for name in files(tmp_path / "sub")}

    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(f"adaptive_gen.exporting.{moment}", fail)
    for out in ("sub", "new"):
        with pytest.raises(KeyboardInterrupt if failure is KeyboardInterrupt else OutputError):
            adaptive_gen.export(model, tmp_path / out, exit_layer=2)
    assert [p.name for p in tmp_path.iterdir()] == ["sub"]
    assert {n: (tmp_path / "sub" / n).read_bytes() for n in files(tmp_path / "sub")} == before


def test_a_move_that_fails_puts_the_earlier_export_back(tmp_path, monkeypatch, tiny_llama):
    model = tiny_llama(layers=4)
    out = adaptive_gen.export(model, tmp_path / "sub", exit_layer=3)
    rename = exporting.os.rename

    def fail(source, target):
        if source.name == "checkpoint":
            raise OSError(13, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(exporting.os, "rename", fail)
    with pytest.raises(OutputError, match="Permission denied"):
        adaptive_gen.export(model, out, exit_layer=2)
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["sub"]


def test_an_earlier_export_is_replaced_and_nothing_else(tmp_path, tiny_llama):
    model = tiny_llama(layers=4)
    (tmp_path / "sub").mkdir()  # an empty directory is free
    out = adaptive_gen.export(model, tmp_path / "sub", exit_layer=3, with_generate=True)
    adaptive_gen.export(model, out, exit_layer=2)
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 2
    assert "custom_generate/generate.py" not in files(out)

    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds notes.txt, which no export wrote"):
        adaptive_gen.export(model, out, exit_layer=1)
    adaptive_gen.export(model, out, exit_layer=1, force=True)
    assert "notes.txt" not in files(out)

    copied = shutil.copytree(out, tmp_path / "copied", copy_function=shutil.copyfile)
    adaptive_gen.export(model, copied, exit_layer=1)
    (out / "config.json").write_text((out / "config.json").read_text() + "\n")
    with pytest.raises(OutputError, match=r"config.json, which was changed after it was exported"):
        adaptive_gen.export(model, out, exit_layer=1)


def test_a_directory_that_is_no_export_is_refused(tmp_path, tiny_llama):
    model = tiny_llama(layers=4)
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").write_text("years of work")
    model.save_pretrained(tmp_path / "other")
    (tmp_path / "file").write_text("")
    for out, force, says in [
        ("papers", False, "not empty and no earlier export"),
        ("papers", True, "holds files and no checkpoint"),
        ("other", False, "not empty and no earlier export"),
        ("file", True, "is no directory"),
    ]:
        with pytest.raises(OutputError, match=says):
            adaptive_gen.export(model, tmp_path / out, exit_layer=2, force=force)
    adaptive_gen.export(model, tmp_path / "other", exit_layer=2, force=True)
    assert (tmp_path / "papers" / "thesis.tex").read_text() == "years of work"


def test_the_model_s_own_directory_is_never_overwritten(tmp_path, tiny_llama):
    tiny_llama(layers=4).save_pretrained(tmp_path / "whole")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    with pytest.raises(OutputError, match="is what the model was loaded from"):
        adaptive_gen.export(model, tmp_path / "x" / ".." / "whole", exit_layer=2, force=True)


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({}, "nothing says what to export"),
        ({"exit_layer": 5}, "exit layer 5"),
        ({"exit_layer": 0}, "0"),
    ],
)
def test_what_does_not_exist_is_not_exported(arguments, says, tmp_path, tiny_llama):
    with pytest.raises(OptionError, match=says):
        adaptive_gen.export(tiny_llama(layers=4), tmp_path / "sub", **arguments)
    assert not list(tmp_path.iterdir())


def test_adapted_and_quantised_models_are_refused(tmp_path, tiny_llama):
    for attribute, says in (("peft_config", "merge"), ("hf_quantizer", "quantised")):
        model = tiny_llama(layers=4)
        setattr(model, attribute, {"default": object()})
        with pytest.raises(ModelError, match=says):
            adaptive_gen.export(model, tmp_path / "sub", exit_layer=2)


def test_the_command_writes_a_sub_model(tmp_path, monkeypatch, capsys, tiny_llama, byte_tokenizer):
    tiny_llama(layers=4).save_pretrained(tmp_path / "whole")
    byte_tokenizer.save_pretrained(tmp_path / "whole")

    def run(*words):
        monkeypatch.setattr("sys.argv", ["adaptive-gen", "export", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return (stop.value.code or 0, *capsys.readouterr())

    code, out, err = run(tmp_path / "whole", tmp_path / "sub", "--exit-layer", 2)
    assert (code, out) == (0, f"{tmp_path / 'sub'}\n")
    assert "equal the model's, bit for bit" in err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "sub").config.num_hidden_layers == 2
    code, out, err = run(
        tmp_path / "whole", tmp_path / "both", "--exit-layer", 3, "--with-generate"
    )
    assert "decodes by its own generate" in err
    assert "a sub-model with the exits below (1, 2) and no calibration" in err
    for words, says in [
        ([tmp_path / "sub"], "nothing says what to export"),
        (["a", "b", "c", "--exit-layer", 2], "'c' is one name too many"),
        ([tmp_path / "whole", tmp_path / "sub", "--exit-layer", 9], "exit layer 9 does not exist"),
    ]:
        code, out, err = run(*words)
        assert (code, out) == (2, "") and says in err
