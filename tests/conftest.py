"""What every test shares: tiny models made on the spot, a byte tokenizer, and no network.

`tiny_llama` and `bigram_llama` are factories, so that a test states the model it speaks about:

    def test_claim(tiny_llama, byte_tokenizer):
        model = tiny_llama(layers=6)
"""

import os

# Before transformers is imported: it reads these once.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import itertools
import socket

import pytest
import torch

if not torch.cuda.is_available():
    # Before transformers imports Triton: kernels are made for the interpreter or for a GPU.
    os.environ["TRITON_INTERPRET"] = "1"

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

STORY = "Once upon a time a cat sat on a mat. The cat saw a dog. They ran and ran all day.\n"
BYTES = 256
BOS, EOS, PAD = 256, 257, 258
VOCAB = 259


def pytest_configure():
    """Output that is compared must not depend on the terminal that happens to run the tests."""
    for name in ("FORCE_COLOR", "PY_COLORS", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "GITHUB_ACTIONS"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Small tensors are quickest on one thread, and the test machine has other work."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def patient():
    """Tests say what is logged; whether kernels are compiled depends on what ran before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adaptive_gen.engine.machine_code.PATIENCE_S", 1e6)
        yield


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """A test that opens a connection to a machine fails at once."""
    connect = socket.socket.connect

    def refuse(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            raise AssertionError(f"a test tried to connect to {address!r}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def tiny_llama():
    """Factory of random Llama models in float32, in eval mode; equal arguments, equal weights."""

    def make(layers=6, hidden=32, vocab=VOCAB, heads=4, kv_heads=2, seed=0, **config):
        torch.manual_seed(seed)
        settings = {
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "vocab_size": vocab,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": 512,
            # Wide enough that the layers disagree and no two logits tie.
            "initializer_range": 0.3,
            "bos_token_id": BOS if vocab >= VOCAB else None,
            "eos_token_id": EOS if vocab >= VOCAB else None,
            "pad_token_id": PAD if vocab >= VOCAB else None,
        }
        return LlamaForCausalLM(LlamaConfig(**{**settings, **config})).eval()

    return make


@pytest.fixture
def bigram_llama(tiny_llama):
    """Factory of models that speak a script: each byte is followed by the next one of the script.

    Attention and MLP add nothing, so the hidden state stays the (one-hot) last token and every
    exit layer says the same: `bigram_llama(b":ok!")` answers "ok!" and then the end to any prompt
    that ends with ":". Bytes that the script does not follow end the text. `sure` is the logit gap.
    """

    def make(script, layers=4, sure=30.0, **config):
        width = VOCAB + 1  # the heads must divide it
        model = tiny_llama(layers=layers, hidden=width, head_dim=8, **config)
        following = {**dict.fromkeys(range(VOCAB), EOS), **dict(itertools.pairwise(script))}
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            model.model.embed_tokens.weight.copy_(torch.eye(VOCAB, width))
            model.lm_head.weight.zero_()
            for token, follower in following.items():
                # The final norm scales a one-hot row to the root of its width.
                model.lm_head.weight[follower, token] = sure / width**0.5
        return model

    return make


@pytest.fixture
def byte_tokenizer():
    """One token per byte (ids 0..255 are the bytes), `<s>`, `</s>`, `<pad>`; no chat template."""
    symbols = _byte_symbols()
    tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<s>", "</s>", "<pad>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture
def data(tmp_path):
    """Forty short stories in a text file."""
    path = tmp_path / "stories.txt"
    path.write_text("<|endoftext|>\n".join(f"{i}. {STORY}" for i in range(40)), encoding="utf-8")
    return path


@pytest.fixture
def model_dir(tmp_path, tiny_llama, byte_tokenizer):
    """A saved random model of four layers."""
    folder = tmp_path / "model"
    tiny_llama(layers=4).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


def _byte_symbols():
    """The printable character that the byte-level pre-tokenizer writes for each byte, in order."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (b for b in range(BYTES) if b not in printable)
    symbol = {b: chr(b) for b in printable} | {b: chr(BYTES + i) for i, b in enumerate(others)}
    return [symbol[b] for b in range(BYTES)]
