import json
import os

import numpy as np
import pytest

from demand import CostModel, DemandError, Execution, GivenUnit, PDGraph, Progress, Unit

WRITE, TEST, ASK = Unit("write", "llm"), Unit("test", "container"), Unit("ask", "human")


def wrote(output_tokens):
    return Execution(WRITE, 0, output_tokens)


def checked(seconds):
    return Execution(TEST, seconds=seconds)


def chain(*numbers):
    """write, test, write, test, ..."""
    return [checked(n) if i % 2 else wrote(n) for i, n in enumerate(numbers)]


def test_a_single_run_is_repeated_exactly():
    graph = PDGraph.fit([chain(100, 2.0)])
    remaining = graph.remaining()
    assert remaining.values.tolist() == pytest.approx([8.0])
    assert graph.branches("start") == {"write": 1.0}
    assert graph.branches("write") == {"test": 1.0}
    assert graph.branches("test") == {"end": 1.0}


def test_branches_are_historical_frequencies():
    graph = PDGraph.fit([chain(1, 1.0), chain(1, 1.0, 1, 1.0), [wrote(1)]])
    assert graph.branches("write") == {"test": 0.75, "end": 0.25}
    assert graph.branches("test") == {"end": pytest.approx(2 / 3), "write": pytest.approx(1 / 3)}
    assert sum(graph.branches("write").values()) == 1.0


def test_a_loop_gives_a_geometric_number_of_rounds():
    """p = 1/2 per round of 1 s: mean 2 s, P(n rounds) = 2^-n."""
    once, twice = [checked(1.0)], [checked(1.0), checked(1.0)]
    graph = PDGraph.fit([once, twice, twice, [checked(1.0)] * 3, once, [checked(1.0)] * 3])
    assert graph.branches("test") == {"end": 0.5, "test": 0.5}
    remaining = graph.remaining(walks=40_000)
    assert remaining.mean() == pytest.approx(2.0, abs=4 * np.sqrt(2 / 40_000))
    assert 1.0 - remaining.survival(1.0) == pytest.approx(0.5, abs=4 * 0.5 / 200)
    assert remaining.survival(3.0) == pytest.approx(0.125, abs=4 * 0.33 / 200)


def test_seconds_and_successor_of_a_sample_stay_together():
    """Long writing is always followed by a test here, short writing never is."""
    graph = PDGraph.fit([[wrote(100)], chain(1000, 5.0)])
    assert set(graph.remaining().values.round(9)) == {6.0, 65.0}


def test_progress_conditions_the_current_unit():
    graph = PDGraph.fit([[checked(s)] for s in (1.0, 3.0, 10.0)])
    remaining = graph.remaining(Progress(current="test", attained_seconds=2.0))
    assert remaining.values.tolist() == [1.0, 8.0]
    outlived = graph.remaining(Progress(current="test", attained_seconds=25.0))
    assert outlived.values.tolist() == [20.0]  # the doubling rule: 10 * 2


def test_progress_between_units_takes_the_branch_of_the_last():
    graph = PDGraph.fit([chain(100, 2.0), chain(200, 2.0)])
    between = graph.remaining(Progress(executed=[wrote(100)]))
    assert between.values.tolist() == [2.0]
    assert graph.remaining(Progress(executed=chain(100, 2.0))).values.tolist() == [0.0]


def test_remaining_of_an_age_agrees_with_the_whole_distribution():
    """For one unit the two ways to account for attained service are one."""
    rng = np.random.default_rng(0)
    graph = PDGraph.fit([[checked(s)] for s in rng.exponential(5.0, 1000)])
    whole = graph.remaining(walks=50_000).condition(4.0)
    part = graph.remaining(Progress(current="test", attained_seconds=4.0), walks=50_000)
    assert part.mean() == pytest.approx(whole.mean(), rel=0.03)


def test_walks_are_seeded():
    graph = PDGraph.fit([chain(n, float(n), n + 1, 1.0) for n in range(1, 50)])
    assert graph.remaining(seed=3) == graph.remaining(seed=3)
    assert graph.remaining(seed=3) != graph.remaining(seed=4)


def test_the_window_slides():
    graph = PDGraph.fit([[checked(float(s))] for s in range(100)], window=10)
    assert [e.seconds for e in graph.samples("test")] == list(range(90, 100))
    graph.observe([wrote(1)])
    assert graph.branches("start") == {"test": 0.9, "write": 0.1}
    for _ in range(10):
        graph.observe([wrote(1)])
    assert graph.branches("start") == {"write": 1.0}


def test_the_window_keeps_runs_whole():
    """A long loop cannot push its own beginning or exit out of the window."""
    graph = PDGraph.fit([[checked(1.0)] * 500, [wrote(1), *[checked(1.0)] * 500]], window=1)
    assert graph.branches("test")["end"] == 1 / 500
    assert len(graph.runs) == 1
    graph.observe([wrote(1)])
    assert [u.name for u in graph.units] == ["write"]  # no remembered run has a test


