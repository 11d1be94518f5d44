"""Axes for all that draw, and pictures for a notebook; matplotlib is loaded when first needed."""

from collections.abc import Callable
from io import StringIO
from typing import TYPE_CHECKING, Any

from sparsity.errors import SparsityError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def axes(ax: "Axes | None", inches: tuple[float, float]) -> "Axes":
    """`ax`, or the axes of a new figure of the given size.

    Raises:
        SparsityError: matplotlib is not installed.
    """
    if ax is not None:
        return ax
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SparsityError('a picture needs matplotlib: pip install "picache[plots]"') from error
    return Figure(figsize=inches, layout="constrained").add_subplot()


def fixed_axes(inches: tuple[float, float]) -> "Axes":
    """Axes of a new figure with margins that fit labels as they are: laying them out takes time."""
    from matplotlib.figure import Figure

    width, height = inches
    return Figure(figsize=inches).add_axes(
        (0.7 / width, 0.5 / height, 1.0 - 1.4 / width, 1.0 - 0.85 / height)
    )


def svg(draw: Callable[[], "Axes"]) -> str | None:
    """What `draw` draws into axes of its own figure, as SVG; None without matplotlib.

    A notebook that is given None shows the text.
    """
    try:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
    except ImportError:
        return None
    text = StringIO()
    figure: Any = draw().figure  # never part of another
    # `savefig` would draw it twice.
    FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
    return text.getvalue()
