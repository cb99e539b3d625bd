"""A model without its decoder's layers gives the same inputs to the decoder, holds less, and refuses to decode."""

import pytest
import torch
from conftest import DECODERS
from peft import LoraConfig

from refrag.engine import Refrag, Request
from refrag.engine.engine import Stopwatch
from refrag.engine.reader import RefragReader, load_reader
from refrag.errors import InputError, NotFoundError
from refrag.model import load_model

QUESTION = "Who founded the harbour of Velmoor?"
PASSAGES = ["The harbour of Velmoor was founded in 1742 by the shipwright Anna Torrel.", "Its lamp burned for ninety years."]
ABSENT = "This process holds no decoder, since a server decodes: choose a policy other than perplexity, or load the whole model with refrag.model.load_model."


def inputs_of(model) -> torch.Tensor:
    """The decoder's inputs for one question with a third of the chunks expanded."""
    engine = Refrag(model)
    request = Request.make(QUESTION, PASSAGES, policy="similarity", expand_fraction=0.3)
    with torch.inference_mode():
        return engine._prepare([request], Stopwatch(engine.device))[2].inputs_embeds


def held(model) -> int:
    """Numbers held in memory."""
    return sum(weight.numel() for weight in model.parameters() if not weight.is_meta)


@pytest.mark.parametrize("kind", DECODERS)
def test_it_makes_the_same_inputs_and_holds_no_layer(make_model, tmp_path, kind: str) -> None:
    whole = make_model(kind)
    whole.save_pretrained(tmp_path)
    reader = load_reader(tmp_path, device="cpu")
    assert isinstance(reader, RefragReader)
    assert torch.equal(inputs_of(reader), inputs_of(whole))
    assert reader.fingerprint() == whole.fingerprint()
    assert reader.config.decoder_config.num_hidden_layers == 2
    rest = sum(held(part) for part in (whole.encoder, whole.projector, whole.policy))
    assert held(reader) == rest + whole.get_input_embeddings().weight.numel() < held(whole)


@pytest.mark.parametrize("lora", [False, True])
def test_an_adapter_s_reader_holds_no_layer_either(make_model, make_decoder, tmp_path, lora: bool) -> None:
    make_decoder("llama").save_pretrained(tmp_path / "decoder")
    whole = make_model(decoder_name=str(tmp_path / "decoder"))
    if lora:
        whole.add_lora(LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    whole.save_pretrained(tmp_path / "adapter", parts="adapter")
    whole.save_pretrained(tmp_path / "whole")
    readers = [load_reader(tmp_path / name, device="cpu") for name in ("adapter", "whole")]
    assert all(torch.equal(inputs_of(reader), inputs_of(whole)) for reader in readers)
    assert len({held(reader) for reader in readers}) == 1


def test_it_refuses_what_needs_the_decoder(make_model, tmp_path) -> None:
    make_model().save_pretrained(tmp_path / "whole")
    reader = load_reader(tmp_path / "whole", device="cpu")
    engine = Refrag(reader)
    for call in (
        lambda: engine.answer(QUESTION, PASSAGES, policy="none"),
        lambda: engine.answer(QUESTION, PASSAGES, policy="perplexity"),
        lambda: reader(input_ids=torch.ones(1, 2, dtype=torch.long)),
        lambda: reader.save_pretrained(tmp_path / "copy"),
        lambda: reader.export_decoder(tmp_path / "copy"),
    ):
        with pytest.raises(InputError) as caught:
            call()
        assert str(caught.value) == ABSENT
    assert not (tmp_path / "copy").exists()
    with pytest.raises(NotFoundError, match=r"There is no model folder at \./absent: check --model\."):
        load_reader("./absent")


def test_settings_of_loading_reach_it(make_model, tmp_path) -> None:
    make_model().save_pretrained(tmp_path)
    assert {load_reader(tmp_path, device="cpu", dtype=name).dtype for name in ("bfloat16", torch.bfloat16)} == {torch.bfloat16}
    assert load_model(tmp_path, device="cpu").dtype == torch.float32
