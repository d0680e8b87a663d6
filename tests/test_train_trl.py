"""TRL's trainer with our loss trains every exit and says which they are."""

import pytest
from transformers import AutoModelForCausalLM

pytest.importorskip("trl")
pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's own

ROWS = [{"prompt": f"Who? {i}", "completion": "Me, of course."} for i in range(16)]


@pytest.mark.parametrize("objective", ["uniform", "rotating+distil:0.5"])
def test_sft_trainer_learns_every_exit(tmp_path, tiny_llama, byte_tokenizer, objective):
    from datasets import Dataset

    from adaptive_gen.train.trl import SoFTConfig, SoFTTrainer

    settings = SoFTConfig(
        output_dir=str(tmp_path),
        exit_layers=[1, 3],
        objective=objective,
        max_steps=12,
        logging_steps=4,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = SoFTTrainer(
        model=tiny_llama(layers=4),
        args=settings,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=byte_tokenizer,
    )
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    for name in ("loss_exit_1", "loss_exit_3", "loss_exit_4"):
        assert logged[-1][name] < logged[0][name] - 0.5
    trainer.save_model(str(tmp_path / "saved"))
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").config
    assert (config.exit_layers, config.exit_objective) == ([1, 3, 4], objective)
