"""model.py: the laws of mixed inputs over six decoder families, and how a model is built."""

import pytest
import torch
import torch.nn.functional as F
from conftest import DECODERS, logits_of, mixed_mask, vectors_of
from transformers import AutoModelForCausalLM, DistilBertConfig, DistilBertForMaskedLM, DynamicCache
from transformers.quantizers import HfQuantizer
from transformers.quantizers import auto as quantizers
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from refrag.errors import InputError, MismatchError, NotFoundError
from refrag.layout import lay_out
from refrag.model import RefragConfig, RefragModel, load_model
from refrag.text import PromptBuilder


@pytest.fixture(scope="module", params=DECODERS)
def model(request, make_model):
    return make_model(request.param)


# ── laws ──


def test_all_expanded_is_the_plain_decoder_bit_for_bit(model, prompts):
    for prompt in prompts:
        _, logits = logits_of(model, [prompt], [[True] * len(prompt.chunks)])
        with torch.no_grad():
            expected = model.decoder(torch.tensor([prompt.token_ids()])).logits
        assert torch.equal(logits, expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_all_expanded_is_the_plain_decoder_in_other_settings(make_decoder, make_encoder, prompts, kind, attention, encoder_tokenizer, tokenizer):
    decoder = make_decoder(kind, tie_word_embeddings=True)
    decoder.set_attn_implementation(attention)
    model = RefragModel.from_parts(make_encoder("bert"), decoder, chunk_size=4, encoder_tokenizer=encoder_tokenizer, decoder_tokenizer=tokenizer).eval()
    assert model.decoder.config._attn_implementation == attention
    _, logits = logits_of(model, prompts[:1], [[True] * len(prompts[0].chunks)])
    with torch.no_grad():
        assert torch.equal(logits, decoder(torch.tensor([prompts[0].token_ids()])).logits)


def test_compressed_chunks_are_their_projected_vectors(model, prompts):
    prompt = prompts[0]
    layout = lay_out([prompt], [[False] * len(prompt.chunks)])
    vectors = vectors_of(model, [prompt])
    with torch.no_grad():
        mixed, projected = model.mix(layout, vectors), model.project(vectors)
    slots = [i for i, source in enumerate(layout.source[0].tolist()) if source >= len(layout.token_ids)]
    assert len(slots) == len(prompt.chunks)
    assert torch.equal(mixed.inputs_embeds[0, slots], projected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_its_rows_alone(model, prompts, side):
    masks = [mixed_mask(prompt) for prompt in prompts]
    layout, batch = logits_of(model, prompts, masks, padding_side=side)
    for row, (prompt, mask) in enumerate(zip(prompts, masks, strict=True)):
        _, alone = logits_of(model, [prompt], [mask])
        real = layout.attention_mask[row].bool()
        torch.testing.assert_close(batch[row, real], alone[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_cached_decoding_equals_uncached(model, prompts):
    layout = lay_out(prompts, [mixed_mask(prompt) for prompt in prompts])
    mixed = model.mix(layout, vectors_of(model, prompts))
    new = torch.tensor([[7, 8, 9], [10, 11, 12]])
    mask = torch.cat([mixed.attention_mask, torch.ones_like(new)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = model(
        inputs_embeds=torch.cat([mixed.inputs_embeds, model.get_input_embeddings()(new)], dim=1), attention_mask=mask, position_ids=positions
    ).logits
    cache, length = DynamicCache(config=model.decoder.config), mixed.inputs_embeds.shape[1]
    prefill = model(layout=layout, chunk_embeds=vectors_of(model, prompts), past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    torch.testing.assert_close(prefill[:, -1], whole[:, length - 1], atol=1e-5, rtol=0)
    for step in range(3):
        end = length + step + 1
        logits = model(
            new[:, step : step + 1], attention_mask=mask[:, :end], position_ids=positions[:, end - 1 : end], past_key_values=cache, use_cache=True
        ).logits
        torch.testing.assert_close(logits[:, 0], whole[:, end - 1], atol=1e-5, rtol=0)


def test_generate_equals_the_decoders_own_and_single_rows(model, prompts):
    prompt, settings = prompts[0], {"max_new_tokens": 6, "do_sample": False}
    full = lay_out([prompt], [[True] * len(prompt.chunks)])
    ids = torch.tensor([prompt.token_ids()])
    plain = model.decoder.generate(ids, attention_mask=torch.ones_like(ids), **settings)[:, ids.shape[1] :]
    assert torch.equal(model.generate(layout=full, chunk_embeds=vectors_of(model, [prompt]), **settings), plain)
    masks = [mixed_mask(prompt) for prompt in prompts]
    batch = model.generate(layout=lay_out(prompts, masks), chunk_embeds=vectors_of(model, prompts), **settings)
    for row, (prompt, mask) in enumerate(zip(prompts, masks, strict=True)):
        alone = model.generate(layout=lay_out([prompt], [mask]), chunk_embeds=vectors_of(model, [prompt]), **settings)[0]
        assert batch[row, : len(alone)].tolist() == alone.tolist()


def test_gradients_reach_exactly_what_occupies_a_slot(model, prompts):
    model.zero_grad()
    masks = [mixed_mask(prompt) for prompt in prompts]
    layout = lay_out(prompts, masks, completions=[[5, 6, 2], [5, 2]])
    vectors = vectors_of(model, prompts).requires_grad_()
    embedded = []
    handle = model.get_input_embeddings().register_forward_hook(lambda module, args, out: (out.retain_grad(), embedded.append(out))[0])
    model(layout=layout, chunk_embeds=vectors).loss.backward()
    handle.remove()
    expanded = torch.tensor([flag for mask in masks for flag in mask])
    assert ((vectors.grad != 0).any(-1) == ~expanded).all()
    ends = {len(embedded[0]) - 1, next(i for i, s in enumerate(layout.token_ids.tolist()) if s == 6) + 1}  # each row's last token predicts nothing
    reached = (embedded[0].grad != 0).any(-1).tolist()
    assert [i for i, flag in enumerate(reached) if not flag] == sorted(ends)


def test_training_call_reaches_encoder_projector_and_decoder(make_model, prompts):
    from refrag.encoder import encoder_inputs

    fresh = make_model()
    ids, mask = encoder_inputs(fresh.encoder, fresh.encoder_tokenizer, [text for prompt in prompts for text in prompt.chunk_texts()])
    layout = lay_out(prompts, [[False] * len(prompt.chunks) for prompt in prompts], completions=[[5, 6, 2], [5, 2]])
    fresh.gradient_checkpointing_enable()
    output = fresh.train()(layout=layout, encoder_input_ids=ids, encoder_attention_mask=mask)
    output.loss.backward()
    without = [name for name, parameter in fresh.named_parameters() if parameter.grad is None and not name.startswith("policy.")]
    assert without == []


def test_loss_is_the_plain_decoders(model, prompts):
    prompt, answer = prompts[0], [5, 6, 7, 2]
    layout = lay_out([prompt], [[True] * len(prompt.chunks)], completions=[answer])
    with torch.no_grad():
        loss = model(layout=layout, chunk_embeds=vectors_of(model, [prompt])).loss
        ids = torch.tensor([prompt.token_ids() + answer])
        labels = torch.tensor([[-100] * len(prompt.token_ids()) + answer])
        assert loss == model.decoder(ids, labels=labels).loss
        assert model(layout=lay_out([prompt], [[True] * len(prompt.chunks)]), chunk_embeds=vectors_of(model, [prompt])).loss is None


def test_a_prompt_without_passages_needs_no_vectors(model, tokenizer):
    prompt = PromptBuilder(tokenizer, chunk_size=4).build("Who?")
    with torch.no_grad():
        logits = model(layout=lay_out([prompt], [[]])).logits
        assert torch.equal(logits, model.decoder(torch.tensor([prompt.token_ids()])).logits)


def test_projector_starts_at_the_scale_of_the_token_embeddings(model, prompts):
    vectors = vectors_of(model, prompts)
    rms = model.project(vectors).square().mean().sqrt().item()
    assert rms == pytest.approx(model.token_embedding_rms(), rel=0.35)  # a few vectors of one direction each, not an average
    ids = torch.arange(400)
    assert model.token_embedding_rms() == pytest.approx(model.get_input_embeddings()(ids).square().mean().sqrt().item(), rel=1e-4)


@torch.no_grad()
def test_chunk_perplexity_by_definition(model, prompts):
    prompt = prompts[0]
    got = model.chunk_perplexity(prompt)
    for passage in (0, 1):
        chunks = [chunk for chunk in prompt.chunks if chunk.passage == passage]
        ids = [1] + [token for chunk in chunks for token in chunk.token_ids]
        nll = F.cross_entropy(model.decoder(torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:]), reduction="none")
        for chunk, part in zip(chunks, nll.split([len(chunk.token_ids) for chunk in chunks]), strict=True):
            assert got[chunk.index].item() == pytest.approx(part.mean().item(), abs=1e-4)


def test_chunk_perplexity_of_long_passages_and_of_none(make_model, make_decoder, tokenizer, prompts):
    from refrag.model import MAX_LOGITS

    assert MAX_LOGITS // 128_256 > 512  # a Llama vocabulary still leaves room for more than one passage at a time
    model = make_model()
    model.decoder.config.max_position_embeddings = 13
    long = PromptBuilder(tokenizer, chunk_size=4).build("?", [prompts[0].passages[0].text * 3])
    assert [len(window) for window in model._windows(long)][:2] == [13, 13]
    assert (model.chunk_perplexity(long) > 0).all()
    assert model.chunk_perplexity(PromptBuilder(tokenizer, chunk_size=4).build("?")).shape == (0,)


# ── building ──


def test_given_parts_keep_their_weights(make_encoder, make_decoder):
    encoder, decoder = make_encoder("roberta"), make_decoder("qwen2")
    plain = torch.nn.Linear(32, 32)  # a module transformers did not make, as quantised or adapted layers are
    decoder.model.layers[0].self_attn.o_proj = plain
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    model = RefragModel.from_parts(encoder, decoder)
    assert model.decoder is decoder and model.encoder is encoder
    assert all(torch.equal(value, before[name]) for name, value in decoder.state_dict().items())


def test_the_unused_pooler_is_dropped(make_encoder, make_decoder):
    for kind in ("roberta", "bert"):
        model = RefragModel.from_parts(make_encoder(kind), make_decoder("llama"))
        assert not any("pooler" in name for name in model.state_dict())


def test_builds_on_the_meta_device(model):
    with torch.device("meta"):
        empty = RefragModel(type(model.config).from_dict(model.config.to_dict()))
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert {name: value.shape for name, value in empty.state_dict().items()} == {name: value.shape for name, value in model.state_dict().items()}


@pytest.mark.parametrize("policy", [{"kind": "none"}, {"kind": "mlp", "hidden_width": 8}, {"kind": "transformer", "hidden_width": 8, "num_heads": 2}])
@pytest.mark.parametrize("width", [None, 32])
def test_settings_shape_the_model(make_model, policy, width):
    model = make_model(policy=policy, projector_width=width)
    assert (model.policy is None) == (policy["kind"] == "none")
    assert model.projector.up.weight.shape == (width or 128, 24)
    assert not model.has_trained_policy


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"chunk_size": 0}, "chunk_size must be a whole number of 1 or more, was 0: try 16"),
        ({"pooling": "max"}, "pooling must be one of cls, mean, was 'max'"),
        ({"expand_fraction": 1.5}, "expand_fraction must lie between 0 and 1, was 1.5: try 0.1"),
        ({"policy": {"kind": "oracle"}}, "kind transformer, mlp or none"),
        ({"policy": {"size": 3}}, "policy must have the keys kind, hidden_width"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        RefragConfig(**settings)


def test_a_config_without_parts_builds_no_model():
    with pytest.raises(InputError, match=r"needs encoder_config and decoder_config: use RefragModel.from_parts"):
        RefragModel(RefragConfig())


def test_from_parts_by_folder(tmp_path, make_encoder, make_decoder, tokenizer, encoder_tokenizer):
    make_encoder("bert").save_pretrained(tmp_path / "encoder")
    encoder_tokenizer.save_pretrained(tmp_path / "encoder")
    decoder = make_decoder("mistral")
    decoder.save_pretrained(tmp_path / "decoder")
    tokenizer.save_pretrained(tmp_path / "decoder")
    model = RefragModel.from_parts(tmp_path / "encoder", str(tmp_path / "decoder"), chunk_size=8, part_kwargs={"dtype": torch.bfloat16})
    assert model.config.decoder_name == str(tmp_path / "decoder") and model.config.encoder_name == str(tmp_path / "encoder")
    assert {parameter.dtype for name, parameter in model.named_parameters() if not name.startswith("policy.")} == {torch.bfloat16}
    assert len(model.tokenizer) == 400 and len(model.encoder_tokenizer) == 320
    assert torch.equal(model.decoder.lm_head.weight, decoder.lm_head.weight.bfloat16())


def test_from_parts_that_do_not_exist_or_fit(make_encoder, make_decoder, tokenizer):
    with pytest.raises(NotFoundError, match="The encoder 'nowhere/model' could not be loaded"):
        RefragModel.from_parts("nowhere/model", make_decoder("llama"))
    with pytest.raises(InputError, match="is a distilbert model whose tokens see those behind them"):  # its config does not know is_decoder
        RefragModel.from_parts(make_encoder("bert"), DistilBertForMaskedLM(DistilBertConfig(vocab_size=400, dim=32, n_layers=1, n_heads=2, hidden_dim=32)))
    for kind in ("bert", "roberta"):  # the parts in the wrong order: what it would decode sees ahead
        with pytest.raises(InputError, match=rf"The decoder must be a causal language model, .* is a {kind} model whose tokens see those behind them: the order is from_parts\(encoder, decoder\)"):
            RefragModel.from_parts(make_decoder("llama"), AutoModelForCausalLM.from_config(make_encoder(kind).config))
    with pytest.raises(InputError, match="chunk_size must be a whole number of 1 or more, was '16': try 16"):
        RefragModel.from_parts(make_encoder("bert"), make_decoder("llama"), chunk_size="16")
    with pytest.raises(MismatchError, match="decoder's tokenizer has 400 entries, its embeddings 100: use the tokenizer that belongs to the decoder"):
        RefragModel.from_parts(make_encoder("bert"), make_decoder("llama", vocab_size=100), decoder_tokenizer=tokenizer)


def test_encoding_without_a_tokenizer_says_so(make_encoder, make_decoder):
    with pytest.raises(InputError, match="encoder's tokenizer, this model has none"):
        RefragModel.from_parts(make_encoder("bert"), make_decoder("llama")).encode(["text"])


def test_quantization_reaches_the_decoder_alone(tiny_model, tmp_path, monkeypatch):
    """By a quantizer that only writes down what it would convert: an index's vectors need the encoder's own weights."""
    converted: list[str] = []

    class Config(QuantizationConfigMixin):
        def __init__(self, modules_to_not_convert=None, **_):
            self.quant_method, self.modules_to_not_convert = "recorded", modules_to_not_convert

    class Quantizer(HfQuantizer):
        requires_calibration = is_trainable = False

        def is_serializable(self, **_):
            return False

        def _process_model_before_weight_loading(self, model, **_):
            spared = self.get_modules_to_not_convert(model, self.quantization_config.modules_to_not_convert, model._keep_in_fp32_modules)
            linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
            converted.extend(name for name in linear if should_convert_module(name, spared))

    tiny_model.save_pretrained(tmp_path / "model")
    monkeypatch.setitem(quantizers.AUTO_QUANTIZATION_CONFIG_MAPPING, "recorded", Config)
    monkeypatch.setitem(quantizers.AUTO_QUANTIZER_MAPPING, "recorded", Quantizer)
    given = Config()
    for config in (given, {"quant_method": "recorded"}):
        converted.clear()
        loaded = load_model(str(tmp_path / "model"), device="cpu", quantization_config=config)
        assert "decoder.model.layers.0.self_attn.q_proj" in converted and len(converted) == 2 * 7
        assert all(name.startswith("decoder.model.layers.") for name in converted)
        assert loaded.fingerprint() == tiny_model.fingerprint()
    assert given.modules_to_not_convert is None
