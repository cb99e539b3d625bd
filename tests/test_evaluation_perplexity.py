"""Perplexity: parity with the plain decoder, laws between the ways to give a context, shares worked by hand, what is refused."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from refrag.cli import main
from refrag.data.rows import Document
from refrag.errors import InputError
from refrag.evaluation import perplexity
from refrag.evaluation.likelihood import token_nll
from refrag.evaluation.perplexity import measure
from refrag.evaluation.provenance import read_result
from refrag.evaluation.tasks import PerplexitySettings
from refrag.text import Prompt, PromptBuilder

SHARED = Path(__file__).parents[2] / "shared"
STORIES = SHARED / "weights" / "stories260K-hf"
TEXT = "The harbour of Velmoor was founded in 1742 by the shipwright Anna Torrel. A lighthouse was built beside the old mill; its lamp burned for ninety years. "
SETTINGS = {"context_tokens": 16, "output_tokens": (3, 8), "expand_fractions": (0.5,), "limit": 5, "batch_size": 3}


def settings(**changes) -> PerplexitySettings:
    return PerplexitySettings(**SETTINGS | changes)


def documents(count: int = 2) -> list[Document]:
    return [Document(f"d{number}", TEXT * (2 + number)) for number in range(count)]


def plain_nll(model, ids: list[int], scored: int) -> torch.Tensor:
    """The decoder's own mean nats over the last `scored` tokens."""
    logits = model.decoder(torch.tensor([ids])).logits[0, :-1]
    return F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")[-scored:].mean()


@torch.no_grad()
def test_full_none_and_truncated_are_the_plain_decoder(tiny_model):
    text = Document("d", TEXT[:120])
    ids = list(PromptBuilder(tiny_model.tokenizer, chunk_size=4).chunk(text.text).token_ids)
    assert 24 <= len(ids) < 48  # one window
    found = measure(tiny_model, [text], settings())["variants"]
    starts = {"full": ids[:16], "none": [], "truncated": ids[12:16], "truncated@0.5": ids[6:16]}
    for name, context in starts.items():
        for scored in (3, 8):
            expected = plain_nll(tiny_model, [1, *context, *ids[16 : 16 + scored]], scored)
            assert found[name]["nats"][str(scored)]["mean"] == pytest.approx(float(expected), abs=1e-5)
        assert found[name]["slots"] == 1 + len(context)


def test_everything_expanded_is_the_full_context_and_all_policies_have_one_rate(tiny_model):
    found = measure(tiny_model, documents(), settings(expand_fractions=(0.5, 1.0)))
    variants = found["variants"]
    assert found["windows"] == 5 and found["context_chunks"] == 4
    for policy in ("random", "first", "similarity", "perplexity", "perplexity-low"):
        for o in ("3", "8"):
            assert variants[f"{policy}@1"]["nats"][o]["mean"] == pytest.approx(variants["full"]["nats"][o]["mean"], abs=1e-5)
        assert variants[f"{policy}@0.5"]["slots"] == variants["truncated@0.5"]["slots"] == 1 + 4 + 2 * 3
    assert variants["refrag"]["slots"] == variants["truncated"]["slots"] == 5 and variants["refrag"]["rate"] == 4.0
    assert variants["full"]["kept"]["8"]["mean"] in (None, 1.0) and variants["none"]["kept"]["8"]["mean"] in (None, 0.0)


def test_a_batch_equals_its_windows_alone(tiny_model):
    one, many = (measure(tiny_model, documents(), settings(batch_size=size))["variants"] for size in (1, 5))
    for name, own in one.items():
        assert own["nats"]["8"]["mean"] == pytest.approx(many[name]["nats"]["8"]["mean"], abs=1e-5)


