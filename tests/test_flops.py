"""FLOPs: laws worked by hand and against torch's counter on models that really run."""

import pytest
import torch
from conftest import build_decoder

from refrag.evaluation.flops import FlopLaw, count, decoder_law, encoder_flops, projector_flops
from refrag.evaluation.shapes import encoder_config


def test_pairs_by_hand() -> None:
    law = FlopLaw(fixed=5, per_slot=10, per_pair=100)
    assert law.counted(3) == 5 + 30 + 900
    assert law.causal(3) == 5 + 30 + 600  # 1 + 2 + 3 pairs look back


def test_the_paper_s_shape_allows_what_its_notes_say() -> None:
    """Llama-2-7B: width 4096, MLP 11008, 32 layers. At 16,384 tokens with k = 16 and 32, without a question and with 128 tokens of it."""
    law = FlopLaw(2 * 4096 * 32000, 2 * 32 * (4 * 4096**2 + 3 * 4096 * 11008), 4 * 4096 * 32)
    limits = [law.causal(16384 + question) / law.causal(16384 // k + question) for question in (0, 128) for k in (16, 32)]
    assert [round(limit, 1) for limit in limits] == [20.9, 42.2, 18.7, 34.0]


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gemma"])
def test_a_law_is_what_a_counter_sees_when_the_decoder_runs(kind: str) -> None:
    decoder = build_decoder(kind)
    law = decoder_law(decoder.config)
    decoder.set_attn_implementation("eager")
    for slots in (1, 37):
        ids = torch.ones(1, slots, dtype=torch.long)
        assert law.counted(slots) == count(lambda ids=ids: decoder(input_ids=ids, use_cache=False, logits_to_keep=1))


def test_encoder_and_projector_by_hand() -> None:
    """Two layers of width 32 with an MLP of 64: 2 operations a weight and token, 4 a pair of tokens and width."""
    a_chunk = 2 * (18 * 2 * (4 * 32 * 32 + 2 * 32 * 64) + 4 * 18 * 18 * 32)
    assert encoder_flops(encoder_config("tiny"), num_chunks=5, chunk_tokens=18) == 5 * a_chunk
    layers = torch.nn.Sequential(torch.nn.Linear(32, 256), torch.nn.Linear(256, 64))
    assert projector_flops(layers, num_chunks=7, encoder_width=32) == 7 * 2 * (32 * 256 + 256 * 64)
