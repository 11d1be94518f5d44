"""The same arms in a smaller run and in a larger one: what each loses, and whether they agree."""

from quickstart_pages import markdown
from scipy.stats import spearmanr


def in_both(small: dict[str, float], large: dict[str, float], form: str = ".3f") -> str:
    """Markdown: the arms of the smaller run in their order, beside the same arms of the larger one.

    Beneath it Spearman's rank correlation of all of them.

    Args:
        small: of each arm what it loses.
        large: likewise; arms of one run alone are left out.
        form: of a number.
    """
    arms = sorted(set(small) & set(large), key=small.__getitem__)
    alike = spearmanr(*([found[arm] for arm in arms] for found in (small, large))).statistic
    rows = [{"arm": arm, "s": format(small[arm], form), "l": format(large[arm], form)}
            for arm in arms]  # fmt: skip
    table = markdown(rows, {"arm": "{arm}", "small": "{s}", "large": "{l}"})
    return f"{table}\n\nRank correlation of the {len(arms)} arms: {alike:.2f}."
