"""REFRAG in lm-evaluation-harness, offline, with local tasks: parity with the plain decoder, and answers from a document's passages."""

import json
import sys
from importlib import reload

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from refrag.config import BUNDLED_MODEL, Budget
from refrag.demo.almanac import evaluation_rows
from refrag.engine import Refrag
from refrag.errors import InputError, MissingExtraError
from refrag.evaluation import lm_eval as module
from refrag.evaluation.lm_eval import RefragLM

PASSAGES = [{"id": "a", "title": "Velmoor", "text": "The harbour of Velmoor was founded in 1742 by the shipwright Anna Torrel."}]
DOC = {"question": "Who founded the harbour?", "passages": PASSAGES}


@pytest.fixture(scope="module")
def engine():
    return Refrag.from_pretrained(BUNDLED_MODEL)


def instance(kind: str, *arguments, doc=DOC) -> Instance:
    return Instance(kind, doc, tuple(arguments), 0)


@torch.no_grad()
def plain(model, ids: list[int], scored: int) -> tuple[float, bool]:
    logits = model.decoder(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)[-scored:]
    targets = torch.tensor(ids[-scored:])
    return float(logits.gather(1, targets[:, None]).sum()), bool((logits.argmax(-1) == targets).all())


def test_everything_expanded_scores_as_the_plain_decoder(tiny_model):
    engine = Refrag(tiny_model)
    prompt, answer = engine.builder.build(DOC["question"], PASSAGES).token_ids(), engine.builder.encode(" Anna Torrel")
    lm = RefragLM(engine, policy="all", batch_size=2)
    requests = [instance("loglikelihood", DOC["question"], " Anna Torrel"), instance("loglikelihood", DOC["question"], " 9"), instance("loglikelihood", "", " Anna")]
    (score, greedy), _, (bare, _) = lm.loglikelihood(requests)
    expected, is_greedy = plain(tiny_model, [*prompt, *answer], len(answer))
    assert score == pytest.approx(expected, abs=1e-4) and greedy == is_greedy
    first = engine.builder.encode(" Anna")
    assert bare == pytest.approx(plain(tiny_model, [1, *first], len(first))[0], abs=1e-4)  # an empty context: the start token alone


def test_compressed_passages_change_the_score_and_a_batch_does_not(tiny_model):
    engine = Refrag(tiny_model)
    requests = [instance("loglikelihood", DOC["question"], text) for text in (" Anna Torrel", " 1742", " the old mill")]
    compressed, alone = (RefragLM(engine, policy="none", batch_size=size).loglikelihood(requests) for size in (3, 1))
    full = RefragLM(engine, policy="all").loglikelihood(requests)
    for (together, _), (single, _), (other, _) in zip(compressed, alone, full, strict=True):
        assert together == pytest.approx(single, abs=1e-4) and abs(together - other) > 1e-4


def test_rolling_scores_every_token_once(tiny_model):
    engine = Refrag(tiny_model)
    text = "The harbour of Velmoor was founded in 1742. " * 60
    ids = engine.builder.encode(text)
    assert len(ids) > 512  # more than the decoder's positions
    short = "Its lamp burned for ninety years."
    long_score, short_score = RefragLM(engine).loglikelihood_rolling([instance("loglikelihood_rolling", text), instance("loglikelihood_rolling", short)])
    own = engine.builder.encode(short)
    assert short_score == pytest.approx(plain(tiny_model, [1, *own], len(own))[0], abs=1e-3)
    assert long_score < short_score < 0


def test_generation_follows_the_task_and_takes_citations_off(engine):
    [row] = evaluation_rows(1, num_passages=4)
    lm = RefragLM(engine, policy="all")
    texts = lm.generate_until([instance("generate_until", row["question"], {"until": ["\n"], "max_gen_toks": length}, doc=row) for length in (24, 1)])
    answer = engine.answer(row["question"], row["passages"], policy="all", max_new_tokens=24, stop="\n").text
    assert answer.startswith("[") and texts[0] == row["answers"][0] and "[" not in texts[0] and len(texts[1]) < len(answer)


TASK = """
task: almanac
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
{rest}
"""
GENERATE = """output_type: generate_until
doc_to_target: "{{answers[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 24}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOOSE = """output_type: multiple_choice
doc_to_choice: choices
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def run(tmp_path, engine):
    """run(yaml, rows, **options of RefragLM): the harness's result of a local task."""

    def run(rest: str, rows: list[dict], **how) -> dict:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "task.yaml").write_text(TASK.format(file=file, rest=rest))
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        found = simple_evaluate(model=RefragLM(engine, **how), tasks=["almanac"], task_manager=manager, bootstrap_iters=0)
        return found["results"]["almanac"]

    return run


def test_a_task_of_answers_runs_offline(run):
    rows = list(evaluation_rows(10, num_passages=4))
    with_passages = run(GENERATE, rows, policy="learned", budget=Budget(expand_fraction=0.2))["exact_match,none"]
    without = run(GENERATE, rows, max_passages=0)["exact_match,none"]
    assert with_passages >= 0.6 > without


def test_a_task_of_choices_runs_offline(run):
    """The model writes its answers as `[2] words`; of a right and a wrong answer so written it prefers the right one."""
    rows = [row for row in evaluation_rows(30, num_passages=4, cite=True) if row["kind"] == "one-hop"][:8]
    for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
        row["choices"] = [row["answers"][0], other["answers"][0]]
    assert run(CHOOSE + 'target_delimiter: ""\n', rows, policy="all")["acc,none"] >= 0.75


def test_a_continuation_without_tokens_is_refused(tiny_model):
    with pytest.raises(InputError, match="A continuation must have a token or more, was ''"):
        RefragLM(Refrag(tiny_model)).loglikelihood([instance("loglikelihood", "Why?", "")])


def test_the_package_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(MissingExtraError, match=r"The evaluation harness needs the package 'lm-eval': install it with  pip install 'refrag\[lm-eval\]'"):
        reload(module)
    monkeypatch.undo()
