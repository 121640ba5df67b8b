"""Experiment 011 runs through at a tiny scale, and goes on where it ended."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.e011_clusters import run
from experiments.e011_clusters.network import ResNet, random_views
from experiments.e011_clusters.pictures import Pictures, read_cifar, read_digits
from experiments.e011_clusters.record import Record
from experiments.e011_clusters.training import TIMED, Scale, Trained

FACTS = {"data": "digits", "pictures": 120, "scale": {"width": 8}, "commit": "a"}
TINY = Scale(
    width=8,
    widths=(8,),
    start_steps=3,
    start_batch=32,
    steps=2,
    batch=32,
)


@pytest.fixture(scope="module")
def pictures():
    found = read_digits()
    return Pictures(
        found.images[:120], found.classes[:120], found.held[:32], found.views
    )


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory):
    """A study that was stopped after its first two rows, and then went on."""
    out = tmp_path_factory.mktemp("e011")
    facts = FACTS
    path, written = out / "results.json", []

    class Stopped(Record):
        def write(self, what):
            super().write(what)
            written.append(what)
            if len(written) == 4:  # both trainings and two rows
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.study(pictures, TINY, 0, Stopped(path, facts), 1e9)
    before = json.loads(path.read_text())
    run.study(pictures, TINY, 0, Record(path, facts), 1e9)
    return out, before, json.loads(path.read_text())


def test_every_method_has_its_row_once(finished):
    _, before, after = finished
    rows = after["seeds"][0]["rows"]
    named = [(row["features"], row["method"]) for row in rows]
    assert len(named) == len(set(named)) == 2 * 7 + 1
    assert ("MLC", "MLC, with network, eta 0.175") in named
    assert ("start", "MLC, affinity only, eta 0.175") in named
    assert all(0 <= row[name] <= 1 for row in rows for name in ("acc", "nmi"))
    # What was there before the stop wasn't made again.
    assert rows[:2] == before["seeds"][0]["rows"]
    assert after["seeds"][0]["seconds"] == before["seeds"][0]["seconds"]


def test_ranks_and_the_picture_are_written(finished):
    out, _, after = finished
    for ranks in after["seeds"][0]["ranks"].values():
        assert 1 <= min(ranks["classes"]) <= max(ranks["classes"]) <= ranks["all"] <= 8
    assert (out / "affinity.png").read_bytes().startswith(b"\x89PNG")
    assert len(after["seeds"][0]["held_out_objective"]) == 2
    assert after["seeds"][0]["steps"] == {"start": 3, "MLC": 2}
    assert {row["commit"] for row in after["seeds"][0]["rows"]} == {"a"}


@pytest.mark.parametrize("name, value", [
    ("data", "cifar"), ("pictures", 40), ("scale", {"width": 16}),
])  # fmt: skip
def test_results_of_something_else_are_not_mixed_in(finished, name, value):
    path = finished[0] / "results.json"
    before = path.read_bytes()
    with pytest.raises(SystemExit, match=f"has results of {name} .* another --out"):
        Record(path, {**FACTS, name: value})
    assert path.read_bytes() == before


def test_seeds_are_trained_alike_however_short_the_time(tmp_path, monkeypatch, capsys):
    """A step takes a second, the rows of one kind of features five."""
    now = [0.0]

    class Clocked(Record):
        def seconds(self):
            return now[0]

    class Counted:
        def __init__(self, pictures, scale, seed):
            self.load = lambda path: None
            self.save = lambda path: path.write_bytes(b"weights")
            self.rows = lambda: (np.eye(20, 4), np.eye(20, 4))

        def start(self, seconds, steps=None):
            taken = steps or min(int(seconds), 1000)
            now[0] += taken
            return taken

        def go_on(self, seconds, steps=None):
            return self.start(seconds, steps), []

    def rows(*_):
        now[0] += 5

    monkeypatch.setattr(run, "Trained", Counted)
    monkeypatch.setattr(run.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(run, "add_rows", rows)
    monkeypatch.setattr(run, "draw_affinity", lambda *_: None)
    pictures = SimpleNamespace(classes=np.arange(20) % 10, images=np.zeros((20, 2)))

    def go_on(end):
        now[0] = 0.0
        record = Clocked(tmp_path / "results.json", FACTS)
        run.study_seeds(pictures, TINY, [0, 1, 2], record, end)
        return record.found["seeds"], capsys.readouterr().out

    # A third of 300 s: 0.6 of it, and 0.9 of the rest.
    seeds, said = go_on(300.0)
    assert [each["steps"] for each in seeds] == [{"start": 60, "MLC": 36}] * 2
    assert said.splitlines()[-1] == "no time to train seed 2: the same line goes on"
    assert "no time" in go_on(90.0)[1]
    seeds, said = go_on(300.0)
    assert [each["steps"] for each in seeds] == [{"start": 60, "MLC": 36}] * 3
    assert "no time" not in said


def test_fewer_steps_are_taken_where_time_is_short(pictures):
    trained = Trained(pictures, TINY._replace(start_steps=10_000), 0)
    assert trained.start(0.0) == TIMED
    assert trained.start(np.inf, TIMED + 2) == TIMED + 2


def test_first_weights_are_hes(pictures):
    trained = Trained(pictures, TINY._replace(widths=(64,)), 0)
    kernels = {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(trained.state)
    }
    conv = next(a for name, a in kernels.items() if "'first'" in name)
    assert conv.shape == (3, 3, 64, 64)
    assert abs(conv.std() / np.sqrt(2 / (9 * 64)) - 1) < 0.02  # 37,000 draws
    scales = [a for name, a in kernels.items() if "scale" in name]
    assert scales and all((a == 1).all() for a in scales)
    z, c = trained.rows()
    assert np.abs(np.linalg.norm(z, axis=1) - 1).max() < 1e-5 and c.shape == z.shape


def test_the_subset_is_decoded(tmp_path):
    """Stored as differences along rows, columns and colours, modulo 256."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (5, 4, 4, 3)).astype(np.uint8)
    red, green, blue = np.moveaxis(pictures, -1, 0)
    planes = np.stack([green, red - green, blue - green], 1)
    stored = np.diff(planes, axis=3, prepend=np.uint8(0))
    stored = np.diff(stored, axis=2, prepend=np.uint8(0))
    path = tmp_path / "subset.npz"
    np.savez(path, xtr=stored, xte=stored[:2], ytr=np.arange(5)[:, None])
    found = read_cifar(path)
    want = (pictures / 255.0 - 0.45) * 4
    assert np.abs(found.images - want).max() < 1e-6 and len(found.held) == 2
    assert found.classes.tolist() == [0, 1, 2, 3, 4]


def test_views_differ_and_the_network_sees_each_alone():
    images = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    views = random_views(images, jax.random.key(1))
    assert views.shape == images.shape and bool(jnp.isfinite(views).all())
    assert float(jnp.abs(views - random_views(images, jax.random.key(2))).max()) > 0.1
    net = ResNet(8, nnx.Rngs(0), (8,))
    together = net(views)[0]
    alone = jnp.concatenate([net(view[None])[0] for view in views])
    assert float(jnp.abs(together - alone).max()) < 1e-5