def test_the_output_follows_the_context_and_windows_do_not_overlap(tiny_model):
    builder = PromptBuilder(tiny_model.tokenizer, chunk_size=4)
    ids = builder.chunk(TEXT * 3).token_ids
    found, counts = perplexity.windows([Document("d", TEXT * 3), Document("short", "Velmoor.")], builder, tiny_model, settings(limit=100))
    assert counts == {"documents": 2, "too_short": 1, "windows": len(ids) // 24, "windows_there": len(ids) // 24}
    for number, window in enumerate(found):
        assert window.context.token_ids() == [1, *ids[24 * number : 24 * number + 16]]
        assert window.output == list(ids[24 * number + 16 : 24 * number + 24])
    assert "".join(found[0].context.chunk_texts()) == (TEXT * 3)[: found[0].context.chunks[-1].end]


def test_rows_of_unequal_length_are_scored_as_alone(tiny_model):
    prompts = [Prompt(((1, 40, 41, 42),), ()), Prompt(((1, 50),), ())]
    completions = [[60, 61, 62], [70]]
    together = token_nll(tiny_model, prompts, [[], []], completions, None)
    for prompt, completion, (nll, greedy) in zip(prompts, completions, together, strict=True):
        [(alone, _)] = token_nll(tiny_model, [prompt], [[]], [completion], None)
        torch.testing.assert_close(nll, alone, atol=1e-5, rtol=0)
        assert nll.shape == greedy.shape == (len(completion),) and set(greedy.tolist()) <= {0.0, 1.0}


def test_shares_kept_by_hand():
    none, half, full = np.array([3.0, 5.0]), np.array([2.0, 4.0]), np.array([1.0, 3.0])
    assert perplexity._kept(none, half, full, 0) == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert perplexity._kept(none, none, none, 0) == {"mean": None, "low": None, "high": None}


def test_a_context_that_the_decoder_cannot_hold_is_left_out_and_the_rest_goes_on(make_model, make_decoder):
    from refrag.model import RefragModel

    whole = make_model()
    small = RefragModel.from_parts(
        whole.encoder, make_decoder("llama", max_position_embeddings=20), encoder_tokenizer=whole.encoder_tokenizer, decoder_tokenizer=whole.tokenizer, chunk_size=4
    ).eval()
    found = measure(small, documents(), settings())["variants"]
    assert found["full"]["problem"] == "17 slots and 8 output tokens are more than the decoder's 20 positions" and "nats" not in found["full"]
    assert found["refrag"]["nats"]["8"]["mean"] > 0 and "kept" not in found["refrag"]


def test_out_of_memory_marks_a_variant_and_keeps_what_was_measured(make_model):
    model = make_model()
    calls = []

    def refuse(module, args, kwargs):
        calls.append(kwargs["inputs_embeds"].shape[1])
        if calls[-1] > 20 and len([width for width in calls if width > 20]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.decoder.register_forward_pre_hook(refuse, with_kwargs=True)
    found = measure(model, documents(), settings(policies=("first",)))["variants"]
    assert found["full"]["problem"] == "Out of memory after 3 windows" and found["full"]["windows"] == 3
    assert found["refrag"]["windows"] == 5 and found["refrag"]["problem"] is None


def test_an_encoder_that_is_out_of_memory_leaves_what_needs_no_vectors(make_model):
    model = make_model()

    def refuse(module, args, kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    model.encoder.register_forward_pre_hook(refuse, with_kwargs=True)
    found = measure(model, documents(), settings(policies=("first",)))["variants"]
    assert found["refrag"]["problem"] == "Out of memory after 0 windows"
    assert found["full"]["windows"] == found["truncated"]["windows"] == 5 and found["full"]["problem"] is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"context_tokens": 18}, "context_tokens must be a multiple of the chunk size, 4, was 18: try 16."),
        ({"output_tokens": (4000,)}, "A window takes 4016 tokens of context and output, the longest of 2 texts has"),
        ({"policies": ("lernt",)}, "There is no policy 'lernt' to compare: choose among random, first, similarity, perplexity, perplexity-low, learned."),
        ({"policies": ("learned",)}, "This model has no trained policy: leave 'learned' out of --policies, or train one."),
    ],
)
def test_what_is_refused(tiny_model, changes, said):
    with pytest.raises(InputError) as caught:
        measure(tiny_model, documents(), settings(**changes))
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize("changes", [{"output_tokens": ()}, {"output_tokens": (0,)}, {"context_tokens": 0}, {"expand_fractions": (2.0,)}, {"batch_size": 0}])
def test_settings_out_of_range(changes):
    with pytest.raises(InputError):
        settings(**changes)


def test_the_mode_of_the_model_is_put_back(make_model):
    model = make_model().train()
    measure(model, documents(), settings(policies=("first",)))
    assert model.training


def test_the_command_writes_a_result(tiny_model, tmp_path, capsys):
    tiny_model.save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text(TEXT * 4)
    command = ["eval", "perplexity", "--data", str(tmp_path / "texts.txt"), "--model", str(tmp_path / "model"), "--context-tokens", "16"]
    command += ["--output-tokens", "3", "8", "--policies", "first", "--out", str(tmp_path / "r.json"), "--quiet"]
    assert main(command) == 0
    content = read_result(tmp_path / "r.json", kind="perplexity")
    assert content["variants"]["full"]["nats"]["8"]["mean"] > 0 and content["settings"]["data"] == [f"{tmp_path.name}/texts.txt"]
    assert "refrag" in capsys.readouterr().out
    assert main([word if word != "16" else "17" for word in command]) == 2
    assert capsys.readouterr().err == "refrag: --context-tokens must be a multiple of the chunk size, 4, was 17: try 16.\n"


@pytest.mark.skipif(not STORIES.exists(), reason="needs the shared stories260K checkpoint")
def test_context_helps_a_real_decoder(make_encoder, encoder_tokenizer):
    from refrag.model import RefragModel

    model = RefragModel.from_parts(make_encoder("roberta"), STORIES, encoder_tokenizer=encoder_tokenizer, chunk_size=8).eval()
    stories = gzip.decompress((SHARED / "data" / "tinystories" / "valid.txt.gz").read_bytes()).decode().split("<|endoftext|>")
    texts = [Document(str(number), text.strip()) for number, text in enumerate(stories[:60])]
    found = measure(model, texts, PerplexitySettings(context_tokens=128, output_tokens=(16, 64), limit=48, policies=("first",)))["variants"]
    full, none, cut = (found[name]["nats"]["64"]["mean"] for name in ("full", "none", "truncated"))
    assert 1.0 < full < 1.6 and full < cut < none
    assert found["truncated"]["kept"]["64"]["mean"] == pytest.approx((none - cut) / (none - full))