def test_a_unit_forgotten_and_seen_again_keeps_its_samples_apart():
    graph = PDGraph.fit([chain(1, 1.0), [checked(7.0)], chain(2, 3.0)], window=2)
    assert [u.name for u in graph.units] == ["test", "write"]
    totals = {round(graph.cost.run_seconds(run), 9) for run in graph.draw_runs(50)}
    assert totals == set(graph.remaining().values.round(9)) == {3.0, 7.0, 3.12, 7.12}


def test_half_life_weighs_runs_by_age():
    graph = PDGraph.fit([[checked(float(s))] for s in (1, 2, 3)], half_life_runs=1.0)
    assert graph.run_weights().tolist() == [0.25, 0.5, 1.0]
    remaining = graph.remaining(walks=70_000)
    assert remaining.values.tolist() == [1.0, 2.0, 3.0]
    assert remaining.weights == pytest.approx([1 / 7, 2 / 7, 4 / 7], abs=0.01)
    graph.observe([wrote(1)])
    assert graph.branches("start") == {
        "test": pytest.approx(7 / 15),
        "write": pytest.approx(8 / 15),
    }


def test_half_life_leaves_a_unit_seen_long_ago_alone():
    """Its weights all underflow, relative to today's; relative to each other they do not."""
    runs = [chain(1, 1.0), chain(1, 3.0), *[[wrote(1)]] * 50]
    graph = PDGraph.fit(runs, half_life_runs=0.02)
    progress = Progress(current="test")
    assert graph.remaining(progress).values.tolist() == [3.0]  # 2^-50 against 1
    assert graph.branches("test") == {"end": 1.0}


def test_equal_weights_are_the_limit_of_a_long_half_life():
    runs = [chain(n, float(n), n + 1, 1.0) for n in range(1, 50)]
    plain, decayed = PDGraph.fit(runs), PDGraph.fit(runs, half_life_runs=1e9)
    assert decayed.remaining(walks=40_000).mean() == pytest.approx(
        plain.remaining(walks=40_000).mean(), rel=0.02
    )


def test_observing_changes_what_remains():
    graph = PDGraph.fit([[checked(1.0)]])
    assert graph.remaining().mean() == 1.0
    graph.observe([checked(9.0)])
    assert set(graph.remaining().values) == {1.0, 9.0}


def test_round_trip(tmp_path):
    cost = CostModel(2e-4, 0.03)
    asked = Execution(ASK, np.int64(7), parallelism=np.int64(1), seconds=np.float32(60))
    calls = Execution.of_calls(WRITE, input_tokens=[5, 7], output_tokens=[10, 30])
    runs = [chain(100, 2.0, 50, 1.5), [asked], [calls]]
    graph = PDGraph.fit(runs, name="coding", window=77, cost=cost, half_life_runs=9.0)
    path = tmp_path / "graph.json"
    graph.save(path)
    graph.save(path)  # over an existing file
    again = PDGraph.load(path)
    assert (again.name, again.window, again.cost, again.units) == ("coding", 77, cost, graph.units)
    assert again.half_life_runs == 9.0
    assert again.runs == graph.runs
    assert all(again.samples(u.name) == graph.samples(u.name) for u in graph.units)
    assert again.remaining() == graph.remaining()
    again.observe(chain(1, 1.0))
    assert [p.name for p in tmp_path.iterdir()] == ["graph.json"]


@pytest.mark.parametrize(("shared", "version"), [(None, 2), (0, 3), (4, 3)])
def test_files_with_shared_tokens_are_of_a_version_of_their_own(tmp_path, shared, version):
    """The last release says of them which version it reads, and does not call them damaged."""
    run = [wrote(5), Execution(WRITE, 9, 5, shared_tokens=shared)]
    path = tmp_path / "graph.json"
    for graph in (
        PDGraph.fit([[wrote(2)], run]),
        PDGraph.from_units([GivenUnit(WRITE, run, {"end": 1.0})], {"write": 1.0}),
    ):
        graph.save(path)
        assert json.loads(path.read_text())["version"] == version
        again = PDGraph.load(path)
        assert (again.runs, again.samples("write")) == (graph.runs, graph.samples("write"))


def test_a_failed_save_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "graph.json"
    PDGraph.fit([chain(1, 1.0)]).save(path)
    before = path.read_text()

    def full_disk(file):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        PDGraph.fit([[wrote(2)]]).save(path)
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["graph.json"]


def test_a_place_that_cannot_be_saved_to_is_named(tmp_path):
    graph = PDGraph.fit([chain(1, 1.0)])
    with pytest.raises(DemandError, match=r"graph\.json', and there is no folder .*missing'"):
        graph.save(tmp_path / "missing" / "graph.json")
    with pytest.raises(DemandError, match="a folder; expected the path of a file in it"):
        graph.save(tmp_path)
    with pytest.raises(DemandError, match="path is 3; expected the path of a file"):
        graph.save(3)
    assert not [*tmp_path.iterdir()]


