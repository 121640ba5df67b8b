import dataclasses
import json
import math
import shutil
import signal

import chex
import numpy as np
import pytest

from tests.compare import assert_close
from tests.train.tiny_runs import with_train
from uoe_jax.config import ModelConfig
from uoe_jax.data import make_dataset
from uoe_jax.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from uoe_jax.evaluate import evaluate
from uoe_jax.runs.checkpoint import Checkpoints
from uoe_jax.runs.load import load_run
from uoe_jax.train import StopRun, loop, train
from uoe_jax.train.metrics import MetricsLog, read_metrics

TIMES = {"seconds", "tokens_per_second", "mfu"}


def lines_of(run, kind=None, drop=TIMES):
    return [
        {k: v for k, v in line.items() if k not in drop}
        for line in read_metrics(run / "metrics.jsonl")
        if kind in (None, line["kind"])
    ]


def arrays_of(run, folder="checkpoints", step=None):
    store = Checkpoints(run / folder)
    step = step or store.steps()[-1]
    manifest = json.loads((run / folder / str(step) / "integrity.json").read_text())
    shapes = {k: np.empty(v["shape"]) for k, v in manifest["arrays"].items()}
    return store.restore(shapes, step=step)[1]


def assert_same_bits(run, other, **kwargs):
    first, second = arrays_of(run, **kwargs), arrays_of(other, **kwargs)
    chex.assert_trees_all_equal_shapes_and_dtypes(first, second)
    for name in first:  # bits: zeros of both signs are equal, and so is no NaN
        assert first[name].tobytes() == second[name].tobytes(), name


@pytest.fixture(scope="module", autouse=True)
def shared_programs():
    """Runs of equal programs compile them once; new processes are in test_resume.py."""

    def shared(make):
        made = {}

        def wrapped(config, *others):
            # What no program depends on; no test here gives its own optimizer.
            key = with_train(config, max_seconds=None, profile=False)
            if key not in made:
                made[key] = make(config, *others)
            return made[key]

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for name in ("make_step", "make_eval_step"):
            patch.setattr(loop, name, shared(getattr(loop, name)))
        yield


@pytest.fixture(scope="module")
def long(tiny, tmp_path_factory):
    """A finished run of 30 steps of a union model and its summary."""
    run = tmp_path_factory.mktemp("long") / "run"
    config = tiny("union", steps=30, eval_every=10, save_every=8, keep_checkpoints=2)
    return run, config, train(config, run, quiet=True)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A run that was never interrupted."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(tiny(), run, quiet=True)
    return run


def test_thirty_steps_lower_the_loss_on_text(long):
    losses = [line["loss"] for line in lines_of(long[0], "train")]
    assert losses[0] > math.log(256) - 0.5
    assert losses[-1] < losses[0] - 1
    valid = [line["loss"] for line in lines_of(long[0], "eval")]
    assert valid[-1] < valid[0]


def test_every_step_has_its_line_with_the_schema(long):
    run, config, summary = long
    lines = lines_of(run, "train", drop=())
    assert [line["step"] for line in lines] == list(range(1, 31))
    keys = {"kind", "step", "seconds", "loss", "lr", "grad_norm", "tokens", "flops"}
    keys |= {"tokens_per_second", "mfu", "balance_loss", "z_loss", "dropped"}
    keys.add("skipped")
    for line in lines:
        routed = {"router"} if line["step"] % config.train.log_every == 0 else set()
        assert set(line) == keys | routed
    assert all(line["tokens"] == line["step"] * 8 * 16 for line in lines)
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds) and seconds[-1] < summary["elapsed"]
    router = lines[9]["router"]
    for part in ("attention", "mlp"):
        assert_close(np.sum(router[part]["load"], axis=1), 1, 1e-5)
        assert np.shape(router[part]["load"]) == (2, 4)
        assert np.shape(router[part]["entropy"]) == (2,)
    assert 0.9 < lines[0]["balance_loss"] < 2


def test_validation_lines_have_the_schema(long):
    lines = lines_of(long[0], "eval", drop=())
    assert [line["step"] for line in lines] == [10, 20, 30]
    for line in lines:
        assert line["split"] == "valid"
        assert_close(line["perplexity"], math.exp(line["loss"]), 1e-6)
        # A byte a token, but for the ends of documents, which stand for none.
        ratio = line["bits_per_byte"] / (line["loss"] / math.log(2))
        assert 1 - 1e-9 <= ratio < 1.05
        assert 0 < line["accuracy"] < 1
        assert line["flops"] > 0 and line["seconds"] > 0


def test_last_and_best_checkpoints_are_kept(long):
    run, _, summary = long
    assert Checkpoints(run / "checkpoints").steps() == [24, 30]
    losses = {line["step"]: line["loss"] for line in lines_of(run, "eval")}
    best = min(losses, key=losses.get)
    assert Checkpoints(run / "best").steps() == [best] == [summary["best_step"]]
    assert summary["best_loss"] == losses[best]


