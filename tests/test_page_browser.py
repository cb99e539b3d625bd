"""`refrag ui` in a real Chromium: pytest -m browser. Needs gradio, playwright, and a Chromium (its own, or the system's)."""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest

from refrag.demo.almanac import evaluation_cases
from refrag.index import PassageIndex
from refrag.text import Passage

pytestmark = pytest.mark.browser

TIMEOUT_S = 120
"""For a machine that is busy with other things."""
DESKTOP, PHONE = (1280, 900), (390, 844)

HOSTILE = "<img src=x onerror='window.hacked = 1'><script>window.hacked = 2</script> ${window.hacked = 3} {{value}}"
WORLD = [
    Passage("dorelux", f"Dorelux was established in 1871. {HOSTILE} The workshops of Dorelux produce lamps.", f"Dorelux {HOSTILE}"),
    Passage("kelline", "Kelline is a maker of hats. The offices of Kelline are in Pelilham.", "Kelline"),
]


@contextmanager
def served(folder, *arguments):
    """(address, process) of `refrag ui` with `folder` as its temporary folder."""
    command = [sys.executable, "-m", "refrag.cli", "ui", "--port", "0", "--max-new-tokens", "24", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": str(folder)}) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip(), process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def chromium():
    pytest.importorskip("gradio")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("temporary")
    with served(folder) as (address, process):
        yield address
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 143
        assert list(folder.rglob("almanac")) == []  # the temporary world is gone


@pytest.fixture
def page(request, chromium):
    width, height = getattr(request, "param", DESKTOP)
    page = chromium.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(TIMEOUT_S * 1000)
    page.asked, page.failures = set(), []
    page.on("request", lambda request: page.asked.add(urlsplit(request.url).hostname))
    page.on("pageerror", lambda error: page.failures.append(str(error)))
    yield page
    shots = os.environ.get("REFRAG_SCREENSHOTS")
    if shots:
        page.screenshot(path=f"{shots}/{request.node.name}.png", full_page=True)
    page.close()
    assert page.asked <= {"127.0.0.1", None}
    assert page.failures == []


def ask(page, question):
    page.locator("#rf-question textarea").fill(question)
    page.locator("#rf-ask").click()


def slots(page) -> list[int]:
    """Decoder slots of REFRAG and of plain RAG."""
    page.wait_for_selector("#rf-figures tbody td:nth-child(3)")
    cells = page.locator("#rf-figures tbody tr:first-child td").all_inner_texts()
    return [int(cell.replace(",", "")) for cell in cells[:2]]


@pytest.mark.parametrize("page", [DESKTOP, PHONE], ids=["desktop", "phone"], indirect=True)
def test_ask_see_the_highlight_and_change_the_budget(page, address):
    page.goto(address)
    ((_, question),) = evaluation_cases(1)
    page.get_by_role("button", name=question.text).click()  # an example
    page.wait_for_function("document.querySelector('#rf-question textarea').value")
    page.locator("#rf-ask").click()
    ours, plain = slots(page)
    assert ours < plain
    assert page.locator("#rf-ours .rf-answer").inner_text() and page.locator("#rf-plain .rf-answer").inner_text()
    marks = page.locator("#rf-passages mark").count()
    assert marks > 0
    page.locator("#rf-passages mark").first.hover()
    tip = page.evaluate("getComputedStyle(document.querySelector('#rf-passages mark'), '::after').content")
    assert "expanded" in tip and "score" in tip
    budget = page.locator("#rf-budget input[type=number]")
    budget.fill("0")
    budget.press("Enter")
    page.wait_for_function("document.querySelectorAll('#rf-passages .rf-chunk').length && !document.querySelector('#rf-passages mark')")
    assert slots(page)[0] < ours
    overflow = page.evaluate("document.scrollingElement.scrollWidth - window.innerWidth")
    assert overflow <= 0


def test_an_empty_question_is_not_asked(page, address):
    page.goto(address)
    page.locator("#rf-ask").click()
    assert "Ask a question" in page.locator("#rf-ours").inner_text()
    assert page.locator("#rf-passages .rf-chunk").count() == 0


def test_a_hostile_passage_stays_text(page, tmp_path, almanac):
    PassageIndex.create(tmp_path / "index", almanac[0].model).add(WORLD)
    with served(tmp_path, "--index", str(tmp_path / "index")) as (address, _):
        page.goto(address)
        ask(page, "What do the workshops of Dorelux produce?")
        slots(page)
        assert HOSTILE in page.locator("#rf-passages").inner_text()
        assert page.evaluate("typeof window.hacked") == "undefined"
        assert page.locator("#rf-passages img, #rf-passages script").count() == 0
