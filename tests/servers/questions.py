"""A question that is put to several servers, and the answers as tables of Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import urllib3

T = TypeVar("T")

NOT_ASKED = "n/a"
"""The answer where what the question needs could not be made."""


class NotAskedError(Exception):
    """The set-up of a question failed, so that the question itself was not put."""


@dataclass(frozen=True, slots=True)
class Question(Generic[T]):
    """One row of a table."""

    text: str
    """A request, or a fact, in Markdown."""
    documented: str
    """The answer that the provider documents; empty where it says nothing."""
    ask: Callable[[T], str]
    """Make the requests and return a status, or a few words."""


@dataclass(frozen=True, slots=True)
class Topic(Generic[T]):
    """One table."""

    title: str
    questions: Sequence[Question[T]]


def answers(topics: Sequence[Topic[T]], server: T) -> dict[str, str]:
    """Put all questions to a server and return the answers by the questions' texts."""
    return {question.text: _answer(question, server) for topic in topics for question in topic.questions}


def _answer(question: Question[T], server: T) -> str:
    try:
        return question.ask(server)
    except NotAskedError:
        return NOT_ASKED
    except urllib3.exceptions.HTTPError:
        return "no answer"


def yes_or_no(fact: bool) -> str:
    """Return an answer in one word."""
    return "yes" if fact else "no"


def outcome_of_race(won: int) -> str:
    """Return the answer of a race that so many requests won."""
    return {0: "none wins", 1: "one wins"}.get(won, "several win")


def table(topic: Topic[Any], provider: str, servers: Mapping[str, Mapping[str, str]]) -> str:
    """Return a table in Markdown: a row a question, a column a server, in bold what differs."""
    lines = [
        f"### {topic.title}",
        "",
        _row(topic.title.lower(), provider, *servers),
        _row(*["---"] * (len(servers) + 2)),
    ]
    for question in topic.questions:
        found = [_cell(question, answers[question.text]) for answers in servers.values()]
        lines.append(_row(question.text, question.documented or "not said", *found))
    return "\n".join(lines) + "\n"


def _cell(question: Question[T], answer: str) -> str:
    differs = question.documented not in {"", answer} and answer != NOT_ASKED
    return f"**{answer}**" if differs else answer


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def read_tables(text: str, topics: Sequence[Topic[Any]]) -> dict[str, dict[str, str]]:
    """Return the answers in a page's tables of these topics: server, question, answer without bold."""
    titles = {topic.title.lower() for topic in topics}
    found = dict[str, dict[str, str]]()
    title, columns = "", list[str]()
    for line in text.splitlines():
        if not line.startswith("| "):
            title, columns = "", []
            continue
        first, *cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not columns:
            title, columns = first, cells
        elif title in titles and set(first) != {"-"}:
            for server, cell in zip(columns, cells, strict=True):
                found.setdefault(server, {})[first] = cell.strip("*")
    return found
