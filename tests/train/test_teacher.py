"""`train.distill_from`: a frozen run teaches another one, beside its data."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.compare import assert_close
from tests.train.test_loop import arrays_of, assert_same_bits, lines_of
from tests.train.test_step import GRADIENTS, make_batch
from tests.train.tiny_runs import make_tiny, with_train
from uoe_jax.cli import main
from uoe_jax.config import MeshConfig, ModelConfig
from uoe_jax.errors import CheckpointError, ConfigError
from uoe_jax.hardware.count import flops_per_token
from uoe_jax.model import make_model
from uoe_jax.partition.mesh import make_mesh
from uoe_jax.runs.load import load_run
from uoe_jax.train import train
from uoe_jax.train.step import make_gradients, put_batch
from uoe_jax.train.subject import whole_model
from uoe_jax.train.teacher import find_teacher, with_teacher
from uoe_jax.tree import named_leaves

SHARE, TEMPERATURE = 0.7, 3.0


def taught_by(config, folder, **more):
    return with_train(
        config,
        distill_from=str(folder),
        distill_weight=SHARE,
        distill_temperature=TEMPERATURE,
        **more,
    )


@pytest.fixture(scope="module")
def teacher(tiny, tmp_path_factory):
    """A dense run of other weights."""
    folder = tmp_path_factory.mktemp("teacher") / "dense"
    train(tiny(steps=2, seed=5), folder, quiet=True)
    return folder


@pytest.fixture(scope="module")
def student(tiny):
    """The config of a union of MLPs."""
    return tiny("union", attention="dense")


def whole_objective(logits, teacher, batch):
    """Mean objective of whole logits, by jax's own differentiation."""
    weights, targets = batch["mask"], batch["targets"]
    log = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(log, targets[..., None], -1)[..., 0]
    wanted = jax.nn.softmax(teacher / TEMPERATURE)
    soft = -jnp.sum(wanted * jax.nn.log_softmax(logits / TEMPERATURE), -1)
    both = (1 - SHARE) * nll + SHARE * TEMPERATURE**2 * soft
    return jnp.sum(both * weights) / jnp.sum(weights)


@pytest.mark.parametrize(
    ("sizes", "accumulate"),
    [({"data": 1}, 1), ({"data": 2, "fsdp": 2, "tensor": 2}, 2), ({"sequence": 2}, 1)],
)
def test_a_step_on_any_mesh_has_the_gradients_of_whole_logits(
    teacher, tmp_path, sizes, accumulate
):
    config = taught_by(make_tiny(), teacher, accumulate=accumulate, loss_chunk=5)
    config = dataclasses.replace(config, mesh=MeshConfig(**({"data": 1} | sizes)))
    mesh = make_mesh(config.mesh)
    subject = whole_model(config, GRADIENTS, mesh)
    found = find_teacher(config, tmp_path)
    subject = with_teacher(subject, found, config, mesh)
    compute = make_gradients(
        config, subject.graphdef, subject.layout, subject.objective
    )
    batch = make_batch()
    placed = put_batch(batch, mesh, accumulate)
    state, step = subject.state, jnp.int32(0)
    grads, sums, _ = jax.jit(compute)(state, placed, step, subject.frozen)

    said = load_run(teacher).model(batch["tokens"])[0]
    model = make_model(config.model, jax.random.key(config.train.seed))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def objective(params):
        logits = nnx.merge(graphdef, params, rest)(batch["tokens"])[0]
        return whole_objective(logits, said, batch)

    value, expected = jax.value_and_grad(objective)(params)
    assert_close(sums["objective"], value, 1e-5)
    wanted = named_leaves(expected)
    for name, grad in named_leaves(grads).items():
        assert_close(np.asarray(grad), np.asarray(wanted[name]), 1e-5)


def test_a_step_counts_the_teachers_forward_pass(teacher, tmp_path, student):
    config = taught_by(student, teacher)
    mesh = make_mesh(MeshConfig(data=1))
    alone = whole_model(config, GRADIENTS, mesh)
    both = with_teacher(alone, find_teacher(config, tmp_path), config, mesh)
    forward = flops_per_token(load_run(teacher).config.model, config.seq_len).forward
    assert both.flops_per_token == alone.flops_per_token + forward


def test_taught_runs_resume_bitwise_and_hold_no_teacher(
    teacher, student, tmp_path, capsys
):
    config = taught_by(student, teacher, steps=6, save_every=3)
    whole, resumed, alone = (tmp_path / name for name in ("whole", "resumed", "alone"))
    train(config, whole)
    said = capsys.readouterr().out
    assert f"learning from step 2 of {teacher}: weight 0.7, temperature 3" in said
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "6")
    shutil.rmtree(resumed / "best")
    train(config, resumed, quiet=True)
    assert_same_bits(whole, resumed)
    assert lines_of(whole, "train") == lines_of(resumed, "train")
    train(with_train(config, distill_from=None), alone, quiet=True)
    one, other = arrays_of(whole), arrays_of(alone)
    assert one.keys() == other.keys()
    assert any(not np.array_equal(one[name], other[name]) for name in one)
    # What is reported and validated is the data's loss: the first step's is the same.
    first = [lines_of(run, "train")[0]["loss"] for run in (whole, alone)]
    assert first[0] == first[1]


