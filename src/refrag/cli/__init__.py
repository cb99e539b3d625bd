"""The command line: parsing and printing only. Data goes to stdout, messages to stderr; torch is imported when a command runs.

Exit status: 0 done, 1 something is wrong with an index (`index verify`) or a training (`doctor`), or a bug, 2 wrong input,
130 interrupted, 143 a training was told to stop (SIGTERM) and has saved.
"""

import errno
import io
import os
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from typing import Annotated, Any

import tyro
from tyro.conf import FlagCreatePairsOff, subcommand

from .. import __version__
from ..errors import InputError, RefragError
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
    args = list(sys.argv[1:] if args is None else args)
    try:
        status = _parse(args).run()
        sys.stdout.flush()
        return status
    except RefragError as error:
        return _fail(_as_typed(str(error), args), 2)
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


def _parse(args: list[str]) -> Any:
    """The command to run. Settings that refuse their values, and what tyro refuses, raise InputError; --help ends the process."""
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
        if sentence := _sentence(said.getvalue()):
            raise InputError(sentence) from None
        sys.stderr.write(said.getvalue())
        raise


def _sentence(box: str) -> str:
    """What tyro says in a framed box, as one sentence: the fault, the option or the commands it proposes, where to read more. Empty for no box."""
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    parts = [" ".join(part.split()) for part in re.split(r"\n[─-]+\n", "\n".join(lines))]
    framed = "╭" in box
    if len(parts) < (2 if framed else 3):
        return ""
    fault, *hints = parts if framed else parts[1:]  # without a frame, where stdout is no UTF-8, the title is a part of its own
    said = [fault.partition(" Got errors:")[0].removesuffix("(required)").rstrip(" .")]
    for hint in hints[:-1]:
        if meant := re.match(r"Perhaps you meant: (--[\w-]+)", hint):
            said.append(f"perhaps you meant {meant[1]}")
        elif hint.startswith("Available subcommands"):
            said.append(hint[0].lower() + hint[1:])
    if help_command := re.search(r"refrag[\w -]*--help", " ".join(hints)):
        said.append(f"see  {help_command[0]}")
    return "; ".join(said)


def _as_typed(message: str, args: Sequence[str]) -> str:
    """A message about a setting (`top_k`) names the option that was typed (`--top-k`)."""
    for option in {arg.partition("=")[0] for arg in args if arg.startswith("--") and "-" in arg[2:]}:
        message = re.sub(rf"(?<![\w-]){re.escape(option[2:].replace('-', '_'))}(?!\w)", option, message)
    return message


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
