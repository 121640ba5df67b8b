"""`uoe topology`: tables, plans of devices, JSON and pictures; errors in one line."""

import json

import pytest

from uoe_jax.cli import main

RING = {"links": [[0, 1], [1, 2], [2, 3], [3, 0]]}
TIED = {"nodes": list(range(4)), "links": [[0, 2], [2, 1], [1, 3], [3, 0, 2.0]]}


def run(capsys, *args):
    code = main(["topology", *args])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_slice_beside_jax(capsys):
    code, out, _ = run(capsys, "v4-8")
    assert code == 0
    assert "v4:2x2x1: 4 devices, 4 links" in out
    assert "jax 1.500, ours 1.000 (33% fewer)" in out
    assert "0  1\n3  2" in out


def test_axes_are_weighed_by_bytes(capsys):
    args = ["v5e:2x4", "--mesh", "data=2,tensor=4", "--json"]
    _, out, _ = run(capsys, *args, "--bytes", "data=1,tensor=8")
    found = json.loads(out)
    assert found["ours"]["hops"] == [2, 1] and found["traffic"]["tensor"] == 8
    _, out, _ = run(capsys, *args, "--bytes", "data=1", "--seed", "3")
    other = json.loads(out)
    assert other["ours"]["hops"][0] == 1
    flat = sum(other["order"], [])
    assert sorted(flat) == list(range(8))


def test_bytes_of_a_plan(capsys, tmp_path):
    assert main(["plan", "tiny-union", "--topology", "v5e:2x4", "--compile", "0",
                 "--json"]) == 0  # fmt: skip
    plan = tmp_path / "plan.json"
    plan.write_text(capsys.readouterr().out)
    fastest = json.loads(plan.read_text())["layouts"][0]
    code, out, _ = run(capsys, "v5e:2x4", "--bytes", str(plan), "--json")
    found = json.loads(out)
    assert code == 0
    assert found["mesh"] == {a: n for a, n in fastest["mesh"].items() if n > 1}
    total = dict.fromkeys(found["mesh"], 0.0)
    for row in fastest["collectives"]:
        total[row["axis"]] += row["bytes"] * row["count"]
    assert found["traffic"] == total
    code, _, err = run(capsys, "v5e:2x4", "--bytes", str(plan), "--mesh", "data=3")
    assert code == 2 and "has no mesh data=3" in err


def test_dead_chips(capsys):
    code, out, _ = run(capsys, "v5e:4x4", "--dead", "3,5", "--seconds", "5")
    assert code == 0 and "14 devices, 18 links" in out
    assert "ours 1.000" in out and "12  11   6   7" in out
    _, out, _ = run(capsys, "v5e:4x4", "--dead", "3,5", "--json")
    assert sorted(json.loads(out)["order"]) == sorted({*range(16)} - {3, 5})


def test_a_graph_of_ones_own(capsys, tmp_path):
    path = tmp_path / "links.json"
    path.write_text(json.dumps(TIED))
    code, out, _ = run(capsys, "--graph", str(path), "--json", "--eps", "1")
    found = json.loads(out)
    assert code == 0 and found["ours"]["hops"] == [1.25]
    assert found["partition"]["eps"] == 1
    assert found["order"] in ([0, 2, 1, 3], [0, 3, 1, 2])


def test_clusters_are_shown_where_they_are_asked_for(capsys):
    args = ["v5e:4x4", "--mesh", "data=2,sequence=8"]
    _, out, _ = run(capsys, *args)
    assert "shortcut" not in out and "stands in data.sequence (x: no device)" in out
    _, out, _ = run(capsys, *args, "--eps", "0.5")
    assert "shortcut partition, eps 0.5: 16 clusters" in out


def test_a_switch_is_left_alone(capsys):
    code, out, _ = run(capsys, "h100:8", "--mesh", "data=2,tensor=4")
    assert code == 0 and "every order is equal, so none is changed" in out
    _, out, _ = run(capsys, "h100:8", "--json")
    assert json.loads(out)["order"] == list(range(8))


def test_a_picture(capsys, tmp_path):
    path = tmp_path / "rings.png"
    code, _, err = run(capsys, "v5e:2x4", "--picture", str(path))
    assert code == 0 and f"picture: {path}" in err
    assert path.read_bytes()[:4] == b"\x89PNG"


BAD = {
    "nothing": ([], "got neither"),
    "name": (["v5q:4x4"], "did you mean"),
    "mesh": (["v5e:4x4", "--mesh", "data=4,tensor=8"], "32 devices and the graph has"),
    "word": (["v5e:4x4", "--mesh", "data"], "AXIS=NUMBER"),
    "twice": (["v5e:4x4", "--mesh", "data=4,data=4"], "names data twice"),
    "zero": (["v5e:4x4", "--mesh", "data=0"], "whole number"),
    "bytes": (["v5e:4x4", "--mesh", "data=16", "--bytes", "tensor=1"], "names tensor"),
    "nan": (["v5e:4x4", "--mesh", "data=16", "--bytes", "data=nan"], "bytes are a"),
    "file": (["v5e:4x4", "--bytes", "absent.json"], "can't be read"),
    "dead": (["v5e:4x4", "--dead", "3,x"], "such as 3,17"),
    "gone": (["v5e:4x4", "--dead", "16"], "device 16 isn't there"),
    "parts": (["v5e:4x4", "--dead", "1,4"], "2 parts"),
    "picture": (["v5e:2x2", "--picture", "rings.txt"], "must end in .png"),
    "both": (["v5e:2x2", "--graph", "links.json"], "got both"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_one_line(capsys, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "links.json").write_text(json.dumps(RING))
    args, said = BAD[case]
    code, out, err = run(capsys, *args)
    assert code == 2 and said in err and err.count("\n") == 1
    assert out == "" and not (tmp_path / "rings.txt").exists()


def test_a_bad_plan_is_named(capsys, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text('{"layouts": 3}')
    code, _, err = run(capsys, "v5e:2x4", "--bytes", str(path))
    assert code == 2 and "isn't a plan" in err and err.count("\n") == 1


def test_a_large_graph_says_that_it_began(capsys, tmp_path):
    ring = [[i, (i + 1) % 1030] for i in range(1030)]
    (tmp_path / "ring.json").write_text(json.dumps({"links": ring}))
    code, out, err = run(capsys, "--graph", str(tmp_path / "ring.json"),
                         "--seconds", "0.1", "--json")  # fmt: skip
    assert code == 0 and json.loads(out)["ours"]["hops"] == [1.0]
    assert err.startswith("looking for an order of 1030 devices") and "\n" in err
    _, _, err = run(capsys, "v4-8", "--json")
    assert err == ""
