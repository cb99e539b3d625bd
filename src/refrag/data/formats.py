"""Rows of public question sets, in the fields of ours: SQuAD, NQ, TriviaQA, HotpotQA, MuSiQue, 2WikiMultihopQA, PopQA, KILT, DPR.

Fields are read by what they are called and what they hold, not by a name of the set, so that copies that mix conventions are
read too. A row in our own fields is passed through as it is.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

NO_ANSWER = "unknown"
"""The answer of a row that is marked unanswerable and gives none."""

_IDS = ("_id", "question_id", "example_id", "QuestionId", "qid")
_QUESTIONS = ("question_text", "Question", "input", "query")
_ANSWERS = ("answers", "answer", "Answer", "golden_answers", "possible_answers", "output", "target")
_PASSAGES = ("paragraphs", "context", "contexts", "ctxs", "positive_ctxs")


def question_rows(row: Any) -> Iterator[Any]:
    """The rows that an entry of a file stands for: those inside SQuAD's and TriviaQA's own files, else the row itself."""
    if isinstance(row, Mapping) and isinstance(row.get("data"), list) and "question" not in row:
        for article in row["data"]:
            yield from _squad_article(article)
    elif isinstance(row, Mapping) and isinstance(row.get("Data"), list):
        yield from row["Data"]
    else:
        yield row


def _squad_article(article: Any) -> Iterator[Any]:
    if not isinstance(article, Mapping) or not isinstance(article.get("paragraphs"), list):
        yield article
        return
    for paragraph in article["paragraphs"]:
        for question in paragraph["qas"]:
            yield {**question, "title": article.get("title", ""), "context": paragraph["context"]}


def in_our_fields(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with `question`, `answers`, `passages` and `id` as ours have them, where it calls or shapes them otherwise.

    Fields that cannot be read are left as they are, so that the message about them names what the file holds.
    """
    changed: dict[str, Any] = {}
    if "id" not in row:
        changed |= _first(row, "id", _IDS, lambda value: value)
    if not isinstance(row.get("question"), str):
        changed |= _first(row, "question", (*_QUESTIONS, "question"), _question)
    if not _is_ours(row.get("answers")):
        changed |= _first(row, "answers", _ANSWERS, lambda value: _answers(value, row))
    if "passages" not in row:
        changed |= _passages(row)
    changed |= _natural_question(row)
    is_musique = row.get("answerable") is False  # it keeps the answer that the passages would have had
    if is_musique or (is_unanswerable(row) and "answers" not in changed and not _is_ours(row.get("answers"))):
        changed["answers"] = [NO_ANSWER]
    return {**row, **changed} if changed else row


def is_unanswerable(row: Mapping[str, Any]) -> bool:
    """Whether a row says that its passages hold no answer."""
    answers = row.get("answers")
    empty_spans = isinstance(answers, Mapping) and answers.get("text") == []  # SQuAD 2 as the hub has it
    return row.get("unanswerable") is True or row.get("is_impossible") is True or row.get("answerable") is False or row.get("kind") == "unanswerable" or empty_spans


def kind_of(row: Mapping[str, Any]) -> str:
    """What kind of question it is, where the row says: HotpotQA's and 2Wiki's `type`, MuSiQue's hops."""
    for name in ("kind", "type"):
        if isinstance(row.get(name), str):
            return row[name]
    hops = row.get("n_hops") or (len(steps) if isinstance(steps := row.get("question_decomposition"), list) else None)
    return f"{hops}-hop" if isinstance(hops, int) else ""


def _first(row: Mapping[str, Any], name: str, candidates: Iterable[str], read: Callable[[Any], Any]) -> dict[str, Any]:
    """`{name: value}` of the first candidate field that can be read, else nothing."""
    for candidate in candidates:
        value = read(row[candidate]) if row.get(candidate) is not None else None
        if value not in (None, "", []):
            return {name: value}
    return {}


def _question(value: Any) -> str | None:
    text = value.get("text") if isinstance(value, Mapping) else value
    return text if isinstance(text, str) else None


def _is_ours(answers: Any) -> bool:
    return isinstance(answers, list) and bool(answers) and all(isinstance(answer, str) for answer in answers)


def _answers(value: Any, row: Mapping[str, Any]) -> list[str] | None:
    """Accepted answers in any of the shapes that the sets have; None for another shape."""
    value = _decoded(value) if isinstance(value, str) else value  # PopQA: a list as JSON
    if isinstance(value, str):
        found: Any = [value, *(row.get("answer_aliases") or [])]
    elif isinstance(value, Mapping):  # SQuAD: text; TriviaQA: value and aliases
        main = [value[name] for name in ("value", "Value") if value.get(name)]
        found = [*main, *(value.get("text") or value.get("aliases") or value.get("Aliases") or [])]
    elif isinstance(value, list):  # texts, SQuAD's spans, or KILT's outputs, some of which have no answer
        texts = [own.get("text") or own.get("answer") if isinstance(own, Mapping) else own for own in value]
        found = [text for own, text in zip(value, texts, strict=True) if not (isinstance(own, Mapping) and text is None)]
    else:
        return None
    return list(dict.fromkeys(found)) if all(isinstance(answer, str) and answer.strip() for answer in found) else None


def _decoded(text: str) -> Any:
    """The list that a text holds as JSON, else the text: a citation such as `[2] Oslo` is no list."""
    try:
        value = json.loads(text) if text.startswith("[") else text
    except ValueError:
        return text
    return value if isinstance(value, list) and not all(isinstance(own, int) for own in value) else text


