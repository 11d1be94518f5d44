"""The same arms in two runs: what each loses, and whether they agree."""

from quickstart_pages import markdown
from scipy.stats import spearmanr


def in_both(
    one: dict[str, float],
    other: dict[str, float],
    form: str = ".3f",
    names: tuple[str, str] = ("small", "large"),
) -> str:
    """Markdown: the arms of one run in their order, beside the same arms of the other.

    Beneath it Spearman's rank correlation of all of them.

    Args:
        one: of each arm what it loses.
        other: likewise; arms of one run alone are left out.
        form: of a number.
        names: of the runs.
    """
    arms = sorted(set(one) & set(other), key=one.__getitem__)
    alike = spearmanr(*([found[arm] for arm in arms] for found in (one, other))).statistic
    rows = [{"arm": arm, "a": format(one[arm], form), "b": format(other[arm], form)}
            for arm in arms]  # fmt: skip
    table = markdown(rows, {"arm": "{arm}", names[0]: "{a}", names[1]: "{b}"})
    return f"{table}\n\nRank correlation of the {len(arms)} arms: {alike:.2f}."
