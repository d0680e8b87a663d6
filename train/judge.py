"""Who wrote the better answer: a judge behind an OpenAI-compatible endpoint, or a score.

Every pair is shown in both orders and the verdicts are averaged, because judges favour a place; the
paper's score is (wins - losses) / all comparisons (Sorted LLaMA, section 4, after PandaLM).
"""

import http.client
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaptive_gen.errors import OptionError

from .metrics import interval

PROMPT = """Two assistants answered the same request. Which answer is better: more correct, more \
helpful, clearer? Their order means nothing.

[Request]
{question}

[Answer 1]
{first}

[Answer 2]
{second}

Reply with nothing but 1, 2, or tie."""
VERDICT = re.compile(r"\b(1|2|tie)\b", re.IGNORECASE)
WORTH = {"1": 1.0, "2": -1.0, "tie": 0.0}


@dataclass
class Judge:
    """A chat model that compares answers.

    Args:
        endpoint: what stands before `/chat/completions`, for example http://localhost:8000/v1.
        model: its name there.
        timeout: seconds to wait for a verdict.

    The key, where one is needed, comes from the environment variable OPENAI_API_KEY.
    """

    endpoint: str
    model: str
    timeout: float = 60.0
    unclear: int = 0  # replies without a verdict; they count as ties

    def compare(self, question: str, ours: str, theirs: str) -> float:
        """Mean verdict of both orders: 1 if ours wins both, -1 if theirs does, 0 for a tie."""
        forth = self._verdict(question, ours, theirs)
        return (forth - self._verdict(question, theirs, ours)) / 2

    def _verdict(self, question: str, first: str, second: str) -> float:
        reply = self._reply(PROMPT.format(question=question, first=first, second=second))
        found = VERDICT.search(reply)
        self.unclear += found is None
        return WORTH[found[1].lower()] if found else 0.0

    def _reply(self, prompt: str) -> str:
        content = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": 16,
        }
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        address = f"{self.endpoint.rstrip('/')}/chat/completions"
        try:
            request = urllib.request.Request(address, json.dumps(content).encode(), headers)
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                return json.load(answer)["choices"][0]["message"]["content"] or ""
        except urllib.error.HTTPError as error:
            reason = f"status {error.code}"
        except (OSError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        except (ValueError, KeyError, IndexError, TypeError):
            reason = "a reply that is no chat completion"
        raise OptionError(
            f"the judge at {self.endpoint} gave {reason}; check --endpoint, --judge and "
            "OPENAI_API_KEY, or leave --endpoint out to judge by ROUGE-L and likelihood."
        )


def verdict_of(ours: float, theirs: float) -> float:
    """Who scores higher: 1, 0 or -1."""
    return float((ours > theirs) - (ours < theirs))


def grid(verdicts: Mapping[tuple[int, int], Sequence[float]]) -> list[dict[str, Any]]:
    """Cells of a table: (wins - losses) / all with its bootstrap interval over questions.

    Args:
        verdicts: (our exit, their exit) -> a number in [-1, 1] per question.
    """
    return [
        {
            "exit_layer": ours,
            "other_exit_layer": theirs,
            "score": sum(values) / len(values),
            "interval": interval(values),
            "wins": sum(v > 0 for v in values),
            "losses": sum(v < 0 for v in values),
            "ties": sum(v == 0 for v in values),
        }
        for (ours, theirs), values in verdicts.items()
    ]
