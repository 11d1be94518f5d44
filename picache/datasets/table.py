"""The data sets: where each stands on the hub, and how a row becomes problems."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from picache.datasets import formats
from picache.datasets.rows import Row
from picache.problem import Problem


@dataclass(frozen=True)
class DataSet:
    """A data set of the hub.

    Args:
        repository: on the hub; one of Parquet, CSV or JSON, since `datasets` 4 runs no scripts.
        split: taken where none is asked for.
        problems: of a row.
        columns: that a row has, for errors.
        subset: of the repository's; None where it has but one, "" where one has to be named.
        answer_inside: whether the data set promises that the first answer stands in the documents,
            as it is written (but for yes and no).
    """

    repository: str
    split: str
    problems: Callable[[Row], Iterator[Problem]]
    columns: str
    subset: str | None = None
    answer_inside: bool = False


_HOTPOT = "question, answer, context (of title, sentences)"

# fmt: off
DATASETS = {
    "squad": DataSet("rajpurkar/squad", "validation", formats.squad,
                     "context, question, answers", answer_inside=True),
    "hotpotqa": DataSet("hotpotqa/hotpot_qa", "validation", formats.hotpotqa, _HOTPOT,
                        subset="distractor", answer_inside=True),
    "2wikimqa": DataSet("framolfese/2WikiMultihopQA", "validation", formats.hotpotqa, _HOTPOT),
    "musique": DataSet("dgslibisey/MuSiQue", "validation", formats.musique,
                       "paragraphs, question, answer, answer_aliases", answer_inside=True),
    "samsum": DataSet("knkarthick/samsum", "test", formats.samsum, "dialogue, summary"),
    "multi_news": DataSet("Awesome075/multi_news_parquet", "test", formats.multi_news,
                          "document, summary"),
    "longbench": DataSet("Xnhyacinth/LongBench", "test", formats.longbench,
                         "input, context, answers, dataset", subset=""),
}
# fmt: on
"""By the name that `load` takes."""
