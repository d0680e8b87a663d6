"""The Triton kernels against plain torch: interpreted on a CPU, compiled on a CUDA device."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install adaptive_gen[gpu]")

import families
from triton.runtime import interpreter

import adaptive_gen
from adaptive_gen import FixedExit
from adaptive_gen.engine import graphs
from adaptive_gen.kernels import operations, plain
from adaptive_gen.kernels.attention import attend
from adaptive_gen.kernels.plan import Heads, Plan


@pytest.fixture(autouse=True, scope="module")
def loops_with_numpy_2_4():
    """Triton 3.6's interpreter asks arrays of one element for an int, which NumPy now refuses."""
    patch_tensor = getattr(interpreter, "_patch_lang_tensor", None)
    if patch_tensor is None:  # another Triton, which may need no help
        yield
        return

    def patched(tensor, scope, *args):
        patch_tensor(tensor, scope, *args)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
    yield
    interpreter._patch_lang_tensor = patch_tensor


KERNELS = operations.triton()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# These tests run compiled with `pytest -m gpu` on a GPU, interpreted everywhere else.
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else []

NO_PRODUCTS = "Triton's interpreter multiplies bfloat16 matrices as integers"


def over(dtypes):
    return pytest.mark.parametrize("dtype", dtypes, ids=lambda dtype: str(dtype).split(".")[1])


every_dtype = over(TOLERANCE)
multiplied = over(
    [
        torch.float32,
        torch.float16,
        pytest.param(torch.bfloat16, marks=pytest.mark.skipif(DEVICE == "cpu", reason=NO_PRODUCTS)),
    ]
)


def random(*shape, dtype=torch.float32, scale=1.0):
    return (scale * torch.randn(*shape)).to(DEVICE, dtype)


def assert_close(ours, theirs):
    tolerance = TOLERANCE[ours.dtype]
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def plan_of(counts, starts, tokens, capacity):
    """A plan for rows with these counts and starts, filled up to `tokens`."""
    slots = [slot for slot, count in enumerate(counts) for _ in range(count)]
    positions = [s + i for s, count in zip(starts, counts, strict=True) for i in range(count)]
    spare = tokens - len(slots)
    firsts = [sum(counts[:i]) for i in range(len(counts))]
    numbers = (slots + [0] * spare, positions + [capacity - 1] * spare, firsts, counts, starts)
    return Plan(*(torch.tensor(n, device=DEVICE) for n in numbers))


@multiplied
@pytest.mark.parametrize(("hidden", "vocab", "tokens"), [(32, 96, 1), (70, 259, 5), (64, 64, 20)])
def test_head(hidden, vocab, tokens, dtype):
    x, gain = random(tokens, hidden, dtype=dtype), random(hidden, dtype=dtype)
    head = random(vocab, hidden, dtype=dtype, scale=0.2)
    outputs = []
    for read_out in (KERNELS.read_out, plain.read_out):
        logits = torch.zeros(tokens, vocab, dtype=dtype, device=DEVICE)
        summary = torch.zeros(tokens, plain.SUMMARY, device=DEVICE)
        read_out(x, gain, 1e-6, head, logits, summary)
        outputs.append((logits, summary))
    (ours, our_summary), (theirs, _) = outputs
    assert_close(ours, theirs)
    # The summary is exactly that of the logits written beside it.
    wide = ours.float()
    top = wide.topk(2).values
    assert torch.equal(our_summary[:, plain.TOP], top[:, 0])
    assert torch.equal(our_summary[:, plain.SECOND], top[:, 1])
    assert torch.equal(our_summary[:, plain.TOKEN].long(), wide.argmax(-1))
    torch.testing.assert_close(our_summary[:, plain.LOGSUMEXP], wide.logsumexp(-1))
    entropy = torch.special.entr(wide.softmax(-1)).sum(-1)
    torch.testing.assert_close(our_summary[:, plain.ENTROPY], entropy, atol=1e-5, rtol=1e-4)
    unwritten = torch.zeros_like(our_summary)
    KERNELS.read_out(x, gain, 1e-6, head, None, unwritten)
    assert torch.equal(unwritten, our_summary)


def test_head_ties_go_to_the_first_token_and_leave_no_margin():
    x, gain = random(2, 32), torch.ones(32, device=DEVICE)
    head = random(200, 32, scale=0.1)
    head[150] = head[7] = x[0]  # in two blocks of the vocabulary
    head[61] = head[60] = x[1]  # in one
    summary = torch.zeros(2, plain.SUMMARY, device=DEVICE)
    KERNELS.read_out(x, gain, 1e-6, head, None, summary)
    assert summary[:, plain.TOKEN].tolist() == [7.0, 60.0]
    assert torch.equal(summary[:, plain.TOP], summary[:, plain.SECOND])


@multiplied
@pytest.mark.parametrize("tokens", [1, 7, 33, 70])
@pytest.mark.parametrize("sizes", [(48, 20, 20), (20, 20)], ids=["qkv", "kv"])
@pytest.mark.parametrize("biased", [False, True])
def test_project(tokens, sizes, biased, dtype):
    if dtype != torch.float32 and tokens > 7:
        pytest.skip("the interpreter is slow, and these sizes are met in float32")
    x, gain = random(tokens, 72, dtype=dtype), random(72, dtype=dtype)
    weights = [random(size, 72, dtype=dtype, scale=0.1) for size in sizes]
    biases = [random(size, dtype=dtype) if biased else None for size in sizes]
    assert_close(
        KERNELS.project(x, gain, 1e-5, weights, biases),
        plain.project(x, gain, 1e-5, weights, biases),
    )


