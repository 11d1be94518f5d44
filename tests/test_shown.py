"""What a notebook shows of an object: well-formed, its own numbers, the text without matplotlib."""

import math
import re
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from demand import (
    FCFS,
    Distribution,
    Engine,
    Execution,
    GivenUnit,
    PDGraph,
    Unit,
    Workload,
    calibrate,
    drift,
    simulate,
    simulate_cluster,
    simulate_engine,
)
from demand.html_table import cell
from demand.routing import LeastLoaded
from picache import LinkReport
from sparsity import H2O, RaaS, Report, SparsityError, Trace, milestone_map, replay
from sparsity.recorded.trace import SHOWN_ROWS, LayerTrace
from tests.helpers import assert_close

HOSTILE = "<script>\"&amp;'$\\frac$ --> ]]>"
THINK, TOOL = Unit("think", "llm"), Unit(HOSTILE, "tool")


def parsed(shown: str) -> ElementTree.Element:
    """As XML, which both are; a result of several tables has no root of its own."""
    return ElementTree.fromstring(shown if shown.startswith("<?xml") else f"<div>{shown}</div>")


def rows(shown: str) -> list[list[str]]:
    return [["".join(one.itertext()) for one in row] for row in parsed(shown).iter("tr")]


def drawn_texts(svg: str) -> set[str]:
    """The texts of a picture: matplotlib draws letters as paths and writes the text beside them."""
    parsed(svg)
    return {found.strip() for found in re.findall(r"<!--(.*?)-->", svg, re.DOTALL)}


def dense_run(prompt=20, decoded=40, heads=4, kv_heads=2, sinks=None, layers=(1, 3, 5)):
    torch.manual_seed(0)
    tokens = prompt + decoded
    made = {
        i: LayerTrace(
            torch.randn(heads, tokens, 8),
            torch.randn(kv_heads, tokens, 8),
            torch.randn(kv_heads, tokens, 8),
            8**-0.5,
            sinks=sinks,
        )
        for i in layers
    }
    ids, forwards = torch.zeros(tokens + 1, dtype=torch.long), (prompt, *[1] * decoded)
    return Trace(ids, prompt, forwards, made, layers)


def link_report(**changed):
    return LinkReport(
        **dict(
            method=HOSTILE,
            tokens_total=100,
            tokens_recomputed_per_layer=(30, 10),
            bytes_loaded=1_234,
            chunk_hits=(True, False),
            flops=1e9,
            flops_full_prefill=math.nan,
            store_failures={HOSTILE: 2},
        )
        | changed
    )


def graph():
    run = [Execution(THINK, 0, 100, parallelism=2), Execution(TOOL, seconds=3.0)]
    return PDGraph.fit([run * n for n in (1, 1, 2, 3)], name=HOSTILE)


def served(count=20, runs=None):
    """Jobs of an application with a hostile name; without runs to say otherwise, of two units."""
    runs = runs or [[Execution(THINK, 10, 5), Execution(TOOL, seconds=2.0)]] * count
    arrivals, known = np.arange(len(runs), dtype=float), {HOSTILE: Distribution([2.0])}
    return Workload(arrivals, [2.0] * len(runs), [HOSTILE] * len(runs), known, runs=runs)


@pytest.fixture
def no_matplotlib(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)


PICTURES = {
    "distribution": lambda: Distribution([1.0, 2.0, 30.0]),
    "graph": graph,
    "trace": dense_run,
}


@pytest.mark.parametrize("name", PICTURES)
def test_without_matplotlib_there_is_the_text(name, no_matplotlib):
    shown = PICTURES[name]()
    assert shown._repr_svg_() is None
    assert repr(shown)
    with pytest.raises(ValueError, match=r"picache\[plots\]"):
        shown.figure()


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_drawn_into_axes_of_ones_own(name):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    left, right = figure.subplots(1, 2)
    shown = PICTURES[name]()
    assert shown.figure(ax=left) is left
    assert shown.figure().figure is not figure
    assert not right.has_data()


