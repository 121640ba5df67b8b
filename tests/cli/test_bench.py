"""`uoe bench` on a CPU: the same programs at sizes of a unit test."""

import dataclasses
import json

import pytest

from uoe_jax.bench import command, sizes, tune
from uoe_jax.cli import main
from uoe_jax.ops import measured

TINY = dataclasses.replace(
    sizes.SMALL,
    attention=((1, 16, 2, 8, True),),
    selective=((1, 16, 4, 2, 8),),
    matmul=((64, 8, 16, 4),),
    mlp=((8, 32, 4, 2, 1, 16),),
    narrow=((16, 8, 4, 2, 16),),
    smha=((8, 4, 2, 4, 1, 16),),
    sweep=(8, 16, 4, 4, 16),
    sweep_lengths=(16,),
    sweep_picks=(2,),
)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setitem(command.SIZES, "small", TINY)
    monkeypatch.setenv(measured.FOLDER, str(tmp_path / "tuning"))
    measured.load.cache_clear()
    yield tmp_path
    measured.load.cache_clear()


def test_rows_are_measured_or_say_why(tiny, capsys):
    out = tiny / "bench.json"
    assert (
        main(["bench", "attention", "union", "--rounds", "1", "--out", str(out)]) == 0
    )
    record = json.loads(out.read_text())
    rows = {(r["op"], r["name"], r["what"]): r for r in record["rows"]}
    assert rows["dense attention", "xla", "both"]["milliseconds"] > 0
    assert "needs an NVIDIA GPU" in rows["dense attention", "cudnn", "forward"]["note"]
    assert rows["selective attention", "xla", "both"]["tflops"] > 0
    assert rows["grouped matmul", "triton", "forward"]["note"]
    assert rows["grouped matmul", "jax.lax.ragged_dot", "both"]["milliseconds"] > 0
    for layer in ("MLP layer", "attention layer"):
        assert rows[layer, "union", "both"]["milliseconds"] > 0
    assert record["command"].startswith("uoe bench attention union")
    assert "one dense product" in capsys.readouterr().out


def test_sweep_is_plotted(tiny):
    picture = tiny / "sweep.png"
    assert main(["bench", "sweep", "--rounds", "1", "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_tuned_table_orders_backends(tiny):
    tune.tune(dataclasses.replace(TINY, attention=()), 1, lambda text: None)
    table = measured.load()
    entry = table["order"]["grouped_matmul"][0]
    assert entry["fastest"] == ["xla"]  # the only one that serves a CPU
    heads = table["order"]["split_heads"]
    assert [e["shape"]["kv_heads"] for e in heads] == [1, 2]
    assert [e["shape"]["rows"] for e in heads] == [32, 16]
    (gated,) = table["order"]["swiglu"]
    assert gated["fastest"] == ["xla"]
    assert gated["shape"] == {"rows": 32, "width": 8, "dtype": "float32"}
    (router,) = table["order"]["router"]
    assert router["fastest"] == ["xla"] and router["shape"]["rows"] == 16
    (narrow,) = table["order"]["expert_mlp"]
    assert narrow["fastest"] == ["steps"]
    assert narrow["shape"]["rows"] == 2 * 16 and narrow["shape"]["hidden"] == 8
    near = entry["shape"] | {"rows": 100}
    names = ("triton", "xla", "reference")
    assert measured.prefer("grouped_matmul", names, near) == (
        "xla",
        "triton",
        "reference",
    )
    far = entry["shape"] | {"rows": 10**6}
    assert measured.prefer("grouped_matmul", names, far) == names


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["speed"], "choose from attention"),
        (["union", "--rounds", "0"], "at least 1"),
        (["union", "--size", "huge"], "choose from full, small"),
        (["union", "--plot", "x.png"], "uoe bench sweep"),
        (["sweep", "--plot", "x"], "--plot is x; its name must end in .png"),
        (["sweep", "--plot", "absent/x.png"], "there is no folder absent"),
        (["gemm", "--plot", "x.txt"], "--plot is x.txt; its name must end in .png"),
    ],
)
def test_bad_requests_are_one_line(args, part, capsys):
    assert main(["bench", *args]) == 2
    said = capsys.readouterr().err
    assert part in said and said.count("\n") == 1
