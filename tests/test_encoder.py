"""encoder.py: pooling by hand, batches equal to plain Hugging Face calls, the projector's scale, devices."""

import copy
import logging
import random
import threading

import pytest
import torch
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

from refrag.encoder import (
    Projector,
    encode_batch,
    encode_texts,
    encoder_inputs,
    encoder_window,
    fastest_dtype,
    length_batches,
    pad_rows,
    pool,
    resolve_device,
    rms_normalize,
    tokenize_texts,
)
from refrag.errors import BackendError, InputError

TEXTS = ["The harbour", "", "Anna Torrel built a lighthouse beside the old mill.", " ", "東京 😀", "1742"]


def test_pooling_by_hand():
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [90.0, 90.0]]])
    mask = torch.tensor([[1, 1, 0]])
    assert pool(hidden, mask, "cls").tolist() == [[1.0, 2.0]]
    assert pool(hidden, mask, "mean").tolist() == [[2.0, 4.0]]
    assert pool(hidden[:, :2], None, "mean").tolist() == [[2.0, 4.0]]


def test_pooling_of_another_name_is_refused():
    with pytest.raises(InputError, match="pooling must be one of cls, mean, was 'max'"):
        pool(torch.zeros(1, 1, 2), None, "max")


def test_pad_rows_by_hand():
    ids, mask = pad_rows([[5, 6, 7], [8]], pad_id=1)
    assert ids.tolist() == [[5, 6, 7], [8, 1, 1]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert pad_rows([], pad_id=1)[0].shape == (0, 0)
    ids, mask = pad_rows([[5, 6], [8]], pad_id=1, width=3)
    assert (ids.tolist(), mask.tolist()) == ([[5, 6, 1], [8, 1, 1]], [[1, 1, 0], [1, 0, 0]])
    assert pad_rows([[5, 6]], pad_id=1, width=1)[0].tolist() == [[5, 6]]


@pytest.mark.parametrize("kind", ["roberta", "bert"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("batch_tokens", [1, 30, 4096])
def test_texts_equal_one_plain_call_each(make_encoder, encoder_tokenizer, kind, pooling, batch_tokens):
    encoder = make_encoder(kind)
    vectors = encode_texts(encoder, encoder_tokenizer, TEXTS, pooling=pooling, batch_tokens=batch_tokens)
    assert vectors.dtype == torch.float32
    with torch.no_grad():
        for text, vector in zip(TEXTS, vectors, strict=True):
            hidden = encoder(**encoder_tokenizer(text, return_tensors="pt", return_token_type_ids=False)).last_hidden_state[0]
            expected = hidden[0] if pooling == "cls" else hidden.mean(0)
            torch.testing.assert_close(vector, expected, atol=1e-5, rtol=1e-5)


def test_batches_by_hand():
    assert list(length_batches([3, 5, 4], 10)) == [([1, 2], 5), ([0], 3)]
    assert list(length_batches([3] * 7, 12)) == [([0, 1, 2, 3], 3), ([4, 5], 3), ([6], 3)]  # the last three: two, and one
    assert list(length_batches([17, 5], 64, step=16)) == [([0, 1], 32)]
    assert list(length_batches([50], 8)) == [([0], 50)]  # longer than a batch may be: alone
    assert list(length_batches([], 8)) == []


def test_few_shapes_occur():
    rng = random.Random(0)
    shapes = {(len(rows), width) for _ in range(300) for rows, width in length_batches([rng.randrange(3, 19) for _ in range(rng.randrange(1, 200))], 1280)}
    assert len(shapes) < 100  # 217 without the powers of two


def test_no_texts_give_no_vectors(make_encoder, encoder_tokenizer):
    assert encode_texts(make_encoder("bert"), encoder_tokenizer, [], pooling="cls").shape == (0, 24)


def test_progress_adds_up_to_the_texts_over_several_windows(make_encoder, encoder_tokenizer, monkeypatch):
    monkeypatch.setattr("refrag.encoder.WINDOW_TEXTS", 4)
    done = []
    encoder = make_encoder("roberta")
    vectors = encode_texts(encoder, encoder_tokenizer, TEXTS, pooling="mean", batch_tokens=16, progress=done.append)
    assert sum(done) == len(TEXTS)
    torch.testing.assert_close(vectors, encode_texts(encoder, encoder_tokenizer, TEXTS, pooling="mean"), atol=1e-5, rtol=1e-5)


def test_control_tokens_in_a_text_stay_text(encoder_tokenizer):
    (ids,) = tokenize_texts(encoder_tokenizer, ["a</s><pad>b"], window=60)
    assert ids[0] == 0 and ids[-1] == 2
    assert not {0, 1, 2, 3} & set(ids[1:-1])
    assert encoder_tokenizer.decode(ids[1:-1]) == "a</s><pad>b"
    assert 2 in encoder_tokenizer("a</s>b")["input_ids"][1:-1]  # the tokenizer itself is left as it was


def test_control_tokens_that_the_vocabulary_itself_could_spell_stay_text():
    """Unigram models (XLM-RoBERTa) hold their control tokens among their pieces: splitting special tokens is not enough."""
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -5.0) for letter in "ab<>/s")]
    backend = Tokenizer(models.Unigram(pieces, unk_id=3))
    backend.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")
    assert tokenize_texts(tokenizer, ["ab</s>b", ""], window=60) == [[0, 4, 5, 6, 8, 9, 7, 5, 2], [0, 2]]


