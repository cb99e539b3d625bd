"""Settings: defaults, limits and the sentences that refuse."""

from pathlib import Path
from typing import Any, get_args

import jaxtyping
import pytest

from refrag.config import POLICIES, Budget, GenerationSettings, IndexSettings, PolicyName, VllmSettings, resolve_model
from refrag.errors import InputError, NotFoundError
from refrag.evaluation.settings import LatencySettings


@pytest.fixture(autouse=True)
def unchecked():
    """As users run it: no type checks at run time, so that values of a wrong type reach our own."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_the_policy_names_are_one_list() -> None:
    assert get_args(PolicyName) == POLICIES


@pytest.mark.parametrize("given", [{}, {"expand_fraction": 0.0}, {"expand_fraction": 1.0}, {"expand_chunks": 0}, {"max_slots": 1}])
def test_budgets_that_hold(given: dict[str, Any]) -> None:
    assert Budget(**given).is_default == (not given)


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        (Budget, {"expand_fraction": 1.5}, r"expand_fraction must lie between 0 and 1, was 1\.5: try 0\.1\."),
        (Budget, {"expand_fraction": "0.5"}, r"expand_fraction must be a number, was '0\.5'\."),
        (Budget, {"expand_fraction": True}, r"expand_fraction must be a number, was True\."),
        (Budget, {"expand_chunks": True}, r"expand_chunks must be a whole number, was True\."),
        (GenerationSettings, {"temperature": "hot"}, r"temperature must be a number, was 'hot'\."),
        (Budget, {"expand_fraction": -0.1}, "expand_fraction must lie between 0 and 1"),
        (Budget, {"expand_fraction": float("nan")}, "expand_fraction must lie between 0 and 1, was nan"),
        (Budget, {"expand_chunks": -1}, r"expand_chunks must be 0 or more, was -1\."),
        (Budget, {"max_slots": 0}, r"max_slots must be 1 or more, was 0\."),
        (Budget, {"expand_chunks": 1, "max_slots": 9}, "expand_chunks and max_slots were given: keep one"),
        (GenerationSettings, {"max_new_tokens": 0}, r"max_new_tokens must be 1 or more, was 0\."),
        (GenerationSettings, {"temperature": -1.0}, "temperature must be 0 or more"),
        (GenerationSettings, {"top_p": 0.0}, "top_p must lie above 0 and be at most 1"),
        (GenerationSettings, {"temperature": float("nan")}, "temperature must be 0 or more, and finite, was nan"),
        (GenerationSettings, {"temperature": float("inf")}, "temperature must be 0 or more, and finite, was inf"),
        (GenerationSettings, {"repetition_penalty": 0.0}, r"repetition_penalty must lie above 0, and be finite, was 0\.0: 1 is"),
        (GenerationSettings, {"seed": 2**70}, f"seed must be at most {2**63 - 1}, was {2**70}"),
        (GenerationSettings, {"seed": -1}, r"seed must be 0 or more, was -1\."),
        (GenerationSettings, {"top_k": -3}, r"top_k must be 0 or more, was -3\."),
        (GenerationSettings, {"stop": ("a", "")}, "A stop string must hold at least one character"),
        (Budget, {"max_slots": 2.5}, r"max_slots must be a whole number, was 2\.5\."),
        (IndexSettings, {"passage_tokens": 0}, "passage_tokens must be 1 or more"),
        (IndexSettings, {"overlap_tokens": 256}, r"overlap_tokens must lie between 0 and passage_tokens \(256\), was 256"),
        (IndexSettings, {"batch_size": 0}, "batch_size must be 1 or more"),
        (LatencySettings, {"chunk_size": 0}, "chunk_size must be 1 or more, was 0"),
        (LatencySettings, {"context_tokens": 4097}, "divide evenly over num_passages, were 4097 and 8: try context_tokens 4096"),
        (LatencySettings, {"index_passages": 4}, r"index_passages must be num_passages \(8\) or more, was 4"),
        (LatencySettings, {"min_repeats": 5}, "min_repeats must be 6 or more"),
        (LatencySettings, {"max_repeats": 6}, "max_repeats must be 7 or more, the least number of rounds, was 6"),
        (LatencySettings, {"tolerance": 0.0}, "tolerance must lie between 0 and 1"),
        (LatencySettings, {"expand_fraction": 2.0}, "expand_fraction must lie between 0 and 1"),
    ],
)
def test_bad_values_are_refused_in_one_sentence(settings: type, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        settings(**given)


def test_settings_are_values() -> None:
    assert GenerationSettings(stop="END") == GenerationSettings(stop=("END",))
    assert Budget(expand_chunks=3) == Budget(expand_chunks=3)
    with pytest.raises(AttributeError):
        Budget().expand_chunks = 3  # type: ignore[misc]


def test_resolve_model_keeps_hub_names_and_refuses_missing_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model("org/name") == "org/name"
    assert resolve_model(str(tmp_path)) == str(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    assert resolve_model("~/mine") == str(tmp_path / "mine")
    assert resolve_model(tmp_path / "mine") == str(tmp_path / "mine")
    with pytest.raises(NotFoundError, match="There is no model folder at nowhere: check --model"):
        resolve_model(Path("nowhere"))
    for missing in ("./nowhere", str(tmp_path / "nowhere"), "~/nowhere"):
        with pytest.raises(NotFoundError, match=f"There is no model folder at {missing}: check --model"):
            resolve_model(missing)


# ── vLLM ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_addresses_of_vllm_are_roots_each_once():
    urls = ["http://a:8000", "http://a:8000/v1/", "https://b/decoder/v1", "http://[::1]:80/"]
    assert VllmSettings(urls).urls == ("http://a:8000", "https://b/decoder", "http://[::1]:80")
    assert VllmSettings("http://a").urls == ("http://a",)
    assert "secret" not in repr(VllmSettings("http://a", api_key="secret"))


@pytest.mark.parametrize("url", ["", "a:8000", "ftp://a", "http://", "http:// a", "http://a:b", "http://a:70000", "http://a:0", "http://[::1", "http://a?x", "http://me:word@a"])
def test_what_is_no_address_of_vllm(url):
    with pytest.raises(InputError) as caught:
        VllmSettings(url)
    assert str(caught.value) == f"The address of a vLLM server must look like http://localhost:8000, was {url!r}: check --vllm-url."


def test_vllm_needs_an_address_and_real_times():
    with pytest.raises(InputError, match=r"^The vLLM engine needs the address of a server: pass --vllm-url http://localhost:8000\.$"):
        VllmSettings([])
    for value in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(InputError, match=rf"^connect_timeout_s must lie above 0, and be finite, was {value}: leave it out for the usual wait\.$"):
            VllmSettings("http://a", connect_timeout_s=value)