def test_evaluating_the_best_checkpoint_gives_its_logged_loss(long):
    run, config, summary = long
    loaded = load_run(run, which="best")
    assert (loaded.config, loaded.step) == (config, summary["best_step"])
    values = evaluate(loaded.model, config, max_batches=config.train.eval_batches)
    assert_close(values["loss"], summary["best_loss"], 1e-5)
    assert set(values) == {
        "loss", "perplexity", "bits_per_byte", "accuracy", "balance_loss", "z_loss",
        "router",
    }  # fmt: skip


def test_what_is_not_a_run_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match=r"isn't a run: it has no config.json"):
        load_run(tmp_path)


def at_step(monkeypatch, step, action):
    """Do something when a training line of that step is written."""
    write = MetricsLog.write

    def wrapped(self, line):
        write(self, line)
        if line["kind"] == "train" and line["step"] == step:
            action()

    monkeypatch.setattr(MetricsLog, "write", wrapped)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_a_signal_saves_and_the_same_command_resumes_bitwise(
    tiny, whole, tmp_path, monkeypatch, number, code
):
    run, handler = tmp_path / "run", signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_step(patch, 6, lambda: signal.raise_signal(number))
        with pytest.raises(StopRun, match="saved in .*; the same command") as error:
            train(tiny(), run, quiet=True)
    assert error.value.exit_code == code
    assert signal.getsignal(number) is handler
    stopped = Checkpoints(run / "checkpoints").steps()[-1]
    assert 6 <= stopped <= 8
    before = lines_of(run, "train", drop=())[-1]
    summary = train(tiny(), run, quiet=True)
    assert_same_bits(run, whole)
    assert_same_bits(run, whole, folder="best")
    assert lines_of(run) == lines_of(whole)
    after = lines_of(run, "train", drop=())[stopped]
    assert after["seconds"] > before["seconds"]
    assert after["flops"] > before["flops"] and summary["tokens"] == 12 * 8 * 16


def test_a_finished_run_is_left_alone(tiny, whole, capsys):
    before = (whole / "metrics.jsonl").read_text()
    assert train(tiny(), whole)["step"] == 12
    assert (whole / "metrics.jsonl").read_text() == before
    assert "all steps are taken" in capsys.readouterr().out


def poison(monkeypatch, steps):
    """Make the loss of some batches NaN."""
    make_dataset = loop.make_dataset

    def poisoned(config, split):
        data = make_dataset(config, split)
        batch = data.batch

        def wrapped(step):
            values = batch(step)
            if split == "train" and step in steps:
                values["mask"][0, 0] = np.nan
            return values

        data.batch = wrapped
        return data

    monkeypatch.setattr(loop, "make_dataset", poisoned)


def test_a_bad_step_is_skipped_and_counted(tiny, tmp_path, monkeypatch):
    poison(monkeypatch, {3})
    assert train(tiny(), tmp_path, quiet=True)["skipped"] == 1
    lines = lines_of(tmp_path, "train")
    assert [line["skipped"] for line in lines] == [0] * 3 + [1] * 9
    assert lines[3]["loss"] is None and lines[4]["loss"] > 0
    names = {"params.embed.embedding", "opt_state.1.mu.embed.embedding"}
    assert all(np.isfinite(a).all() for a in arrays_of(tmp_path).values())
    assert names <= set(arrays_of(tmp_path))


def test_bad_steps_in_a_row_stop_with_a_dump(tiny, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        poison(patch, range(5, 100))
        with pytest.raises(NonFiniteError, match="5 steps in a row up to step 10") as e:
            train(tiny(), tmp_path, quiet=True)
    assert e.value.exit_code == 3 and "\n" not in str(e.value)
    dump = json.loads((tmp_path / "nonfinite-10.json").read_text())
    assert dump["step"] == 10 and len(dump["batch_hash"]) == 16
    assert dump["nonfinite_parameters"] == [] and dump["nonfinite_gradients"]
    assert len(dump["grad_norms"]["trunk.blocks.0.attention.wq"]) == 2
    # With the cause gone the same command goes on from before it.
    train(tiny(), tmp_path, quiet=True)
    assert lines_of(tmp_path, "train")[-1]["step"] == 12


def test_the_wall_clock_budget_ends_a_run_cleanly(tiny, tmp_path):
    # Used up by the time everything is set up: one step is always taken.
    summary = train(tiny(max_seconds=1e-3), tmp_path, quiet=True)
    assert summary["step"] == 1 and summary["elapsed"] > 1e-3
    assert [line["step"] for line in lines_of(tmp_path, "eval")] == [1]
    assert Checkpoints(tmp_path / "checkpoints").steps() == [1]
    assert train(tiny(max_seconds=1e-3), tmp_path, quiet=True)["step"] == 1
    # More time: the same run goes on, its clock too.
    config = with_train(tiny(), max_seconds=summary["elapsed"] + 3600)
    more = train(config, tmp_path, quiet=True)
    assert more["step"] == 12 and more["elapsed"] > summary["elapsed"]
    assert [line["step"] for line in lines_of(tmp_path, "eval")] == [1, 5, 10, 12]


def test_a_run_of_no_steps_holds_a_fresh_model(tiny, tmp_path):
    assert train(tiny(steps=0), tmp_path, quiet=True)["step"] == 0
    loss = lines_of(tmp_path, "eval")[0]["loss"]
    assert loss == pytest.approx(math.log(256), abs=1)
    assert load_run(tmp_path).step == 0


def test_a_corrupt_newest_checkpoint_is_refused_and_an_older_one_used(
    tiny, whole, tmp_path, capsys
):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "checkpoints/12/state/params.embed.embedding/0.0"
    content = bytearray(file.read_bytes())
    content[100] ^= 4
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="embedding.*--resume-step 8"):
        train(tiny(), tmp_path, quiet=True)
    train(tiny(), tmp_path, resume_step=8)
    assert "resuming from step 8" in capsys.readouterr().out
    assert_same_bits(tmp_path, whole)
    assert lines_of(tmp_path) == lines_of(whole)


