"""PyramidKV: SnapKV with more budget in lower layers."""

from dataclasses import dataclass, field, replace

from typing_extensions import override

from sparsity.policies.base import check_count
from sparsity.policies.snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV with a budget that falls linearly from the first layer to the last.

    Cai et al., "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling"
    (arXiv 2406.02069). Beyond the window every layer has `budget - window` tokens on average; the
    last layer has that average divided by `beta`, the first has twice the average less that, and
    the layers between are interpolated linearly.

    Departures from the paper: as in `SnapKV`. From the authors' code: each layer's budget is
    rounded on its own, so that they add up to the average times the layers but for rounding (there
    the step from layer to layer is rounded), and prompts shorter than the first layer's budget
    change nothing.

    Args:
        budget: tokens that a KV head keeps, averaged over the layers with full attention. The last
            layers keep less, so that a text of `budget` tokens is already pruned there;
            `dense_layers` takes the first layers away, which have the largest budgets.
        beta: the paper's 20.

    The other arguments are those of `SnapKV`, with page_size=1 and pin_prompt=False.
    """

    page_size: int = field(default=1, init=False)
    pin_prompt: bool = field(default=False, init=False)  # the last layers have no room for one
    beta: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "beta", least=1)

    @override
    def at_layer(self, layer: int, layers: int) -> SnapKV:
        """`SnapKV` with this layer's own budget, see `Policy.at_layer`."""
        fixed = self.sinks + self.recent_kept
        average = self.budget - fixed
        last = average / self.beta
        first = 2 * average - last
        depth = layer / max(1, layers - 1)
        return replace(self, budget=fixed + max(1, round(first + (last - first) * depth)))
