"""Data for the built-in model: simple English stories, and chats that ask for one.

Reads the permissive sets named in the model card from a local directory and writes `train.txt`
(stories and chats, shuffled; the chats already carry the role tokens of the built-in template, so
that everything packs into one stream), `soft.txt` (the same without the old tales, whose language
is beyond a model of this size: they only broaden its words), `long.txt` (for the long last phase:
every story with two more requests of its own, so that what stays the same is that the story is
what was asked for) and the held-out `eval.txt`.

    python train/recipes/builtin_data.py --data-dir DATA --out OUT
"""

import argparse
import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

END = "<|endoftext|>"
HELD_OUT = 300
COMMON = frozenset(  # nouns and near-nouns that say nothing of what a story is about
    "one day time little big girl boy mom dad mommy daddy friend friends fun thing things home "
    "house man woman lot way place people name child kids kid mum mother father morning night "
    "days something everyone nothing everything side end top bit rest help idea hand hands eyes "
    "face head voice back front room door lesson smile story world water food air ground sun sky "
    "moral tears kind sound surprise problem family brother sister parents hug care piece while "
    "moment turn look work play noise new cute inside outside bottom try break same other".split()
)
# Typographic quotes, dashes and dots, by code point.
PLAIN = {8220: '"', 8221: '"', 8216: "'", 8217: "'", 8212: " - ", 8211: "-", 8230: "..."}
ASK = (
    "Tell me a story about {0}.",
    "Can you tell me a story about {0}?",
    "Please write a short story about {0}.",
    "I want to hear a story about {0}.",
    "Write a story with {0} in it.",
)
ASK_TWO = ("Tell me a story about {0} and {1}.", "Write a short story with {0} and {1}.")
ASK_ANY = ("Tell me a story.", "Can you tell me a story?", "Please tell me a short story.")
ASK_START = ("Tell me a story that begins with: {0}", "Continue this story: {0}")


