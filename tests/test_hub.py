"""hub.py and the file side of model.py: what a model folder holds, what it refuses, adapters, exports, the card."""

import json
import resource
import stat
import time
from pathlib import Path

import pytest
import torch
from conftest import DECODERS, assert_same, logits_of, mixed_mask
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from refrag import hub
from refrag.errors import BackendError, InputError, MismatchError, NotFoundError
from refrag.model import RefragConfig, RefragModel, load_model


@pytest.fixture(scope="module", params=DECODERS)
def model(request, make_model):
    return make_model(request.param)


def test_round_trip_is_bitwise(model, prompts, tmp_path):
    model.generation_config.eos_token_id = [2, 3]
    model.save_pretrained(tmp_path / "model")
    model.generation_config.eos_token_id = 2
    assert oct(stat.S_IMODE((tmp_path / "model" / "model.safetensors").stat().st_mode)) == "0o644"
    loaded = RefragModel.from_pretrained(tmp_path / "model")
    assert not loaded.training and loaded.generation_config.eos_token_id == [2, 3]
    assert_same(model, loaded, prompts)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert loaded.fingerprint() == model.fingerprint()
    assert loaded.config.to_diff_dict()["policy"] == model.config.policy


@pytest.mark.parametrize("tied", [True, False])
def test_tied_output_weights_are_written_once(make_model, make_decoder, make_encoder, tokenizer, encoder_tokenizer, tmp_path, prompts, tied):
    parts = {"encoder_tokenizer": encoder_tokenizer, "decoder_tokenizer": tokenizer}
    model = RefragModel.from_parts(make_encoder("bert"), make_decoder("llama", tie_word_embeddings=tied), chunk_size=4, **parts).eval()
    model.save_pretrained(tmp_path / "model")
    assert ("decoder.lm_head.weight" in load_file(tmp_path / "model" / "model.safetensors")) != tied
    loaded = RefragModel.from_pretrained(tmp_path / "model")
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    assert_same(model, loaded, prompts)


def test_auto_classes_and_tokenizers(tiny_model, prompts, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "model"), RefragConfig)
    for auto in (AutoModel, AutoModelForCausalLM):
        loaded = auto.from_pretrained(tmp_path / "model")
        assert isinstance(loaded, RefragModel)
        assert_same(tiny_model, loaded, prompts)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").get_vocab() == tiny_model.tokenizer.get_vocab()


def test_sharded_folders_replace_each_other(tiny_model, prompts, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1
    assert_same(tiny_model, RefragModel.from_pretrained(tmp_path / "model"), prompts)
    tiny_model.save_pretrained(tmp_path / "model")
    assert [path.name for path in (tmp_path / "model").glob("model*")] == ["model.safetensors"]
    assert_same(tiny_model, RefragModel.from_pretrained(tmp_path / "model"), prompts)


def test_transformers_options_are_passed_on(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    half = RefragModel.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    eager = RefragModel.from_pretrained(tmp_path / "model", attn_implementation="eager")
    assert eager.decoder.config._attn_implementation == eager.encoder.config._attn_implementation == "eager"
    split = RefragModel.from_pretrained(tmp_path / "model", attn_implementation={"encoder_config": "sdpa", "decoder_config": "eager"})
    assert (split.decoder.config._attn_implementation, split.encoder.config._attn_implementation) == ("eager", "sdpa")
    model, info = RefragModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"] and isinstance(model, RefragModel)
    with pytest.raises(NotFoundError, match="was found here or on the hub"):
        RefragModel.from_pretrained("refrag/none", revision="v9")


def test_device_maps_place_the_parts(tiny_model, tmp_path, prompts):
    """The decoder on disk, read layer by layer: the extreme case of a model larger than the device."""
    tiny_model.save_pretrained(tmp_path / "model")
    where = {"encoder": "cpu", "projector": "cpu", "policy": "cpu", "decoder": "disk"}
    placed = load_model(str(tmp_path / "model"), device="cpu", device_map=where, offload_folder=str(tmp_path / "offload"))
    assert placed.hf_device_map == where
    assert_same(tiny_model, placed, prompts)
    assert placed.chunk_perplexity(prompts[0]).equal(tiny_model.chunk_perplexity(prompts[0]))


def test_half_precision_folders_load_exactly(make_model, tmp_path, prompts):
    model = make_model()
    for parameter in model.parameters():
        parameter.data = parameter.data.half()  # model.half() would round the rotary buffers too
    model.save_pretrained(tmp_path / "model")
    assert next(RefragModel.from_pretrained(tmp_path / "model").parameters()).dtype == torch.float16
    loaded = load_model(str(tmp_path / "model"), device="cpu")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert loaded.fingerprint() == model.fingerprint()  # whatever precision it is loaded in
    assert_same(loaded, model.float(), prompts)
    rates = load_model(str(tmp_path / "model"), device="cpu", dtype="bfloat16").decoder.model.rotary_emb.inv_freq
    assert torch.equal(rates, model.decoder.model.rotary_emb.inv_freq) and rates.dtype == torch.float32


def test_harmless_settings_may_be_changed_on_loading(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    assert RefragModel.from_pretrained(tmp_path / "model", expand_fraction=0.3).config.expand_fraction == 0.3
    assert RefragModel.from_pretrained(tmp_path / "model", chunk_size=4).config.chunk_size == 4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"chunk_size": 8}, "made with chunk_size 4, 8 was asked for: leave chunk_size out, or train a model with it"),
        ({"pooling": "mean"}, "made with pooling cls, mean was asked for"),
    ],
)
def test_another_chunk_size_or_pooling_is_refused(tiny_model, tmp_path, change, message):
    tiny_model.save_pretrained(tmp_path / "model")
    with pytest.raises(MismatchError, match=message):
        load_model(str(tmp_path / "model"), **change)


