"""From threads to a backend: answers equal those of this process, whatever the order and size in which token ids come."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Sequence

import pytest
import torch

from refrag.engine import Refrag, Request
from refrag.engine.backend import Backend
from refrag.errors import BackendError

QUESTION = "Who founded the harbour of Velmoor?"
PASSAGES = ["The harbour of Velmoor was founded in 1742 by the shipwright Anna Torrel.", "Its lamp burned for ninety years."]
REQUESTS = [Request.make(QUESTION, PASSAGES[:size], policy="none", max_new_tokens=6, seed=size) for size in (1, 2)]


class Scripted:
    """Gives the ids that transformers' own greedy `generate` gives, in runs of `run` ids; notes what was asked and what was closed."""

    name = "scripted"

    def __init__(self, decoder, *, run: int = 1, wait_s: float = 0.0, fail_after: int | None = None) -> None:
        self.decoder, self.run, self.wait_s, self.fail_after = decoder, run, wait_s, fail_after
        self.seeds: list[int] = []
        self.closed = threading.Event()

    async def decode(self, prompt_embeds, settings) -> AsyncGenerator[Sequence[int]]:
        self.seeds.append(settings.seed)
        with torch.inference_mode():
            ids = self.decoder.generate(inputs_embeds=prompt_embeds[None], max_new_tokens=settings.max_new_tokens, do_sample=False)[0].tolist()
        try:
            for start in range(0, len(ids), self.run):
                if self.fail_after is not None and start >= self.fail_after:
                    raise BackendError("The server went away: ask again.")
                yield ids[start : start + self.run]
                await asyncio.sleep(self.wait_s)
        finally:
            self.closed.set()

    async def check(self) -> None: ...

    async def aclose(self) -> None: ...


@pytest.mark.parametrize("run", [1, 4])
def test_answers_are_those_of_this_process(tiny_model, run: int) -> None:
    backend = Scripted(tiny_model.decoder, run=run)
    assert isinstance(backend, Backend)
    here, there = Refrag(tiny_model), Refrag(tiny_model, backend=backend)
    for one, other in zip(here.answer_batch(REQUESTS), there.answer_batch(REQUESTS), strict=True):
        assert (one.text, one.usage, one.finish_reason, one.trace) == (other.text, other.usage, other.finish_reason, other.trace)
        assert other.timings["ttft_s"] > 0
    assert sorted(backend.seeds) == [1, 2]
    with there.stream(REQUESTS[0]) as pieces:
        assert "".join(pieces) == here.answer(REQUESTS[0]).text


def test_a_stop_string_closes_the_backend_s_stream(tiny_model) -> None:
    text = Refrag(tiny_model).answer(REQUESTS[0]).text
    backend = Scripted(tiny_model.decoder, wait_s=60)
    answer = Refrag(tiny_model, backend=backend).answer(QUESTION, PASSAGES[:1], policy="none", max_new_tokens=6, stop=text[0])
    assert (answer.text, answer.finish_reason, answer.usage["completion_tokens"]) == ("", "stop", 1)
    assert backend.closed.is_set()


def test_cancelling_stops_while_no_token_comes(tiny_model) -> None:
    backend = Scripted(tiny_model.decoder, wait_s=60)
    cancel = threading.Event()
    threading.Timer(0.3, cancel.set).start()
    answer = Refrag(tiny_model, backend=backend).answer(REQUESTS[0], cancel=cancel)
    assert (answer.finish_reason, answer.usage["completion_tokens"]) == ("cancelled", 1)
    assert backend.closed.is_set()
    cancelled = Refrag(tiny_model, backend=backend).answer(REQUESTS[0], cancel=cancel)
    assert (cancelled.finish_reason, cancelled.text) == ("cancelled", "")


def test_one_row_that_fails_ends_the_others_with_its_error(tiny_model) -> None:
    failing = Scripted(tiny_model.decoder, fail_after=2)
    with pytest.raises(BackendError, match=r"^The server went away: ask again\.$"):
        Refrag(tiny_model, backend=failing).answer_batch(REQUESTS)
    with pytest.raises(BackendError, match="The server went away"):
        list(Refrag(tiny_model, backend=failing).stream(REQUESTS[0]))


def test_threads_share_one_backend(tiny_model) -> None:
    backend = Scripted(tiny_model.decoder, wait_s=0.05)
    engine = Refrag(tiny_model, backend=backend)
    texts = [Refrag(tiny_model).answer(request).text for request in REQUESTS]
    found: dict[int, str] = {}
    threads = [threading.Thread(target=lambda place=place: found.update({place: engine.answer(REQUESTS[place % 2]).text})) for place in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {place: texts[place % 2] for place in range(6)}
