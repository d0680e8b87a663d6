"""Tokens -> text with timings, one chunk per token as it is decoded."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .decoding import TokenLoop
from .errors import OptionError
from .generate import LoopHandover
from .report import Report
from .resume import AdaptiveCache
from .settings import state

Prompt = str | Sequence[Mapping[str, str]]


class Chunk(NamedTuple):
    """One new token of a stream."""

    text: str  # may be empty: a character can take several tokens
    token: int
    exit_layer: int
    confidence: float  # nan where full depth decided unasked
    tokens_per_s: float  # decoded so far, prefill left out; 0 for the first token


class Stream:
    """An iterator of `Chunk`; what it has done so far is in `report` at any time.

    The texts of all chunks, joined, are what the tokenizer makes of the new tokens at once.
    """

    def __init__(self, loop: TokenLoop, tokenizer: Any):
        """Take over a loop that has not run yet."""
        self._loop = loop
        self._chunks = self._iterate(_Detokenizer(tokenizer))

    def __iter__(self) -> Iterator[Chunk]:
        """The stream itself."""
        return self

    def __next__(self) -> Chunk:
        """Decode one more token."""
        return next(self._chunks)

    def _iterate(self, text: "_Detokenizer") -> Iterator[Chunk]:
        for step in self._loop:
            piece = text.push(step.token, last=step.last)
            report = self.report
            yield Chunk(piece, step.token, step.exit_layer, step.confidence, report.tokens_per_s)

    @property
    def report(self) -> Report:
        """The account of what has been decoded so far."""
        return self._loop.report()

    @property
    def cache(self) -> AdaptiveCache | None:
        """What the next stream can start from, given as its `past_key_values`."""
        return self._loop.cache()

    def close(self) -> None:
        """Stop decoding; the model is as it was before."""
        self._chunks.close()  # type: ignore[attr-defined]


class _Detokenizer:
    """Text that each new token adds, held back while it is part of a character.

    Decoding only the tokens since the last clean break keeps a step's cost constant, and one clean
    piece of context before them keeps a sentencepiece tokenizer from dropping the leading space.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._context = self._shown = 0  # where the decoded window and the unseen tokens start

    def push(self, token: int, last: bool) -> str:
        """Add a token; return the text that is now settled, all of it if it is the last."""
        self._tokens.append(token)
        before = self._decode(self._context, self._shown)
        now = self._decode(self._context, len(self._tokens))
        if now.endswith("\ufffd") and not last:
            return ""
        self._context, self._shown = self._shown, len(self._tokens)
        return now[len(before) :]

    def _decode(self, start: int, stop: int) -> str:
        return self._tokenizer.decode(self._tokens[start:stop], skip_special_tokens=True)


def stream(model: Any, tokenizer: Any, prompt: Prompt, **kwargs: Any) -> Stream:
    """Generate with adaptive depth, yielding every token as it is decoded.

    Args:
        model: a wrapped model.
        tokenizer: its tokenizer.
        prompt: a text to continue, or chat messages ({"role", "content"}) for its chat template.
        **kwargs: what `model.generate(adaptive=True, ...)` takes, `threshold` for one.

    Returns:
        An iterator of `Chunk` with a live `report`; it may be dropped at any token.

    Raises:
        ModelError: `model` is not wrapped.
        OptionError: a prompt that is empty or none, a chat without a template, or a keyword out of
            range.
    """
    if "generate" not in vars(model):  # an exported model wraps itself once it is called
        state(model)  # transformers would only say that it knows no adaptive
    return Stream(
        model.generate(
            **encode(tokenizer, prompt, model.device),
            **{"tokenizer": tokenizer, **kwargs, "adaptive": True},
            streamer=LoopHandover(),
        ),
        tokenizer,
    )


def encode(tokenizer: Any, prompt: Prompt, device: Any) -> dict[str, Any]:
    """A prompt as the keywords `generate` takes: input_ids and attention_mask, [1, time] each.

    Raises:
        OptionError: it is neither a text nor messages, cannot be read, or is empty.
    """
    _check(prompt)
    if isinstance(prompt, str):
        inputs = tokenizer(prompt, return_tensors="pt")
    elif tokenizer.chat_template is None:
        raise OptionError(
            "this tokenizer has no chat template; give the prompt as one text instead of messages."
        )
    else:
        inputs = tokenizer.apply_chat_template(
            list(prompt), add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    if inputs["input_ids"].shape[1] == 0:
        raise OptionError("the prompt is empty; give it at least one word.")
    return {name: inputs[name].to(device) for name in ("input_ids", "attention_mask")}


def _check(prompt: Any) -> None:
    texts = [prompt]
    if not isinstance(prompt, str):
        listed = isinstance(prompt, Sequence) and not isinstance(prompt, bytes)
        messages: list[Any] = list(prompt) if listed else [prompt]
        if not listed or not all(isinstance(message, Mapping) for message in messages):
            raise OptionError(
                f"the prompt is {type(prompt).__name__}; give one text, or chat messages such as "
                '[{"role": "user", "content": "Hi"}]. Several texts go to generate().'
            )
        texts = [message.get("content") for message in messages]
    try:
        for text in texts:
            str(text).encode()
    except UnicodeEncodeError:
        # Other bytes of a pipe or an argument arrive with surrogates in their places.
        raise OptionError(
            "the prompt is not UTF-8 text; convert it first, such as with iconv."
        ) from None