def _tampered(tmp_path, change):
    path = tmp_path / "graph.json"
    PDGraph.fit([chain(1, 1.0)]).save(path)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.update(format="other"), "not a demand.PDGraph file"),
        (lambda d: d.update(version=99), "format version 99"),
        (lambda d: d["runs"][0][0].__setitem__(0, 2), "no unit 2"),
        (lambda d: d["runs"][0][1].__setitem__(4, -1.0), "seconds of unit 'test'"),
        (
            lambda d: d["runs"][0][1].__setitem__(4, "soon"),
            "damaged: DemandError: seconds of unit .* holds text",
        ),
        (lambda d: d["runs"][0][1].__setitem__(4, None), "has no seconds"),
        (lambda d: d["runs"][0][0].pop(), "damaged"),
        (lambda d: d["runs"].append([]), "run is empty"),
        (lambda d: d["units"].append(d["units"][0]), "listed twice"),
        (lambda d: d.update(half_life_runs=-1.0), "half_life_runs is -1.0"),
        (lambda d: d.update(window=0), "window is 0"),
        (lambda d: d.pop("cost"), "damaged: KeyError"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, change, says):
    with pytest.raises(DemandError, match=says):
        PDGraph.load(_tampered(tmp_path, change))


def test_a_file_that_is_not_json_is_refused(tmp_path):
    path = tmp_path / "graph.json"
    path.write_text("{")
    with pytest.raises(DemandError, match="is not JSON"):
        PDGraph.load(path)
    with pytest.raises(FileNotFoundError):
        PDGraph.load(tmp_path / "nowhere.json")


def test_bad_input_is_refused():
    graph = PDGraph.fit([chain(1, 1.0)])
    for progress in (Progress(current="deploy"), Progress(executed=[Execution(ASK, seconds=1.0)])):
        with pytest.raises(DemandError, match="is not in the graph"):
            graph.remaining(progress)
    with pytest.raises(DemandError, match="is not in the graph"):
        graph.branches("deploy")
    with pytest.raises(DemandError, match="run is empty"):
        graph.observe([])
    with pytest.raises(DemandError, match="no runs"):
        PDGraph.fit([])
    with pytest.raises(DemandError, match="seen no run"):
        PDGraph().remaining()
    with pytest.raises(DemandError, match="walks is 0"):
        graph.remaining(walks=0)
    with pytest.raises(DemandError, match="not over after 1 units"):
        PDGraph.fit([[checked(1.0)] * 50]).remaining(max_units=1)


def test_a_refused_run_leaves_the_graph_unchanged():
    graph = PDGraph.fit([chain(1, 1.0)])
    with pytest.raises(DemandError, match="two different names"):
        graph.observe([Execution(ASK, seconds=1.0), Execution(Unit("test", "tool"), seconds=1.0)])
    assert [u.name for u in graph.units] == ["write", "test"]
    assert graph.branches("start") == {"write": 1.0}


def test_repr_reads():
    graph = PDGraph.fit([chain(1, 1.0)], name="coding")
    assert repr(graph) == "PDGraph('coding', 2 units, 1 runs)"
    assert repr(PDGraph()) == "PDGraph('application', 0 units, 0 runs)"


def test_what_is_left_of_a_choice_has_weight_however_old_it_is():
    """One long run, then 1,500 short ones at a half-life of one run: 2^-1500 is 0 in float64."""
    a, b = Unit("a", "tool"), Unit("b", "tool")
    long = [Execution(a, seconds=1.0), Execution(b, seconds=100.0)]
    short = [Execution(a, seconds=1.0), Execution(b, seconds=2.0)]
    graph = PDGraph.fit([long, *[short] * 1500], window=2000, half_life_runs=1.0)
    remaining = graph.remaining(Progress(current="b", attained_seconds=50.0))
    assert remaining.values.tolist() == [50.0]
    assert (graph.run_weights() > 0.0).all()


def test_files_with_broken_entries_name_themselves(tmp_path):
    unit = Unit("a", "tool")
    given = GivenUnit(unit, [Execution(unit, seconds=1.0)], {"end": 1.0})
    path = tmp_path / "graph.json"
    for entries in ([["a", 1.0, 2.0]], {"a": 0.5}):
        PDGraph.from_units([given], {"a": 1.0}).save(path)
        document = json.loads(path.read_text())
        document["entries"] = entries
        path.write_text(json.dumps(document))
        with pytest.raises(DemandError, match=r"graph\.json is damaged"):
            PDGraph.load(path)


def test_the_start_has_no_executions():
    unit = Unit("a", "tool")
    run = [Execution(unit, seconds=1.0)]
    given = PDGraph.from_units([GivenUnit(unit, run, {"end": 1.0})], {"a": 1.0})
    assert given.samples("start") == PDGraph.fit([run]).samples("start") == ()
