"""Answers as texts: what of them counts when two are compared."""

import re
import string

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "\u2018\u2019\u00b4`", " "))


def normalised(text: str) -> str:
    """An answer as TriviaQA's evaluation compares it.

    Lower case, underscores and punctuation to blanks, articles dropped, single blanks (Joshi et
    al. 2017).
    """
    plain = text.replace("_", " ").lower().translate(PUNCTUATION)
    return " ".join(ARTICLES.sub(" ", plain).split())
