"""SQuAD v1.1 (Rajpurkar et al. 2016): its files, windows of tokens, answers, exact match and F1.

A question and as much of its context as fits are one window; a longer context gives several that
overlap. A model gives every token a start and an end logit, and the answer is the best span of
context over all windows of the question (Devlin et al. 2019, section 4.2).
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distilfast.errors import ConfigError

Answer = tuple[str, int]  # its text, and the character of the context where it begins

N_BEST = 20  # start and end positions of a window that are tried
MAX_ANSWER = 30  # tokens
CHUNK = 1000  # questions that are tokenised at a time: the lists are large


# --- Reading --------------------------------------------------------------------------------------


def read(file: Path) -> tuple[list[tuple[str, ...]], list[list[Answer]]]:
    """(question, context) and the gold answers of each question, from an official file.

    Raises:
        ConfigError: no such file, not JSON, not SQuAD's, of v2.0, or an answer that is not at its
            place (with the question's id).
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"--data: expected the file {str(file)!r}, which is missing") from None
    except ValueError as error:  # UnicodeDecodeError among them
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
                    texts.append((asked["question"], context))
                    gold.append(checked(answers, context, where))
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"{file}: expected the layout of SQuAD v1.1 (data, paragraphs, context, qas, id, "
            f"question, answers, text, answer_start), got another ({error!r})"
        ) from None
    return texts, gold


def of_hub(row: Mapping[str, Any], where: str) -> list[Answer]:
    """The gold answers in a row of the hub's copy, checked in the same way."""
    answers = list(zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True))
    return checked(answers, row["context"], f"{where}, question {row['id']}")


def checked(answers: list[Answer], context: str, where: str) -> list[Answer]:
    """The answers, each of which stands in the context where it says.

    Raises:
        ConfigError: one does not, or there is none.
    """
    if not answers:
        raise ConfigError(f"{where}: expected an answer, as all have in SQuAD v1.1, got none")
    for text, start in answers:
        found = context[start : start + len(text)]
        if not text or start < 0 or found != text:
            raise ConfigError(f"{where}: expected {text!r} at character {start}, got {found!r}")
    return answers


# --- Windows --------------------------------------------------------------------------------------


class Window(NamedTuple):
    """Tokens of a question and of a part of its context, L of them."""

    question: int  # its number
    input_ids: np.ndarray  # (L,) int32
    token_type_ids: np.ndarray  # (L,) int32
    chars: np.ndarray  # (L, 2) int32: where in the context each begins and ends; -1: not in it


def windows(texts: Sequence[tuple[str, ...]], tokenizer: Any, max_length: int) -> Iterator[Window]:
    """The windows of all questions, in their order.

    Args:
        texts: (question, context).
        tokenizer: a fast one, as only these know where a token stands.
        max_length: tokens of a window, the special ones included. Neighbours share a third of it,
            128 of 384, and a question is cut to a sixth, BERT's 64 of 384.
    """
    for begin in range(0, len(texts), CHUNK):
        questions, contexts = (list(x) for x in zip(*texts[begin : begin + CHUNK], strict=True))
        made = tokenizer(
            _cut(questions, tokenizer, max(1, max_length // 6)),
            contexts,
            truncation="only_second",
            max_length=max_length,
            stride=max_length // 3,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_token_type_ids=True,
        )
        for i, ids in enumerate(made["input_ids"]):
            in_context = np.array([part == 1 for part in made.sequence_ids(i)])
            yield Window(
                begin + made["overflow_to_sample_mapping"][i],
                np.asarray(ids, np.int32),
                np.asarray(made["token_type_ids"][i], np.int32),
                np.where(in_context[:, None], np.asarray(made["offset_mapping"][i], np.int32), -1),
            )


def _cut(questions: list[str], tokenizer: Any, length: int) -> list[str]:
    """The questions, each up to the end of its token number ``length``."""
    made = tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True)
    places = made["offset_mapping"]
    return [
        question if len(of_tokens) <= length else question[: of_tokens[length - 1][1]]
        for question, of_tokens in zip(questions, places, strict=True)
    ]


def positions(chars: np.ndarray, answer: Answer) -> tuple[int, int]:
    """The first and the last token of an answer; (0, 0), BERT's [CLS], where the window does not
    hold all of it.

    Args:
        chars: of the window.
    """
    text, start = answer
    stop = start + len(text)
    inside = np.flatnonzero(chars[:, 0] >= 0)
    if not len(inside) or start < chars[inside[0], 0] or stop > chars[inside[-1], 1]:
        return 0, 0
    touched = inside[(chars[inside, 1] > start) & (chars[inside, 0] < stop)]
    # A tokenizer drops what it does not know at all, a control character, and leaves no token.
    return (int(touched[0]), int(touched[-1])) if len(touched) else (0, 0)


# --- Answers --------------------------------------------------------------------------------------


class Span(NamedTuple):
    score: float  # the sum of its logits
    start: int  # characters of the context
    stop: int


def best_span(start: np.ndarray, end: np.ndarray, chars: np.ndarray) -> Span | None:
    """The span of context of the greatest sum of logits, of at most MAX_ANSWER tokens, that begins
    at one of the N_BEST starts and ends at one of the N_BEST ends; None without any.

    Args:
        start, end: (L,) logits of the window's tokens.
        chars: of the window.
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
    """The text of the best span of each question, the first one of equals; "" without any.

    Args:
        contexts: of each question.
        found: the number of the question and the best span of each window.
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
    """The words that count: lower case, without ASCII punctuation and articles.

    Example:
        >>> normalize("The  U.S.'s an-the Army")
        ['uss', 'anthe', 'army']
    """
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def exact_match(answer: str, gold: str) -> float:
    """1 where the words are the same, else 0."""
    return float(normalize(answer) == normalize(gold))


def f1(answer: str, gold: str) -> float:
    """The harmonic mean of precision and recall of the words, as often as they occur; 0 where none
    is shared, also where neither side has any (SQuAD v1.1's own rule)."""
    words, wanted = normalize(answer), normalize(gold)
    shared = (Counter(words) & Counter(wanted)).total()
    return 2 * shared / (len(words) + len(wanted)) if shared else 0.0


def score(found: Sequence[str], gold: Sequence[Sequence[str]]) -> dict[str, float]:
    """ "EM" and "F1", means over the questions of the best over the gold answers, x 100.

    Args:
        found: n answers.
        gold: the texts of the gold answers of each question, at least one.
    """
    return {
        name: 100
        * sum(max(measure(a, g) for g in texts) for a, texts in zip(found, gold, strict=True))
        / len(gold)
        for name, measure in (("EM", exact_match), ("F1", f1))
    }
