"""A row of each published format to problems.

Rows are as the hub has them, or as the files of the data sets' authors do where these differ. A row
that asks nothing gives no problem: one without answers where the data set has unanswerable
questions, or one whose documents are empty.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from picache.datasets.rows import Row
from picache.problem import Problem

INSTRUCTION = "Read the passages and answer the question."
LEAD = "The answer is"
SUMMARY = "Summary:"


def squad(row: Row) -> Iterator[Problem]:
    """SQuAD 1.1 (arXiv 1606.05250) and 2.0: a question on one paragraph.

    A row of the hub is a question; a row of the authors' file, an article with its paragraphs.
    """
    if "paragraphs" in row:
        for paragraph in row["paragraphs"]:
            for asked in paragraph["qas"]:
                texts = [answer["text"] for answer in asked["answers"]]
                yield from _answerable([paragraph["context"]], asked["question"], texts)
    else:
        yield from _answerable([row["context"]], row["question"], row["answers"]["text"])


def hotpotqa(row: Row) -> Iterator[Problem]:
    """HotpotQA, distractor setting (arXiv 1809.09600), and 2WikiMultihopQA (arXiv 2011.01060).

    Two or more of ten paragraphs are needed. The answer may be yes or no.
    """
    documents = [f"{title}: {''.join(parts)}" for title, parts in _titled(row["context"])]
    answer = row.get("answer")  # the test split has none
    yield _asked(documents, row["question"], [answer] if answer else [])


def musique(row: Row) -> Iterator[Problem]:
    """MuSiQue (arXiv 2108.00573): two to four of twenty paragraphs are needed."""
    documents = [f"{one['title']}: {one['paragraph_text']}" for one in row["paragraphs"]]
    if row.get("answerable", True):
        yield _asked(documents, row["question"], [row["answer"], *row["answer_aliases"]])


def samsum(row: Row) -> Iterator[Problem]:
    """SAMSum (arXiv 1911.12237): a chat and its summary."""
    yield from _summarised([row["dialogue"]], row["summary"], "Summarize the dialogue above.")


def multi_news(row: Row) -> Iterator[Problem]:
    """Multi-News (arXiv 1906.01749): articles on one event, parted by "|||||", and a summary."""
    articles = [article.strip() for article in row["document"].split("|||||")]
    summary = row["summary"].removeprefix("\N{EN DASH} ")
    yield from _summarised(articles, summary, "Summarize the news articles above.")


def longbench(row: Row) -> Iterator[Problem]:
    """LongBench (arXiv 2308.14508), any subset: its numbered passages, or the context as a whole.

    Departure: the prompts are shorter than the authors', and say the same.
    """
    instruction, behind, lead = _LONGBENCH[row["dataset"].removesuffix("_e")]
    documents = _filled(part.strip() for part in _PASSAGE.split(row["context"]))
    asked = "\n".join(_filled((row["input"], behind)))
    yield Problem(documents, asked, _filled(row["answers"]), instruction, lead)


_PASSAGE = re.compile(r"^(?=(?:Passage|Paragraph) \d+:)", re.MULTILINE)

_CODE = ("Go on with the code.", "Next line of code:", "")
_LONGBENCH = {
    **dict.fromkeys(
        "narrativeqa qasper multifieldqa_en multifieldqa_zh hotpotqa 2wikimqa musique dureader "
        "qmsum".split(),
        (INSTRUCTION, "", LEAD),
    ),
    **dict.fromkeys(
        "trec triviaqa samsum lsht".split(),
        ("Go on as in the examples: one more follows, without its last line.", "", ""),
    ),
    **dict.fromkeys(
        "gov_report multi_news vcsum".split(),
        ("", "Write a summary of the text above, of one page, in its language.", SUMMARY),
    ),
    **dict.fromkeys(
        "passage_retrieval_en passage_retrieval_zh".split(),
        (
            "An abstract of one of these passages follows them.",
            "Name the passage that the abstract is of, as it is named above.",
            LEAD,
        ),
    ),
    "passage_count": (
        "Some of these passages are repeated.",
        "How many different ones are there?",
        LEAD,
    ),
    "lcc": _CODE,
    "repobench-p": _CODE,
}
"""By subset: the instruction, what is asked behind the input (which may be empty), the lead."""


def _titled(context: Any) -> list[tuple[str, list[str]]]:
    """Titles and sentences: of [title, sentences] (the authors' files), or of columns (the hub)."""
    if isinstance(context, Mapping):
        return list(zip(context["title"], context["sentences"], strict=True))
    found = [(title, sentences) for title, sentences in context]
    if any(isinstance(sentences, str) for _, sentences in found):
        raise ValueError("context is no list of [title, sentences]")
    return found


def _answerable(documents: list[str], question: str, answers: list[str]) -> Iterator[Problem]:
    if _filled(answers):
        yield _asked(documents, question, answers)


def _asked(documents: list[str], question: str, answers: list[str]) -> Problem:
    return Problem(tuple(documents), question, _filled(answers), INSTRUCTION, LEAD)


def _summarised(documents: list[str], summary: str, task: str) -> Iterator[Problem]:
    kept = _filled(documents)
    if kept and summary.strip():
        yield Problem(kept, task, (summary.strip(),), "", SUMMARY)


def _filled(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(text for text in texts if text.strip())
