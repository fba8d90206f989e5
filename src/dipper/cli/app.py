"""The program: its verbs' group, and every error as one line."""

from __future__ import annotations

import difflib
import errno
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any, cast

import typer
from typer.core import TyperGroup

from dipper import __version__
from dipper.cli.shared import one_line, say
from dipper.errors import ConfigError, DipperError
from dipper.options import Debug

__all__ = ["app", "main"]


# click's own classes, wherever this typer keeps its click (newer ones carry a copy).
_UsageError = cast(type[Exception], typer.BadParameter.__mro__[1])


_EXIT_ERROR, _EXIT_INTERRUPTED, _EXIT_BROKEN_PIPE = 1, 130, 141


class _Group(TyperGroup):
    """The verbs; an unknown one is an error that names the nearest."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The verb that `args` begins with."""
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            verbs = self.list_commands(ctx)
            near = difflib.get_close_matches(args[0], verbs, n=1)
            hint = f"did you mean `dipper {near[0]}`?" if near else f"the verbs are {', '.join(verbs)}."
            raise ConfigError(f"there is no verb '{args[0]}'; {hint}")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="dipper",
    cls=_Group,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"dipper {__version__}")
        raise typer.Exit


@app.callback()
def _dipper(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Run GLU language models larger than the DRAM they may use, by reading from flash only the weight columns needed.

    \b
    Examples:
      dipper pack "$(dipper pull smollm2)" -o smollm2.dipper
      dipper run smollm2.dipper "Why is the sky blue?" --mlp-dram 60%
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
        argv: arguments without the program's name; by default the process's.

    Returns:
        The exit code: 0; 1 for an error, said in one line on stderr; 130 for Ctrl-C.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    command = typer.main.get_command(app)
    try:
        # Not command.main(): it would print usage errors over several lines, and exit with 2.
        with command.make_context("dipper", list(args) or ["--help"]) as context:
            command.invoke(context)
    except typer.Exit as request:
        return int(request.exit_code)
    except BrokenPipeError:
        # The reader of stdout has gone, as in `dipper ... | head`; Python would complain once more when it closes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_BROKEN_PIPE
    except (KeyboardInterrupt, typer.Abort):
        return _EXIT_INTERRUPTED
    except Exception as error:
        if "--debug" in args:
            traceback.print_exc()
        say(f"dipper: {_describe(error)}")
        return _EXIT_ERROR
    return 0


def _describe(error: Exception) -> str:
    """What an error says to a user, in one line."""
    if isinstance(error, DipperError):
        return one_line(error)
    if isinstance(error, _UsageError):
        return _describe_usage(error)
    if isinstance(error, MemoryError):
        return "out of memory; lower --dram, --mlp-dram or --ctx."
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None else ""
        todo = {errno.ENOSPC: "; free some space", errno.EACCES: "; check its permissions"}.get(error.errno or 0, "")
        return f"{where}{error.strerror or one_line(error)}{todo}."
    return f"internal error: {type(error).__name__}: {one_line(error)} (--debug shows where)"


def _describe_usage(error: Any) -> str:
    """A usage error of click's, with the nearest option where one was misspelt."""
    context = error.ctx
    help_hint = f"see `{context.command_path} --help`." if context is not None else "see `dipper --help`."
    name = getattr(error, "option_name", None)
    if name is not None and hasattr(error, "possibilities") and context is not None:
        known = [option for parameter in context.command.params for option in parameter.opts]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? or " if near else ""
        return f"`{context.command_path}` has no option {name}; {hint}{help_hint}"
    message = " ".join(error.format_message().split()).rstrip(".")
    return f"{message}; {help_hint}"
