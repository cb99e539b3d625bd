"""What the adapters share, what is said when a framework is missing, and the examples of docs/integrations.md."""

import importlib
import re
import sys
from pathlib import Path

import pytest

from refrag.errors import InputError, MissingExtraError
from refrag.index import PassageIndex
from refrag.integrations import as_passage, check_options, facts, source_of
from refrag.text import Passage

DOCUMENT = Path(__file__).parents[1] / "docs" / "integrations.md"
FRAMEWORKS = {"langchain": "langchain_core", "llama_index": "llama_index", "haystack": "haystack"}
EXAMPLES = ("langchain", "llama-index", "haystack")
WORLD = [
    Passage("kelline", "Kelline is a maker of hats. The offices of Kelline are in Pelilham. Kelline has traded since 1710.", "Kelline"),
    Passage("dorelux", "Dorelux was established in 1871. The workshops of Dorelux produce lamps.", "Dorelux"),
]


def test_a_document_is_a_passage():
    assert as_passage("a", "text", {"title": "T", "page": 3}, number=1) == Passage("a", "text", "T", {"page": 3})
    assert as_passage(None, "text", None, number=2) == Passage("2", "text")
    with pytest.raises(InputError, match="Document 3 must hold a text, was a NoneType"):
        as_passage("a", None, {}, number=3)


def test_options_are_checked_before_there_is_a_question():
    assert check_options({"expand_fraction": 0.2, "policy": "first"}) == {"expand_fraction": 0.2, "policy": "first"}
    with pytest.raises(InputError, match=r"There is no option 'top_kk' \(did you mean 'top_k'"):
        check_options({"top_kk": 1})


def test_an_engine_that_cannot_retrieve_reads_nothing(almanac):
    engine, _ = almanac
    assert source_of(engine, None) is None and source_of(engine, []) == []
    assert source_of(type(engine)(engine.model), None) == []


def test_facts_are_all_but_the_text(almanac):
    answer = almanac[0].answer("Who?", [], max_new_tokens=1)
    assert facts(answer) | {"text": answer.text} == answer.to_dict()


@pytest.mark.parametrize(("name", "package"), FRAMEWORKS.items())
def test_a_missing_framework_is_named_with_its_extra(name, package, monkeypatch):
    for module in [own for own in sys.modules if own.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"refrag.integrations.{name}", raising=False)
    extra = name.replace("_", "-")
    with pytest.raises(MissingExtraError, match=rf"adapter needs the package '.+': install it with  pip install 'refrag\[{extra}\]'$"):
        importlib.import_module(f"refrag.integrations.{name}")


def _block(name: str) -> str:
    match = re.search(rf"^<!-- example: {name} -->\n```python\n(.+?)^```$", DOCUMENT.read_text(encoding="utf-8"), re.M | re.S)
    assert match, f"docs/integrations.md has no example {name!r}"
    return match[1]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_of_the_page_run(name, almanac, tmp_path, monkeypatch, capsys):
    pytest.importorskip(FRAMEWORKS[name.replace("-", "_")])
    monkeypatch.chdir(tmp_path)
    PassageIndex.create("my.index", almanac[0].model).add(WORLD)
    code = _block(name)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    exec(compile(code, f"docs/integrations.md, {name}", "exec"), {})
    assert capsys.readouterr().out.count("lamps") >= 1