def read_text(path: Path) -> str:
    """A text file, gzipped or not."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        return file.read()


def read_rows(path: Path) -> Iterator[dict]:
    """The objects of a JSON-lines file, gzipped or not."""
    for line in read_text(path).splitlines():
        if line.strip():
            yield json.loads(line)


def tidy(text: str) -> str:
    """Plain quotes, single line breaks, no stray spaces: one way to write everything."""
    text = text.translate(PLAIN)
    text = re.sub(r"[ \t]+", " ", text)
    return re.sub(r" ?\n[ \n]*", "\n", text).strip()


def whole(story: str) -> bool:
    """A story that is long enough, ends like one and has no decoding damage."""
    return (
        150 <= len(story) <= 4000
        and story[-1] in '.!?"'
        and "\ufffd" not in story
        and "â" not in story
    )


def stories(path: Path) -> list[str]:
    """The stories of a TinyStories slice."""
    return [s for s in (tidy(part) for part in read_text(path).split(END)) if whole(s)]


def recase(story: str, names: frozenset[str]) -> str:
    """Capitals for a lower-cased story: sentence starts, `I`, and names known from cased ones."""
    story = re.sub(r"\b[a-z]+\b", lambda m: m[0].capitalize() if m[0] in names else m[0], story)
    story = re.sub(r"\bi\b", "I", story)
    after_quote = r"""[.!?]["']\s+(?!said|asked|replied|he |she |they )"""
    start = rf"""(^|[.!?]\s+|{after_quote}|\n|[.!?,] ")(["']?)([a-z])"""
    return re.sub(start, lambda m: m[1] + m[2] + m[3].upper(), story)


def proper_names(cased: list[str]) -> frozenset[str]:
    """Words that are nearly always capitalised in the middle of a sentence."""
    upper: Counter[str] = Counter()
    lower: Counter[str] = Counter()
    for story in cased:
        lower.update(re.findall(r"\b[a-z]+\b", story))
        upper.update(w.lower() for w in re.findall(r"(?<=[a-z,] )[A-Z][a-z]+\b", story))
    return frozenset(w for w, n in upper.items() if n >= 3 and n > 4 * lower[w])


def topics(story: str, nouns: frozenset[str]) -> list[str]:
    """Things the story is about: nouns after an article that come back in it, oftenest first."""
    after = re.findall(r"\b(?:a|an|the|his|her) (?:(\w+) )?([a-z]{3,})\b", story)
    seen = Counter(word for pair in after for word in pair if word in nouns)
    return [w for w, n in seen.most_common(4) if n >= 2]


def noun_list(texts: list[str]) -> frozenset[str]:
    """Words that follow an article and end a phrase often enough to be taken for nouns."""
    found: Counter[str] = Counter()
    for text in texts:
        found.update(re.findall(r"\b(?:a|an|the) ([a-z]{3,})(?=[.,!?])", text))
    return frozenset(w for w, n in found.items() if n >= 4 and w not in COMMON)


def article(noun: str) -> str:
    """The noun as a request would name it."""
    return noun if noun.endswith("s") else f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def request(story: str, nouns: frozenset[str], rng: random.Random) -> tuple[str, str]:
    """A user's request that the story answers."""
    about = topics(story, nouns)
    draw = rng.random()
    if draw < 0.15:
        first = re.match(r'[^.!?]{15,120}[.!?]"?', story)
        if first:
            return rng.choice(ASK_START).format(first[0]), story
    if draw < 0.3 and len(about) > 1:
        return rng.choice(ASK_TWO).format(article(about[0]), article(about[1])), story
    if draw < 0.9 and about:
        return rng.choice(ASK).format(article(about[0])), story
    return rng.choice(ASK_ANY), story


def chats(data: Path, rng: random.Random) -> list[list[dict]]:
    """Short everyday dialogues: synthetic persona chats, and a few drink orders."""
    found = []
    for row in [
        *read_rows(data / "synthetic-persona-chat/valid.jsonl.gz"),
        *read_rows(data / "synthetic-persona-chat/test.jsonl.gz"),
    ]:
        if "[" not in json.dumps(row["turns"][:2])[30:]:
            found.append(row["turns"][: rng.choice((4, 6, 8))])
    found = [t for t in found if not any("[" in text for _, text in t)]
    orders = [
        r["turns"] for r in read_rows(data / "taskmaster/dialogs.jsonl.gz") if len(r["turns"]) <= 8
    ]
    found += rng.sample(orders, 200)
    return [messages for messages in map(as_messages, found) if len(messages) > 1]


def as_messages(turns: list[list[str]]) -> list[dict]:
    """Turns as alternating user and assistant messages, an assistant's last."""
    messages: list[dict] = []
    for speaker, text in turns:
        role = "user" if speaker == turns[0][0] else "assistant"
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += " " + tidy(text)
        else:
            messages.append({"role": role, "content": tidy(text)})
    return messages[: len(messages) // 2 * 2]


def questions(data: Path, rng: random.Random) -> list[list[dict]]:
    """FairytaleQA: a section of a tale, a question, the answer."""
    tales = {
        row["id"]: row["sections"] for row in read_rows(data / "fairytaleqa/stories_train.jsonl.gz")
    }
    items = []
    for row in read_rows(data / "fairytaleqa/qa_train.jsonl.gz"):
        part = (
            int(row["section"].split(",")[0]) - 1 if row["section"].split(",")[0].isdigit() else -1
        )
        sections = tales.get(row["story"], [])
        if (
            row["ex_or_im"] == "explicit"
            and 0 <= part < len(sections)
            and len(sections[part]) < 700
        ):
            answer = tidy(row["answers"][0]).rstrip(".")
            ask = f"{tidy(sections[part])}\n{tidy(row['question'])}"
            items.append(
                [
                    {"role": "user", "content": ask},
                    {"role": "assistant", "content": answer[:1].upper() + answer[1:] + "."},
                ]
            )
    return rng.sample(items, min(700, len(items)))


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    data, rng = args.data_dir, random.Random(0)
    tiny = data / "tinystories-slices"

    random_slice = stories(tiny / "czhou578_val.txt.gz")
    rng.shuffle(random_slice)
    held, random_slice = random_slice[:HELD_OUT], random_slice[HELD_OUT:]
    head = stories(tiny / "train_head_2.1MB.txt.gz")
    kept = {s[:60].lower() for s in held}
    names = proper_names(random_slice + head)
    known = {re.sub(r"\W+", "", s.lower())[:80] for s in head}
    lowered = re.split(r"(?<!\n)\n(?!\n)", read_text(tiny / "train_head_lowercased_4.2MB.txt.gz"))
    lowered = [tidy(s) for s in lowered]
    lowered = [
        recase(s, names) for s in lowered if whole(s) and re.sub(r"\W+", "", s)[:80] not in known
    ]
    simple = [s for s in random_slice + head + lowered if s[:60].lower() not in kept]

    books = [
        tidy(r["text"]) for r in read_rows(data / "open-storybooks-en/stories_permissive.jsonl.gz")
    ]
    tales = [
        tidy("\n".join(r["sections"]))
        for r in read_rows(data / "fairytaleqa/stories_train.jsonl.gz")
    ]
    nouns = noun_list(simple)
    talk = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
        for q, a in (request(s, nouns, rng) for s in simple)
    ]
    small_talk = chats(data, rng)
    other = small_talk + questions(data, rng)

    plain = simple + [b for b in books if len(b) > 150] + tales
    documents = plain + [render(messages) for messages in talk + other]
    rng.shuffle(documents)
    last = [*simple, *map(render, talk + small_talk)]
    rng.shuffle(last)
    asked_twice = [
        render([{"role": "user", "content": q}, {"role": "assistant", "content": a}])
        for q, a in (request(s, nouns, rng) for s in simple * 2)
    ]
    long = [*simple, *asked_twice, *(b for b in books if len(b) > 150), *map(render, small_talk)]
    rng.shuffle(long)
    args.out.mkdir(parents=True, exist_ok=True)
    files = {"eval.txt": held, "train.txt": documents, "soft.txt": last, "long.txt": long}
    for name, texts in files.items():
        (args.out / name).write_text(f"\n{END}\n".join(texts) + "\n", encoding="utf-8")


def render(messages: list[dict]) -> str:
    """A dialogue as the chat template of an own BPE writes it, without its first and last END."""
    parts = (
        f"<|{m['role']}|>{m['content']}" + (END if m["role"] == "assistant" else "")
        for m in messages
    )
    return "".join(parts).removesuffix(END)


if __name__ == "__main__":
    main()