def test_a_teacher_that_trained_on_teaches_as_it_did(teacher, student, tmp_path):
    copy = tmp_path / "teacher"
    shutil.copytree(teacher, copy)
    config = taught_by(student, copy, steps=4, save_every=2)
    run = tmp_path / "run"
    train(config, run, quiet=True)
    train(with_train(load_run(copy).config, steps=3), copy, quiet=True)
    assert load_run(copy).step == 3
    found = find_teacher(config, run)
    assert (
        found.step,
        json.loads((run / "distill_from.json").read_text())["step"],
    ) == (
        2,
        2,
    )
    # Moved: the record's hash says that it is the same.
    moved = copy.rename(tmp_path / "elsewhere")
    summary = train(taught_by(config, moved, steps=5), run, quiet=True)
    assert summary["step"] == 5
    shutil.rmtree(moved / "checkpoints" / "2")
    with pytest.raises(ConfigError, match="learns from step 2 of .* put it back"):
        find_teacher(taught_by(config, moved), run)


def test_nobody_leaves_a_teacher_out_of_a_run_that_has_one(teacher, student, tmp_path):
    config = taught_by(student, teacher, steps=2, save_every=2)
    train(config, tmp_path / "run", quiet=True)
    with pytest.raises(ConfigError, match="train.distill_from is None, was '"):
        train(with_train(config, distill_from=None), tmp_path / "run", quiet=True)
    train(with_train(config, distill_from=None), tmp_path / "alone", quiet=True)
    with pytest.raises(ConfigError, match="train.distill_from is '"):
        train(config, tmp_path / "alone", quiet=True)


def copied(teacher, tmp_path, **model):
    """A copy of the teacher's folder, its config changed."""
    folder = tmp_path / "other"
    shutil.copytree(teacher, folder)
    content = json.loads((folder / "config.json").read_text())
    content["model"] |= model
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ({"vocab_size": 300}, "a vocabulary of 300 tokens and this model one of 256"),
        ({"kind": "encoder"}, "model.kind 'encoder'; only a decoder teaches"),
        ({"max_seq_len": 8}, "takes at most 8 tokens and rows are 16 long"),
    ],
)
def test_a_run_that_cannot_teach_is_refused(teacher, student, tmp_path, model, text):
    folder = copied(teacher, tmp_path, **model)
    run = tmp_path / "run"
    with pytest.raises(ConfigError, match=re.escape(text)) as error:
        train(taught_by(student, folder), run, quiet=True)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    assert not run.exists()  # nothing was begun


def test_what_is_no_run_or_the_run_itself_is_refused(teacher, student, tmp_path):
    run = tmp_path / "run"
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "absent", tmp_path / "empty"):
        with pytest.raises(ConfigError, match="isn't a run: it has no config.json"):
            train(taught_by(student, folder), run, quiet=True)
    shutil.copytree(teacher, run)
    with pytest.raises(ConfigError, match="is the run itself"):
        find_teacher(taught_by(student, run), run)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find_teacher(taught_by(student, run), tmp_path / "new")
    adapter = copied(teacher, tmp_path)
    (adapter / "adaptation.json").write_text("{}")
    with pytest.raises(ConfigError, match="the run of an adapter"):
        find_teacher(taught_by(student, adapter), tmp_path / "new")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"source": "a", "step": "x", "digest": "b"}',
     '{"source": 1, "step": true, "digest": null}'],
)  # fmt: skip
def test_a_damaged_record_of_the_teacher_is_refused(teacher, student, tmp_path, text):
    (tmp_path / "distill_from.json").write_text(text)
    with pytest.raises(CheckpointError, match="distill_from.json is damaged"):
        find_teacher(taught_by(student, teacher), tmp_path)


def test_another_tokenizer_is_refused(tiny, student, tmp_path):
    other = tiny(steps=0, data={"tokenizer": "bpe", "bpe_vocab_size": 257})
    wide = dataclasses.replace(other.model, vocab_size=257)
    train(dataclasses.replace(other, model=wide), tmp_path / "bpe", quiet=True)
    bytes_of_257 = dataclasses.replace(
        student, model=dataclasses.replace(student.model, vocab_size=257)
    )
    with pytest.raises(ConfigError, match="with another tokenizer"):
        train(taught_by(bytes_of_257, tmp_path / "bpe"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("distill_weight", 0.0, "it must be positive"),
        ("distill_weight", 1.5, "it must be at most 1"),
        ("distill_temperature", 0.05, "it must be 0.1 to 100"),
        ("distill_temperature", 101.0, "it must be 0.1 to 100"),
    ],
)
def test_weights_and_temperatures_have_ranges(
    student, teacher, tmp_path, field, value, text
):
    config = with_train(taught_by(student, teacher), **{field: value})
    with pytest.raises(ConfigError, match=text):
        train(config, tmp_path, quiet=True)


def test_only_decoders_learn(tmp_path):
    model = ModelConfig(kind="encoder", d_model=16, d_ff=32, num_heads=4,
                        num_kv_heads=4, head_dim=4)  # fmt: skip
    config = dataclasses.replace(make_tiny(), model=model)
    with pytest.raises(ConfigError, match="only a decoder learns"):
        train(with_train(config, distill_from="there"), tmp_path, quiet=True)


def test_the_command_finds_a_teacher_by_name(teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(teacher, "runs/wise")
    line = ["train", "runs/wise", "--run-dir", "pupil", "--no-report", "--no-recall"]
    line += ["--train.steps", "1", "--train.eval-batches", "1"]
    assert main([*line, "--train.distill-from", "wise"]) == 0
    assert "learning from step 2 of runs/wise: weight 0.5" in capsys.readouterr().out
    # From another folder the same run goes on: what it keeps is a whole path.
    monkeypatch.chdir("/")
    kept = json.loads((tmp_path / "pupil" / "config.json").read_text())["train"]
    assert kept["distill_from"] == str(tmp_path / "runs/wise")
    assert main([*line[:-4], "--train.distill-from", "unwise"]) == 2
