"""SQuAD v1.1 (Rajpurkar et al. 2016): its files, windows of tokens, answers, exact match and F1.

A window holds a question and as much of its context as fits; a longer context gives several windows
that overlap. A model gives every token a start logit and an end logit. The answer is the best span
of context over all windows of the question (Devlin et al. 2019, section 4.2).
"""

from __future__ import annotations

import itertools
import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distilfast import models
from distilfast.errors import ConfigError

Answer = tuple[str, int]  # the text, and the index of its first character in the context

N_BEST = 20  # the number of start positions, and of end positions, tried in a window
MAX_ANSWER = 30  # tokens
CHUNK = 1000  # questions tokenised at a time, because the tokenizer's lists are large


# --- Reading --------------------------------------------------------------------------------------


def read(file: Path) -> tuple[list[tuple[str, ...]], list[list[Answer]]]:
    """Read (question, context) and the gold answers of each question from an official file.

    Raises:
        ConfigError: the file is missing, not JSON, not SQuAD's or of v2.0, or an answer is not at
            its place in the context (the error names the question's id).
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"--data: expected the file {str(file)!r}, which is missing") from None
    except OSError as error:
        raise ConfigError(
            f"--data: expected the file {str(file)!r}, got {error.strerror}"
        ) from None
    except (ValueError, RecursionError) as error:  # includes UnicodeDecodeError
        raise ConfigError(f"{file}: expected JSON, got {error}") from None
    texts: list[tuple[str, ...]] = []
    gold = []
    try:
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                context = paragraph["context"]
                for asked in paragraph["qas"]:
                    where = f"{file}, question {asked['id']}"
                    if "is_impossible" in asked:
                        raise ConfigError(f"{where}: expected SQuAD v1.1, got v2.0")
                    answers = [(a["text"], a["answer_start"]) for a in asked["answers"]]
                    for name, text in (("question", asked["question"]), ("context", context)):
                        if not isinstance(text, str):
                            raise ConfigError(f"{where}: expected a text as {name}, got {text!r}")
                    texts.append((asked["question"], context))
                    gold.append(checked(answers, context, where))
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"{file}: expected the layout of SQuAD v1.1 (data, paragraphs, context, qas, id, "
            f"question, answers, text, answer_start), got another ({error!r})"
        ) from None
    return texts, gold


def of_hub(row: Mapping[str, Any], where: str) -> list[Answer]:
    """Return the gold answers in a row of the hub's copy, checked in the same way."""
    answers = list(zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True))
    return checked(answers, row["context"], f"{where}, question {row['id']}")


def checked(answers: list[Answer], context: str, where: str) -> list[Answer]:
    """Return the answers after checking that each stands at its place in the context.

    Raises:
        ConfigError: an answer is not at its place, or there is none.
    """
    if not answers:
        raise ConfigError(f"{where}: expected an answer, as all have in SQuAD v1.1, got none")
    for text, start in answers:
        if not isinstance(text, str) or type(start) is not int:
            raise ConfigError(
                f"{where}: expected a text and a whole number, got {text!r} and {start!r}"
            )
        if not text.strip():
            raise ConfigError(f"{where}: expected the text of an answer, got {text!r}")
        found = context[start : start + len(text)]
        if start < 0 or found != text:
            raise ConfigError(f"{where}: expected {text!r} at character {start}, got {found!r}")
    return answers


# --- Windows --------------------------------------------------------------------------------------


class Window(NamedTuple):
    """The L tokens of a question and of a part of its context."""

    question: int  # its number
    input_ids: np.ndarray  # (L,) int32
    token_type_ids: np.ndarray  # (L,) int32
    chars: np.ndarray  # (L, 2) int32: each token's begin and end in the context; -1: not in it


