"""The command line: parsing and printing only. Data goes to stdout, messages to stderr; torch is imported when a command runs.

Exit status: 0 done, 1 something is wrong with an index (`index verify`) or a training (`doctor`), or a bug, 2 wrong input,
130 interrupted, 143 a training was told to stop (SIGTERM) and has saved.
"""

import errno
import io
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from typing import Annotated, Any

import tyro
from tyro.conf import FlagCreatePairsOff, subcommand

from .. import __version__
from ..errors import RefragError
from .ask import Ask, Demo, Info
from .bench import Bench, Report
from .evaluate import Eval
from .export import Export
from .index import Index
from .serve import Serve
from .train import Doctor, Train, Tune, with_config
from .ui import Ui

DESCRIPTION = "Answers from retrieved passages that are compressed into vectors and expanded only where it matters (REFRAG)."

Command = (
    Annotated[Index, subcommand("index"), FlagCreatePairsOff]
    | Annotated[Ask, subcommand("ask"), FlagCreatePairsOff]
    | Annotated[Serve, subcommand("serve"), FlagCreatePairsOff]
    | Annotated[Train, subcommand("train")]  # its flags have pairs: each must be able to win over a file
    | Annotated[Tune, subcommand("tune"), FlagCreatePairsOff]
    | Annotated[Doctor, subcommand("doctor"), FlagCreatePairsOff]
    | Annotated[Demo, subcommand("demo"), FlagCreatePairsOff]
    | Annotated[Export, subcommand("export"), FlagCreatePairsOff]
    | Annotated[Ui, subcommand("ui"), FlagCreatePairsOff]
    | Annotated[Info, subcommand("info"), FlagCreatePairsOff]
    | Annotated[Bench, subcommand("bench"), FlagCreatePairsOff]
    | Annotated[Eval, subcommand("eval"), FlagCreatePairsOff]
    | Annotated[Report, subcommand("report"), FlagCreatePairsOff]
)


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Errors a user can mend are one sentence on stderr."""
    try:
        status = _parse(args).run()
        sys.stdout.flush()
        return status
    except RefragError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # the reader has gone, for example `head`
        _drop_stdout()
        return 1
    except (OSError, RuntimeError) as error:
        if not _is_disk_full(error):
            raise
        _drop_stdout()
        return _fail("The disk is full: free some space, then run the same command again.", 2)


def _parse(args: Sequence[str] | None) -> Any:
    """The command to run. Settings that refuse their values raise InputError; for tyro's own errors and --help it ends the process."""
    args = list(sys.argv[1:] if args is None else args)
    if args == ["--version"]:
        print(f"refrag {__version__}")
        raise SystemExit(0)
    said = io.StringIO()
    config = (
        tyro.conf.OmitArgPrefixes,
        tyro.conf.OmitSubcommandPrefixes,
        tyro.conf.PositionalMetavarFromFieldName,
        tyro.conf.DisallowNone,
    )
    try:
        with redirect_stderr(said):
            return tyro.cli(Command, args=with_config(args), prog="refrag", description=DESCRIPTION, config=config)
    except SystemExit as end:
        cause: BaseException | None = end
        while cause is not None:  # tyro wraps what a dataclass says about its values in a box of its own
            if isinstance(cause, RefragError):
                raise cause from None
            cause = cause.__context__
        sys.stderr.write(said.getvalue())
        raise


def _fail(message: str, status: int) -> int:
    print(f"refrag: {message}", file=sys.stderr)
    return status


def _drop_stdout() -> None:
    """What is still buffered for a stdout that cannot take it must not fail again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_disk_full(error: BaseException) -> bool:
    """Whether an error, or one behind it, says so; Lance says it in words."""
    behind = error.__cause__ or error.__context__
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)
    return full or (behind is not None and _is_disk_full(behind))
