"""Peak memory and time of one training step, SoFT beside plain fine-tuning.

    python benchmarks/train_memory.py --out benchmarks/results/DATE-train-memory.json

Counts every allocation and release of PyTorch's own allocator (the CPU profiler's memory events; on
a GPU the caching allocator's peak), from after the model was built until the gradients are there.
`peak` adds what lay there before: the weights, gradients and AdamW's two moments of a run in step.
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from adaptive_gen.losses import sorted_losses


def made(vocab: int, layers: int, hidden: int, device: str) -> LlamaForCausalLM:
    """A Llama of the shape, head untied, with gradients as after a first step."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=vocab,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 32 * 32,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
    )
    return LlamaForCausalLM(shape).to(device).train()


def allocated(step, device: str) -> int:
    """Most bytes that `step` holds at once, beyond what was there before it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    cpu = [ProfilerActivity.CPU]
    with profile(activities=cpu, profile_memory=True, acc_events=True) as seen:
        step()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def seconds(step, device: str, rounds: int) -> float:
    """Shortest of some steps: other work on the machine only ever adds."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def measure(vocab: int, exits: int, distil: float, options: argparse.Namespace) -> dict:
    """One row: the same batch through the loss of full depth alone and of `exits` exits."""
    model = made(vocab, options.layers, options.hidden, options.device)
    ids = torch.randint(vocab, (options.batch, options.length), device=options.device)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    inner = [options.layers * i // exits for i in range(1, exits + 1)]
    steps = {}
    for name, layers, share in (("sft", inner[-1:], 0.0), ("soft", inner, distil)):

        def step(layers=layers, share=share):
            loss = sorted_losses(
                model, ids, ids, exit_layers=layers, distil=share, chunk_size=options.chunk_size
            ).loss
            loss.backward()

        step()  # what is made once is made now
        model.zero_grad(set_to_none=True)
        held = 0 if options.no_memory else allocated(step, options.device)
        steps[name] = {
            "step_bytes": held,
            "seconds": seconds(step, options.device, options.rounds),
        }
        model.zero_grad(set_to_none=True)
        # Weights and AdamW's two moments lie there; the gradients are among the step's bytes.
        steps[name]["peak_bytes"] = steps[name]["step_bytes"] + 3 * weights
    row = {"vocab": vocab, "exits": exits, "distil": distil, "weight_bytes": weights, **steps}
    # What more matrix products alone cost: every layer once, the head once an exit.
    head = model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in model.model.layers.parameters())
    row["products_ratio"] = round((body + exits * head) / (body + head), 3)
    for key in ("step_bytes", "peak_bytes", "seconds"):
        row[f"{key}_ratio"] = round(steps["soft"][key] / max(steps["sft"][key], 1e-9), 3)
    return row


def main() -> None:
    """Measure the grid, write JSON, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, nargs="+", default=[8192, 32000, 128000])
    parser.add_argument("--exits", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--distil", type=float, nargs="+", default=[0.0, 0.5])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=257)
    parser.add_argument("--chunk-size", type=int, default=256)
    parser.add_argument("--no-memory", action="store_true", help="time alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for vocab in options.vocab:
        for exits in options.exits:
            for distil in options.distil:
                rows.append(measure(vocab, exits, distil, options))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    names = ["vocabulary", "exits", "distil", "memory of the step", "with weights, AdamW", "time"]
    print("| " + " | ".join([*names, "matrix products"]) + " |\n" + "|---" * 7 + "|")
    for row in rows:
        keys = ("step_bytes", "peak_bytes", "seconds", "products")
        ratios = [f"{row[f'{k}_ratio']:.2f}x" for k in keys]
        print(f"| {row['vocab']:,} | {row['exits']} | {row['distil']} | {' | '.join(ratios)} |")
    if options.out:
        revision = ["git", "rev-parse", "--short", "HEAD"]
        found = subprocess.run(revision, capture_output=True, text=True, cwd=Path(__file__).parent)
        result = {
            "command": " ".join(["python", "benchmarks/train_memory.py", *sys.argv[1:]]),
            "commit": found.stdout.strip(),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "settings": {k: str(v) for k, v in vars(options).items()},
            "rows": rows,
        }
        new = options.out.with_suffix(".new")
        new.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        os.replace(new, options.out)


if __name__ == "__main__":
    main()
