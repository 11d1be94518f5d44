"""The attention of one head as a picture: pages from left to right, decoded tokens downwards."""

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

LEAST = 1e-4
"""Share of the attention at which the colours begin."""


def draw_head(
    ax: "Axes", mass: Tensor, page_size: int, prompt_tokens: int, tokens: int
) -> "AxesImage":
    """Draw the shares of the attention, and a dotted line where the prompt ends.

    Args:
        ax: of a matplotlib figure.
        mass: `[rows, pages]`, the rows at equal distances from `prompt_tokens` to `tokens`.
        page_size: tokens a page.
        prompt_tokens: tokens of the prompt.
        tokens: of the whole run.
    """
    from matplotlib.colors import LogNorm

    ax.axvline(prompt_tokens, color="white", linewidth=0.8, linestyle=":")
    return ax.imshow(
        mass.clamp(min=LEAST).numpy(),
        aspect="auto",
        cmap="magma",
        norm=LogNorm(LEAST, 1),
        interpolation="nearest",
        extent=(0, mass.shape[1] * page_size, tokens, prompt_tokens),
    )