def windows(texts: Sequence[tuple[str, ...]], tokenizer: Any, max_length: int) -> Iterator[Window]:
    """Yield the windows of all questions, in the order of the questions.

    Args:
        texts: (question, context).
        tokenizer: a fast one, because only those report a token's place in the text.
        max_length: tokens of a window, special tokens included. Neighbouring windows share a third
            of it (128 of 384). A question is cut to a sixth (64 of 384, as in BERT).
    """
    for begin in range(0, len(texts), CHUNK):
        questions, contexts = (list(x) for x in zip(*texts[begin : begin + CHUNK], strict=True))
        made = models.tokenize(
            tokenizer,
            _cut(questions, tokenizer, max(1, max_length // 6)),
            contexts,
            key="--data",
            truncation="only_second",
            max_length=max_length,
            stride=max_length // 3,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_token_type_ids=True,
        )
        # The windows of a question, which follow one another.
        numbers = made["overflow_to_sample_mapping"]
        for number, some in itertools.groupby(range(len(numbers)), numbers.__getitem__):
            mine = list(some)
            inside = [np.array([part == 1 for part in made.sequence_ids(i)]) for i in mine]
            places = [
                _in_order(np.asarray(made["offset_mapping"][i], np.int32)[held])
                for i, held in zip(mine, inside, strict=True)
            ]
            moved = _with_all_letters(contexts[number], np.concatenate(places))
            for i, place, held in zip(mine, places, inside, strict=True):
                for token, pair in enumerate(map(tuple, place.tolist()) if moved else ()):
                    place[token] = moved.get(pair, pair)
                chars = np.full((len(held), 2), -1, np.int32)
                chars[held] = place
                yield Window(
                    begin + number,
                    np.asarray(made["input_ids"][i], np.int32),
                    np.asarray(made["token_type_ids"][i], np.int32),
                    chars,
                )


def _in_order(places: np.ndarray) -> np.ndarray:
    """Return places of which none begins after the next one, nor ends before the one before.

    The first of several tokens of one letter may be reported as empty, behind the letter.
    """
    begins = np.minimum.accumulate(places[::-1, 0])[::-1]
    return np.stack([begins, np.maximum.accumulate(places[:, 1])], 1)


def _with_all_letters(context: str, places: np.ndarray) -> dict[tuple[int, int], tuple[int, int]]:
    """Return the tokens' places that have to move so that each visible character is in one.

    A tokenizer may report a word's place without its first letter (byte pairs after another
    pre-tokenizer), or drop a character. What is in no place belongs to the token that begins after
    it, else to the one that ends before it; if there is a space on both sides, to none.

    Args:
        places: (n, 2), the begin and end of all tokens of the context.
    """
    change = np.zeros(len(context) + 1, np.int64)
    np.add.at(change, places[:, 0], 1)
    np.add.at(change, places[:, 1], -1)
    outside = np.flatnonzero(change.cumsum()[:-1] == 0).tolist()
    loose = [i for i in outside if context[i].isprintable() and not context[i].isspace()]
    if not loose:
        return {}
    ordered = sorted(set(map(tuple, places.tolist())))
    first = {begin: (begin, end) for begin, end in reversed(ordered)}  # that begins there
    last = {end: (begin, end) for begin, end in ordered}  # that ends there
    moved: dict[tuple[int, int], tuple[int, int]] = {}
    start = loose[0]
    for here, following in itertools.pairwise([*loose, -1]):
        stop = here + 1
        if stop == following and not (stop in first or stop in last):
            continue
        spaced = context[stop : stop + 1].isspace() and first.get(stop, (0, 0))[1] > stop
        if stop in first and not (spaced and start in last):
            moved[first[stop]] = (start, moved.get(first[stop], first[stop])[1])
        elif start in last:
            moved[last[start]] = (moved.get(last[start], last[start])[0], stop)
        start = following
    return moved


def _cut(questions: list[str], tokenizer: Any, length: int) -> list[str]:
    """Cut each question after ``length`` tokens."""
    options = {"add_special_tokens": False, "return_offsets_mapping": True}
    made = models.tokenize(tokenizer, questions, key="--data", **options)
    places = made["offset_mapping"]
    return [
        question if len(of_tokens) <= length else question[: max(e for _, e in of_tokens[:length])]
        for question, of_tokens in zip(questions, places, strict=True)
    ]


def positions(chars: np.ndarray, answer: Answer) -> tuple[int, int]:
    """Return the positions of an answer's first and last token.

    They are (0, 0), BERT's [CLS], if the window does not hold the whole answer.

    Args:
        chars: the window's.
    """
    text, start = answer
    start += len(text) - len(text.lstrip())
    stop = start + len(text.strip())
    inside = np.flatnonzero(chars[:, 0] >= 0)
    if not len(inside) or start < chars[inside[0], 0] or stop > chars[inside[-1], 1]:
        return 0, 0
    touched = inside[(chars[inside, 1] > start) & (chars[inside, 0] < stop)]
    # An answer may have no token: a tokenizer drops characters such as control characters.
    return (int(touched[0]), int(touched[-1])) if len(touched) else (0, 0)


def within_reach(chars: np.ndarray, context: str, answer: Answer) -> bool:
    """Return whether the window can give this answer, to the word: a span of at most MAX_ANSWER
    tokens that begins and ends where the answer does."""
    first, last = positions(chars, answer)
    if not last >= first > 0 or last - first >= MAX_ANSWER:
        return False
    return bool(exact_match(context[chars[first, 0] : chars[last, 1]], answer[0]))


# --- Answers --------------------------------------------------------------------------------------


class Span(NamedTuple):
    score: float  # the sum of its logits
    start: int  # the first character in the context
    stop: int  # the character after the last one


def best_span(start: np.ndarray, end: np.ndarray, chars: np.ndarray) -> Span | None:
    """Return the span of context with the greatest sum of logits; None if there is no span.

    It has at most MAX_ANSWER tokens, begins at one of the N_BEST starts and ends at one of the
    N_BEST ends.

    Args:
        start, end: (L,) logits of the window's tokens.
        chars: the window's.
    """
    inside = np.flatnonzero(chars[:, 0] >= 0)
    firsts = inside[np.argsort(-start[inside], kind="stable")[:N_BEST]]
    lasts = inside[np.argsort(-end[inside], kind="stable")[:N_BEST]]
    length = lasts - firsts[:, None] + 1
    allowed = (length >= 1) & (length <= MAX_ANSWER)
    if not allowed.any():
        return None
    scores = np.where(allowed, start[firsts][:, None] + end[lasts], -np.inf)
    i, j = np.unravel_index(scores.argmax(), scores.shape)
    return Span(float(scores[i, j]), int(chars[firsts[i], 0]), int(chars[lasts[j], 1]))


def answers(
    contexts: Sequence[str],
    found: Iterable[tuple[int, Span | None]],
) -> list[str]:
    """Return the text of each question's best span, or "" if it has none.

    Of equally good spans the first counts.

    Args:
        contexts: the context of each question.
        found: for each window, the number of its question and its best span.
    """
    best: list[Span | None] = [None] * len(contexts)
    for question, span in found:
        before = best[question]
        if span is not None and (before is None or span.score > before.score):
            best[question] = span
    return [
        "" if span is None else context[span.start : span.stop]
        for context, span in zip(contexts, best, strict=True)
    ]


# --- Exact match and F1 ---------------------------------------------------------------------------


def normalize(text: str) -> list[str]:
    """Return the words that count: lower case, without ASCII punctuation and articles.

    Example:
        >>> normalize("The  U.S.'s an-the Army")
        ['uss', 'anthe', 'army']
    """
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def exact_match(answer: str, gold: str) -> float:
    """Return 1 if the words are the same, else 0."""
    return float(normalize(answer) == normalize(gold))


def f1(answer: str, gold: str) -> float:
    """Return the harmonic mean of precision and recall of the words, counted with repetition.

    It is 0 if no word is shared, even if neither side has any word (SQuAD v1.1's own rule).
    """
    words, wanted = normalize(answer), normalize(gold)
    shared = (Counter(words) & Counter(wanted)).total()
    return 2 * shared / (len(words) + len(wanted)) if shared else 0.0


def score(found: Sequence[str], gold: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return "EM" and "F1", x 100.

    A question counts with its best value over the gold answers; the result is the mean over the
    questions.

    Args:
        found: n answers.
        gold: for each question, the texts of its gold answers, at least one.
    """
    return {
        name: 100
        * sum(max(measure(a, g) for g in texts) for a, texts in zip(found, gold, strict=True))
        / len(gold)
        for name, measure in (("EM", exact_match), ("F1", f1))
    }
