"""`uoe adapt`: trained, saved, loaded again, merged; mistakes in one line."""

import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.compare import assert_close
from uoe_jax.adapt import AdapterConfig, adapted_params
from uoe_jax.adapt.files import digest_params, load_adapters
from uoe_jax.adapt.merge import merge
from uoe_jax.adapt.plan import make_plans, warn_of
from uoe_jax.cli import main
from uoe_jax.cli.adapt import AdaptOptions
from uoe_jax.cli.fields import option_names, typed_options
from uoe_jax.cli.notes import plain_warnings
from uoe_jax.model import flat_params, make_model
from uoe_jax.runs.checkpoint import Checkpoints
from uoe_jax.runs.load import load_run
from uoe_jax.runs.state import Progress
from uoe_jax.runs.write import Origin, write_run
from uoe_jax.train.metrics import read_metrics


@pytest.fixture(scope="module")
def other_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("other") / "words.txt"
    path.write_text("the river carries every letter home. " * 800)
    return path


@pytest.fixture(scope="module")
def union_run(tiny_config, tmp_path_factory):
    """A union as it starts: what it has learned plays no part here."""
    config, folder = tiny_config(), tmp_path_factory.mktemp("runs") / "fresh"
    model = make_model(config.model, jax.random.key(0))
    spent = Progress(seconds=5.0, tokens=700, flops=9e9)
    origin = Origin(made_by="test", source="nothing", spent=spent)
    write_run(folder, config, flat_params(model), origin)
    shutil.copytree(folder / "checkpoints", folder / "best")
    return folder


USED = set()  # options that some command here was run with


def given_names(words):
    return {n[2:].replace("-", "_") for n in typed_options(words, AdaptOptions)}


def adapt(*args):
    """Run the command; what it returns, exit status first."""
    words = list(map(str, args))
    USED.update(given_names(words))
    return main(["adapt", *words])


@pytest.fixture(scope="module")
def adapted(union_run, other_text, tmp_path_factory):
    """An adapter of the union, with its merged run; nine rows fit one device."""
    out = tmp_path_factory.mktemp("adapters") / "lora"
    args = [union_run, "--method", "lora", "--rank", "2", "--steps", "6",
            "--data", other_text, "--learning-rate", "0.03", "--merge",
            "--batch-size", "9", "--out", out, "--quiet"]  # fmt: skip
    assert adapt(*args) == 0
    return out


def test_an_adapter_is_trained_reported_and_merged(adapted, union_run, capsys):
    report = json.loads((adapted / "adapt.json").read_text())
    assert report["after"]["loss"] < report["before"]["loss"]
    assert report["params"]["adapter"] < report["params"]["base"]
    memory = report["memory_bytes"]
    assert 0 <= memory["optimizer"] - 2 * memory["adapter"] <= 16  # and a counter
    assert report["tokens_per_second"] > 0 and len(report["losses"]) == 6
    assert (adapted / "adapt.png").read_bytes().startswith(b"\x89PNG")
    base = load_run(union_run)
    params = nnx.split(base.model, nnx.Param, ...)[1]
    adapters, config = load_adapters(adapted, params)
    assert config.method == "lora" and config.rank == 2
    merged = nnx.split(load_run(adapted / "merged").model, nnx.Param, ...)[1]
    want = jax.jit(adapted_params)(params, adapters)
    changed = 0
    for got, wanted, old in zip(
        *map(jax.tree.leaves, (merged, want, params)), strict=True
    ):
        assert_close(got, wanted, 1e-6)
        changed += bool(np.any(np.asarray(got) != np.asarray(old)))
    assert changed == len(adapters.plans)
    assert set(merge(params, adapters).originals) == {p.name for p in adapters.plans}


