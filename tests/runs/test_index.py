"""The index: weights, nearest runs, its file, and what it answers."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from tests.runs.made_runs import change, make_result, make_run
from uoe_jax.errors import ConfigError, DataError
from uoe_jax.presets import get_preset
from uoe_jax.runs.diversity import diversity
from uoe_jax.runs.index import RunIndex, open_index
from uoe_jax.runs.read import RunRecord, config_record
from uoe_jax.runs.search import (
    NEAR,
    differing,
    expect,
    explain,
    like,
    principal_axes,
    recall,
)


def plan(preset="tiny", **fields):
    return config_record(change(get_preset(preset), **fields), "plan")


def grid(tmp_path, rates=(1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2), seeds=(0, 1, 2)):
    """Runs whose loss is a parabola of the log of the rate, seeds nearly alike."""
    for rate in rates:
        for seed in seeds:
            loss = 1 + 0.05 * np.log2(rate / 4e-3) ** 2 + 0.002 * seed
            make_run(tmp_path / f"r{rate:g}-{seed}", loss=loss,
                     optim__learning_rate=rate, train__seed=seed)  # fmt: skip
    return open_index([tmp_path])


def test_weights_are_how_likely_two_differ():
    objects = [{"same": 1, "half": i % 2, "all": f"v{i}"} for i in range(100)]
    found = diversity(objects)
    assert 0 < found["same",] < 0.2
    assert abs(found["half",] - 0.5**0.5) < 0.02
    assert found["all",] > 0.99
    # Half of the objects have it, all with one value: it too tells two apart.
    partly = diversity([{"a": 1} if i % 2 else {"b": i} for i in range(100)])
    assert abs(partly["a",] - 0.5**0.5) < 0.02


def test_weights_know_nothing_of_how_runs_ended(tmp_path):
    index = grid(tmp_path)
    blind = [dataclasses.replace(r, outcome={}) for r in index.records]
    assert RunIndex(blind).encoder.weights == index.encoder.weights
    assert (RunIndex(blind).vectors == index.vectors).all()


def test_other_seeds_come_first_and_then_what_differs_least(tmp_path):
    index = grid(tmp_path)
    found = like(index, index.record(str(tmp_path / "r0.004-1")), 4)
    names = [match.record.name for match in found]
    assert names[:2] == ["r0.004-0", "r0.004-2"]
    assert all(not match.differences for match in found[:2])
    assert found[0].cosine > 0.999 > found[2].cosine
    assert [str(d) for d in found[2].differences] in (
        ["optim.learning_rate 0.002 -> 0.004"], ["optim.learning_rate 0.008 -> 0.004"]
    )  # fmt: skip


def test_a_setting_that_all_runs_share_still_counts(tmp_path):
    index = grid(tmp_path)
    same = index.nearest(plan(optim__learning_rate=4e-3).settings, 1)[0][1]
    beta = plan(optim__learning_rate=4e-3, optim__beta2=0.999)
    assert same > 0.9999 > index.nearest(beta.settings, 1)[0][1]


def test_shares_of_an_explanation_add_up_and_rank(tmp_path):
    index = grid(tmp_path)
    a, b = plan(optim__learning_rate=1e-3), plan("tiny-union", optim__beta2=0.9501)
    cosine, found = explain(index, a.settings, b.settings)
    assert cosine < 1 and {d.path for d in found} == set(
        differing(a.settings, b.settings)
    )
    assert abs(sum(d.share for d in found) - 1) < 1e-6
    assert [d.share for d in found] == sorted((d.share for d in found), reverse=True)
    assert found[-1].share < 0.01 < found[0].share
    assert found[0].path == ("optim", "learning_rate")
    assert explain(index, a.settings, a.settings) == (pytest.approx(1, abs=1e-5), [])


# Held in short by the next two; the whole is benchmarks/run_search.py.
@pytest.mark.nightly
def test_expectations_cover_what_was_left_out(tmp_path):
    index = grid(tmp_path, rates=[10 ** (-3 + i / 7) for i in range(9)])
    covered = []
    for run in index.records:
        config = json.dumps(run.settings)
        rest = [r for r in index.records if json.dumps(r.settings) != config]
        found = expect(RunIndex(rest), run)
        assert found.loss is not None and found.configurations == 8
        covered.append(found.low <= run["loss"] <= found.high)
    assert 0.65 <= np.mean(covered) <= 0.95


def test_a_plan_that_was_run_before_gets_its_repeats(tmp_path):
    index = grid(tmp_path)
    found = expect(index, plan(optim__learning_rate=8e-3))
    assert abs(found.loss - 1.052) < 1e-3 and found.high - found.low < 0.01


def test_nothing_is_expected_far_from_every_run(tmp_path):
    for i, width in enumerate((64, 128, 256, 512, 1024)):
        make_run(tmp_path / f"w{i}", model__d_model=width, train__steps=100 * (i + 1),
                 optim__beta1=0.5 + i / 10, model__num_layers=2 + i)  # fmt: skip
    index = open_index([tmp_path])
    found = expect(index, plan(data__path="elsewhere.txt"))
    assert found.loss is None and "same data" in found.reason
    far = dataclasses.replace(get_preset("1b-union"), data=get_preset("tiny").data)
    far = change(far, model__max_seq_len=256, data__batch_size=1, optim__beta1=0.1)
    found = expect(index, config_record(far, "plan"))
    assert found.loss is None and "nearest is at" in found.reason
    assert len(found.nearest) == 3


def test_too_few_configurations_say_so(tmp_path):
    index = grid(tmp_path, rates=(1e-3, 2e-3))
    assert "too few" in expect(index, plan(optim__learning_rate=1.5e-3)).reason
    with pytest.raises(ConfigError, match="between 0 and 1"):
        expect(index, plan(), level=80.0)


def test_an_index_is_the_same_after_its_file(tmp_path):
    index = grid(tmp_path / "runs")
    size = index.save(tmp_path / "x.npz")
    assert size == (tmp_path / "x.npz").stat().st_size
    again = RunIndex.load(tmp_path / "x.npz")
    assert again.records == index.records
    assert (again.vectors == index.vectors).all()
    lazy = RunIndex.load(tmp_path / "x.npz", lazy=True)
    assert [lazy.settled(r) for r in lazy.records] == index.records
    record = index.records[3]
    assert again.nearest(record.settings) == index.nearest(record.settings)


@pytest.mark.parametrize("how", ["cut", "text", "version", "rows", "pickle"])
def test_a_foreign_or_damaged_index_is_refused_in_one_line(tmp_path, how):
    file = tmp_path / "x.npz"
    grid(tmp_path / "runs", rates=(1e-3,)).save(file)
    data = file.read_bytes()
    if how == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif how == "text":
        file.write_text("hello")
    elif how == "pickle":
        np.savez(file, vectors=np.array([{}], object), about=np.zeros(2, np.uint8))
    else:
        with np.load(file) as old:
            arrays = dict(old)
        if how == "version":
            about = json.loads(arrays["about"].tobytes())
            text = json.dumps(about | {"version": 99}).encode()
            arrays["about"] = np.frombuffer(text, np.uint8)
        else:
            arrays["vectors"] = arrays["vectors"][:-1]
        np.savez(file, **arrays)
    with pytest.raises(DataError) as caught:
        RunIndex.load(file)
    assert "\n" not in str(caught.value) and "delete it" in str(caught.value)
    # Opened as a cache it is built anew.
    assert len(open_index([tmp_path / "runs"], file)) == 3
    assert len(RunIndex.load(file)) == 3


def test_only_what_changed_is_read_again(tmp_path, monkeypatch):
    file = tmp_path / ".index.npz"
    grid(tmp_path / "runs", rates=(1e-3, 2e-3))
    open_index([tmp_path / "runs"], file)
    from uoe_jax.runs import index as module

    read, real = [], module.read_run
    monkeypatch.setattr(module, "read_run", lambda p: read.append(p) or real(p))
    assert len(open_index([tmp_path / "runs"], file)) == 6 and not read
    new = make_run(tmp_path / "runs" / "new", loss=1.1)
    (tmp_path / "runs" / "r0.001-0" / "config.json").write_text("{")
    index = open_index([tmp_path / "runs"], file)
    assert sorted(read) == [new, tmp_path / "runs" / "r0.001-0"][::-1] or set(read) == {
        new, tmp_path / "runs" / "r0.001-0"
    }  # fmt: skip
    assert len(index) == 6 and [r.name for r in index.broken] == ["r0.001-0"]
    (tmp_path / "runs" / "new" / "config.json").unlink()
    (tmp_path / "runs" / "new" / "metrics.jsonl").unlink()
    assert len(open_index([tmp_path / "runs"], file)) == 5


def test_an_index_of_other_defaults_is_read_anew(tmp_path, monkeypatch):
    from uoe_jax.runs import index as module

    file = tmp_path / ".index.npz"
    grid(tmp_path / "runs", rates=(1e-3,))
    monkeypatch.setattr(module, "DEFAULTS", "older")
    open_index([tmp_path / "runs"], file)
    assert module.load_current(file) is not None
    monkeypatch.undo()
    assert module.load_current(file) is None
    open_index([tmp_path / "runs"], file)
    assert module.load_current(file, lazy=True) is not None


def test_recall_finds_the_nearest_and_keeps_silent_otherwise(tmp_path):
    grid(tmp_path / "runs")
    file = tmp_path / "runs" / ".index.npz"
    want = plan(optim__learning_rate=4e-3, train__steps=301)
    for step in range(2):  # without and with an index in a file
        found = recall(tmp_path / "runs", file, want, 60.0)
        assert found.record.name.startswith("r0.004") and found.cosine > 0.95
        if not step:
            open_index([tmp_path / "runs"], file)
    make_run(tmp_path / "runs" / "later", optim__learning_rate=4e-3, train__steps=301)
    assert recall(tmp_path / "runs", file, want, 60.0).record.name == "later"
    assert recall(tmp_path / "none", tmp_path / "none" / "x", want, 1.0) is None
    far = plan("digits-vit", optim__learning_rate=1.0)
    assert recall(tmp_path / "runs", file, far, 60.0) is None


def test_objects_of_anybody_are_indexed():
    objects = [{"kind": k, "size": s} for k in ("a", "b") for s in (1, 2, 40)]
    index = RunIndex.from_objects(objects, dim=1024, half=True)
    assert index.vectors.dtype == np.float16
    found = index.nearest({"kind": "b", "size": 38}, 2)
    assert found[0][0].settings == {"kind": "b", "size": 40} and found[0][1] > 0.9
    assert len(RunIndex.from_objects([1, "x", None], names=["p", "q", "r"])) == 3
    with pytest.raises(ConfigError, match="2 names for 1"):
        RunIndex.from_objects([1], names=["a", "b"])
    with pytest.raises(ConfigError, match="at least 1"):
        index.nearest({}, 0)


def test_an_empty_index_answers():
    index = RunIndex([])
    assert len(index) == 0 and index.nearest({"a": 1}) == []
    assert expect(index, plan()).loss is None


def test_principal_axes_are_those_of_the_covariance():
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(60, 64)).astype(np.float32)
    vectors[:, 0] += np.repeat([0, 9], 30)
    for rows in (vectors, vectors[25:35]):
        places, shares = principal_axes(rows)
        centred = rows - rows.mean(axis=0, dtype=float)
        sizes = np.linalg.svd(centred, compute_uv=False)
        assert np.abs(np.linalg.norm(places, axis=0) - sizes[:2]).max() < 1e-4
        assert abs(shares[0] - sizes[0] ** 2 / (sizes**2).sum()) < 1e-6
    assert abs(np.diff(places.mean(axis=0))).max() < 1e-6
    alone, _ = principal_axes(vectors[:1])
    assert alone.shape == (1, 2) and not alone.any()


def test_results_and_folders_are_searched_together(tmp_path):
    make_run(tmp_path / "runs" / "a")
    make_result(tmp_path / "experiments" / "001_x" / "results" / "b-0.json")
    index = open_index([tmp_path / "runs", tmp_path / "experiments"])
    assert {r.name for r in index.records} == {"a", "b-0"}
    assert like(index, index.records[0], 1)[0].cosine > 0.999 > NEAR
    assert isinstance(index.records[0], RunRecord)


def test_a_graph_finds_what_it_holds():
    from uoe_jax.runs.approximate import NeighbourGraph

    index = RunIndex.from_objects([{"a": i, "b": str(i)} for i in range(300)], dim=256)
    found = NeighbourGraph(index.vectors).nearest(index.vectors[:20], 3)
    assert (found[:, 0] == np.arange(20)).all() and found.shape == (20, 3)


def test_more_candidates_find_more_of_the_exact_neighbours():
    from uoe_jax.runs.approximate import CANDIDATES, NeighbourGraph

    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(4050, 128)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries, vectors = vectors[:50], vectors[50:]
    exact = np.argsort(-(queries @ vectors.T), axis=1)[:, :10]
    graph = NeighbourGraph(vectors, threads=1)
    assert graph.candidates == CANDIDATES

    def recall() -> float:
        found = graph.nearest(queries, 10)
        pairs = zip(found, exact, strict=True)
        return float(np.mean([len(set(a) & set(b)) for a, b in pairs])) / 10

    many = recall()
    graph.candidates = 10
    assert many >= 0.97 and recall() < 0.7


def test_a_graph_of_neighbours_is_an_extra(monkeypatch):
    from uoe_jax.errors import MissingExtra
    from uoe_jax.runs.approximate import NeighbourGraph

    vectors = np.eye(4, dtype=np.float32)
    monkeypatch.setitem(sys.modules, "usearch", None)
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    with pytest.raises(MissingExtra, match=r"uoe_jax\[search\]"):
        NeighbourGraph(vectors)
