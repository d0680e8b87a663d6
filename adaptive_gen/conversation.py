"""What a chat remembers: its turns, and as many of them as fit the model's context."""

from typing import Any


class Conversation:
    """The turns of one chat, given to the model as its tokenizer prefers.

    With a chat template the turns become messages. Without one the model only continues text: each
    line of the user is appended to the text so far, and the model goes on from there.
    """

    def __init__(self, tokenizer: Any, limit: int | None = None):
        """Start empty.

        Args:
            tokenizer: counts the tokens; its chat template, if any, is used.
            limit: most tokens of a prompt; the oldest turns are forgotten first.
        """
        self.tokenizer, self.limit = tokenizer, limit
        self.turns: list[list[str]] = []  # [what the user said, what the model replied]

    def ask(self, line: str) -> str | list[dict[str, str]]:
        """The user says `line`; return the prompt for the reply: messages, or text."""
        self.turns.append([line, ""])
        while self.limit is not None and len(self.turns) > 1 and self._tokens() > self.limit:
            del self.turns[0]
        return self._prompt()

    def reply(self, tokens: list[int]) -> None:
        """Remember what the model replied to the latest line, whole or interrupted."""
        prompt = self._prompt()
        # Read after the text they continue: alone, the first word would lose the space before it.
        before = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else []
        self.turns[-1][1] = self._text([*before, *tokens])[len(self._text(before)) :]

    def _prompt(self) -> str | list[dict[str, str]]:
        if not self.tokenizer.chat_template:
            return "\n".join(said + replied for said, replied in self.turns)
        messages = []
        for said, replied in self.turns:
            messages.append({"role": "user", "content": said})
            messages.append({"role": "assistant", "content": replied})
        return messages[:-1]

    def _tokens(self) -> int:
        prompt = self._prompt()
        if isinstance(prompt, str):
            return len(self.tokenizer(prompt)["input_ids"])
        ids = self.tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        return len(ids)

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)
