"""The tasks that the default model learns, each with an answer that can be checked; drawn from a seed.

    copy        give a text back                    Copy: Red Lorry 77                    Red Lorry 77
    sort        up to 8 numbers, letters, words         Sort these numbers: 31, 4, 15         4, 15, 31
    arithmetic  sums, differences up to 4 digits    What is 250 + 75?                     325
    json        fill a template from a sentence     Fill in {"age": 0} from: Ada is 36.   {"age": 36}
    talk        greetings and "who are you", with fixed answers; in training only, never scored

Training and held-out problems are disjoint by construction: a hash of what is asked, not of how it is phrased, says
on which side a problem is (`is_held_out`). No torch here.
"""

from __future__ import annotations

import json
import string
from dataclasses import dataclass
from hashlib import sha256
from random import Random
from typing import TYPE_CHECKING, Any

from gllm.runtime.default_model import words

if TYPE_CHECKING:
    from collections.abc import Callable

HELD_OUT_SHARE = 1 / 16
HISTORY_SHARE = 0.25
"""Of the chats: those in which other questions came before."""
MAX_BYTES = 850
"""Of a chat's messages, so that with its answer it fits into the 1024 tokens that training reads at once."""
_SYLLABLES = tuple(c + v for c in "bdfghjklmnprstvwz" for v in "aeiou")
_UNICODE = "äöüßéèçñøåłşžαβγδλπ" + "ЖдяшюЮ" + "日本語漢字中文" + "→≤∞€°😀🎉🚀"
_SYMBOLS = string.ascii_letters + string.digits + "-_.,:;!?+*/=()[]{}<>@#%&$'\"|~^"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing asked, as a message of a chat and as a line to complete, and its one right answer."""

    task: str
    key: str  # what is asked, whatever the phrasing: decides the split
    question: str
    line: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A chat that ends with a question, and the answer to it."""

    task: str
    messages: tuple[dict[str, str], ...]  # role and content, as OpenAI's endpoint takes them
    answer: str


def is_held_out(task: str, key: str) -> bool:
    """Whether training never sees this problem. The shortest ones are too few to hold any out."""
    return len(key) > 3 and sha256(f"{task}:{key}".encode()).digest()[0] < 256 * HELD_OUT_SHARE


def draw_problem(rng: Random, task: str, *, held_out: bool) -> Problem:
    """A problem of the task from that side of the split."""
    while True:
        problem = TASKS[task](rng)
        if task == "talk" or is_held_out(task, problem.key) == held_out:
            return problem


def draw_case(rng: Random, task: str, *, held_out: bool) -> Case:
    """A question in a chat: alone, after a system prompt, or after other questions; all from one side of the split."""
    system = _system(rng)
    messages = [] if system is None else [{"role": "system", "content": system}]
    for _ in range(rng.randint(1, 4) if rng.random() < HISTORY_SHARE else 0):
        other = draw_problem(rng, rng.choice((*SCORED, *SCORED, "talk")), held_out=held_out)
        messages.append({"role": "user", "content": other.question})
        messages.append({"role": "assistant", "content": other.answer})
    problem = draw_problem(rng, task, held_out=held_out)
    messages.append({"role": "user", "content": problem.question})
    if sum(len(message["content"].encode()) for message in messages) > MAX_BYTES:
        return draw_case(rng, task, held_out=held_out)
    return Case(task=task, messages=tuple(messages), answer=problem.answer)


def held_out_cases(num_cases: int, seed: int) -> list[Case]:
    """Cases that training never saw, the scored tasks in turn."""
    rng = Random(f"held out {seed}")
    return [draw_case(rng, SCORED[index % len(SCORED)], held_out=True) for index in range(num_cases)]


def _system(rng: Random) -> str | None:
    kind = rng.random()
    if kind < 0.15:
        return words.SHARED_PREFIX
    if kind < 0.35:
        return rng.choice(words.SYSTEMS)
    if kind < 0.4:
        return " ".join(_word(rng) for _ in range(rng.randint(1, 30))).capitalize() + "."
    return None


def _copy(rng: Random) -> Problem:
    text = _text(rng)
    question = _phrase(rng, words.COPY).format(text=text)
    return Problem(task="copy", key=text, question=question, line=f"copy: {text} =>", answer=text)


