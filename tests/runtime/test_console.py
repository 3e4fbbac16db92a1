"""What is printed, as wide and as coloured as the stream takes; on real terminals."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from pathlib import Path

import pytest

import mtl.training.loop
from mtl.runtime.console import has_colour, line_width, logger, print_err, progress_bar, show_log
from terminal import lines_of, terminal

EPOCH = (
    "warm-heads  epoch 1  step 5  loss 2.903  val/score 0.015  segmentation miou 0.034  depth abs_rel 0.525"
    "  normals mean 48.220  object accuracy 0.000  339 img/s"
)
YELLOW, RED, END = "\x1b[33m", "\x1b[31m", "\x1b[0m"


@pytest.fixture(autouse=True)
def _plain_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLUMNS", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


# --- how wide, how coloured


def test_a_terminal_has_its_own_width_and_a_file_any(tmp_path: Path) -> None:
    with terminal(132) as (stream, _), (tmp_path / "log").open("w") as file:
        assert (line_width(stream), line_width(file), line_width(io.StringIO())) == (132, None, None)
    with terminal(0) as (stream, _):
        assert line_width(stream) == 80, "it does not know its width"


def test_columns_decide_for_terminals_and_files(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, widths in {"60": (60, 60), "": (132, None), "wide": (132, None), "0": (132, None)}.items():
        monkeypatch.setenv("COLUMNS", value)
        with terminal(132) as (stream, _):
            assert (line_width(stream), line_width(io.StringIO())) == widths, value


@pytest.mark.parametrize(
    ("name", "value", "is_coloured"),
    [("NO_COLOR", "1", False), ("NO_COLOR", "", True), ("TERM", "dumb", False), ("TERM", "vt100", True)],
)
def test_a_terminal_is_coloured_unless_the_user_or_the_terminal_wants_none(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, is_coloured: bool
) -> None:
    monkeypatch.setenv(name, value)
    with terminal(80) as (stream, _):
        assert has_colour(stream) == is_coloured
    assert not has_colour(io.StringIO())


# --- the log


def logged(monkeypatch: pytest.MonkeyPatch, columns: int, level: int, text: str) -> str:
    """What a record looks like in a terminal."""
    with terminal(columns) as (stream, printed):
        monkeypatch.setattr(sys, "stdout", stream)
        show_log(quiet=False)
        logger.log(level, text)
        return printed()


def test_warnings_and_errors_are_coloured_and_information_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert logged(monkeypatch, 80, logging.WARNING, "too few") == f"{YELLOW}warning:{END} too few\n"
    assert logged(monkeypatch, 80, logging.ERROR, "audit: 1\n  a") == f"{RED}error:{END} audit: 1\n  a\n"
    assert logged(monkeypatch, 80, logging.INFO, "phase a") == "phase a\n"


def test_without_colour_the_prefix_stays(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    show_log(quiet=True)
    logger.warning("too few")
    logger.error("too many")
    logger.info("phase a")
    assert capsys.readouterr().out == "warning: too few\nerror: too many\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert logged(monkeypatch, 80, logging.WARNING, "too few") == "warning: too few\n"


def test_an_epoch_line_is_wrapped_on_a_terminal_between_its_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    assert logged(monkeypatch, 80, logging.INFO, EPOCH).splitlines() == [
        "warm-heads  epoch 1  step 5  loss 2.903  val/score 0.015",
        "    segmentation miou 0.034  depth abs_rel 0.525  normals mean 48.220",
        "    object accuracy 0.000  339 img/s",
    ]
    assert logged(monkeypatch, 200, logging.INFO, EPOCH) == f"{EPOCH}\n"


def test_a_warning_of_python_is_one_of_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        show_log(quiet=True)
        warnings.warn_explicit("param_changed", UserWarning, mtl.training.loop.__file__, 7)
        warnings.warn_explicit("old", FutureWarning, "/lib/other.py", 8)
        show_log(quiet=True, only_errors=True)
        warnings.warn_explicit("of another rank", UserWarning, mtl.training.loop.__file__, 7)
    said = "warning: param_changed\nwarning: old (FutureWarning, /lib/other.py:8)\n"
    assert capsys.readouterr() == (said, "")


def test_an_epoch_line_in_a_file_is_whole_unless_columns_are_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    show_log(quiet=False)
    logger.info(EPOCH)
    assert capsys.readouterr().out == f"{EPOCH}\n"
    monkeypatch.setenv("COLUMNS", "80")
    logger.info(EPOCH)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_messages_are_wrapped_at_separators_and_a_path_stays_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"/{'a' * 60}/b"
    assert logged(monkeypatch, 40, logging.WARNING, f"the cache {path} is damaged: it is made again") == (
        f"{YELLOW}warning:{END} the cache\n    {path}\n    is damaged: it is made again\n"
    )
    assert logged(monkeypatch, 40, logging.INFO, "warm: 1 epoch done; next phase: finetune") == (
        "warm: 1 epoch done; next phase: finetune\n"
    )
    assert logged(monkeypatch, 39, logging.INFO, "warm: 1 epoch done; next phase: finetune") == (
        "warm: 1 epoch done; next phase:\n    finetune\n"
    )


def test_a_message_on_standard_error_is_coloured_where_its_lines_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(80) as (stream, printed):
        monkeypatch.setattr(sys, "stderr", stream)
        print_err("error: a\nwarning: b\nmtl train: error: c\nan error: d")
        assert printed() == f"{RED}error:{END} a\n{YELLOW}warning:{END} b\n{RED}mtl train: error:{END} c\nan error: d\n"


# --- the bar

LOSSES = "loss 2.903  segmentation 2.565  depth 0.525  normals 0.220  object 2.303"


def bar_in(monkeypatch: pytest.MonkeyPatch, columns: int, losses: str) -> str:
    """The last state of a bar in a terminal."""
    with terminal(columns) as (stream, printed):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_bar(200, "warm-heads epoch 12", quiet=False) as bar:
            bar.update(50)
            bar.set_postfix_str(losses)
        lines = lines_of(printed())
    assert all(len(line) < columns for line in lines), lines
    return lines[-1]


def test_the_bar_shows_every_loss_in_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bar_in(monkeypatch, 80, LOSSES) == f"25%, {LOSSES}"


def test_the_bar_shows_as_much_else_as_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = bar_in(monkeypatch, 180, LOSSES)
    assert wide.startswith("warm-heads epoch 12  25% |█████  ") and " 50/200, " in wide and "img/s" in wide
    assert wide.endswith(f", {LOSSES}")
    assert bar_in(monkeypatch, 100, LOSSES) == f"warm-heads epoch 12  25%, {LOSSES}"
    short = bar_in(monkeypatch, 80, "loss 2.903  depth 0.525")
    assert short.startswith("warm-heads epoch 12  25%, 00:0") and short.endswith(", loss 2.903  depth 0.525")


def test_losses_that_do_not_fit_are_left_out_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = "  ".join(f"task{number} 0.{number}00" for number in range(1, 10))
    assert bar_in(monkeypatch, 40, losses) == "25%, task1 0.100  task2 0.200  ..."


def test_there_is_no_bar_in_a_file_or_if_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_bar(200, "a", quiet=False) as bar:
        bar.set_postfix_str(LOSSES)
    assert capsys.readouterr().err == ""
    with terminal(80) as (stream, printed):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_bar(200, "a", quiet=True) as bar:
            bar.update(5)
        assert printed() == ""