def test_a_model_of_several_chunk_sizes_is_loaded_with_any_of_them(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_model.config, "chunk_sizes", [4, 8])
    tiny_model.save_pretrained(tmp_path / "model")
    small, large = (load_model(str(tmp_path / "model"), device="cpu", **how) for how in ({}, {"chunk_size": 8}))
    assert (small.config.chunk_size, large.config.chunk_size) == (4, 8)
    assert {key for key, value in small.fingerprint().items() if value != large.fingerprint()[key]} == {"chunk_size"}
    assert "| chunk_size | 4 or 8 tokens |" in hub.model_card(small)
    with pytest.raises(MismatchError, match="made with chunk_size 4 or 8, 16 was asked for: leave chunk_size out, or train a model with it"):
        load_model(str(tmp_path / "model"), chunk_size=16)
    with pytest.raises(InputError, match=r"chunk_size must be one of chunk_sizes, \[4, 8\], was 5\."):
        RefragConfig(chunk_size=5, chunk_sizes=[4, 8])


def edit_config(folder: Path, part: str | None, **values):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    (config if part is None else config[part]).update(values)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "part, values, message",
    [
        ("encoder_config", {"hidden_size": 16}, r"The encoder in '.*' does not fit config.json: encoder.embeddings.LayerNorm.bias has shape \(24,\), the config asks for \(16,\)"),
        ("encoder_config", {"num_hidden_layers": 3}, r"The encoder in .* it lacks encoder.encoder.layer.2"),
        ("decoder_config", {"hidden_size": 48}, r"The decoder in '.*' does not fit config.json: decoder.*use weights and config of one and the same model"),
        ("decoder_config", {"num_hidden_layers": 1}, r"The decoder in .* it has unknown weights decoder.model.layers.1"),
        (None, {"projector_width": 99}, r"The projector in .* projector.down.weight has shape \(32, 128\), the config asks for \(32, 99\)"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(tiny_model, tmp_path, part, values, message):
    tiny_model.save_pretrained(tmp_path / "model")
    edit_config(tmp_path / "model", part, **values)
    with pytest.raises(MismatchError, match=message):
        load_model(str(tmp_path / "model"))


def test_folders_that_are_no_refrag_model(tmp_path, make_decoder):
    make_decoder("llama").save_pretrained(tmp_path / "llama")
    with pytest.raises(MismatchError, match=r"is a llama model, not a refrag one: wrap it with RefragModel.from_parts"):
        load_model(str(tmp_path / "llama"))
    (tmp_path / "empty").mkdir()
    for name in (str(tmp_path / "empty"), str(tmp_path / "missing"), "no-such-model"):
        with pytest.raises(NotFoundError, match=r"(No model '.*' was found|There is no model folder at).*check --model"):
            load_model(name)


def test_a_model_without_tokenizer_is_refused(make_encoder, make_decoder, tmp_path):
    RefragModel.from_parts(make_encoder("bert"), make_decoder("llama")).save_pretrained(tmp_path / "model")
    with pytest.raises(NotFoundError, match=r"has no decoder tokenizer: save it again with model.tokenizer set"):
        load_model(str(tmp_path / "model"))


def test_devices_and_dtypes_of_load_model(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    assert load_model(str(tmp_path / "model"), device="cpu", dtype="bf16").dtype == torch.bfloat16
    assert load_model(str(tmp_path / "model"), device="cpu", dtype=torch.float32).dtype == torch.float32
    with pytest.raises(InputError, match="dtype must be auto, float32, bfloat16 or float16, was 'int7'"):
        load_model(str(tmp_path / "model"), dtype="int7")
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="run the same command with --device cpu"):
            load_model(str(tmp_path / "model"), device="cuda")


def test_a_full_disk_leaves_the_old_folder_whole(tiny_model, make_model, tmp_path, prompts):
    folder, other = tmp_path / "model", make_model("qwen2")
    tiny_model.save_pretrained(folder)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # the operating system now refuses longer files
    try:
        with pytest.raises(InputError, match=r"The model could not be written to .*: free some space, or choose another folder"):
            other.save_pretrained(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert_same(tiny_model, RefragModel.from_pretrained(folder), prompts)


def test_a_file_in_the_way_is_refused(tiny_model, tmp_path):
    (tmp_path / "model").write_text("here")
    with pytest.raises(InputError, match=r"A model is saved into a folder, .* is a file: choose another name"):
        tiny_model.save_pretrained(tmp_path / "model")


def test_fingerprints_change_with_what_vectors_depend_on(make_model):
    model = make_model()
    first = model.fingerprint()
    assert first.keys() == {"encoder", "encoder_tokenizer", "decoder_tokenizer", "chunk_size", "pooling", "encoder_width", "projector"}
    model.tokenizer("padding changes nothing", padding="max_length", max_length=30, truncation=True)
    assert model.fingerprint() == first
    with torch.no_grad():
        model.encoder.embeddings.word_embeddings.weight[7, 3] += 0.1
        model.projector.log_scale += 1
        model.decoder.lm_head.weight += 1  # nothing depends on it
    model.tokenizer.add_tokens(["newword"])
    changed = {key for key, value in model.fingerprint().items() if value != first[key]}
    assert changed == {"encoder", "projector", "decoder_tokenizer"}


# ── adapters, exports ──


@pytest.fixture
def based(tmp_path, make_encoder, make_decoder, encoder_tokenizer, tokenizer):
    """A model whose decoder lies in a folder of its own, as a base model on the hub would."""
    make_decoder("llama").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return RefragModel.from_parts(make_encoder("roberta"), str(tmp_path / "base"), encoder_tokenizer=encoder_tokenizer, chunk_size=4).eval()


def with_lora(model):
    """LoRA on the attention, trained one big step, so that it does something."""
    peft = pytest.importorskip("peft")
    model.add_lora(peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    return model.eval()


def test_adapter_holds_all_but_the_base_weights(based, tmp_path, prompts):
    based.save_pretrained(tmp_path / "adapter", parts="adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    with safe_open(tmp_path / "adapter" / "adapter.safetensors", "pt") as file:
        assert {key.split(".")[0] for key in file.keys()} == {"encoder", "projector", "policy"}  # noqa: SIM118
    config = json.loads((tmp_path / "adapter" / "config.json").read_text())
    assert config["decoder_name"] == str(tmp_path / "base") and config["parts"] == "adapter"
    loaded = RefragModel.from_pretrained(tmp_path / "adapter")
    assert_same(based, loaded, prompts)
    assert loaded.fingerprint() == based.fingerprint()
    loaded.save_pretrained(tmp_path / "whole")  # and back to a whole model
    assert RefragModel.from_pretrained(tmp_path / "whole").config.parts == "all"
    assert next(load_model(str(tmp_path / "adapter"), device="cpu", dtype="bfloat16").parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("parts", ["adapter", "all"])
def test_lora_round_trip_is_bitwise(based, tmp_path, prompts, parts):
    plain = logits_of(based, prompts[:1], [mixed_mask(prompts[0])])[1]
    with_lora(based)
    assert not torch.allclose(plain, logits_of(based, prompts[:1], [mixed_mask(prompts[0])])[1])
    based.save_pretrained(tmp_path / "saved", parts=parts)
    loaded = RefragModel.from_pretrained(tmp_path / "saved")
    assert loaded.config.lora["r"] == 4 and loaded.config.lora["target_modules"] == ["q_proj", "v_proj"]
    assert_same(based, loaded, prompts)
    if parts == "adapter":
        keys = load_file(tmp_path / "saved" / "adapter.safetensors").keys()
        decoder_keys = [key for key in keys if key.startswith("decoder.")]
        assert decoder_keys and all(".lora_" in key for key in decoder_keys)


def test_lora_starts_as_the_plain_decoder_and_trains_alone(based, prompts):
    import peft

    mask = [mixed_mask(prompts[0])]
    plain = logits_of(based, prompts[:1], mask)[1]
    based.add_lora(peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    assert torch.equal(plain, logits_of(based.eval(), prompts[:1], mask)[1])
    trained = [name for name, parameter in based.decoder.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    rebuilt = RefragModel(type(based.config).from_dict(based.config.to_dict()))
    assert all(not parameter.any() for name, parameter in rebuilt.named_parameters() if "lora_B" in name)


def test_only_lora_is_taken(based):
    import peft

    with pytest.raises(InputError, match=r"must be a peft.LoraConfig, was a IA3Config: use LoRA"):
        based.add_lora(peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    assert based.config.lora is None


def test_an_adapter_needs_the_decoders_name(make_model, tmp_path):
    with pytest.raises(InputError, match=r"An adapter needs its decoder's name.*set model.config.decoder_name"):
        make_model().save_pretrained(tmp_path / "adapter", parts="adapter")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="parts must be 'all' or 'adapter', was 'half'"):
        make_model().save_pretrained(tmp_path / "adapter", parts="half")


def test_an_adapter_finds_and_checks_its_decoder(based, tmp_path, make_decoder, prompts):
    based.save_pretrained(tmp_path / "adapter", parts="adapter")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(NotFoundError, match=r"The adapter's decoder '.*base' was not found .*pass decoder_name with its folder"):
        load_model(str(tmp_path / "adapter"))
    assert_same(based, load_model(str(tmp_path / "adapter"), device="cpu", decoder_name=str(tmp_path / "moved")), prompts)
    for kind, width, message in (("llama", 48, "hidden_size 32, '.*' has 48"), ("mistral", 32, "model_type llama, '.*' has mistral")):
        make_decoder(kind, hidden_size=width).save_pretrained(tmp_path / "other")
        with pytest.raises(MismatchError, match=f"trained with a decoder of {message}: pass decoder_name with the right model"):
            load_model(str(tmp_path / "adapter"), decoder_name=str(tmp_path / "other"))


def test_a_damaged_adapter_is_refused(based, tmp_path):
    based.save_pretrained(tmp_path / "adapter", parts="adapter")
    path = tmp_path / "adapter" / "adapter.safetensors"
    weights = load_file(path)
    del weights["projector.up.bias"]
    save_file(weights, path)
    with pytest.raises(MismatchError, match=r"The projector in .* lacks projector.up.bias"):
        load_model(str(tmp_path / "adapter"))
    path.unlink()
    with pytest.raises(NotFoundError, match=r"has no adapter.safetensors: save it again with parts='adapter'"):
        load_model(str(tmp_path / "adapter"))


def test_exported_decoder_is_a_plain_folder(model, prompts, tmp_path):
    model.export_decoder(tmp_path / "decoder")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder")
    assert type(plain) is type(model.decoder)
    ids = torch.tensor([prompts[0].token_ids()])
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, model.decoder(ids).logits)
    text = "Größe 1742 <s> Anna\n"
    # not AutoTokenizer: for a Qwen2 config it would lay Qwen's own pre-tokenizer over ours
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "decoder")(text) == model.tokenizer(text)


def test_exported_decoder_has_lora_merged_and_the_model_is_untouched(based, prompts, tmp_path):
    with_lora(based)
    before = {name: value.clone() for name, value in based.state_dict().items()}
    based.export_decoder(tmp_path / "decoder")
    assert not any("lora" in key or "base_layer" in key for key in load_file(tmp_path / "decoder" / "model.safetensors"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder")
    ids = torch.tensor([prompts[0].token_ids()])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, based.decoder(ids).logits, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in based.state_dict().items())


def test_the_card_names_the_bases(make_model):
    model = make_model(decoder_name="meta-llama/Llama-3.2-3B", decoder_revision="abc123", encoder_name="FacebookAI/roberta-large")
    card = hub.model_card(model)
    front = card.split("---")[1]
    assert "base_model: [meta-llama/Llama-3.2-3B, FacebookAI/roberta-large]" in front and "library_name: refrag" in front
    assert "| decoder | meta-llama/Llama-3.2-3B @ abc123 |" in card and "| chunk_size | 4 tokens |" in card


def test_push_uploads_a_loadable_folder_with_its_card(make_model, prompts, monkeypatch, tmp_path):
    """The hub is out of reach of a test: its client is replaced, what it is given is checked."""
    import shutil
    from types import SimpleNamespace

    import huggingface_hub

    calls = []

    class Api:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, *, private, exist_ok):
            calls.append(("create", repo_id, private))
            return SimpleNamespace(repo_id=repo_id)

        def create_branch(self, repo_id, *, branch, exist_ok):
            assert exist_ok
            calls.append(("branch", repo_id, branch))

        def upload_folder(self, *, repo_id, folder_path, commit_message, **kwargs):
            shutil.copytree(folder_path, tmp_path / "uploaded")
            calls.append(("upload", repo_id, commit_message, kwargs))
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    model = make_model()
    assert model.push_to_hub("me/refrag-tiny", private=True, token="secret", revision="dev", license="mit") == "https://hub/me/refrag-tiny"
    uploaded = ("upload", "me/refrag-tiny", "Upload refrag model", {"revision": "dev"})
    assert calls == [("token", "secret"), ("create", "me/refrag-tiny", True), ("branch", "me/refrag-tiny", "dev"), uploaded]
    card = (tmp_path / "uploaded" / "README.md").read_text()
    assert 'Refrag.from_pretrained("me/refrag-tiny")' in card and "license: mit" in card.split("---")[1]
    assert_same(model, RefragModel.from_pretrained(tmp_path / "uploaded"), prompts)


def test_a_hub_that_refuses_is_one_sentence(tiny_model, monkeypatch):
    import huggingface_hub

    api = huggingface_hub.HfApi(endpoint="http://127.0.0.1:9", token="secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token: api)
    with pytest.raises(BackendError, match=r"The model could not be uploaded to 'me/x' \(.*\): log in with  hf auth login  or pass token=…, and check the name"):
        tiny_model.push_to_hub("me/x")


@pytest.mark.parametrize("parts", ["all", "adapter"])
def test_weights_that_are_cut_short_are_one_sentence(make_model, make_decoder, tmp_path, parts):
    model = make_model()
    make_decoder("llama").save_pretrained(tmp_path / "decoder")
    model.config.decoder_name = str(tmp_path / "decoder")
    model.save_pretrained(tmp_path / "model", parts=parts)
    weights = tmp_path / "model" / ("model.safetensors" if parts == "all" else hub.ADAPTER_FILE)
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(MismatchError, match=r"are damaged or incomplete .*: copy or download them again"):
        load_model(tmp_path / "model", device="cpu")
    weights.unlink()
    with pytest.raises(NotFoundError):
        load_model(tmp_path / "model", device="cpu")


def test_an_unknown_name_is_refused_at_once(monkeypatch, caplog):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nobody listens there
    start = time.monotonic()
    with pytest.raises(NotFoundError, match=r"No model 'refrag/no-such-model' was found here or on the hub \(.*\): check --model"):
        load_model("refrag/no-such-model", device="cpu")
    assert time.monotonic() - start < 8
    assert "Retrying" not in caplog.text