def _text(rng: Random) -> str:
    """What is to be copied: words, symbols, digits or other scripts, up to 24 characters; some words go on to 96."""
    kind = rng.random()
    if kind < 0.5:
        most = 96 if kind < 0.1 else 24
        return _clip(" ".join(_styled(rng, _word(rng)) for _ in range(rng.randint(1, most // 5))), most)
    if kind < 0.75:
        return _string(rng, _SYMBOLS, 24)
    if kind < 0.85:
        return _string(rng, string.digits, 16)
    return _clip(" ".join(_string(rng, _UNICODE + string.ascii_lowercase, 8) for _ in range(rng.randint(1, 3))), 24)


def _clip(text: str, most: int) -> str:
    return text[:most].rstrip()


def _string(rng: Random, alphabet: str, most: int) -> str:
    return "".join(rng.choices(alphabet, k=rng.randint(1, most)))


def _word(rng: Random) -> str:
    return "".join(rng.choices(_SYLLABLES, k=rng.randint(1, 4))) + rng.choice(("", "", "n", "s", "r", "x"))


def _styled(rng: Random, word: str) -> str:
    style = rng.random()
    if style < 0.2:
        word = word.capitalize()
    elif style < 0.25:
        word = word.upper()
    elif style < 0.35:
        word = str(rng.randint(0, 9999))
    return word + rng.choice(("", "", "", "", ",", ".", "!"))


def _sort(rng: Random) -> Problem:
    items, kind = _items(rng)
    backwards = rng.random() < 0.3
    between = rng.choice((", ", ", ", " ", ","))
    order = sorted(items, key=int if kind == "numbers" else str, reverse=backwards)
    given = between.join(items)
    question = _phrase(rng, words.DESCENDING if backwards else words.ASCENDING).format(items=given, kind=kind)
    question += _tail(rng)
    line = f"{'reverse' if backwards else 'sort'}: {given} =>"
    return Problem(task="sort", key=" ".join(sorted(items)), question=question, line=line, answer=between.join(order))


def _items(rng: Random) -> tuple[list[str], str]:
    """Numbers up to 999, which may repeat; small letters; or words, no two with the same first letter."""
    num_items, kind = rng.randint(2, 8), rng.random()
    if kind < 0.6:
        most = rng.choice((9, 99, 99, 999))
        return [str(rng.randint(0, most)) for _ in range(num_items)], "numbers"
    if kind < 0.8:
        return rng.sample(string.ascii_lowercase, num_items), "letters"
    known = [*words.ANIMALS, *words.FRUITS, *words.ITEMS, *words.COLORS, *(_word(rng) for _ in range(30))]
    by_letter = {word[0]: word for word in rng.sample(known, len(known))}
    return rng.sample(sorted(by_letter.values()), num_items), "words"


def _arithmetic(rng: Random) -> Problem:
    a, b = _number(rng), _number(rng)
    plus = rng.random() < 0.5
    sign, name = ("+", "plus") if plus else ("-", "minus")
    key = f"{min(a, b)}+{max(a, b)}" if plus else f"{a}-{b}"
    question = _phrase(rng, words.ADD if plus else words.SUBTRACT).format(a=a, b=b, sign=sign, name=name)
    line = rng.choice(("{a} {sign} {b} =", "{a}{sign}{b}=")).format(a=a, b=b, sign=sign)
    answer = str(a + b if plus else a - b)
    return Problem(task="arithmetic", key=key, question=question + _tail(rng), line=line, answer=answer)


def _number(rng: Random) -> int:
    """Up to four digits, every number of digits often."""
    return rng.randrange(10 ** rng.choice((1, 2, 2, 3, 3, 4, 4)))


def _json(rng: Random) -> Problem:
    sentence = rng.choice(words.SENTENCES)
    values = {name: value for name, value in _values(rng).items() if f"{{{name}}}" in sentence}
    fields = rng.sample(sorted(values), rng.randint(1, len(values)))
    marks = rng.choice(((", ", ": "), (", ", ": "), (",", ":")))  # the answer is spaced as the template is
    template = json.dumps({name: "" if isinstance(values[name], str) else 0 for name in fields}, separators=marks)
    text = sentence.format(**values)
    return Problem(
        task="json",
        key=" ".join(map(str, values.values())),
        question=_phrase(rng, words.JSON).format(template=template, sentence=text),
        line=f"json: {template} {text} =>",
        answer=json.dumps({name: values[name] for name in fields}, separators=marks),
    )


def _values(rng: Random) -> dict[str, Any]:
    """Something for every field that a sentence may have."""
    return {
        "name": _proper(rng, words.NAMES),
        "city": _proper(rng, words.CITIES),
        "age": rng.randint(18, 99),
        "job": rng.choice(words.JOBS),
        "quantity": rng.randint(2, 99),
        "color": rng.choice(words.COLORS),
        "item": rng.choice(words.ITEMS),
        "price": rng.randint(1, 999),
        "day": rng.choice(words.DAYS),
        "time": f"{rng.randint(8, 19):02}:{rng.choice((0, 15, 30, 45)):02}",
        "room": rng.randint(1, 499),
    }


def _proper(rng: Random, known: tuple[str, ...]) -> str:
    """A known name or one made up."""
    return rng.choice(known) if rng.random() < 0.5 else "".join(rng.choices(_SYLLABLES, k=rng.randint(2, 3))).title()


def _talk(rng: Random) -> Problem:
    if rng.random() < 0.5:
        answer, known = rng.choice(tuple(words.SMALL_TALK.items()))
        question = rng.choice(known)
    else:
        answer, question = words.UNKNOWN, _beyond(rng)
    question = rng.choice((question, question, question.capitalize(), question.capitalize(), question.upper()))
    question += rng.choice(("", "", "?", ".", "!"))
    return Problem(task="talk", key="", question=question, line=question, answer=answer)


def _beyond(rng: Random) -> str:
    """A question that the model cannot answer."""
    text = rng.choice(words.BEYOND)
    known = rng.choice((words.TOPICS, (*words.TOPICS, *words.FILLERS), (*words.TOPICS, *words.FILLERS)))
    while "{word}" in text:
        text = text.replace("{word}", rng.choice(known) if rng.random() < 0.85 else _word(rng), 1)
    while "{number}" in text:
        text = text.replace("{number}", str(_number(rng)), 1)
    return text


def _tail(rng: Random) -> str:
    """What people leave at the end of a question, and what changes nothing."""
    return rng.choice(("", "", "", "", "", "", "", "", ".", "?", " ", "\n"))


def _phrase(rng: Random, phrases: tuple[str, ...]) -> str:
    phrase = rng.choice(phrases)
    return phrase if rng.random() < 0.75 else phrase.lower()


TASKS: dict[str, Callable[[Random], Problem]] = {
    "copy": _copy,
    "sort": _sort,
    "arithmetic": _arithmetic,
    "json": _json,
    "talk": _talk,
}
SCORED = ("copy", "sort", "arithmetic", "json")
