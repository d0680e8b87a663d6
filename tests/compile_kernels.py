"""Compile what most tests run, for weights of the kinds named: python tests/compile_kernels.py int8

Test workers that start with empty caches else compile the same at the same time, each for itself.
"""

import sys

import families
import torch

import adaptive_gen

KINDS = {
    "float32": (torch.float32, "own"),
    "float64": (torch.float64, "own"),
    "bfloat16": (torch.bfloat16, "own"),
    "float16": (torch.float16, "own"),
    "int8": (torch.float32, "int8"),
    "int8-bfloat16": (torch.bfloat16, "int8"),
    "int8-float16": (torch.float16, "int8"),
}


def main(kinds):
    """Generate in every mode."""
    for kind in kinds:
        dtype, weights = KINDS[kind]
        model = families.make("llama", dtype)
        model = adaptive_gen.wrap(model, exit_layers=(2, 4), engine="compiled", weights=weights)
        for rows in (1, 2):
            ids = torch.arange(5, 13).repeat(rows, 1)
            for mode in ({"threshold": 0.5}, {"lossless": True}):
                mask = torch.ones_like(ids)
                model.generate(
                    ids,
                    attention_mask=mask,
                    adaptive=True,
                    max_new_tokens=8,
                    pad_token_id=0,
                    **mode,
                )


if __name__ == "__main__":
    main(sys.argv[1:] or KINDS)