def full_disk(monkeypatch, steps):
    write = Checkpoints._write

    def wrapped(self, step, *args):
        if step in steps:
            raise OSError(28, "No space left on device")
        write(self, step, *args)

    monkeypatch.setattr(Checkpoints, "_write", wrapped)


def test_a_failed_save_is_a_warning(tiny, whole, tmp_path, monkeypatch, capsys):
    full_disk(monkeypatch, {8})
    train(tiny(), tmp_path, quiet=True)
    out, err = capsys.readouterr()
    assert out == ""
    folder = tmp_path / "checkpoints"
    assert f"saving step 8 into {folder} failed: No space left on device" in err
    assert Checkpoints(tmp_path / "checkpoints").steps() == [4, 12]
    assert lines_of(tmp_path) == lines_of(whole)


def test_a_failed_last_save_is_an_error_at_the_end(tiny, tmp_path, monkeypatch):
    full_disk(monkeypatch, {12})
    with pytest.raises(CheckpointError, match="step 8 is the newest kept"):
        train(tiny(), tmp_path, quiet=True)
    assert lines_of(tmp_path)[-1]["step"] == 12


def test_an_unfinished_step_is_ignored_with_a_line(tiny, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints/12/integrity.json").unlink()
    train(tiny(), tmp_path)
    out = capsys.readouterr().out.splitlines()
    assert out[4:6] == ["step 12 was unfinished, ignored", "resuming from step 8"]
    assert_same_bits(tmp_path, whole)


def test_profile_is_written(tiny, tmp_path):
    train(tiny(profile=True), tmp_path, quiet=True)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_batch_that_does_not_divide_is_refused_before_anything(tiny, tmp_path):
    with pytest.raises(ConfigError, match="a batch of 6 doesn't divide over 8"):
        train(tiny(data={"batch_size": 6}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_missing_data_leaves_no_folder_behind(tiny, tmp_path):
    config = tiny()
    missing = {"source": "auto", "path": str(tmp_path / "no.txt")}
    data = dataclasses.replace(config.data, **missing)
    with pytest.raises(DataError, match=r"no\.txt doesn't exist"):
        train(dataclasses.replace(config, data=data), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_images_train_and_the_filled_up_last_batch_counts_once(tiny, tmp_path):
    config = tiny(steps=20, eval_every=20, save_every=20)
    model = ModelConfig(
        kind="vision", max_seq_len=16, d_model=16, d_ff=32, num_layers=1, num_heads=2,
        num_kv_heads=2, head_dim=8, tie_embeddings=False,
    )  # fmt: skip
    data = dataclasses.replace(
        config.data, source="digits", batch_size=64, max_bytes=None
    )
    config = dataclasses.replace(config, model=model, data=data)
    train(config, tmp_path, quiet=True)
    values = evaluate(load_run(tmp_path).model, config)
    assert values["accuracy"] > 0.2 and values["bits_per_byte"] is None
    dataset = make_dataset(config, "valid")
    assert dataset.num_examples % 64
    correct = values["accuracy"] * dataset.num_examples
    assert correct == pytest.approx(round(correct), abs=1e-3)


def test_packed_documents_train(tiny, tmp_path):
    config = tiny(data={"pack": "documents"}, steps=2)
    train(config, tmp_path, quiet=True)
    lines = lines_of(tmp_path, "train")
    assert lines[1]["loss"] < lines[0]["loss"] + 0.5
    real = [
        (make_dataset(config, "train").batch(step)["segments"] > 0).sum()
        for step in range(2)
    ]
    assert lines[1]["tokens"] == sum(real)