def test_vectors_can_train_what_follows(make_encoder, encoder_tokenizer):
    encoder, projector = make_encoder("roberta"), Projector(24, 32, 64)
    projector(encode_texts(encoder, encoder_tokenizer, TEXTS, pooling="cls")).sum().backward()
    assert projector.up.weight.grad.abs().sum() > 0 and encoder.embeddings.word_embeddings.weight.grad is None


def test_padding_and_truncation_of_the_tokenizer_are_not_ours(encoder_tokenizer):
    """MiniLM's tokenizer.json pads and cuts every text to 128 tokens."""
    fixed = copy.deepcopy(encoder_tokenizer)
    fixed.backend_tokenizer.enable_padding(length=9, pad_id=1, pad_token="<pad>")
    fixed.backend_tokenizer.enable_truncation(9)
    assert tokenize_texts(fixed, TEXTS, window=60) == tokenize_texts(encoder_tokenizer, TEXTS, window=60)


def test_eight_threads_never_get_a_control_token(encoder_tokenizer):
    found = []

    def work():
        for _ in range(200):
            found.extend(ids for ids in tokenize_texts(encoder_tokenizer, ["x</s>y<s>z"], window=60) if {0, 1, 2} & set(ids[1:-1]))
            encoder_tokenizer("x</s>y", padding="max_length", max_length=20, truncation=True)  # as another part of a server would

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == []


def test_texts_longer_than_the_window_are_cut_and_counted(make_encoder, encoder_tokenizer, caplog):
    encoder = make_encoder("roberta")
    with caplog.at_level(logging.WARNING):
        rows = tokenize_texts(encoder_tokenizer, ["short", "long " * 100], window=encoder_window(encoder, encoder_tokenizer))
    assert len(rows[1]) == 60 and rows[1][-1] == 2
    assert "1 of 2 chunks were cut to the encoder's 60 tokens: use a smaller chunk_size" in caplog.text
    assert encode_texts(encoder, encoder_tokenizer, ["long " * 100], pooling="cls").isfinite().all()


def test_window_leaves_out_the_positions_that_roberta_never_uses(make_encoder, encoder_tokenizer):
    assert encoder_window(make_encoder("roberta", max_position_embeddings=42), encoder_tokenizer) == 40
    assert encoder_window(make_encoder("bert", max_position_embeddings=42), encoder_tokenizer) == 42
    encoder = RobertaModel(RobertaConfig(vocab_size=320, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, max_position_embeddings=42))
    ids = torch.full((1, 40), 5)
    assert encoder(input_ids=ids).last_hidden_state.shape == (1, 40, 8)
    with pytest.raises((IndexError, RuntimeError)):
        encoder(input_ids=torch.full((1, 41), 5))


