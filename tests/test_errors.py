"""Errors: stdlib kinship, messages, pickling."""

import pickle

import pytest

from refrag.errors import BackendError, InputError, MismatchError, MissingExtraError, NotFoundError, RefragError, missing_extra


@pytest.mark.parametrize(
    ("error", "standard"),
    [(InputError, ValueError), (NotFoundError, FileNotFoundError), (MismatchError, ValueError), (MissingExtraError, ImportError), (BackendError, RuntimeError)],
)
def test_every_error_is_ours_and_a_standard_one(error: type[RefragError], standard: type[Exception]) -> None:
    with pytest.raises(standard) as caught:
        raise error("k must be 1 or more, was 0.")
    assert isinstance(caught.value, RefragError)
    assert str(caught.value) == "k must be 1 or more, was 0."


@pytest.mark.parametrize("error", [InputError, NotFoundError, MismatchError, MissingExtraError, BackendError])
def test_errors_survive_a_process_boundary(error: type[RefragError]) -> None:
    copy = pickle.loads(pickle.dumps(error("one sentence")))
    assert type(copy) is error
    assert str(copy) == "one sentence"


def test_not_found_prints_its_sentence_and_nothing_of_errno() -> None:
    assert str(NotFoundError("There is no index at x.")) == "There is no index at x."
    assert str(NotFoundError()) == ""


def test_missing_extra_names_the_package_the_purpose_and_the_command() -> None:
    error = missing_extra("pypdf", "docs", "Reading PDF files")
    assert isinstance(error, MissingExtraError)
    assert str(error) == "Reading PDF files needs the package 'pypdf': install it with  pip install 'refrag[docs]'"
