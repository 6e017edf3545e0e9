"""The ``moe-lens`` command: its sub-commands, and the one place where an error becomes a sentence.

Exit codes: 0 done, 1 a run failed, 2 the input was wrong, 130 interrupted. Nothing here imports torch.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import typer

from moe_lens import __version__
from moe_lens.cli import (
    autointerp,
    demo,
    doctor,
    export,
    faithfulness,
    inspect,
    ls,
    probe,
    report,
    show,
    steer,
    validate,
)
from moe_lens.errors import MoELensError, nearest

DEBUG = "MOE_LENS_DEBUG"
_RESUMABLE = ("probe", "autointerp", "validate", "faithfulness", "demo")

app = typer.Typer(
    name="moe-lens",
    help="What does each expert of a Mixture-of-Experts language model do, and how far may I believe the answer?",
    epilog="MODEL is a hub id, a folder with a config.json, or bundled:tiny-moe.",
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
app.command("inspect", short_help="what a model is made of, from its config")(inspect.inspect)
app.command("doctor", short_help="does moe-lens see a checkpoint right, and what does it offer")(doctor.doctor)
app.command("probe", short_help="probe experts' neurons for concepts, beside a dense model")(probe.probe)
app.command("autointerp", short_help="label experts, and score the labels")(autointerp.autointerp)
app.command("validate", short_help="put labels on trial: are experts needed where labels say")(validate.validate)
app.command("faithfulness", short_help="do rankings of experts say which ones the model needs")(
    faithfulness.faithfulness
)
app.command("steer", short_help="generate with experts suppressed, forced or biased")(steer.steer)
app.command("show", short_help="what a run says about an expert, with its exemplars")(show.show)
app.command("report", short_help="a run as one offline HTML page")(report.report)
app.command("verify", short_help="is a report what its tables say")(report.verify)
app.command("export", short_help="a run as CSV, hub data set or Neuronpedia import")(export.export)
app.command("demo", short_help="the bundled MoE against its dense twin, offline")(demo.demo)
app.command("ls", short_help="tables of a run, or the runs in a folder")(ls.ls)


@app.callback(invoke_without_command=True)
def _root(context: typer.Context, version: bool = typer.Option(False, "--version", help="print the version")) -> None:
    if version:
        typer.echo(f"moe-lens {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def normalise(argv: Sequence[str]) -> list[str]:
    """Accept ``_`` for ``-`` in option names: ``--max_tokens=5`` becomes ``--max-tokens=5``."""
    plain: list[str] = []
    for word in argv:
        if word.startswith("--") and len(word) > 2 and "--" not in plain:
            name, equals, value = word.partition("=")
            word = name.replace("_", "-") + equals + value
        plain.append(word)
    return plain


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Errors are one line on stderr."""
    words = normalise(sys.argv[1:] if argv is None else argv)
    # before torch is imported: its threads would spin while they wait, and take the cores from those of the cells
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        command = typer.main.get_command(app)
        with command.make_context("moe-lens", words) as context:
            command.invoke(context)
        sys.stdout.flush()
        return 0
    except typer.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted(words)
    except BrokenPipeError:  # the reader of a pipe went away, as in `moe-lens ls runs | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _report(error, words)


def _interrupted(words: Sequence[str]) -> int:
    resumable = bool(words) and words[0] in _RESUMABLE and "--no-resume" not in words
    _say("interrupted" + ("; the same command continues from its finished parts" if resumable else ""))
    return 130


def _report(error: Exception, words: Sequence[str]) -> int:
    if os.environ.get(DEBUG):
        traceback.print_exception(error)
    if isinstance(error, MoELensError):
        _say(str(error))
        return error.exit_code
    if hasattr(error, "format_message"):  # typer's usage errors; their class is not public in every release
        _say(_usage(error.format_message(), words))  # pyright: ignore[reportAttributeAccessIssue]
        return 2
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        _say("the disk is full: free some space and run the same command again")
        return 1
    _say(f"{type(error).__name__}: {error} (run again with {DEBUG}=1 for the traceback)")
    return 1


def _usage(message: str, words: Sequence[str]) -> str:
    """Typer's sentence with what to do: the nearest command, else the help that lists what there is."""
    commands = [info.name for info in app.registered_commands if info.name]
    named = next((word for word in words if word in commands), None)
    if message.startswith("No such command"):
        unknown = next((word for word in words if not word.startswith("-")), "")
        return f"no command {unknown!r}{nearest(unknown, commands) or ': there are ' + ', '.join(commands)}"
    text = message.rstrip(".").replace("No such option: ", "no option ")
    help_command = "moe-lens " + (f"{named} --help" if named else "--help")
    return f"{text[:1].lower()}{text[1:]}; see {help_command}"


def _say(message: str) -> None:
    """One line on stderr, whatever the message holds."""
    typer.echo(f"moe-lens: {' '.join(message.split())}", err=True)


def entry() -> NoReturn:
    """Console script."""
    sys.exit(main())
