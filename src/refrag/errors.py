"""The errors a user can meet. Each is also a standard-library error, so `except ValueError` keeps working.

Every message is one sentence or two: what must hold, what was given, what to type next.
"""


class RefragError(Exception):
    """Base of all errors raised on purpose by refrag; the CLI prints its message and exits with 2."""


class InputError(RefragError, ValueError):
    """A value, file or row given by the user cannot be used."""


class NotFoundError(RefragError, FileNotFoundError):
    """A file, folder, model or index that was named does not exist."""

    def __str__(self) -> str:  # FileNotFoundError would print errno fields
        return str(self.args[0]) if self.args else ""


class MismatchError(RefragError, ValueError):
    """Weights, tokenizer or index do not belong together."""


class MissingExtraError(RefragError, ImportError):
    """An optional dependency is not installed; the message names the extra."""


class BackendError(RefragError, RuntimeError):
    """A device or an engine failed; the message names the command that runs on CPU."""


def missing_extra(package: str, extra: str, purpose: str) -> MissingExtraError:
    """The one message for a missing optional dependency: `purpose` needs `package`, install `refrag[extra]`."""
    return MissingExtraError(f"{purpose} needs the package {package!r}: install it with  pip install 'refrag[{extra}]'")


def first_line(error: BaseException) -> str:
    """What a library's error says first, to stand between brackets in a sentence of ours; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")[:200]
