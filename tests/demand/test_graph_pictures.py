"""Export to networkx, the layout of a picture, and the picture."""

import builtins
import sys

import pytest

from demand import DemandError, Execution, PDGraph, Unit
from demand.graph.drawing_layout import lay_out

WRITE, TEST = Unit("write", "llm"), Unit("test", "container")


def coding(rounds=(1, 1, 2, 3)):
    """write, test, and back with p = 3/7."""
    run = [Execution(WRITE, 0, 100, parallelism=2), Execution(TEST, seconds=3.0)]
    return PDGraph.fit([run * n for n in rounds], name="coding")


def test_networkx_has_every_unit_and_branch():
    networkx = pytest.importorskip("networkx")
    export = coding().to_networkx()
    assert list(export) == ["start", "write", "test", "end"]
    assert export.nodes["write"] == dict(
        kind="llm", mean_seconds=12.0, mean_critical_seconds=6.0, mean_parallelism=2.0, samples=7
    )
    assert export.edges["test", "write"]["probability"] == pytest.approx(3 / 7)
    for name in ("start", "write", "test"):
        out = sum(p for _, _, p in export.out_edges(name, data="probability"))
        assert out == pytest.approx(1.0)
    assert [set(cycle) for cycle in networkx.simple_cycles(export)] == [{"write", "test"}]


@pytest.mark.parametrize(
    ("module", "method", "says"),
    [("networkx", "to_networkx", r"picache\[integrations\]"), ("matplotlib", "figure", "plots")],
)
def test_what_is_not_installed_is_named(monkeypatch, module, method, says):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == module:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    for loaded in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DemandError, match=says):
        getattr(coding(), method)()


def test_columns_run_from_left_to_right_and_loops_back():
    layout = lay_out(
        {
            "start": {"a": 1.0},
            "a": {"b": 0.9, "c": 0.1},
            "b": {"a": 0.5, "c": 0.4, "b": 0.1},
            "c": {"end": 1.0},
        }
    )
    x = {name: place[0] for name, place in layout.centres.items()}
    assert x["start"] < x["a"] < x["b"] < x["c"] < x["end"]
    back = {edge for edge, route in layout.routes.items() if route[-1][0] < route[0][0]}
    assert back == {("b", "a")}
    assert ("b", "b") not in layout.routes
    # a to c passes the column of b on a row of its own.
    _, (passed_x, passed_y), _ = layout.routes["a", "c"]
    assert passed_x == x["b"]
    assert passed_y != layout.centres["b"][1]


def test_no_two_nodes_stand_in_one_place():
    hub = {f"tool{i}": {"hub": 1.0} for i in range(7)}
    layout = lay_out({"start": {"hub": 1.0}, "hub": {**dict.fromkeys(hub, 0.1), "end": 0.3}, **hub})
    assert len(set(layout.centres.values())) == 10
    assert len({layout.centres[tool][0] for tool in hub}) == 1


def test_the_picture_names_units_seconds_and_probabilities():
    pytest.importorskip("matplotlib")
    ax = coding().figure()
    texts = {text.get_text() for text in ax.texts}
    assert {"start", "write", "12 s, 2 calls", "test", "3 s", "end", "0.43", "0.57"} <= texts
    assert ax.get_title() == "coding"
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {"llm", "container"}
    assert coding().figure(ax) is ax


def test_rare_branches_are_left_out_and_counted(tmp_path):
    pytest.importorskip("matplotlib")
    run = [Execution(WRITE, 0, 100)]
    rare = [*run, Execution(TEST, seconds=3.0)]
    graph = PDGraph.fit([*[run] * 999, rare], window=2000)
    texts = {text.get_text() for text in graph.figure().texts}
    assert "test" not in texts
    assert "not drawn: 2 rarer branches, 1 of the units" in texts
    graph.figure().figure.savefig(tmp_path / "graph.png")
    assert (tmp_path / "graph.png").stat().st_size > 1000