def _passages(row: Mapping[str, Any]) -> dict[str, Any]:
    name = next((name for name in _PASSAGES if row.get(name)), None)
    if name is None:
        pages = _columns(row.get("entity_pages"), "title", "wiki_context") + _columns(row.get("search_results"), "title", "search_context")
        return {"passages": pages} if pages else {}
    value = _decoded(row[name]) if isinstance(row[name], str) else row[name]
    if name == "context":
        return {"passages": _context(value, row)}
    if name == "positive_ctxs":  # DPR
        kinds = ("positive_ctxs", True), ("hard_negative_ctxs", False), ("negative_ctxs", False)
        return {"passages": [_passage(own, is_gold) for kind, is_gold in kinds for own in row.get(kind) or []]}
    return {"passages": [_passage(own) for own in value] if isinstance(value, list) else value}


def _context(value: Any, row: Mapping[str, Any]) -> Any:
    """SQuAD's text, or HotpotQA's and 2Wiki's list of (title, sentences), as lists or as columns."""
    if isinstance(value, str):
        return [{"title": row.get("title") or "", "text": value, "is_gold": not is_unanswerable(row)}]
    if isinstance(value, Mapping):
        texts = next((value[name] for name in ("sentences", "content", "text") if name in value), [])
        value = list(zip(value.get("title") or [""] * len(texts), texts, strict=False))
    if not isinstance(value, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value):
        return value
    gold = _supporting_titles(row.get("supporting_facts"))
    return [{"title": title, "text": _joined(text)} | ({} if gold is None else {"is_gold": title in gold}) for title, text in value]


def _joined(text: Any) -> Any:
    """Sentences as one text; HotpotQA's carry their own spaces, 2Wiki's do not."""
    if not isinstance(text, list) or not all(isinstance(sentence, str) for sentence in text):
        return text
    return "".join(sentence if not number or sentence[:1].isspace() else f" {sentence}" for number, sentence in enumerate(text)).strip()


def _supporting_titles(facts: Any) -> set[str] | None:
    facts = _decoded(facts) if isinstance(facts, str) else facts
    if isinstance(facts, Mapping):
        return set(facts.get("title") or ())
    return {fact[0] for fact in facts} if isinstance(facts, list) and all(isinstance(fact, list | tuple) and fact for fact in facts) else None


def _passage(value: Any, is_gold: bool | None = None) -> Any:
    """One passage of MuSiQue (`paragraph_text`, `is_supporting`), FiD and Atlas (`hasanswer`) or DPR (`passage_id`)."""
    if not isinstance(value, Mapping):
        return value
    text = next((value[name] for name in ("text", "paragraph_text", "contents") if name in value), None)
    mark = next((value[name] for name in ("is_gold", "is_supporting", "hasanswer") if name in value), is_gold)
    identity = next((value[name] for name in ("id", "passage_id", "psg_id") if value.get(name) is not None), None)
    passage = {"title": value.get("title") or "", "text": text} | ({} if mark is None else {"is_gold": bool(mark)})
    return passage | ({} if identity is None else {"id": identity})


def _columns(value: Any, *names: str) -> list[dict[str, Any]]:
    """TriviaQA's pages: columns of titles and texts."""
    if not isinstance(value, Mapping):
        return []
    titles, texts = (value.get(name) or [] for name in names)
    return [{"title": title, "text": text} for title, text in zip(titles, texts, strict=False) if text]


def _natural_question(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of NQ's simplified files or of its hub copy: the long answer is the gold passage, the short answers are spans of tokens."""
    annotations = row.get("annotations")
    if isinstance(annotations, Mapping):
        tokens, annotations = row["document"]["tokens"]["token"], list(_annotations(annotations))
    elif isinstance(document := row.get("document_text"), str) and isinstance(annotations, list):
        tokens = document.split(" ")
    else:
        return {}

    def text_of(span: Mapping[str, Any]) -> str:
        return " ".join(token for token in tokens[span["start_token"] : span["end_token"]] if not (token.startswith("<") and token.endswith(">")))

    short = [text_of(span) for own in annotations for span in own.get("short_answers") or []]
    plain = [own["yes_no_answer"].lower() for own in annotations if own.get("yes_no_answer") in ("YES", "NO")]
    long = [own["long_answer"] for own in annotations if (own.get("long_answer") or {}).get("start_token", -1) >= 0]
    texts = dict.fromkeys(text_of(span) for span in long)
    answers = list(dict.fromkeys(answer for answer in [*short, *plain] if answer))
    if not answers and not texts:  # annotated as having none
        return {"passages": [], "answers": [NO_ANSWER], "unanswerable": True}
    return {"passages": [{"text": text, "is_gold": True} for text in texts]} | ({"answers": answers} if answers else {})


def _annotations(columns: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """NQ's annotations as its simplified files have them, of the columns of its hub copy."""
    for long, short, plain in zip(columns["long_answer"], columns["short_answers"], columns["yes_no_answer"], strict=True):
        spans = zip(short["start_token"], short["end_token"], strict=True)
        yield {
            "long_answer": long,
            "short_answers": [{"start_token": start, "end_token": end} for start, end in spans],
            "yes_no_answer": {0: "NO", 1: "YES"}.get(plain, "NONE"),
        }
