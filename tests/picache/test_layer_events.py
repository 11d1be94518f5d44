"""A captured pass that waits for each layer by itself while later ones are loaded."""

import time

import pytest
import torch

from picache.hf.layer_events import LayerEvents

NO_DEVICE = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
LAYERS, SIZE = 6, 1 << 16
SLEEP_CYCLES = 100_000_000  # some 50 ms


def gpu(test):
    return pytest.mark.gpu(NO_DEVICE(test))


def test_a_torch_without_such_events_is_known(monkeypatch):
    assert LayerEvents.exist()

    class Event:
        def __new__(cls, enable_timing=False, blocking=False, interprocess=False): ...

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert not LayerEvents.exist()


class Captured:
    """A graph that copies every layer of an arena out, each once it is in place."""

    def __init__(self):
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.events = LayerEvents(LAYERS, self.device)
        self.arena = torch.zeros(LAYERS, SIZE, device=self.device)
        self.out = torch.zeros(LAYERS, SIZE, device=self.device)
        self.done = torch.zeros(LAYERS, pin_memory=True)  # which the host can look at meanwhile
        self.one = torch.ones(1, device=self.device)
        self.loading = torch.cuda.Stream(self.device)
        self.graph = torch.cuda.CUDAGraph()
        self.forward()
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph):
            self.forward()

    def forward(self):
        for layer in range(LAYERS):
            self.events.wait(layer)
            torch.add(self.arena[layer], 1, out=self.out[layer])
            self.done[layer : layer + 1].copy_(self.one, non_blocking=True)

    def load(self, held, slow=()):
        """Copy the layers of pinned memory to the arena; before some of them the stream sleeps."""
        self.loading.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.loading):
            for layer in range(LAYERS):
                if layer in slow:
                    torch.cuda._sleep(SLEEP_CYCLES)
                self.arena[layer].copy_(held[layer], non_blocking=True)
                self.events.placed(layer)


def pinned(number):
    return torch.full((LAYERS, SIZE), float(number)).pin_memory()


@gpu
@pytest.mark.parametrize("slow", [(), (0,), (3,), (LAYERS - 1,), range(LAYERS)], ids=str)
def test_a_replay_reads_no_layer_before_it_is_in_place(slow):
    captured = Captured()
    for number in range(1, 4):  # the same graph, each time for what was loaded last
        held = pinned(number)
        captured.load(held, slow)
        captured.graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured.out.cpu(), held + 1)


@gpu
def test_the_first_layers_are_computed_while_the_last_is_loaded():
    captured = Captured()
    loaded = torch.cuda.Event()
    captured.done.zero_()
    captured.load(pinned(2), slow=[LAYERS - 1])
    loaded.record(captured.loading)
    captured.graph.replay()
    until = time.monotonic() + 10
    while not captured.done[LAYERS - 2] and time.monotonic() < until:
        pass
    assert not loaded.query(), "the last layer is still on its way"
    assert not captured.done[LAYERS - 1]
    torch.cuda.synchronize()
    assert captured.done.all()
    assert torch.equal(captured.out.cpu(), pinned(2) + 1)


@gpu
def test_what_is_not_captured_waits_too():
    captured = Captured()
    captured.load(pinned(3), slow=[0])
    captured.forward()
    torch.cuda.synchronize()
    assert torch.equal(captured.out.cpu(), pinned(3) + 1)
