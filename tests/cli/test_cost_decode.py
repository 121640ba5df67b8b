"""`uoe cost --device`: one decoded token, inside the memory and beside it."""

import json

import pytest

from uoe_jax.cli import main


def test_a_token_on_a_memory_device(capsys):
    args = ["cost", "1b-union", "--device", "aim-gddr6:16", "--context", "1024"]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "decoding, batch 1" in out and "a token on aim-gddr6:16" in out
    assert main([*args, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["decode"]
    assert [cost["device"] for cost in found] == ["aim-gddr6:16", "h200", "t4"]
    first = found[0]
    assert first["context"] == 1024
    assert abs(sum(first["phases"].values()) - first["seconds"]) < 1e-9
    assert 0.97 < first["row_hits"] < 1


def test_a_token_on_an_ordinary_device(capsys):
    assert main(["cost", "small", "--device", "H200", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["decode"]
    assert [cost["device"] for cost in found] == ["h200", "t4"]
    assert found[0]["context"] == 2048 and set(found[0]["phases"]) == {
        "weights",
        "keys and values",
    }


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["small", "--device", "aim:8"], "--device is 'aim:8'; did you mean aim-gddr6"),
        (["small", "--device", "aim-gddr6:0"], "write channels as aim-gddr6:8"),
        (["small", "--context", "3"], "add --device"),
        (["small", "--device", "t4", "--context", "9999"], "takes 1 to 2048 tokens"),
        (["7b", "--device", "aim-gddr6:8"], "aim-gddr6:8 holds 4.00 GB"),
        (["tiny-mod", "--device", "aim-gddr6"], "has mod"),
    ],
)
def test_requests_that_cant_be_met(args, says, capsys):
    assert main(["cost", *args]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1