@multiplied
@pytest.mark.parametrize("tokens", [1, 20])
def test_gated(tokens, dtype):
    x, gain = random(tokens, 72, dtype=dtype), random(72, dtype=dtype)
    gate, up = (random(50, 72, dtype=dtype, scale=0.1) for _ in range(2))
    assert_close(KERNELS.gated(x, gain, 1e-5, gate, up), plain.gated(x, gain, 1e-5, gate, up))


@every_dtype
@pytest.mark.parametrize("dim", [8, 20])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (0, 2)], ids=str)
@pytest.mark.parametrize("normed", [False, True])
def test_write(dim, heads, normed, dtype):
    heads, capacity = Heads(*heads, dim), 16
    plan = plan_of([2, 0, 3], [4, 9, 0], tokens=7, capacity=capacity)
    projected = random(7, (heads.query + 2 * heads.kv) * dim, dtype=dtype)
    table = random(capacity, dim, dtype=dtype), random(capacity, dim, dtype=dtype)
    gains = (random(dim, dtype=dtype), random(dim, dtype=dtype), 1e-6) if normed else None
    # A layer's K/V are slices of one buffer.
    before = random(2, 3, heads.kv, capacity, dim, dtype=dtype)
    outputs = []
    for write in (KERNELS.write, plain.write):
        keys, values = whole = before.clone()
        query = write(projected, heads, gains, table, plan, keys, values)
        # Filling goes to the last position, whichever of it comes last.
        outputs.append((query[:5], whole[:, :, :, :-1]))
    for ours, theirs in zip(*outputs, strict=True):
        assert_close(ours, theirs)
    kept = before[:, 1, :, :-1]
    assert torch.equal(outputs[0][1][:, 1], kept), "a row without tokens must stay as it is"


CASES = {
    "one_row": ([1], [37]),
    "first_token": ([1], [0]),
    "pending": ([17], [100]),
    "ragged": ([3, 0, 1, 5], [0, 7, 199, 64]),
    "long": ([2, 1], [700, 3]),
}


@multiplied
@pytest.mark.parametrize("heads", [(4, 2, 8), (2, 2, 16), (6, 1, 20)], ids=str)
@pytest.mark.parametrize("window", [None, 16, 150])
@pytest.mark.parametrize("case", CASES)
def test_attention(case, heads, window, dtype):
    if case != "ragged" and (dtype != torch.float32 or heads != (4, 2, 8)):
        pytest.skip("the interpreter is slow; heads and dtypes cross with ragged rows")
    counts, starts = CASES[case]
    query_heads, kv_heads, dim = heads
    capacity, tokens = max(starts) + 64, sum(counts) + 3
    plan = plan_of(counts, starts, tokens, capacity)
    query = random(tokens, query_heads, dim, dtype=dtype)
    keys, values = random(2, len(counts), kv_heads, capacity, dim, dtype=dtype)
    args = (query, keys, values, plan, dim**-0.5, window)
    ours, theirs = KERNELS.attend(*args), plain.attend(*args)
    assert_close(ours[:-3], theirs[:-3])
    assert not ours[-3:].any(), "what fills the block up must be finite: zero"


def test_attention_reads_nothing_beyond_a_rows_length_and_skips_flagged_rows():
    plan = plan_of([2, 1], [10, 30], tokens=3, capacity=64)
    query, (keys, values) = random(3, 4, 8), random(2, 2, 2, 64, 8)
    expected = attend(query, keys, values, plan, 1.0, None)
    for buffer in (keys, values):
        buffer[0, :, 12:] = buffer[1, :, 31:] = torch.nan
    assert torch.equal(attend(query, keys, values, plan, 1.0, None), expected)
    skip = torch.tensor([0, 1], device=DEVICE)
    skipped = attend(query, keys, values, plan, 1.0, None, skip)
    assert torch.equal(skipped[:2], expected[:2]) and not skipped[2].any()


@pytest.mark.parametrize(
    "config",
    [{"family": "llama"}, {"family": "qwen3", "layer_types": families.ALTERNATING[:2]}],
    ids=lambda config: config["family"],
)
@pytest.mark.slow
def test_the_engine_runs_on_the_kernels(config, monkeypatch):
    """Half precision on a GPU would take them; here float32 does."""
    monkeypatch.setattr(operations, "best_for", lambda like: KERNELS)
    monkeypatch.setattr(graphs, "TILES", (6,))
    prompt, outputs = torch.tensor([[3, 4, 5]], device=DEVICE), []
    for engine in ("static", "module"):
        model = families.make(**config, num_hidden_layers=2).to(DEVICE)
        model = adaptive_gen.wrap(model, [1], engine=engine)
        out = model.generate(
            prompt,
            adaptive=True,
            policy=FixedExit(1),
            kv="propagate",
            max_new_tokens=3,
            return_dict_in_generate=True,
            output_logits=True,
        )
        assert out.report.engine == engine
        outputs.append(torch.cat(out.logits))
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper_without_a_gpu(tmp_path):
    """The interpreter accepts more than the compiler does."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)  # else an older kernel's code might be found
    script = Path(__file__).parent / "compile_kernels.py"
    run = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    names = {"_partial", "_reduce", "_rstd", "_project", "_write", "_split", "_join"}
    assert set(run.stdout.split()) == {f"{name}_kernel" for name in names}
