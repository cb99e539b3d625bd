"""What the live page shows: HTML worked by hand, escaping, which characters are marked, and the views of real answers."""

import threading
from html.parser import HTMLParser

import pytest

from refrag.engine import Answer, Refrag
from refrag.errors import InputError
from refrag.page import mount
from refrag.page.app import OWN_POLICY, _page, page_app
from refrag.page.views import Reading, answer_html, error_html, figures_html, passages_html, views

HOSTILE = "<script>alert(1)</script><img src=x onerror='alert(2)'>\"'&amp;"
ALLOWED = {"div", "p", "a", "section", "header", "span", "b", "small", "mark", "table", "thead", "tbody", "tr", "th", "td"}


class Page(HTMLParser):
    """The tags, attribute names and texts of a page, and per `section` the characters of its `p` with whether each is marked."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.names: set[str] = set()
        self.tips: list[str] = []
        self.text = ""
        self.passages: list[list[tuple[str, bool]]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.names |= {name for name, _ in attrs}
        self.tips += [value for name, value in attrs if name == "data-tip"]
        self._open.append(tag)
        if tag == "section":
            self.passages.append([])

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self._open[:2] == ["section", "p"]:
            self.passages[-1] += [(character, "mark" in self._open) for character in data]


def chunk(text, start, expanded, *, identity="a", title="A", score=0.5, rule="similarity"):
    return {"passage_id": identity, "title": title, "start": start, "end": start + len(text), "text": text, "score": score, "expanded": expanded, "rule": rule}


def passage(number, chunks, *, score=0.25):
    counts = {"num_chunks": len(chunks), "expanded_chunks": sum(own["expanded"] for own in chunks)}
    return {"number": number, "id": chunks[0]["passage_id"], "title": chunks[0]["title"], "score": score, **counts}


def answer(text, trace, passages, **usage):
    counts = {"context_tokens": 40, "context_slots": 10, "prompt_slots": 20, "num_chunks": 4, "expanded_chunks": 1, "compression_rate": 4.0, "kv_bytes": 2**20}
    return Answer(text, (), counts | {"completion_tokens": 1} | usage, {"ttft_s": 0.0125, "total_s": 0.1}, trace, passages)


# ── worked by hand ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_passages_worked_by_hand():
    first = [chunk("The hat ", 0, True), chunk("is < red", 8, False, score=None)]
    second = [chunk("Boats.", 0, False, identity="b", title="", score=-1.25, rule="first")]
    shown = passages_html(answer("[1] hat", first + second, [passage(1, first), passage(2, second, score=None)]))
    assert shown == (
        '<section class="rf-passage" id="rf-passage-1">'
        '<header><span class="rf-number">1</span> <b>A</b> <small>1 of 2 chunks expanded · retrieval 0.250</small></header>'
        '<p><mark class="rf-chunk" data-tip="expanded · similarity · score 0.500">The hat </mark>'
        '<span class="rf-chunk" data-tip="compressed · similarity">is &lt; red</span></p></section>'
        '<section class="rf-passage" id="rf-passage-2">'
        '<header><span class="rf-number">2</span> <b>b</b> <small>0 of 1 chunks expanded</small></header>'
        '<p><span class="rf-chunk" data-tip="compressed · first · score -1.250">Boats.</span></p></section>'
    )


def test_figures_worked_by_hand():
    plain = answer("hat", [], [], prompt_slots=50, kv_bytes=3 * 2**20)
    page = figures_html(answer("hat", [], []), plain)
    assert "<td>20</td><td>50</td><td>2.5×</td>" in page
    assert "<td>12 ms</td><td>12 ms</td><td>1.0×</td>" in page
    assert "<td>1.00 MiB</td><td>3.00 MiB</td><td>3.0×</td>" in page
    assert "1 of 4 chunks expanded: 40 context tokens in 10 slots (4.0× compression)." in page
    assert "plain" not in figures_html(plain)


def test_citations_of_passages_that_exist_are_links():
    assert answer_html("[2] lamps [3] [x]", 2) == '<div class="rf-answer"><a class="rf-cite" href="#rf-passage-2">2</a> lamps [3] [x]</div>'


# ── escaping ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_text_becomes_markup():
    chunks = [chunk(HOSTILE, 0, True, identity=HOSTILE, title=HOSTILE, rule=HOSTILE), chunk(HOSTILE, len(HOSTILE), False, identity=HOSTILE, title="", rule=HOSTILE)]
    untitled = passage(2, chunks[1:])
    shown = answer(HOSTILE, [chunks[0], chunks[1]], [passage(1, chunks[:1]), untitled])
    html = passages_html(shown) + answer_html(HOSTILE) + error_html(InputError(HOSTILE)) + figures_html(shown)
    page = Page(html)
    assert page.tags <= ALLOWED
    assert not any(name.startswith("on") or name == "src" for name in page.names)
    assert page.text.count(HOSTILE) == 6  # two titles (the second is the id), two passages, the answer, the error
    assert ["".join(character for character, _ in own) for own in page.passages] == [HOSTILE, HOSTILE]
    assert all(HOSTILE in tip for tip in page.tips)


# ── real answers ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fraction", [0.0, 0.2, 1.0])
def test_the_marked_characters_are_those_of_the_expanded_chunks(almanac, fraction):
    engine, cases = almanac
    found = engine.answer(cases[0][1].text, policy="similarity", expand_fraction=fraction, top_k=3, max_new_tokens=2)
    texts = engine.index.passages([own["id"] for own in found.passages])
    shown = Page(passages_html(found)).passages
    assert len(shown) == 3
    for entry, characters in zip(found.passages, shown, strict=True):
        assert "".join(character for character, _ in characters) == texts[entry["id"]].text
        expanded = [(own["start"], own["end"]) for own in found.trace if own["passage_id"] == entry["id"] and own["expanded"]]
        assert [is_marked for _, is_marked in characters] == [any(start <= at < end for start, end in expanded) for at in range(len(characters))]


def test_a_question_is_answered_piece_by_piece_and_then_by_plain_rag(almanac):
    engine, cases = almanac
    question, reading = cases[0][1].text, Reading("similarity", 0.2, top_k=8)
    shown = list(views(engine, question, reading))
    ours = engine.answer(question, policy="similarity", expand_fraction=0.2)
    plain = engine.answer(question, policy="all")
    last = shown[-1]
    assert last.answer == answer_html(ours.text, 8) and last.plain == answer_html(plain.text, 8)
    assert last.passages == passages_html(ours)
    assert f"<td>{ours.usage['prompt_slots']:,}</td><td>{plain.usage['prompt_slots']:,}</td>" in last.figures
    pieces = [Page(view.answer).text for view in shown[1:] if "rf-cite" not in view.answer]
    assert len(set(pieces)) > 2 and all(ours.text.startswith(piece) for piece in pieces)
    assert all(not view.plain for view in shown if not view.passages)  # one after the other


def test_without_comparison_plain_rag_does_not_run(almanac):
    engine, cases = almanac
    last = list(views(engine, cases[1][1].text, Reading(top_k=2), compare=False))[-1]
    assert last.plain == "" and "plain RAG" not in last.figures and last.passages


def test_closing_the_view_stops_the_decoding(almanac):
    engine, cases = almanac
    running = threading.active_count()
    shown = views(engine, cases[0][1].text, Reading(top_k=2))
    next(shown), next(shown)
    shown.close()
    assert threading.active_count() == running


def test_what_cannot_be_asked_is_said_in_place_of_the_answer(almanac):
    engine, cases = almanac
    for reading, said in [(Reading(top_k=0), "top_k must be 1 or more"), (Reading(expand_fraction=2.0), "between 0 and 1"), (Reading("nearest"), "no policy")]:
        (*_, last) = views(engine, cases[0][1].text, reading)
        assert 'class="rf-error"' in last.answer and said in last.answer and not last.passages


def test_plain_rag_that_does_not_fit_leaves_the_answer(almanac):
    engine, cases = almanac
    question = cases[0][1].text
    limit, engine._limit = engine._limit, 400
    try:
        last = list(views(engine, question, Reading("none", top_k=16)))[-1]
    finally:
        engine._limit = limit
    assert "rf-error" in last.plain and "more than the decoder" in last.plain
    assert "rf-error" not in last.answer and last.passages


def test_an_engine_without_an_index_is_refused(almanac):
    with pytest.raises(InputError, match="The page asks about an index, this engine has none"):
        mount(None, Refrag(almanac[0].model))


# ── the Gradio app ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_page_is_mounted_and_names_no_other_host(almanac):
    pytest.importorskip("gradio")
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    app = FastAPI()
    mount(app, almanac[0], path="/ui", examples=["What is it?"])
    with TestClient(app) as client:
        reply = client.get("/ui/")
    assert reply.status_code == 200
    assert "default-src 'self'" in reply.headers["content-security-policy"]
    assert "fonts.googleapis.com/css" not in reply.text


def test_the_page_answers_to_this_machines_names_only(almanac):
    pytest.importorskip("gradio")
    from fastapi.testclient import TestClient

    app = page_app(almanac[0], host="127.0.0.1")
    for name, status in (("127.0.0.1:7860", 200), ("localhost", 200), ("evil.example:7860", 400)):
        with TestClient(app, base_url=f"http://{name}") as client:
            assert client.get("/").status_code == status


def test_the_untouched_budget_is_the_engines_own(almanac):
    gradio = pytest.importorskip("gradio")
    engine = almanac[0]
    page = _page(gradio, engine, Reading(top_k=1), ())
    show = next(own.fn for own in page.fns.values() if own.fn is not None and own.fn.__name__ == "show")
    fraction, question = engine.model.config.expand_fraction, almanac[1][0][1].text
    own = engine.answer(question, top_k=1)
    assert own.usage["expanded_chunks"] >= 1

    def marks(budget):
        return list(show(question, OWN_POLICY, budget, 1.0, False))[-1][3].count("<mark")

    assert marks(fraction) >= 1 and marks(round(fraction, 2)) >= 1 and marks(0.0) == 0
