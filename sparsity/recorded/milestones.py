"""Which pages of a text matter when: milestones, phoenixes, and a picture of them.

The RaaS paper (arXiv 2502.11147, section 3) sorts attention maps by eye: a milestone token is
bright for a while after it was written and then fades for good, a "water column"; a phoenix token
is ignored for more than 128 steps and matters again, and is nearly always part of the prompt. Here
the same is defined for pages and counted.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsity.arguments import take_share, take_whole_number, whole_number
from sparsity.recorded.head_picture import draw_head
from sparsity.recorded.trace import Trace, check_trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

NAMES = ("milestone", "phoenix", "steady", "unused")
NONE_COUNTED = "none counted: no page has left the newest tokens (Thresholds.local)"


@dataclass(frozen=True)
class Thresholds:
    """When a page matters, and for how long it must not.

    Args:
        alpha: a page matters at a step that gives it more than this share of the attention.
        gap: steps without mattering after which a page has faded; the paper's 128.
        local: a page with any of this many newest tokens always matters, so that it is not counted.

    Raises:
        SparsityError: for numbers out of range.
    """

    alpha: float = 0.05
    gap: int = 128
    local: int = 32

    def __post_init__(self) -> None:
        take_share(self, "alpha")
        take_whole_number(self, "gap", least=1, note=" step")
        take_whole_number(self, "local", least=0, note=" tokens")


@dataclass(frozen=True)
class Kinds:
    """The kind of each page in a dense run: one or none, bool `[kv_heads, pages]` for each kind.

    A page is counted once it has left the `Thresholds.local` newest tokens; one that never does has
    no kind.

    Attributes:
        milestone: matters, but not once in the last `gap` steps, and never after more than `gap`
            steps without.
        phoenix: matters again after more than `gap` steps without.
        steady: matters, and is neither.
        unused: never matters.
        prompt: whether a page holds tokens of the prompt, bool `[pages]`.
        returns: the steps at which a phoenix page matters again, bool `[kv_heads, steps, pages]`.
    """

    milestone: Tensor
    phoenix: Tensor
    steady: Tensor
    unused: Tensor
    prompt: Tensor
    returns: Tensor

    def share(self, name: str) -> float:
        """Share of the counted pages of a kind: "milestone", "phoenix", "steady" or "unused".

        0 where no page is counted.
        """
        return int(getattr(self, name).sum()) / max(1, self.counted)

    @property
    def counted(self) -> int:
        """Pages that have a kind, summed over KV heads."""
        return sum(int(getattr(self, one).sum()) for one in NAMES)

    @property
    def phoenixes_in_prompt(self) -> float:
        """Share of the phoenix pages that hold tokens of the prompt; NaN when there are none."""
        return float((self.phoenix & self.prompt).sum() / self.phoenix.sum())

    def __str__(self) -> str:
        if not self.counted:
            return NONE_COUNTED
        shares = ", ".join(f"{name} {self.share(name):.1%}" for name in NAMES)
        if not self.phoenix.any():
            return shares
        return f"{shares}; {self.phoenixes_in_prompt:.1%} of the phoenix pages in the prompt"


def classify(
    mass: Tensor, prompt_tokens: int, page_size: int, thresholds: Thresholds | None = None
) -> Kinds:
    """The kind of each page, by the steps at which it matters.

    Args:
        mass: share of its attention that each decoded token gives to each page,
            `[kv_heads, steps, pages]`, as from `Trace.mass`.
        prompt_tokens: tokens of the prompt.
        page_size: tokens a page.
        thresholds: when a page matters; None for the defaults.
    """
    limits = thresholds or Thresholds()
    _, steps, pages = mass.shape
    step = torch.arange(steps)[:, None]
    last = torch.arange(pages) * page_size + page_size - 1
    # A step is about the token of this rank; a page is local while it is among the newest.
    apart = prompt_tokens + step - last >= limits.local
    matters = (mass > limits.alpha) & apart
    first_apart = torch.where(apart.any(0), apart.float().argmax(0), steps)
    # The step at which a page last mattered before each step; where it left the newest at first.
    when = torch.where(matters, step, -1)
    before = torch.cat([torch.full_like(when[:, :1], -1), when.cummax(1).values[:, :-1]], 1)
    before = torch.maximum(before, first_apart.clamp(max=steps - 1))
    returns = matters & (step - before > limits.gap)
    ever, phoenix = matters.any(1), returns.any(1)
    faded = steps - 1 - when.amax(1) > limits.gap
    known = (first_apart < steps).expand_as(ever)
    milestone = ever & faded & ~phoenix
    return Kinds(
        milestone=milestone,
        phoenix=phoenix,
        steady=ever & ~phoenix & ~milestone,
        unused=known & ~ever,
        prompt=torch.arange(pages) * page_size < prompt_tokens,
        returns=returns,
    )


def milestone_map(
    trace: Trace,
    layer: int,
    kv_head: int = 0,
    page_size: int = 16,
    path: str | Path | None = None,
) -> "Figure":
    """A picture of one head's attention: pages from left to right, decoded tokens downwards.

    A milestone is a bright column that begins on the diagonal and ends; a phoenix goes dark and
    comes back. Needs matplotlib (extra "plots").

    Args:
        trace: from `record`.
        layer: index of the layer in the model.
        kv_head: index of the KV head.
        page_size: tokens a page.
        path: where to save the picture; None to save nothing.

    Raises:
        SparsityError: as `Trace.figure`, which draws it into axes of one's own.
    """
    check_trace(trace)
    figure: Any = trace.figure(whole_number("layer", layer), kv_head, page_size).figure
    if path is not None:
        figure.savefig(Path(path).expanduser(), dpi=120)
    return figure


def plot_head(axes: "Axes", trace: Trace, layer: int, kv_head: int, page_size: int) -> "AxesImage":
    """Plot what `milestone_map` shows into axes of your own, without title and labels.

    Args:
        axes: of a matplotlib figure.
        trace: from `record`.
        layer: index of the layer in the model.
        kv_head: index of the KV head.
        page_size: tokens a page.

    Raises:
        SparsityError: for a layer or head that the trace does not hold.
    """
    check_trace(trace)
    mass = trace.head_mass(layer, kv_head, page_size)
    return draw_head(axes, mass, page_size, trace.prompt_tokens, trace.tokens)