def test_only_what_draws_loads_matplotlib_and_nothing_of_it_changes():
    code = """
import sys, demand, picache, sparsity
assert not {"matplotlib", "IPython"} & set(sys.modules)
shown = demand.Distribution([1.0, 2.0])
import matplotlib
before = matplotlib.rcParams.copy()
assert shown._repr_svg_() and before == matplotlib.rcParams.copy()
assert "matplotlib.pyplot" not in sys.modules
"""
    pytest.importorskip("matplotlib")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_link_report_is_its_print():
    report = link_report()
    assert rows(report._repr_html_()) == [[*pair] for pair in report._entries()]
    assert [f"  {name}: {text}" for name, text in rows(report._repr_html_())] == str(
        report
    ).splitlines()[1:]


@pytest.mark.parametrize("managed", [(True, True, False), (False,) * 3, ()])
def test_a_report_of_a_cache_is_its_print(managed):
    layers = len(managed)
    report = Report(
        RaaS(budget=64), 5_000, (64, 64, 5_000)[:layers], (7, 7, 0)[:layers], managed, 9_999,
        peak_bytes=12_345, past_bytes=5, decoding=HOSTILE, prompt_attention="sdpa",
    )  # fmt: skip
    lines = ["  " * (len(row) > 1) + ": ".join(row) for row in rows(report._repr_html_())]
    assert lines == str(report).splitlines()[1:]
    assert parsed(report._repr_html_()).find(".//caption").text == str(report.policy)


def test_a_replay_is_its_print():
    report = replay(dense_run(), H2O(16), page_size=4, progress=False)
    (size,), *found = rows(report._repr_html_())
    lines = [f"{name:<17}{what}" for name, what in found]
    assert [str(report.policy), size, *lines] == str(report).split("\n  ")
    assert repr(report) == str(report)  # what a notebook keeps beside the table


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 2.0, 0.0])])
@pytest.mark.parametrize("step", [1, 3])
def test_the_mass_of_one_head_is_that_of_all(sinks, step):
    trace = dense_run(prompt=9, decoded=300, sinks=sinks)
    for head in (0, 1):
        found = trace.head_mass(3, head, page_size=7, step=step)
        assert_close("mass", found, trace.mass(3, 7)[head, ::step])


