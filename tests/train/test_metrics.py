import io
import json
import resource
import sys

import pytest
from rich.console import Console

from tests.train.tiny_runs import make_tiny
from uoe_jax.train.metrics import MetricsLog, read_metrics, scalars
from uoe_jax.train.progress import Display


def write(path, lines, step=0):
    log = MetricsLog(path, step)
    for line in lines:
        log.write(line)
    log.close()


def test_resuming_drops_later_lines_and_half_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [{"kind": "train", "step": s, "loss": 1 / s} for s in range(1, 6)])
    with path.open("a") as file:
        file.write('{"kind": "train", "st')
    write(path, [{"kind": "train", "step": 4, "loss": 0.5}], step=3)
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4]
    assert [line["loss"] for line in read_metrics(path)][2:] == [1 / 3, 0.5]


def test_lines_are_readable_at_once_and_strict_json(tmp_path):
    log = MetricsLog(tmp_path / "m", 0)
    log.write({"step": 1, "loss": float("nan"), "router": {"load": [float("inf"), 1]}})
    text = (tmp_path / "m").read_text()
    refuse = lambda name: pytest.fail(f"{name} isn't JSON")
    assert json.loads(text, parse_constant=refuse)["loss"] is None
    log.close()


def test_scalars_are_named_by_their_path():
    line = {"kind": "x", "step": 1, "loss": 2.0, "router": {"mlp": {"load": [[3, 4]]}}}
    assert dict(scalars(line)) == {
        "loss": 2.0,
        "router/mlp/load/00/00": 3,
        "router/mlp/load/00/01": 4,
    }


@pytest.mark.parametrize(
    ("sink", "module"), [("wandb", "wandb"), ("tensorboard", "tensorboardX")]
)
def test_a_missing_writer_costs_one_line(tmp_path, monkeypatch, sink, module):
    monkeypatch.setitem(sys.modules, module, None)
    notes = []
    log = MetricsLog(tmp_path / "m", 0)
    log.add_sinks(make_tiny(**{sink: True}), tmp_path, notes.append)
    log.write({"kind": "train", "step": 1, "loss": 1.0})
    log.close()
    (note,) = notes
    assert f"pip install 'uoe_jax[{sink}]'" in note and "\n" not in note


def test_tensorboard_events_are_written(tmp_path):
    log = MetricsLog(tmp_path / "m", 0)
    log.add_sinks(make_tiny(tensorboard=True), tmp_path, pytest.fail)
    log.write({"kind": "train", "step": 1, "loss": 1.0})
    log.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


LINE = {
    "loss": 2.5,
    "tokens": 1234.5,
    "tokens_per_second": 1234.5,
    "mfu": 0.25,
    "skipped": 0,
}


def test_plain_output_is_one_line_every_log_steps(capsys):
    with Display(log_every=5) as display:
        display.start(0, 12)
        for step in range(1, 13):
            seen = {"step": step, "tokens": 1234.5 * step, "seconds": float(step)}
            display.step({**LINE, **seen})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["5/12", "10/12", "12/12"]
    assert lines[0] == "step 5/12  loss 2.5000  1,234 tokens/s  MFU 25.0%  7 s left"


def test_quiet_prints_only_warnings(capsys):
    with Display(quiet=True) as display:
        display.start(0, 1)
        display.note("note")
        display.warn("disk full")
        display.step({**LINE, "step": 1, "seconds": 1.0})
    out, err = capsys.readouterr()
    assert out == "" and err == "warning: disk full\n"


def test_a_loss_that_is_not_finite_is_shown(capsys):
    with Display() as display:
        display.step(
            {**LINE, "step": 1, "seconds": 0.0, "loss": float("nan"), "mfu": None}
        )
    assert "loss nan" in capsys.readouterr().out


def test_a_terminal_gets_a_bar_and_notes_above_it(capsys):
    display = Display()
    out = io.StringIO()
    display.console = Console(file=out, force_terminal=True, width=100, highlight=False)
    with display:
        display.start(0, 4)
        display.step({**LINE, "step": 3, "seconds": 3.0})
        display.note("validation loss 2.0")
    text = out.getvalue()
    assert "validation loss 2.0" in text
    assert "3/4" in text and "MFU 25.0%" in text and "1,234 tokens/s" in text


def test_lines_a_full_disk_refuses_are_written_later(tmp_path):
    log = MetricsLog(tmp_path / "m", 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60, hard))
    try:
        for step in range(1, 5):
            log.write({"kind": "train", "step": step, "loss": 1.25})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [line["step"] for line in read_metrics(tmp_path / "m")] == [1]
    assert "can't be written (File too large)" in log.poll()[0] and not log.poll()
    log.write({"kind": "train", "step": 5, "loss": 1.25})
    log.close()
    assert [line["step"] for line in read_metrics(tmp_path / "m")] == [1, 2, 3, 4, 5]


def test_a_writer_that_cannot_connect_costs_one_line(tmp_path, monkeypatch):
    class Offline:
        def init(**kwargs):
            raise OSError("no route to host")

    monkeypatch.setitem(sys.modules, "wandb", Offline)
    notes = []
    log = MetricsLog(tmp_path / "m", 0)
    log.add_sinks(make_tiny(wandb=True), tmp_path, notes.append)
    log.close()
    assert notes == [
        "train.wandb is on but wandb fails (no route to host); going on without"
    ]
