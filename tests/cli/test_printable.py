"""Names, paths and messages reach a terminal or a page as text, never as commands."""

import shutil

import pytest

from uoe_jax.cli import main
from uoe_jax.cli.notes import plain_warnings
from uoe_jax.data.progress import note, progress
from uoe_jax.report.build import write_report
from uoe_jax.train.progress import Display

HOSTILE = "a\x1b[31mred\x07 \u202egnp [red]x[bold] :x: \x9b2J\nuoe: all is well"
SHOWN = r"a\x1b[31mred\x07 \u202egnp [red]x[bold] :x: \x9b2J\nuoe: all is well"


@pytest.mark.parametrize(
    "args",
    [
        ["{}"],
        ["eval", "{}"],
        ["generate", "{}", "--prompt", "x"],
        ["report", "{}"],
        ["train", "{}"],
        ["train", "tiny", "--train.steps", "{}"],
        ["train", "tiny", "--optim.schedule", "{}"],
        ["train", "tiny", "--{}", "1"],
        ["data", "tiny", "--data.path", "{}"],
        ["data", "tiny", "--data.tokenizer", "{}.json"],
        ["plan", "tiny", "--topology", "{}"],
        ["cost", "{}"],
        ["complete", "{}.csv"],
        ["decompose", "{}"],
        ["adapt", "{}"],
        ["leakcheck", "{}"],
        ["train", "tiny", "--layout", "{}"],
        ["bench", "{}"],
    ],
    ids=lambda args: " ".join(args),
)
def test_a_wrong_value_is_one_line_that_a_terminal_can_show(args, capsys, tmp_path):
    assert main([arg.replace("{}", HOSTILE) for arg in args]) == 2
    out, err = capsys.readouterr()
    assert not out
    (line,) = err.splitlines()
    assert line.startswith("uoe: ") and line.isprintable()


def test_paths_and_names_are_shown_with_escapes(union_run, tmp_path, capsys):
    run = tmp_path / HOSTILE
    run.mkdir()
    shutil.copy(union_run / "config.json", run)
    config = (run / "config.json").read_text()
    name = config.replace('"tiny-union"', r'"\u001b[31mred \u202e"')
    (run / "config.json").write_text(name)
    assert main(["report", str(run), "--no-overlay"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable() and "printable characters only" in line
    name = config.replace('"tiny-union"', '"[red]<b>:x: $a_$"')
    (run / "config.json").write_text(name)
    shutil.copy(union_run / "metrics.jsonl", run)
    page = write_report([run], tmp_path / "page.html").read_text()
    assert "\x1b" not in page and "\u202e" not in page
    assert "<b>" not in page and "[red]&lt;b&gt;:x: $a_$" in page
    shutil.copy(union_run / "config.json", run)
    assert main(["report", str(run), "--no-overlay"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"report: {tmp_path}/{SHOWN}/report.html"


def test_notes_and_warnings_of_a_run_are_plain_text(capsys):
    with Display() as display:
        display.note(HOSTILE)
        display.warn(HOSTILE)
    out, err = capsys.readouterr()
    assert out == SHOWN + "\n"
    assert err == f"warning: {SHOWN}\n"


def test_notes_of_data_and_of_the_library_are_plain_text(capsys, monkeypatch):
    import warnings

    note(HOSTILE)
    with plain_warnings():
        warnings.warn(HOSTILE, UserWarning, stacklevel=1)
    assert capsys.readouterr().err == f"{SHOWN}\nuoe: {SHOWN}\n"
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with progress(HOSTILE, 10) as advance:
        advance(10)
    err = capsys.readouterr().err
    assert "\x07" not in err and "\u202e" not in err and r"[red]x[bold]" in err


def test_a_column_or_a_folder_of_a_table_is_no_markup(tmp_path, capsys):
    table = tmp_path / "[red]t[bold].csv"
    table.write_text(
        "user,item,rating\n"
        + "".join(f"{i},{j},{i + j}\n" for i in range(6) for j in range(6))
    )
    out = tmp_path / "[red]out[bold] :x:"
    assert main(["complete", str(table), "--rank", "1", "--iters", "2",
                 "--out", str(out)]) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert f"{out}: " in said and table.name in said