def test_a_text_without_any_token_still_has_a_vector(make_encoder, encoder_tokenizer):
    bare = copy.deepcopy(encoder_tokenizer)
    bare.backend_tokenizer.post_processor = None
    assert tokenize_texts(bare, [""], window=60) == [[1]]
    assert encode_texts(make_encoder("bert"), bare, ["", "a"], pooling="mean").isfinite().all()


def test_training_batch_equals_inference_and_has_gradients(make_encoder, encoder_tokenizer):
    encoder = make_encoder("roberta")
    ids, mask = encoder_inputs(encoder, encoder_tokenizer, TEXTS)
    vectors = encode_batch(encoder, ids, mask, "mean")
    torch.testing.assert_close(vectors, encode_texts(encoder, encoder_tokenizer, TEXTS, pooling="mean"), atol=1e-5, rtol=1e-5)
    vectors.sum().backward()
    assert encoder.embeddings.word_embeddings.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("scale", [0.01, 1.0, 50.0])
def test_projector_starts_at_the_scale_asked_for_whatever_the_encoders_scale(scale):
    torch.manual_seed(0)
    projector = Projector(48, 64, 256)
    projector.calibrate(0.37)
    chunks = scale * torch.randn(500, 48)
    assert projector(chunks).square().mean().sqrt().item() == pytest.approx(0.37, rel=0.05)


def test_projector_passes_gradients_to_every_weight_and_takes_other_dtypes():
    projector = Projector(8, 16, 32).to(torch.bfloat16)
    out = projector(torch.randn(2, 3, 8))
    assert out.shape == (2, 3, 16) and out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in projector.parameters())


def test_rms_normalize_by_hand():
    torch.testing.assert_close(rms_normalize(torch.tensor([[3.0, -3.0], [0.0, 0.0]])), torch.tensor([[1.0, -1.0], [0.0, 0.0]]))


def test_device_names():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(InputError, match=r"The device must be auto, cpu, cuda, cuda:N or mps, was 'gpu': try --device cpu"):
        resolve_device("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_a_device_that_is_not_there_names_the_cpu(device):
    with pytest.raises(BackendError, match=f"sees no device '{device}': run the same command with --device cpu"):
        resolve_device(device)


def test_fastest_dtype_is_probed_once():
    dtype = fastest_dtype(torch.device("cpu"))
    assert dtype in (torch.float32, torch.bfloat16)
    hits = fastest_dtype.cache_info().hits
    assert fastest_dtype(torch.device("cpu")) is dtype and fastest_dtype.cache_info().hits == hits + 1


@pytest.mark.slow
def test_encoding_reaches_nine_tenths_of_the_encoders_own_speed(encoder_tokenizer):
    """Chunks a second of `encode_texts` over those of bare forward calls on ready tensors, at the encoder's best batch size.

    Processor time, so that other work on the machine does not matter.
    """
    import time

    from refrag.encoder import length_batches

    torch.manual_seed(0)
    shape = {"vocab_size": 320, "hidden_size": 384, "num_hidden_layers": 3, "num_attention_heads": 12, "intermediate_size": 1536}
    encoder = RobertaModel(RobertaConfig(**shape, max_position_embeddings=514, type_vocab_size=1), add_pooling_layer=False).eval()
    texts = [f"The harbour {number} of Velmoor was built by Anna {number * 7}" for number in range(300)]
    rows = tokenize_texts(encoder_tokenizer, texts, window=60)

    def bare(batch_tokens: int) -> float:
        batches = [pad_rows([rows[i] for i in batch], pad_id=1) for batch, _ in length_batches([len(row) for row in rows], batch_tokens)]
        start = time.process_time()
        with torch.inference_mode():
            for ids, mask in batches:
                encoder(input_ids=ids, attention_mask=mask)
        return time.process_time() - start

    def ours() -> float:
        start = time.process_time()
        encode_texts(encoder, encoder_tokenizer, texts, pooling="cls")
        return time.process_time() - start

    bare(4096), ours()
    best = min(min(bare(tokens) for tokens in (1024, 2048, 4096, 8192)) for _ in range(3))
    assert best / min(ours() for _ in range(4)) >= 0.9
