"""The frame of the command line: argument spelling, exit codes, and one sentence for every error."""

from __future__ import annotations

import errno

import pytest

from moe_lens.cli import app
from moe_lens.errors import MoELensError, WriteFailed
from tests.cli.conftest import Cli


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let ``moe-lens ls`` raise."""

    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr("moe_lens.cli.ls.find_runs", fail)


def test_underscores_are_accepted_in_option_names_only() -> None:
    words = ["probe", "--max_tokens=5", "--text_column", "my_text", "-o", "my_run", "--", "--a_b"]
    assert app.normalise(words) == [
        "probe",
        "--max-tokens=5",
        "--text-column",
        "my_text",
        "-o",
        "my_run",
        "--",
        "--a_b",
    ]


def test_both_spellings_reach_the_same_option(cli: Cli) -> None:
    for option in ("--max-tokens", "--max_tokens"):
        assert "--max-tokens cannot be '0'" in cli("probe", "--model", "m", option, "0").err


def test_no_command_shows_the_help(cli: Cli) -> None:
    outcome = cli()
    assert outcome.code == 0
    assert outcome.out == cli("--help").out


def test_only_commands_that_exist_are_listed(cli: Cli) -> None:
    listed = cli("--help").out.split("Commands:")[1].split("\n\n")[0]
    lines = [line for line in listed.splitlines() if line.startswith("  ") and line[2] != " "]
    wanted = "inspect doctor probe autointerp validate faithfulness steer show report verify export demo ls".split()
    assert [line.split()[0] for line in lines] == wanted


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("prob",), "no command 'prob', did you mean 'probe'?"),
        (("xyz",), "no command 'xyz': there are inspect, doctor, probe, autointerp, validate, faithfulness, steer,"),
        (("probe", "--cncepts", "a"), "no option --cncepts"),
        (("inspect",), "missing argument 'MODEL'; see moe-lens inspect --help"),
        (("ls", "a", "b"), "see moe-lens ls --help"),
        (("probe", "--model"), "see moe-lens probe --help"),
        (("probe",), "no model was named: give --model"),
    ],
)
def test_a_usage_error_is_one_sentence_and_exit_2(cli: Cli, words: tuple[str, ...], message: str) -> None:
    outcome = cli(*words)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (MoELensError("a problem\nin two lines: do this"), 2, "moe-lens: a problem in two lines: do this\n"),
        (WriteFailed("could not write x"), 2, "moe-lens: could not write x\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "the disk is full: free some space"),
        (ZeroDivisionError("oops"), 1, "ZeroDivisionError: oops (run again with MOE_LENS_DEBUG=1 for the traceback)"),
        (KeyboardInterrupt(), 130, "moe-lens: interrupted\n"),
    ],
)
def test_every_error_is_one_line(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    raising(monkeypatch, error)
    outcome = cli("ls", ".")
    assert (outcome.code, outcome.out) == (code, "")
    assert message in outcome.err
    assert outcome.err.count("\n") == 1


def test_the_traceback_is_shown_when_asked_for(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, ZeroDivisionError("oops"))
    monkeypatch.setenv("MOE_LENS_DEBUG", "1")
    outcome = cli("ls", ".")
    assert outcome.code == 1
    assert "Traceback" in outcome.err
    assert "ZeroDivisionError: oops" in outcome.err


@pytest.mark.parametrize(("more", "hint"), [((), "the same command continues"), (("--no-resume",), "interrupted\n")])
def test_an_interrupted_run_says_how_it_goes_on(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], hint: str
) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moe_lens.cli.probe.check_models", interrupt)
    outcome = cli("probe", "--model", "bundled:tiny-moe", "-o", "run", *more)
    assert outcome.code == 130
    assert hint in outcome.err
    assert outcome.err.count("\n") == 1
