"""Requests prepared together are what each is alone, and their tokens, decoded elsewhere, become the engine's own answers."""

import time

import pytest
import torch

from refrag import GenerationSettings, Passage, PassageIndex, Refrag
from refrag.engine import Request
from refrag.engine.batching import Row, RowBatch
from refrag.engine.prepared import decode_timings
from refrag.errors import InputError

PASSAGES = [
    Passage("velmoor", "The harbour of Velmoor was founded in 1742 by the shipwright Anna Torrel.", "Velmoor"),
    Passage("lamp", "A lighthouse was built beside the old mill; its lamp burned for ninety years.", "Lamp"),
    Passage("mill", "The mill grinds rye."),
]
SHORT = GenerationSettings(max_new_tokens=6)
REQUESTS = [
    Request("Who founded the harbour?", generation=SHORT),
    Request("How long did the lamp burn?", top_k=2, policy="none", mode="hybrid", generation=SHORT),
    Request("What does the mill grind?", mode="text", policy="all", generation=SHORT),
    Request("Which mill?", [PASSAGES[2]], policy="first", generation=SHORT),
    Request("Nothing to read?", [], generation=SHORT),
]


@pytest.fixture(scope="module")
def engine(tiny_model, tmp_path_factory) -> Refrag:
    index = PassageIndex.create(tmp_path_factory.mktemp("prepared") / "index", tiny_model)
    index.add(PASSAGES)
    return Refrag(tiny_model, index=index)


def test_a_group_is_its_requests_alone(engine: Refrag) -> None:
    together = engine.prepare(REQUESTS)
    for request, own in zip(REQUESTS, together, strict=True):
        [alone] = engine.prepare([request])
        assert own.usage == alone.usage and len(own.prompt_embeds) == own.usage["prompt_slots"]
        torch.testing.assert_close(own.prompt_embeds, alone.prompt_embeds, atol=1e-5, rtol=1e-5)
        assert [entry["id"] for entry in own.row.passage_entries()] == [entry["id"] for entry in alone.row.passage_entries()]
        assert own.prompt_embeds.untyped_storage().nbytes() == own.prompt_embeds.nbytes  # the group's padded tensor is not kept


def test_tokens_decoded_elsewhere_become_the_engines_answers(engine: Refrag) -> None:
    prepared = engine.prepare(REQUESTS)
    batch = RowBatch(engine.model.decoder, engine.end_ids)
    batch.join(prefilled := batch.prefill([Row(own.prompt_embeds, own.row.request.generation) for own in prepared]))
    rows = prefilled.rows
    while batch.rows:
        batch.step()
    start = time.perf_counter()
    for request, own, row in zip(REQUESTS, prepared, rows, strict=True):
        for token_id in row.token_ids:
            own.feed.push(token_id)
        own.feed.close()
        answer, expected = own.answer(start=start, stamps=[start + 1, start + 2, start + 4]).to_dict(), engine.answer(request).to_dict()
        timings, _ = answer.pop("timings"), expected.pop("timings")
        for shown in (answer, expected):
            for entry in (*shown["trace"], *shown["passages"]):
                entry["score"] = entry["score"] and round(entry["score"], 4)
        assert answer == expected
        assert (timings["ttft_s"], timings["per_token_s"]) == pytest.approx((1, 1.5))


def test_one_bad_request_is_refused_with_its_group(engine: Refrag) -> None:
    with pytest.raises(InputError, match="no trained policy"):
        engine.prepare([REQUESTS[0], Request("Why?", PASSAGES, policy="learned")])


def test_timings_count_from_where_they_should() -> None:
    timings = decode_timings(10.0, 12.0, [15.0, 16.0, 19.0])
    assert (timings["prefill_s"], timings["ttft_s"], timings["per_token_s"]) == (3.0, 5.0, 2.0)
    nothing = decode_timings(10.0, 12.0, [])
    assert (nothing["prefill_s"], nothing["ttft_s"], nothing["per_token_s"]) == (0.0, 0.0, 0.0)
