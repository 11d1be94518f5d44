"""PyramidKV: SnapKV with more room in lower layers."""

from dataclasses import dataclass, field, replace

from sparsity.policies.base import check_count
from sparsity.policies.snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV with a budget that falls linearly from the first layer to the last.

    Cai et al., "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling"
    (arXiv 2406.02069). Beyond the window every layer has `budget - window` tokens on average; the
    last layer has that average divided by `beta`, the first twice the average less that, and the
    layers between lie on a line.

    Departures from the paper: as in `SnapKV`. From the authors' code: the line is rounded layer by
    layer, so that the sum is the average times the layers up to rounding (there every step down
    is rounded), and it does not bend for prompts shorter than the first layer's budget.

    budget: tokens kept by a KV head, on average over the layers with full attention (a text of
    `budget` tokens is more than the last layers keep; `dense_layers` takes away from the first
    ones, which have the most). beta: the paper's 20. The rest as
    in `SnapKV`.
    """

    page_size: int = field(default=1, init=False)
    pin_prompt: bool = field(default=False, init=False)  # the last layers have no room for one
    beta: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "beta", least=1)

    def at_layer(self, layer: int, layers: int) -> SnapKV:
        """This layer's own budget."""
        fixed = self.sinks + self.recent_kept
        average = self.budget - fixed
        last = average / self.beta
        first = 2 * average - last
        depth = layer / max(1, layers - 1)
        return replace(self, budget=fixed + max(1, round(first + (last - first) * depth)))
