"""A pass captured in pieces, whose later layers are put in place while the earlier ones compute."""

from contextlib import nullcontext

import pytest
import torch

from picache.hf import graph_pieces
from picache.hf.due import nothing_due
from picache.hf.graph_pieces import GraphPieces

NO_DEVICE = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
LAYERS, SIZE = 6, 1 << 16
SLEEP_CYCLES = 100_000_000  # some 50 ms


def gpu(test):
    return pytest.mark.gpu(NO_DEVICE(test))


class Order:
    """Stands for CUDA's graphs: what was captured in each, and in which order that happened."""

    def __init__(self):
        self.told = []
        self.now = None

    def graph(self):
        order = self

        class Graph:
            def capture_begin(self, pool, capture_error_mode):
                assert order.now is None
                order.now, self.inside = self, []

            def capture_end(self):
                assert order.now is self
                order.now = None
                if "broken" in self.inside:
                    raise RuntimeError("the capture was invalidated")

            def replay(self):
                order.told.append(self.inside)

        return Graph()


@pytest.fixture
def order(monkeypatch):
    found = Order()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", found.graph)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    return found


def layer_by_layer(order, layers):
    def forward(due):
        order.now.inside.append("embed")
        for layer in range(layers):
            order.now.inside.append(f"project {layer}")
            due(range(layer, layer + 1))
            order.now.inside.append(f"attend {layer}")
        return "result"

    return forward


@pytest.mark.parametrize("each", [1, 2, 3, 7])
def test_each_piece_is_replayed_behind_the_layers_that_it_reads(each, order, monkeypatch):
    monkeypatch.setattr(graph_pieces, "LAYERS", each)
    pieces = GraphPieces(None, None)
    assert pieces.capture(layer_by_layer(order, 5)) == "result"
    assert order.now is None
    pieces.replay(lambda layers: order.told.append([f"place {layer}" for layer in layers]))
    told = [step for some in order.told for step in some]
    expected = ["embed", *(f"{do} {layer}" for layer in range(5) for do in ("project", "attend"))]
    assert [step for step in told if not step.startswith("place")] == expected
    for layer in range(5):
        assert told.index(f"place {layer}") < told.index(f"attend {layer}")
    placed = [step for step in told[: told.index("embed")] if step.startswith("place")]
    assert placed == [f"place {layer}" for layer in range(min(each, 5))]  # and waits for no more
    assert sum("place" not in some[0] for some in order.told) == -(-5 // each)


def test_a_pass_that_says_all_layers_at_once_is_one_piece(order):
    def forward(due):
        due(range(9))
        order.now.inside.append("all")

    pieces = GraphPieces(None, None)
    pieces.capture(forward)
    due = []
    pieces.replay(due.append)
    assert (due, order.told) == ([range(9)], [["all"]])


@pytest.mark.parametrize("layer", range(5))
def test_what_fails_while_it_is_captured_is_what_is_raised(layer, order, monkeypatch):
    monkeypatch.setattr(graph_pieces, "LAYERS", 2)

    def forward(due):
        for before in range(layer):
            due(range(before, before + 1))
        order.now.inside.append("broken")
        raise ValueError("reads a tensor of the device")

    with pytest.raises(ValueError, match="reads a tensor"):
        GraphPieces(None, None).capture(forward)
    assert order.now is None  # other captures may follow


@pytest.mark.parametrize("piece", range(3))
def test_a_piece_that_cannot_be_begun_is_not_ended(piece, order, monkeypatch):
    monkeypatch.setattr(graph_pieces, "LAYERS", 1)
    begun = []
    graph = torch.cuda.CUDAGraph

    def failing():
        made = graph()
        if len(begun) == piece:
            made.capture_begin = lambda *_, **__: 1 / 0
        begun.append(made)
        return made

    monkeypatch.setattr(torch.cuda, "CUDAGraph", failing)
    with pytest.raises(ZeroDivisionError):
        GraphPieces(None, None).capture(layer_by_layer(order, 4))
    assert order.now is None


class Captured:
    """Pieces that copy every layer of an arena out, each once it is in place."""

    def __init__(self):
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.arena = torch.zeros(LAYERS, SIZE, device=self.device)
        self.out = torch.zeros(LAYERS, SIZE, device=self.device)
        self.loading, stream = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)
        self.pieces = GraphPieces(stream, torch.cuda.graph_pool_handle())
        self.pieces.capture(self.forward)

    def forward(self, due):
        total = torch.zeros(SIZE, device=self.device)
        for layer in range(LAYERS):
            due(range(layer, layer + 1))
            total = total + self.arena[layer]  # lives from one piece to the next
            self.out[layer].copy_(total)
        return total

    def load(self, held, slow=()):
        """Copies a layer of pinned memory to the arena; before some of them the stream sleeps."""
        self.loading.wait_stream(torch.cuda.current_stream())

        def due(layers):
            for layer in layers:
                with torch.cuda.stream(self.loading):
                    if layer in slow:
                        torch.cuda._sleep(SLEEP_CYCLES)
                    self.arena[layer].copy_(held[layer], non_blocking=True)
                torch.cuda.current_stream().wait_stream(self.loading)

        return due


def pinned(number):
    return torch.full((LAYERS, SIZE), float(number)).pin_memory()


@gpu
@pytest.mark.parametrize("each", [1, 2, 4, 9])
@pytest.mark.parametrize("slow", [(), (0,), (3,), (LAYERS - 1,), range(LAYERS)], ids=str)
def test_a_replay_reads_no_layer_before_it_is_in_place(slow, each, monkeypatch):
    monkeypatch.setattr(graph_pieces, "LAYERS", each)
    captured = Captured()
    for number in range(1, 4):  # the same graphs, each time for what was loaded last
        held = pinned(number)
        captured.pieces.replay(captured.load(held, slow))
        torch.cuda.synchronize()
        assert torch.equal(captured.out.cpu(), held.cumsum(0))


@gpu
def test_the_first_layers_are_computed_while_the_host_waits_for_the_last(monkeypatch):
    monkeypatch.setattr(graph_pieces, "LAYERS", 1)
    captured, held = Captured(), pinned(2)
    load, computed = captured.load(held), []

    def due(layers):
        if LAYERS - 1 in layers:
            torch.cuda.synchronize()  # as long as a disk may take
            computed.append(captured.out[LAYERS - 2, 0].item())
        load(layers)

    captured.pieces.replay(due)
    torch.cuda.synchronize()
    assert computed == [2.0 * (LAYERS - 1)]
    assert torch.equal(captured.out.cpu(), held.cumsum(0))


@gpu
def test_two_passes_of_one_pool_keep_apart():
    captured = Captured()
    other = Captured()
    for number in (3, 5):
        for one in (captured, other):
            one.pieces.replay(one.load(pinned(number)))
            torch.cuda.synchronize()
            assert torch.equal(one.out.cpu(), pinned(number).cumsum(0))
        captured.pieces.replay(nothing_due)
        torch.cuda.synchronize()
        assert torch.equal(captured.out.cpu(), pinned(number).cumsum(0))
