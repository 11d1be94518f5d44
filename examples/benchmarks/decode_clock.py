"""Milliseconds a token inside `model.generate`, and what a step does on the GPU."""

import statistics
import time
from collections import defaultdict

import torch
from torch._dynamo.utils import counters
from transformers import LogitsProcessor

WARM = 12  # steps before the first window: traced, recorded, replayed


class Clock(LogitsProcessor):
    """Called by `generate` behind every forward: marks the ends of windows, changes no score.

    On a GPU a mark is an event in the stream, so that nothing waits for it; the device is waited
    for behind the prompt and before the first window only.

    Args:
        device: the model's.
        window: steps in a window.
        repeats: windows.
        profiled: steps that a profiler records behind the last window; 0 for none.
    """

    def __init__(self, device: torch.device, window: int, repeats: int, profiled: int = 0) -> None:
        self.cuda = device.type == "cuda"
        self.window, self.repeats, self.profiled = window, repeats, profiled
        self.marks: list = []
        self.steps, self.began, self.warm = 0, 0.0, 0.0
        self.graphs_when_warm = 0
        self.profile: torch.profiler.profile | None = None

    @property
    def new_tokens(self) -> int:
        """How many `generate` has to decode."""
        return 1 + WARM + self.window * self.repeats + self.profiled

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        done = self.steps - WARM
        if self.steps == 0:
            self.began = self._waited()
        if done == 0:
            self.warm = self._waited()
            self.graphs_when_warm = counters["stats"]["unique_graphs"]
        if done >= 0 and done % self.window == 0 and len(self.marks) <= self.repeats:
            self.marks.append(self._mark())
        self._record(done - self.window * self.repeats)
        self.steps += 1
        return scores

    def _waited(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _mark(self) -> "torch.cuda.Event | float":
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _record(self, behind: int) -> None:
        if self.profiled and behind == 0:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            if self.cuda:
                torch.cuda.synchronize()
                kinds.append(torch.profiler.ProfilerActivity.CUDA)
            self.profile = torch.profiler.profile(activities=kinds)
            self.profile.start()
        if self.profiled and behind == self.profiled and self.profile is not None:
            if self.cuda:
                torch.cuda.synchronize()
            self.profile.stop()

    def windows(self) -> list[float]:
        """Milliseconds a step, window by window."""
        if self.cuda:
            torch.cuda.synchronize()
            spans = [a.elapsed_time(b) for a, b in zip(self.marks, self.marks[1:], strict=False)]
        else:
            spans = [1e3 * (b - a) for a, b in zip(self.marks, self.marks[1:], strict=False)]
        return [span / self.window for span in spans]

    def row(self) -> dict:
        """What was measured: milliseconds of a step, seconds that the first steps took beyond."""
        windows = self.windows()
        step = statistics.median(windows)
        graphs = counters["stats"]["unique_graphs"]
        return {
            "step_ms": step,
            "windows_ms": windows,
            "first_steps_seconds": self.warm - self.began - 1e-3 * step * WARM,
            "graphs": graphs,
            "graphs_once_warm": graphs - self.graphs_when_warm,
            "graph_breaks": sum(counters["graph_break"].values()),
            "cuda_graphs_skipped": counters["inductor"]["cudagraph_skips"],
        }


def profile_rows(clock: Clock) -> dict:
    """A step by kernel, and how long the GPU has nothing to do between graphs.

    Returns:
        "kernels": name, times a step and microseconds a step, the longest first;
        "busy_us", "step_us": a step's kernels and the step itself on the GPU's own clock (on a
        CPU what stands for kernels is torch's own operations);
        "graph_launches": a step; "between_launches_us": median from one graph launch to the next.
    """
    assert clock.profile is not None
    on_device, launches = [], []
    for event in clock.profile.events():
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if on_gpu or (not clock.cuda and event.cpu_parent is None):
            if not event.is_user_annotation:  # a span around kernels
                on_device.append(event)
        elif event.name.startswith("cudaGraphLaunch"):
            launches.append(event.time_range.start)
    steps = clock.profiled
    by_name: dict[str, list[float]] = defaultdict(list)
    for event in on_device:
        by_name[event.name].append(event.time_range.elapsed_us())
    kernels = [
        {"kernel": name, "times": len(took) / steps, "microseconds": sum(took) / steps}
        for name, took in by_name.items()
    ]
    kernels.sort(key=lambda row: -row["microseconds"])
    starts = [event.time_range.start for event in on_device]
    ends = [event.time_range.end for event in on_device]
    gaps = [b - a for a, b in zip(sorted(launches), sorted(launches)[1:], strict=False)]
    return {
        "kernels": kernels,
        "busy_us": sum(row["microseconds"] for row in kernels),
        "step_us": (max(ends) - min(starts)) / steps if ends else 0.0,
        "graph_launches": len(launches) / steps,
        "between_launches_us": statistics.median(gaps) if gaps else None,
    }