def test_a_trace_shows_the_middle_layer_and_at_most_so_many_rows(monkeypatch):
    pytest.importorskip("matplotlib")
    decoded = 2 * SHOWN_ROWS + 1
    trace = dense_run(decoded=decoded)
    given = []
    head_mass = Trace.head_mass
    monkeypatch.setattr(
        Trace, "head_mass", lambda self, *a: given.append(head_mass(self, *a)) or given[-1]
    )
    texts = drawn_texts(trace._repr_svg_())
    assert "layer 3, KV head 0: attention by page of 16 tokens" in texts
    (mass,) = given
    assert mass.shape == (-(-decoded // 3), -(-trace.tokens // 16))
    axes = trace.figure(3, 1, 4)
    expected = head_mass(trace, 3, 1, 4).clamp(min=1e-4)
    assert_close("picture", torch.tensor(axes.images[0].get_array().data), expected)
    same = milestone_map(trace, 3, 1, page_size=4).axes[0]
    assert_close("map", torch.tensor(same.images[0].get_array().data), expected)


@pytest.mark.parametrize("empty", [{"decoded": 0}, {"layers": ()}])
def test_a_trace_with_nothing_to_draw_shows_the_text(empty):
    assert dense_run(**empty)._repr_svg_() is None
    with pytest.raises(SparsityError, match=r"no decoded tokens|layer 0 is not in this trace"):
        dense_run(**empty).figure()


@pytest.mark.parametrize(
    "values", [[0.0], [5.0], [5.0] * 3, [0.0, 1e-12], [1e-9, 1e12], range(1, 5000)]
)
def test_a_distribution_shows_its_spread_and_its_rank(values):
    pytest.importorskip("matplotlib")
    demand = Distribution(values)
    title = repr(demand).removeprefix("Distribution(").removesuffix(")")
    assert title in drawn_texts(demand._repr_svg_())
    left, right = demand.figure().figure.axes
    (line,) = right.lines
    ages, ranks = line.get_data()
    drawn = demand.compress(1000)
    at = len(ages) // 3
    assert ranks[at] == drawn.gittins(ages[at], variant="shifted")
    shares, edges, _ = left.patches[0].get_data()
    inside = demand.weights[demand.values <= edges[-1]].sum()
    assert shares.sum() == pytest.approx(inside)
    assert inside >= 0.99 * (1 - 1e-12)
    assert (inside < 1 - 1e-9) == ("take longer" in left.get_xlabel())


def test_a_graph_shows_names_that_are_no_markup():
    pytest.importorskip("matplotlib")
    svg = graph()._repr_svg_()
    assert "<script>" not in svg
    # Dashes in a row end a comment: matplotlib parts them.
    assert {"start", "think", "12 s, 2 calls", "3 s", "0.43", "0.57"} <= drawn_texts(svg)
    assert HOSTILE in {text.get_text() for text in graph().figure().texts}


def test_a_graph_without_a_quick_picture_shows_the_text():
    assert PDGraph("empty")._repr_svg_() is None
    many = [Execution(Unit(f"u{i}", "tool"), seconds=1.0) for i in range(31)]
    assert PDGraph.fit([many])._repr_svg_() is None
    long = PDGraph.fit([many[:2]] * 2001, window=3000)
    assert long._repr_svg_() is None
    given = [GivenUnit(THINK, [Execution(THINK, 0, 100)], {"end": 1.0})]
    pytest.importorskip("matplotlib")
    assert "think" in drawn_texts(PDGraph.from_units(given, {"think": 1.0})._repr_svg_())


RESULTS = {
    "queue": lambda: simulate(served(), FCFS()),
    "one job": lambda: simulate(served(1), FCFS()),
    "engine": lambda: simulate_engine(served(), FCFS(), Engine(max_requests=2)),
    "no request": lambda: simulate_engine(served(runs=[[Execution(TOOL, seconds=2.0)]]), FCFS()),
    "cluster": lambda: simulate_cluster(served(), FCFS(), engines=2, router=LeastLoaded()),
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_shows_every_figure(name):
    result = RESULTS[name]()
    shown = result._repr_html_()
    summary = result.summary()
    head, *figures = rows(shown)[: 1 + len(summary)]
    assert head == ["figure", "value"]
    assert figures == [[key.replace("_", " "), cell(value)] for key, value in summary.items()]
    assert ["deadline hits", "-"] in figures, "NaN"
    caption = parsed(shown).find(".//caption").text
    assert caption == f"{type(result).__name__}: {len(result.workload)} jobs under {FCFS()!r}"
    engines = rows(shown)[1 + len(summary) :]
    assert len(engines) == (4 if name == "cluster" else 0)  # a head, all, and two
    if engines:
        assert engines[1:] == [[cell(v) for v in row.values()] for row in result.table]


def test_requests_show_their_table():
    requests = RESULTS["engine"]().requests
    head, *found = rows(requests._repr_html_())
    assert found == [[cell(value) for value in row.values()] for row in requests.table]
    assert found[1][0] == HOSTILE
    assert len(head) == len(found[0])


def test_a_calibration_shows_each_point():
    def remaining(progress):
        return Distribution([2.0, 3.0])

    run = [Execution(THINK, seconds=2.0), Execution(TOOL, seconds=1.0)]
    report = calibrate(remaining, [run, run[:1]], [0, 1])
    printed = [re.split(r"\s{2,}", line.strip()) for line in str(report).splitlines()]
    head, *found = rows(report._repr_html_())
    assert head[0] == "after units"
    assert found == [re.split(r"\s+", " ".join(row)) for row in printed[1:]]


def test_a_drift_shows_each_unit():
    run = [Execution(THINK, 0, 100), Execution(TOOL, seconds=3.0)]
    slow = [run[0], Execution(TOOL, seconds=9.0)]
    report = drift(PDGraph.fit([run] * 150 + [slow] * 50), recent=50)
    assert HOSTILE in report.drifted
    _, *found = rows(report._repr_html_())
    assert [row[0] for row in found] == [test.what for test in report.tests]
    assert ["3", "9"] in [row[1:3] for row in found]
    caption = parsed(report._repr_html_()).find(".//caption").text
    assert caption == f"{str(report).splitlines()[0]}; drifted: {', '.join(report.drifted)}"


def test_cells():
    assert [cell(v) for v in ("a", 12_345, 0.123456, 1e9, math.nan, math.inf)] == [
        "a", "12,345", "0.1235", "1e+09", "-", "inf",
    ]  # fmt: skip