def test_a_saved_adapter_merges_untrained(
    adapted, union_run, other_text, tmp_path, capsys
):
    out = tmp_path / "again"
    args = [union_run, "--load", adapted, "--steps", "0", "--merge"]
    args += ["--data", other_text, "--batch-size", "9", "--out", out, "--json"]
    assert adapt(*args) == 0
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert "after" not in report and "other weights" not in said.err
    first = json.loads((adapted / "adapt.json").read_text())
    assert_close(report["before"]["loss"], first["after"]["loss"], 1e-6)
    first, second = (flat_params(load_run(f / "merged").model) for f in (adapted, out))
    chex.assert_trees_all_equal(first, second)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rank", "0"], "at least 1"),
        (["--targets", "*.wz"], "no weight matches"),
        (["--init", "gaussian"], "tucker takes"),
        (["--steps", "0"], "--load"),
        (["--data", "nowhere.txt", "--rank", "2"], "nowhere.txt"),
        (["--rank-pattern", "*.wq"], "PATTERN=RANK"),
        (["--load", "nowhere"], "nowhere"),
        (["--load", "nowhere", "--rank", "8"], "--rank is 8 with --load"),
        (["--load", "nowhere", "--no-dora"], "--dora is False with --load"),
        (["--load", "no", "--steps", "0", "--seed", "0"], "--seed is 0 with --steps 0"),
        (["--rank", "2", "--mesh.tensor", "3"], "mesh.tensor 3 doesn't divide"),
        (["--load", "nowhere", "--dora"], "--dora is True with --load"),
        (["--method", "loha"], "choose from 'tucker', 'lora'"),
        (["--alpha", "0"], "--alpha is 0"),
        (["--learning-rate", "-1"], "--learning-rate is -1"),
        (["--batch-size", "0"], "--batch-size is 0"),
    ],
)
def test_mistakes_are_one_line(options, words, union_run, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["adapt", str(union_run), "--out", str(out), *options]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert not out.exists()


def test_nothing_is_ever_overwritten(adapted, union_run, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "half" / "merged").mkdir(parents=True)
    for out, words in (
        (adapted, "holds an adapter already"),
        (tmp_path / "half", "holds a merged run already"),
        (tmp_path / "file", "is a file"),
    ):
        assert main(["adapt", str(union_run), "--out", str(out)]) == 2
        assert words in capsys.readouterr().err


def test_a_loaded_adapter_needs_a_folder_for_what_becomes_of_it(union_run, capsys):
    assert main(["adapt", str(union_run), "--load", "some", "--merge"]) == 2
    assert "--out" in capsys.readouterr().err


def test_warnings_are_one_line_without_a_place_in_code(capsys):
    with plain_warnings():
        warn_of(make_plans({"w": (6, 4)}, AdapterConfig(rank=64, targets=("w",))))
    said = capsys.readouterr().err.splitlines()
    assert [line[:24] for line in said] == [
        "uoe: rank 64 is more tha",
        "uoe: adapters have 56 pa",
    ]


def test_a_merged_run_keeps_what_its_source_spent(adapted):
    progress = Checkpoints(adapted / "merged" / "checkpoints").restore(
        {"step": jax.ShapeDtypeStruct((), jnp.int32)}
    )[2]
    spent = [progress[name] for name in ("seconds", "tokens", "flops")]
    assert spent == [5.0, 700, 9e9]


def test_an_adapters_run_has_what_any_run_has(adapted, union_run, capsys):
    lines = list(read_metrics(adapted / "metrics.jsonl"))
    assert [line["step"] for line in lines if line["kind"] == "eval"][:2] == [0, 2]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [*range(1, 7)]
    assert Checkpoints(adapted / "checkpoints").steps() == [4, 6]
    before = (adapted / "adapter_model.safetensors").read_bytes()
    again = [union_run, "--method", "lora", "--rank", "2", "--steps", "6", "--merge",
             "--data", lines_data(adapted), "--learning-rate", "0.03",
             "--batch-size", "9", "--out", adapted]  # fmt: skip
    assert adapt(*again) == 0
    assert "all steps are taken" in capsys.readouterr().out
    assert (adapted / "adapter_model.safetensors").read_bytes() == before
    for verb in (["eval"], ["generate", "--prompt", "a"]):
        assert main([verb[0], str(adapted), *verb[1:]]) == 2
        assert "merged" in capsys.readouterr().err
    assert main(["train", str(adapted)]) == 2
    assert "go on with the same uoe adapt" in capsys.readouterr().err
    assert main(["report", str(adapted)]) == 0


def lines_data(folder):
    """The data that a run was trained on."""
    return json.loads((folder / "config.json").read_text())["data"]["path"]


COMMANDS = {
    "heads and experts on a mesh": [
        "--method", "tucker", "--init", "flora", "--alpha", "0.5", "--split-heads",
        "--share-experts", "--targets", "*.w?", "*.w_up", "--rank-pattern", "*.wo=1",
        "--path", "factored", "--seed", "3", "--checkpoint", "best",
        "--mesh.data", "2", "--mesh.tensor", "2", "--mesh.fsdp", "2",
        "--layout.tensor-reduce", "reduce_scatter", "--layout.experts", "round_robin",
        "--layout.dispatch", "all_to_all", "--layout.device-order", "jax",
        "--layout.rules", "RULES",
    ],
    "magnitudes": [
        "--method", "lora", "--dora", "--rslora", "--targets", "*.wq", "*.w_down",
        "--mesh.sequence", "2", "--mesh.data", "1",
        "--layout.sequence-attention", "gather",
    ],
    "dropout": ["--method", "lora", "--dropout", "0.3", "--targets", "*.w_up"],
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_options_train_and_report(name, union_run, tmp_path, capsys):
    out = tmp_path / "out"
    rules = tmp_path / "rules.json"
    rules.write_text('{"*.attention.wq": {"fsdp": null}}')
    words = [rules if word == "RULES" else word for word in COMMANDS[name]]
    options = ["--rank", "2", "--steps", "2", "--out", out, "--json", *words]
    assert adapt(union_run, *options) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["steps"] == 2 and len(report["losses"]) == 2
    params = nnx.split(load_run(union_run).model, nnx.Param, ...)[1]
    adapters, _ = load_adapters(out, params)
    base = json.loads((out / "adaptation.json").read_text())["base"]
    assert base == digest_params(params)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(adapters.weights))


def test_every_option_was_run(adapted):
    known = {name[2:].replace("-", "_") for name in option_names(AdaptOptions)}
    known = {name for name in known if not name.startswith("no_")}
    used = USED | given_names(sum(COMMANDS.values(), []))
    assert known - {"run", "cut"} <= used | {"load"}  # cut: compress/test_anytime.py


def test_an_adapter_of_other_weights_is_said_to_be(adapted, union_run, tmp_path):
    params = nnx.split(load_run(union_run).model, nnx.Param, ...)[1]
    moved = jax.tree.map(lambda a: a + 0.5, params)
    with pytest.warns(UserWarning, match="trained on other weights"):
        load_adapters(adapted, moved)


def test_training_that_diverges_stops_with_a_diagnosis(union_run, tmp_path, capsys):
    out, broken = tmp_path / "out", tmp_path / "broken"
    run = load_run(union_run)
    spoiled = flat_params(run.model) | {"embed.embedding": np.full((256, 16), np.nan)}
    origin = Origin(made_by="test", source=str(union_run))
    write_run(broken, run.config, spoiled, origin)
    options = ["--method", "lora", "--targets", "*.wq", "--steps", "9", "--quiet"]
    assert adapt(broken, *options, "--out", out) == 3
    said = capsys.readouterr().err
    assert "wasn't finite 5 steps in a row up to step 5" in said
    assert (out / "nonfinite-5.json").is_file()
    assert not (out / "adapter_model.safetensors").exists()
