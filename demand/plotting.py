"""The axes of a picture, for all that draw one; matplotlib is loaded when it is first needed."""

from typing import TYPE_CHECKING

from demand.errors import DemandError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def axes(ax: "Axes | None", inches: tuple[float, float]) -> "Axes":
    """`ax`, or the axes of a new figure of the given size.

    Raises:
        DemandError: matplotlib is not installed.
    """
    if ax is not None:
        return ax
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DemandError('a picture needs matplotlib: pip install "picache[plots]"') from error
    return Figure(figsize=inches, layout="constrained").add_subplot()
