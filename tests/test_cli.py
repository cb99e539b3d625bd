"""The command line, run in this process on a saved tiny model and a real index: stdout, stderr, exit status."""

import gzip
import json
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from refrag.cli import main
from refrag.cli.progress import Count, Gauge
from refrag.engine.answer import TIMING_KEYS, USAGE_KEYS
from refrag.index import PassageIndex
from refrag.text import Passage

QUESTION = "Who founded the harbour of Velmoor?"
ROWS = [
    {"id": "velmoor", "title": "Velmoor", "text": "The harbour of Velmoor was founded in 1742 by Anna Torrel."},
    {"id": "lamp", "title": "Lamp", "text": "A lighthouse was built beside the old mill; its lamp burned for ninety years."},
]


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def index(model: str, corpus: Path, tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("made") / "index")
    assert main(["index", "build", str(corpus), "--index", folder, "--model", model, "--quiet"]) == 0
    return folder


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that exits with 2 and prints nothing."""
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err
    lines = said.err.strip().splitlines()
    assert lines[-1].startswith("refrag: ")
    return lines[-1]


# ── asking ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_ask_streams_the_answer_and_then_a_table(model: str, index: str, capsys) -> None:
    arguments = ["ask", QUESTION, "--index", index, "--model", model, "--max-new-tokens", "6", "--policy", "first", "--expand-chunks", "1"]
    assert main([*arguments, "--trace"]) == 0
    said = capsys.readouterr()
    assert main([*arguments, "--json", "--quiet"]) == 0
    answer = json.loads((quiet := capsys.readouterr()).out)
    assert said.out == answer["text"] + "\n"
    assert f"1 of {answer['usage']['num_chunks']}" in said.err and "TTFT" in said.err
    assert f"⟦{answer['trace'][0]['text']}⟧" in said.err
    assert quiet.err == ""


def test_the_json_holds_everything(model: str, index: str, capsys) -> None:
    arguments = [
        "ask",
        QUESTION,
        "--index",
        index,
        "--model",
        model,
        "--top-k",
        "1",
        "--expand-fraction",
        "0.5",
        "--max-new-tokens",
        "4",
        "--json",
    ]
    assert main(arguments) == 0
    answer = json.loads(capsys.readouterr().out)
    assert {"text", "citations", "usage", "timings", "trace"} <= answer.keys()
    assert list(answer["usage"]) == list(USAGE_KEYS)
    assert list(answer["timings"]) == list(TIMING_KEYS)
    assert set(answer["trace"][0]) == {"passage_id", "title", "start", "end", "text", "score", "expanded", "rule"}
    assert [passage["id"] for passage in answer["passages"]] == ["velmoor"]
    assert "".join(entry["text"] for entry in answer["trace"]) == ROWS[0]["text"]
    assert sum(entry["expanded"] for entry in answer["trace"]) == len(answer["trace"]) // 2


def test_ask_reads_passages_from_a_file(model: str, corpus: Path, capsys) -> None:
    arguments = ["ask", QUESTION, "--passages", str(corpus), "--model", model, "--max-new-tokens", "4", "--json", "--policy", "none"]
    assert main(arguments) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [passage["id"] for passage in answer["passages"]] == ["velmoor", "lamp"]
    assert answer["usage"]["expanded_chunks"] == 0


def test_sampling_is_seeded_and_stop_repeats(model: str, corpus: Path, capsys) -> None:
    arguments = [
        "ask",
        QUESTION,
        "--passages",
        str(corpus),
        "--model",
        model,
        "--json",
        "--quiet",
        "--temperature",
        "2",
        "--sample-top-k",
        "40",
    ]
    texts = []
    for extra in (["--seed", "1"], ["--seed", "1"], ["--seed", "2"], ["--seed", "1", "--stop", "zzzz", "--stop", "e"]):
        assert main([*arguments, *extra]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1] != texts[2]
    assert texts[3] == texts[0].split("e")[0].strip()


def test_debug_shows_lengths_and_shapes(model: str, corpus: Path, capsys) -> None:
    assert main(["ask", QUESTION, "--passages", str(corpus), "--model", model, "--max-new-tokens", "3", "--log-level", "debug"]) == 0
    said = capsys.readouterr().err
    assert "DEBUG: context tokens (" in said and "inputs_embeds (1, " in said and "decoded [3] tokens" in said


def test_info(model: str, index: str, capsys) -> None:
    assert main(["info", "--model", model, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["chunk_sizes"] == [4]
    assert (values["chunk_size"], values["device"], values["model"]) == (4, "cpu", model)
    assert values["decoder"].startswith("llama, ")
    assert main(["info", "--model", model]) == 0
    assert "chunk_size       4\n" in capsys.readouterr().out
    assert main(["info", "--model", model, "--index", index, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["index"]["passages"] == 2


def test_faiss_retrieves_and_its_scores_are_shown(model: str, index: str, capsys) -> None:
    pytest.importorskip("faiss")
    command = ["ask", QUESTION, "--index", index, "--model", model, "--json", "--quiet"]
    assert main(command) == 0
    exact = json.loads(capsys.readouterr().out)["passages"]
    assert main([*command, "--faiss", "Flat"]) == 0
    found = json.loads(capsys.readouterr().out)["passages"]
    assert [own["id"] for own in found] == [own["id"] for own in exact]
    assert [own["score"] for own in found] == pytest.approx([own["score"] for own in exact], abs=2e-3)


# ── the index ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_life_of_an_index(model: str, corpus: Path, tmp_path: Path, capsys) -> None:
    folder = str(tmp_path / "index")
    owner = ["--index", folder, "--model", model, "--quiet"]
    more = tmp_path / "more.txt"
    more.write_text("The mill was sold.", encoding="utf-8")

    def run(*arguments: str) -> str:
        assert main(["index", *arguments, *owner]) == 0
        said = capsys.readouterr()
        assert said.err == ""
        return said.out

    assert json.loads(run("build", str(corpus), "--storage", "int8"))["added"] == 2
    assert json.loads(run("build", str(corpus), "--storage", "int8"))["unchanged"] == 2  # finishes what there is
    assert json.loads(run("add", str(more)))["added"] == 1
    assert json.loads(run("delete", "lamp", "nobody")) == {"deleted": 1, "unknown": ["nobody"]}
    info = json.loads(run("info", "--json"))
    assert (info["passages"], info["storage"]) == (2, "int8")
    assert "passages" in run("info")
    assert run("verify") == ""
    assert json.loads(run("build", str(corpus), "--rebuild"))["added"] == 2
    assert json.loads(run("info", "--json"))["storage"] == "float16"


def test_verify_finds_damage_and_exits_with_1(model: str, corpus: Path, tmp_path: Path, capsys) -> None:
    folder = str(tmp_path / "index")
    assert main(["index", "build", str(corpus), "--index", folder, "--model", model]) == 0
    table = PassageIndex.open(folder).table._table
    table.update(where="id = 'lamp'", values={"text": "Another text."})
    capsys.readouterr()
    assert main(["index", "verify", "--index", folder]) == 1
    said = capsys.readouterr()
    assert "Passage 'lamp' is not the one that was stored" in said.out
    assert "2 passages, 1 problem" in said.err


def test_an_interrupted_build_is_finished_by_the_same_command(model: str, tmp_path: Path, capsys) -> None:
    corpus, folder = tmp_path / "corpus.jsonl", tmp_path / "index"
    corpus.write_text(
        "".join(json.dumps({"id": str(n), "text": f"House number {n} stands there. " * 12}) + "\n" for n in range(160)), encoding="utf-8"
    )
    command = ["index", "build", str(corpus), "--index", str(folder), "--model", model, "--batch-size", "4"]

    over = threading.Event()

    def interrupt() -> None:
        while not over.wait(0.01):
            if len(list(folder.rglob("*.lance"))) >= 6:
                os.kill(os.getpid(), signal.SIGINT)
                return

    threading.Thread(target=interrupt).start()
    try:
        assert main(command) == 130
    finally:
        over.set()
    assert capsys.readouterr().err.rstrip().endswith("refrag: interrupted")
    partial = PassageIndex.open(folder)
    assert 0 < partial.count < 160
    assert partial.verify() == []
    assert main([*command, "--quiet"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts["unchanged"] > 0 and counts["added"] + counts["unchanged"] == 160
    assert PassageIndex.open(folder).count == 160


def test_the_bar_knows_how_far_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 100)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"y" * 300))
    (tmp_path / "image.png").write_text("not read")
    gauge = Gauge([tmp_path])
    assert gauge.total == 400
    passages = [Passage(name, "x" * 60, metadata={"source": str(tmp_path / name)}) for name in ("a.txt", "a.txt", "b.txt.gz")]
    read = [gauge.read for _ in gauge.watch(passages)]
    assert read == [60, 100, 160]  # a file is not longer than it is
    assert gauge.read == 400
    assert Gauge([]).total == 0
    count = Count(3)
    assert [count.read for _ in count.watch(passages)] == [1, 2, 3] == [*range(1, count.total + 1)]


# ── shell conventions ────────────────────────────────────────────────────────────────────────────────────────────────


def test_ctrl_c_while_answering(model: str, corpus: Path, capsys) -> None:
    class Interrupting:
        """Stands where stdout stands: the first piece that arrives is answered with Ctrl-C."""

        encoding = "utf-8"

        def write(self, text: str) -> int:
            os.kill(os.getpid(), signal.SIGINT)
            return len(text)

        def flush(self) -> None: ...

    stdout, sys.stdout = sys.stdout, Interrupting()
    try:
        assert main(["ask", QUESTION, "--passages", str(corpus), "--model", model, "--max-new-tokens", "200"]) == 130
    finally:
        sys.stdout = stdout
    assert not [thread for thread in threading.enumerate() if thread.name == "refrag-answer"]
    assert capsys.readouterr().err == "refrag: interrupted\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_sentence(model: str, corpus: Path, capsys, monkeypatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["ask", QUESTION, "--passages", str(corpus), "--model", model, "--max-new-tokens", "2", "--json", "--quiet"]) == 2
    assert capsys.readouterr().err == "refrag: The disk is full: free some space, then run the same command again.\n"


def test_a_closed_pipe_is_no_error_to_shout_about(model: str, capsys, monkeypatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["info", "--model", model]) == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (["ask", "q", "--top-kk", "3"], "--top-k"),
        (["ask", "q", "--expand-fractoin", "3"], "--expand-fraction"),
        (["index", "build", "a", "--indx", "b"], "--index"),
        (["index", "build", "a"], "Missing from refrag index build: --index"),
        (["aks", "q"], "ask"),
        ([], "Expected one of {index, ask"),
        (["ask"], "Missing from refrag ask: QUESTION"),
        (["ask", "q", "--dtype", "half"], "'half' for argument '--dtype'. Expected one of ('auto', 'float32', 'bfloat16', 'float16'); see  refrag ask --help\n"),
        (["ask", "q", "--top-k", "many"], "--top-k: no type matching INT could be instantiated from ['many']; see  refrag"),
        (["index", "build", "a", "--index", "b", "--passage-tokens", "0"], "--passage-tokens must be 1 or more, was 0.\n"),
    ],
)
def test_what_was_typed_wrongly_is_one_sentence_with_the_nearest_name(arguments: list[str], nearest: str, capsys) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("refrag: ")
    assert nearest in said.err


def test_the_demo_takes_a_model_and_its_table_fits_80_columns(make_encoder, make_decoder, tiny_model, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    tokenizers = {"encoder_tokenizer": tiny_model.encoder_tokenizer, "decoder_tokenizer": tiny_model.tokenizer}
    decoder = make_decoder("llama", max_position_embeddings=8192)
    type(tiny_model).from_parts(make_encoder("roberta"), decoder, chunk_size=4, **tokenizers).save_pretrained(tmp_path / "model")
    capsys.readouterr()
    assert main(["demo", "--model", str(tmp_path / "model"), "--num-questions", "1", "--quiet"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "all expanded (plain RAG)" in said.out and "TTFT ms" in said.out and "…" not in said.out
    assert max(map(len, said.out.splitlines())) <= 80


@pytest.mark.parametrize(
    "command", [[], ["ask"], ["index"], ["index", "build"], ["index", "import-prototype"], ["demo"], ["info"], ["bench"]]
)
def test_help_is_data(command: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    said = capsys.readouterr()
    assert (end.value.code, said.err) == (0, "")
    assert said.out.startswith(" ".join(["usage: refrag", *command]))


def test_version(capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert not end.value.code
    assert capsys.readouterr().out.startswith("refrag 0.")


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────

MODEL, INDEX, CORPUS, MISSING = "MODEL", "INDEX", "CORPUS", "./missing"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["ask", QUESTION], "Passages must come from one place: give either --index FOLDER or --passages FILE."),
        (["ask", QUESTION, "--index", INDEX, "--passages", CORPUS], "Passages must come from one place"),
        (["ask", QUESTION, "--passages", MISSING, "--model", MODEL], "There is no file or folder missing: check the path."),
        (
            ["ask", QUESTION, "--index", MISSING, "--model", MODEL],
            "There is no index at missing: make one with  refrag index build PATH… --index missing",
        ),
        (["ask", QUESTION, "--index", INDEX, "--model", MISSING], "There is no model folder at ./missing: check --model."),
        (["ask", QUESTION, "--index", INDEX, "--expand-fraction", "1.5"], "--expand-fraction must lie between 0 and 1, was 1.5: try 0.1."),
        (
            ["ask", QUESTION, "--index", INDEX, "--expand-fraction", "0", "--max-slots", "9"],
            "A budget is one limit; --expand-fraction and --max-slots were given: keep one of them.",
        ),
        (["ask", QUESTION, "--index", INDEX, "--model", MODEL, "--max-slots", "9"], "more than --max-slots 9: raise --max-slots to"),
        (
            ["ask", QUESTION, "--index", INDEX, "--model", MODEL, "--policy", "learned"],
            "This model has no trained policy: choose --policy similarity, or train one.",
        ),
        (["ask", "  ", "--index", INDEX, "--model", MODEL], "The question must hold some text, was empty: write it between quotes."),
        (["ask", "why " * 60, "--passages", CORPUS, "--model", MODEL], "more than the encoder's window of 60: shorten it"),
        (
            ["ask", QUESTION, "--passages", CORPUS, "--model", MODEL, "--max-new-tokens", "510"],
            "more than the decoder's 512 positions: pass fewer passages or lower --max-new-tokens.",
        ),
        (["ask", QUESTION, "--index", INDEX, "--top-k", "0", "--model", "./never-looked-at"], "--top-k must be 1 or more, was 0."),
        (["ask", " ", "--index", INDEX, "--model", "./never-looked-at"], "The question must hold some text"),
        (["ask", QUESTION, "--index", MISSING, "--model", "./never-looked-at"], "There is no index at missing"),
        (["ask", "a\udc80b", "--index", INDEX, "--model", MODEL], "The question must be valid Unicode"),
        (["ask", QUESTION, "--index", INDEX, "--repetition-penalty", "0"], "--repetition-penalty must lie above 0"),
        (["ask", QUESTION, "--index", INDEX, "--temperature", "nan"], "temperature must be 0 or more, and finite, was nan"),
        (["ask", QUESTION, "--index", INDEX, "--seed", str(2**70)], "seed must be at most"),
        (["ask", QUESTION, "--index", INDEX, "--sample-top-k", "-1"], "top_k must be 0 or more, was -1"),
        (["ask", QUESTION, "--index", INDEX, "--policy", "similiarity"], "There is no policy 'similiarity' (did you mean 'similarity'?): choose one of none, all,"),
        (["ask", QUESTION, "--passages", CORPUS, "--model", MODEL, "--faiss", "Flat"], "--faiss searches the vectors of an index by meaning"),
        (["ask", QUESTION, "--index", INDEX, "--model", MODEL, "--faiss", "Nonsense"], "FAISS cannot make 'Nonsense' of"),
        (["ask", QUESTION, "--passages", CORPUS, "--where", "id = 'a'", "--mode", "text"], "nothing is retrieved: leave --where and --mode out, or make an index"),
        (["ask", QUESTION, "--passages", CORPUS, "--top-k", "1"], "nothing is retrieved: leave --top-k out"),
        (["ask", QUESTION, "--index", INDEX, "--text-column", "body"], "How files are read belongs to --passages: leave --skip-bad, --encoding, --text-column and --subset out."),
        (["ask", QUESTION, "--index", INDEX, "--top-k", "99999999999999999999"], "--top-k must be at most 1000000, was 99999999999999999999: take a smaller number."),
        (["ask", QUESTION, "--index", INDEX, "--vllm-model", "m"], "A model of vLLM was given, but this process decodes: add --engine vllm."),
        (["index", "build", CORPUS, "--index", "", "--model", MODEL], "The index needs a folder, its name was empty: pass --index FOLDER."),
        (["index", "build", CORPUS, "--index", "x", "--model", MODEL, "--subset", "en"], "A subset belongs to a dataset on the hub, none was named: leave --subset en out."),
        (["index", "build", CORPUS, "--index", "x", "--model", MODEL, "--encoding", "utf-16"], "is not utf-16 text (UTF-16 stream does not start with BOM): pass its encoding"),
        (["ask", QUESTION, "--index", INDEX, "--policy", "none", "--expand-chunks", "4"], "The policy 'none' expands nothing, but a budget to expand was given"),
        (["demo", "--num-questions", "0"], "--num-questions must be 1 or more, was 0."),
        (["demo", "--model", MISSING], "There is no model folder at ./missing: check --model."),
        (["ask", QUESTION, "--index", INDEX, "--model", MODEL, "--top-k", "0"], "--top-k must be 1 or more, was 0."),
        (["ask", QUESTION, "--index", INDEX, "--model", MODEL, "--where", "colour = 1"], "The filter 'colour = 1' cannot be used"),
        (["index", "build", "--index", "x"], "Nothing was named to read: give files or folders before --index."),
        (["index", "build", MISSING, "--index", "x", "--model", MODEL], "There is no file or folder missing: check the path."),
        (["index", "build", CORPUS, "--index", "x", "--model", MODEL, "--passage-tokens", "0"], "--passage-tokens must be 1 or more, was 0."),
        (["index", "build", CORPUS, "--index", "x", "--model", MODEL, "--encoding", "utf-9"], "There is no text encoding 'utf-9'"),
        (["index", "build", CORPUS, "--index", CORPUS, "--model", MODEL], "is a file, an index needs a folder: pass another --index."),
        (["index", "add", CORPUS, "--index", MISSING, "--model", MODEL], "There is no index at missing"),
        (["index", "delete", "--index", INDEX], "Nothing was named to delete: give the ids of passages."),
        (["index", "import-prototype", MISSING, "--index", "x", "--model", MODEL], "There is no folder missing: check the path."),
        (["index", "info", "--index", INDEX, "--device", "cpu"], "--device says where --model is loaded, and there is none: leave --device cpu out, or give --model."),
        (["info", "--model", MODEL, "--device", "cuda"], "This PyTorch sees no device 'cuda': run the same command with --device cpu."),
    ],
)
def test_one_sentence_and_exit_2(
    arguments: list[str], sentence: str, model: str, index: str, corpus: Path, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {MODEL: model, INDEX: index, CORPUS: str(corpus)}
    assert sentence in refused([names.get(word, word) for word in arguments], capsys)
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_a_broken_line_is_named_and_left_out_only_when_asked(model: str, tmp_path: Path, capsys) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"id": "1", "text": "One."}\n{"id": 2, "text": \n{"id": "3", "text": "Three."}\n', encoding="utf-8")
    command = ["index", "build", str(broken), "--index", str(tmp_path / "index"), "--model", model]
    sentence = refused(command, capsys)
    assert f"{broken}" in sentence and "line 2" in sentence
    assert main([*command, "--skip-bad"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["added"] == 2
    assert "1 bad row or file was left out" in said.err


def test_an_index_of_another_model_is_refused(make_model, index: str, tmp_path: Path, capsys) -> None:
    make_model(chunk_size=8).save_pretrained(tmp_path / "other")
    sentence = refused(["ask", QUESTION, "--index", index, "--model", str(tmp_path / "other")], capsys)
    assert "chunk size: index 4, given 8" in sentence and "--rebuild" in sentence
    assert "chunk size" in refused(["index", "verify", "--index", index, "--model", str(tmp_path / "other")], capsys)


# ── exporting ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_export_writes_a_folder_of_its_own_and_replaces_only_its_own(model: str, tmp_path: Path, capsys) -> None:
    export = ["export", "decoder", "--model", model, "--output-dir"]
    assert main([*export, str(tmp_path / "decoder")]) == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'decoder'}\n"
    assert f"vllm serve {tmp_path / 'decoder'} --enable-prompt-embeds" in said.err
    assert json.loads((tmp_path / "decoder" / "config.json").read_text())["model_type"] == "llama"
    assert main([*export, str(tmp_path / "decoder"), "--quiet"]) == 0
    capsys.readouterr()
    said_no = refused([*export, str(tmp_path)], capsys)
    assert said_no == f"refrag: A decoder is exported into a folder of its own, {tmp_path} holds other files: choose a new --output-dir."
    (tmp_path / "file").write_text("")
    assert "is a file: choose another name" in refused([*export, str(tmp_path / "file")], capsys)
    assert "There is no model folder at ./absent: check --model." in refused(["export", "decoder", "--model", "./absent", "--output-dir", str(tmp_path / "new")], capsys)
