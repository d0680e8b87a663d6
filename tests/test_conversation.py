"""What a chat remembers, and in which form the model is given it."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adaptive_gen.conversation import Conversation

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}:{% endif %}"
)


def test_a_conversation_without_a_template_is_one_text(byte_tokenizer):
    conversation = Conversation(byte_tokenizer)
    assert conversation.ask("Once") == "Once"
    conversation.reply([*b" upon", byte_tokenizer.eos_token_id])
    assert conversation.ask("a time") == "Once upon\na time"


def test_a_reply_keeps_the_space_that_its_tokens_alone_would_lose():
    words = Tokenizer(models.WordLevel({"▁once": 0, "▁upon": 1}, unk_token="▁once"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert tokenizer.decode([1]) == "upon"
    conversation = Conversation(tokenizer)
    conversation.ask("once")
    conversation.reply([1])
    assert conversation.ask("a time") == "once upon\na time"


def test_a_conversation_with_a_template_is_messages(byte_tokenizer):
    byte_tokenizer.chat_template = TEMPLATE
    conversation = Conversation(byte_tokenizer)
    conversation.ask("hello")
    conversation.reply(list(b"hi"))
    assert conversation.ask("you") == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "you"},
    ]


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_conversation_forgets_its_oldest_turns_when_the_context_is_full(byte_tokenizer, template):
    byte_tokenizer.chat_template = template
    conversation = Conversation(byte_tokenizer, limit=60)
    for number in range(9):
        conversation.ask(f"question {number}")
        conversation.reply(list(b"answer"))
    kept = [said for said, _ in conversation.turns]
    assert kept[-1] == "question 8" and 1 <= len(kept) < 4
    conversation.ask("long " * 60)
    assert len(conversation.turns) == 1
