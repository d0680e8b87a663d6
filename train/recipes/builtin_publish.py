"""Put a trained model where the package ships it: float16 weights that load as float32.

python train/recipes/builtin_publish.py --model RUN --out adaptive_gen/builtin
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


def main() -> None:
    """Write config, generation config, tokenizer and weights, file by file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out, prefix=".saving-") as name:
        model.half().save_pretrained(name)
        tokenizer.save_pretrained(name)
        rewrite(Path(name) / "config.json", {"dtype": "float32", "use_cache": True})
        rewrite(Path(name) / "tokenizer_config.json", {"is_local": None, "local_files_only": None})
        for file in Path(name).iterdir():
            file.chmod(0o644)
            os.replace(file, args.out / file.name)


def rewrite(path: Path, changes: dict) -> None:
    """Set fields of a JSON file; None drops one.

    The weights are half precision for the download only: `dtype` names what to load them as.
    """
    content = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    content = {key: value for key, value in content.items() if value is not None}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
