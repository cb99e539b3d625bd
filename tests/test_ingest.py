"""Files to passages: every format, sentence splitting with offsets, bad input."""

import csv
import gzip
import json
from itertools import pairwise

import pytest

from refrag.config import IndexSettings
from refrag.errors import InputError, NotFoundError
from refrag.index import documents, read_passages
from refrag.index.ingest import Splitter
from refrag.text import PromptBuilder

TEXT = "The harbour of Velmoor was founded in 1742. Anna Torrel built it! Who paid? Nobody knows… A lamp burned beside it for ninety years."


@pytest.fixture(scope="module")
def builder(tokenizer) -> PromptBuilder:
    return PromptBuilder(tokenizer, chunk_size=4)


@pytest.fixture
def read(builder):
    """read(*paths, **settings): all passages."""

    def read(*paths, skip_bad=False, encoding="utf-8", text_column="text", subset=None, **settings):
        reading = {"skip_bad": skip_bad, "encoding": encoding, "text_column": text_column, "subset": subset}
        return list(read_passages(paths, builder=builder, settings=IndexSettings(**settings), **reading))

    return read


# ── formats ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_text_file(tmp_path, read):
    (tmp_path / "harbour.txt").write_text(f"\n  {TEXT}\n\n")
    [passage] = read(tmp_path / "harbour.txt")
    assert (passage.id, passage.text, passage.title) == (f"{tmp_path / 'harbour.txt'}#1", TEXT, "harbour")
    assert passage.metadata == {"source": str(tmp_path / "harbour.txt"), "start": 3, "end": 3 + len(TEXT)}


def test_markdown_title_is_the_first_heading(tmp_path, read):
    (tmp_path / "a.md").write_text(f"intro\n\n## The harbour\n\n{TEXT}")
    [passage] = read(tmp_path / "a.md")
    assert passage.title == "The harbour" and passage.text.startswith("intro")


def test_html_shows_what_a_reader_sees(tmp_path, read):
    page = "<html><head><title>The\n harbour</title><style>p {}</style></head><body><script>x = '<p>'</script><h1>Velmoor</h1><p>Built by <b>Anna</b> &amp; co.<br>In 1742.<ul><li>one</li></ul><img alt='x'></body>"
    (tmp_path / "a.html").write_text(page)
    [passage] = read(tmp_path / "a.html")
    assert (passage.title, passage.text) == ("The harbour", "Velmoor\n\nBuilt by Anna & co.\n\nIn 1742.\n\none")


def make_pdf(lines_by_page: list[list[str]]) -> bytes:
    """A minimal PDF with one text line a list entry."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>"]
    kids = " ".join(f"{4 + 2 * number} 0 R" for number in range(len(lines_by_page)))
    objects.append(f"<< /Type /Pages /Kids [{kids}] /Count {len(lines_by_page)} >>")
    objects.append("<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>")
    for number, lines in enumerate(lines_by_page):
        stream = "BT /F1 12 Tf 14 TL 50 700 Td " + " ".join(f"({line}) Tj T*" for line in lines) + " ET"
        objects.append(f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Resources << /Font << /F1 3 0 R >> >> /Contents {5 + 2 * number} 0 R >>")
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
    body, offsets = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        offsets.append(len(body))
        body += f"{number} 0 obj\n{content}\nendobj\n".encode()
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    return body + f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{len(body)}\n%%EOF".encode()


def test_pdf_pages(tmp_path, read):
    pytest.importorskip("pypdf")
    (tmp_path / "a.pdf").write_bytes(make_pdf([["The harbour was", "founded in 1742."], ["Anna built it."]]))
    first, second = read(tmp_path / "a.pdf")
    assert first.text.split() == ["The", "harbour", "was", "founded", "in", "1742."] and second.text == "Anna built it."
    assert (first.metadata["page"], second.metadata["page"]) == (1, 2)
    assert (first.id, second.id) == (f"{tmp_path / 'a.pdf'}#1", f"{tmp_path / 'a.pdf'}#2")
    (tmp_path / "b.pdf").write_bytes(b"%PDF-1.4 nothing")
    with pytest.raises(InputError, match=r"b.pdf: this PDF cannot be read .*; mend it, or keep the rest with --skip-bad"):
        read(tmp_path / "b.pdf")


def test_json_lines_keep_id_title_and_metadata(tmp_path, read):
    rows = [{"id": 7, "text": "One.", "title": "A", "metadata": {"x": 1}, "lang": "en"}, {"text": "Two."}, {"title": "B", "text": "Two.", "lang": None}, "Three."]
    for name, opener in (("a.jsonl", open), ("a.jsonl.gz", gzip.open)):
        with opener(tmp_path / name, "wt") as file:
            file.writelines(json.dumps(row) + "\n\n" for row in rows)
        one, two, three, four = read(tmp_path / name)
        assert (one.id, one.title, one.metadata) == ("7", "A", {"x": 1, "lang": "en", "source": str(tmp_path / name), "start": 0, "end": 4})
        assert two.id.startswith("#") and three.id.startswith("B#") and two.id != three.id
        assert "lang" not in three.metadata and four.text == "Three."
    ids = [passage.id for passage in read(tmp_path / "a.jsonl")]
    assert ids == [passage.id for passage in read(tmp_path / "a.jsonl.gz")], "ids must not depend on the file"


def test_question_rows_give_their_passages(tmp_path, read):
    row = {"id": "q1", "question": "Who?", "answers": ["Anna"], "passages": [{"title": "A", "text": "One.", "is_gold": True}, {"title": "A", "text": "Two."}]}
    (tmp_path / "a.json").write_text(json.dumps([row, row]))
    passages = read(tmp_path / "a.json")
    assert [passage.text for passage in passages] == ["One.", "Two."] * 2
    assert len({passage.id for passage in passages}) == 2 and passages[0].metadata["is_gold"] is True


@pytest.mark.parametrize("content", ['{"text": "One."}', '[{"text": "One."}]', '{"text": "One."}\n{"text": "One."}\n', '["One."]'])
def test_json_in_its_forms(tmp_path, read, content):
    (tmp_path / "a.json").write_text(content)
    assert {passage.text for passage in read(tmp_path / "a.json")} == {"One."}


def test_csv_and_tsv(tmp_path, read):
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with (tmp_path / name).open("w", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows([["id", "text", "year"], ["1", 'One, "two"\nthree.', "1742"], ["2", "x " * 100_000, ""]])
        one, *rest = read(tmp_path / name, passage_tokens=300_000)
        assert (one.id, one.text, one.metadata["year"]) == ("1", 'One, "two"\nthree.', "1742")
        assert [passage.id for passage in rest] == ["2"]


def test_parquet_and_saved_datasets(tmp_path, read):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"id": "a", "text": "One.", "score": 0.5}, {"id": "b", "text": "Two.", "score": 1.5}])
    rows.to_parquet(tmp_path / "a.parquet")
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=rows.select([0]), test=rows.select([1])).save_to_disk(tmp_path / "splits")
    for name in ("a.parquet", "saved", "splits"):
        passages = read(tmp_path / name)
        assert [(passage.id, passage.text, passage.metadata["score"]) for passage in passages] == [("a", "One.", 0.5), ("b", "Two.", 1.5)]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(InputError, match=r"bad.parquet: this is not a Parquet file"):
        read(tmp_path / "bad.parquet")


def test_folders(tmp_path, read):
    (tmp_path / "docs" / "deep").mkdir(parents=True)
    (tmp_path / "docs" / ".hidden").mkdir()
    for name in ("b.txt", "deep/a.md", ".hidden/c.txt", ".d.txt", "image.png"):
        (tmp_path / "docs" / name).write_text(f"In {name}.")
    assert [passage.text for passage in read(tmp_path / "docs")] == ["In b.txt.", "In deep/a.md."]


def test_a_saved_dataset_inside_a_folder_is_one_source(tmp_path, read):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"id": "a", "text": "One."}]).save_to_disk(tmp_path / "docs" / "deep" / "saved")
    (tmp_path / "docs" / "z.txt").write_text("Two.")
    passages = read(tmp_path / "docs")
    assert [(passage.text, passage.metadata["source"]) for passage in passages] == [
        ("One.", str(tmp_path / "docs" / "deep" / "saved")),
        ("Two.", str(tmp_path / "docs" / "z.txt")),
    ]


# ── splitting ────────────────────────────────────────────────────────────────────────────────────────────────────────


def split(builder, text: str, *, tokens: int, overlap: int = 0) -> list[str]:
    splitter = Splitter(builder, IndexSettings(passage_tokens=tokens, overlap_tokens=overlap))
    return [text[start:end] for start, end in splitter.spans(text)]


def test_splits_at_sentence_ends(builder):
    text = "The old mill. The old mill! The old mill? The old mill…\n\nThe old mill"
    one, dots = len(builder.encode("The old mill.")), len(builder.encode("The old mill…"))
    assert dots < 2 * one
    assert split(builder, text, tokens=dots) == ["The old mill.", "The old mill!", "The old mill?", "The old mill…", "The old mill"]
    assert split(builder, text, tokens=2 * one + 2)[0] == "The old mill. The old mill!"


def test_sentence_ends_in_other_scripts(builder):
    for parts, space in ((["東京。", "東京に行く！", "東京"], ""), (['He said "no."', "Then (he left.)", "Well, it was so."], " ")):
        longest = max(len(builder.encode(part)) for part in parts)
        assert split(builder, space.join(parts), tokens=longest) == parts


@pytest.mark.parametrize("tokens", [1, 3, 8, 20, 60, 1000])
@pytest.mark.parametrize("text", [TEXT, TEXT.replace(" ", ""), "x" * 500, "lamp " * 100, "😀" * 30 + " é. مرحبا بالعالم. " * 5, "a.\n\n\n b.  c?!  " * 9])
def test_passages_fit_and_nothing_is_lost(builder, text, tokens):
    splitter = Splitter(builder, IndexSettings(passage_tokens=tokens))
    spans = splitter.spans(text)
    for start, end in spans:
        piece = text[start:end]
        assert piece == piece.strip() and piece
        assert len(builder.encode(piece)) <= tokens or len(piece) == 1
    assert "".join("".join(text[start:end] for start, end in spans).split()) == "".join(text.split())
    assert [start for start, _ in spans] == sorted(start for start, _ in spans)


def test_overlap_repeats_whole_sentences(builder):
    text = " ".join(f"The old mill number {number}." for number in range(10, 20))
    one = len(builder.encode(" The old mill number 10."))
    passages = split(builder, text, tokens=3 * one, overlap=one)
    for before, after in pairwise(passages):
        assert before.count(".") == 3 and after.startswith(before[before.rindex("The old") :])
    assert all(len(builder.encode(passage)) <= 3 * one for passage in passages)
    assert all(text.count(passage) == 1 for passage in passages)


def test_offsets_point_into_the_file(tmp_path, read):
    text = "\n".join(f"{TEXT} Number {number}." for number in range(30))
    (tmp_path / "a.txt").write_text(text)
    passages = read(tmp_path / "a.txt", passage_tokens=50)
    assert len(passages) > 20
    assert [passage.id for passage in passages] == [f"{tmp_path / 'a.txt'}#{number}" for number in range(1, len(passages) + 1)]
    assert all(text[passage.metadata["start"] : passage.metadata["end"]] == passage.text for passage in passages)


def test_large_files_are_read_in_blocks(tmp_path, read, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK_CHARACTERS", 300)
    text = "\n\n".join(f"{TEXT} Number {number}." for number in range(30)) + "x" * 2000
    (tmp_path / "a.txt").write_text(text)
    passages = read(tmp_path / "a.txt", passage_tokens=50)
    assert len({passage.id for passage in passages}) == len(passages)
    assert all(text[passage.metadata["start"] : passage.metadata["end"]] == passage.text for passage in passages)
    assert "".join("".join(passage.text for passage in passages).split()) == "".join(text.split())


def test_long_rows_are_split(tmp_path, read):
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "a", "text": TEXT}) + "\n" + json.dumps({"id": "b", "text": "One."}))
    passages = read(tmp_path / "a.jsonl", passage_tokens=30)
    assert [passage.id for passage in passages][-2:] == [f"a#{len(passages) - 1}", "b"] and passages[0].id == "a#1"


def test_reading_streams(tmp_path, builder):
    with (tmp_path / "a.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": f"Number {number}."}) + "\n" for number in range(2000))
        file.write("broken")
    stream = read_passages([tmp_path / "a.jsonl"], builder=builder, settings=IndexSettings())
    assert next(stream).text == "Number 0."


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_missing_and_unknown_files(tmp_path, read):
    with pytest.raises(NotFoundError, match=r"There is no file or folder .*nothing.txt: check the path"):
        read(tmp_path / "nothing.txt")
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(InputError, match=r"a.docx is of a kind that cannot be read: refrag reads txt, .*pdf, folders of them"):
        read(tmp_path / "a.docx")
    with pytest.raises(InputError, match="holds no file that can be read: refrag reads txt"):
        read(tmp_path)


def test_paths_are_checked_before_anything_is_read(tmp_path, builder):
    (tmp_path / "a.txt").write_text(TEXT)
    with pytest.raises(NotFoundError):
        read_passages([tmp_path / "a.txt", tmp_path / "missing.txt"], builder=builder, settings=IndexSettings())


@pytest.mark.parametrize(("name", "content"), [("a.txt", ""), ("a.txt", " \n\n"), ("a.jsonl", ""), ("a.json", "[]"), ("a.jsonl", '{"text": " "}')])
def test_empty_corpus(tmp_path, read, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=r"No passage with text was found in .*: check that the files are not empty"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "One."}\n{"text": \n{"text": "Two."}\n', r"a.jsonl, line 2: this line is not JSON \(.*\); mend it, or keep the rest with --skip-bad"),
        ("a.jsonl", '{"text": "One."}\n{"txt": "x", "n": 1}\n{"text": "Two."}', r'a.jsonl, line 2: a row must have a string under "text" .*, has the keys txt, n'),
        ("a.jsonl", '{"text": "One."}\n17\n{"text": "Two."}', r"a.jsonl, line 2: a row must have .*, has a int"),
        ("a.jsonl", '{"text": "One."}\n{"text": "\\ud800"}\n{"text": "Two."}', r"a.jsonl, line 2: the text holds half a character"),
        ("a.jsonl", '{"text": "One."}\n' + "[" * 100_000 + '\n{"text": "Two."}', r"a.jsonl, line 2: this line is not JSON"),
        ("a.json", '[{"text": "One."}, {"text": null}, {"text": "Two."}]', r"a.json, row 2: a row must have"),
        ("a.csv", "id,text\n1,One.\n2\n3,Two.\n", r"a.csv, line 3: this row has fewer cells than the header"),
        ("a.csv", "id,text\n1,One.\n2,a,b\n3,Two.\n", r"a.csv, line 3: this row has more cells than the header"),
    ],
)
def test_bad_rows(tmp_path, read, caplog, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read(tmp_path / name)
    with caplog.at_level("WARNING"):
        assert [passage.text for passage in read(tmp_path / name, skip_bad=True)] == ["One.", "Two."]
    assert f"1 bad row or file was left out (1 in {tmp_path / name}); the first: " in caplog.text and "--skip-bad" not in caplog.text


def test_a_quote_that_is_never_closed_is_no_cell(tmp_path, read, caplog):
    (tmp_path / "a.csv").write_text('id,text\n1,One.\n2,"Two.\n3,Three.\n')
    with pytest.raises(InputError, match=r"a.csv, line 3: this row is not CSV \(unexpected end of data\); mend its quotes, or keep the rest with --skip-bad"):
        read(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text('id,text\n1,One.\n2,"Two" or so.\n3,Three.\n')
    with caplog.at_level("WARNING"):
        assert [passage.text for passage in read(tmp_path / "a.csv", skip_bad=True)] == ["One."]
        assert [passage.text for passage in read(tmp_path / "b.csv", skip_bad=True)] == ["One.", "Three."]
    assert "b.csv, line 3: this row is not CSV" in caplog.text


def test_broken_files(tmp_path, read):
    (tmp_path / "a.json").write_text('{"text": "One."')
    with pytest.raises(InputError, match=r"a.json: this file is not JSON"):
        read(tmp_path / "a.json")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "One."}\n' * 1000)[:-20])
    with pytest.raises(InputError, match=r"a.jsonl.gz cannot be read \(.*\): check the file"):
        read(tmp_path / "a.jsonl.gz")
    (tmp_path / "b.txt.gz").write_text("not compressed")
    with pytest.raises(InputError, match=r"b.txt.gz cannot be read"):
        read(tmp_path / "b.txt.gz")
    (tmp_path / "a.csv").write_text("id,body\n1,One.\n")
    with pytest.raises(InputError, match=r"a.csv: the header must name a column 'text', has id, body; name the column"):
        read(tmp_path / "a.csv")


def test_encodings(tmp_path, read):
    (tmp_path / "a.txt").write_bytes("Größe.".encode("latin-1"))
    with pytest.raises(InputError, match=r"a.txt is not utf-8 text \(byte 0xf6\): pass its encoding, for example --encoding latin-1"):
        read(tmp_path / "a.txt")
    assert read(tmp_path / "a.txt", encoding="latin-1")[0].text == "Größe."
    (tmp_path / "b.txt").write_bytes("\ufeffGröße.".encode())
    assert read(tmp_path / "b.txt")[0].text == "Größe."
    with pytest.raises(InputError, match="There is no text encoding 'klingon': try --encoding utf-8"):
        read(tmp_path / "b.txt", encoding="klingon")


def test_one_badly_encoded_line_is_named_and_can_be_skipped(tmp_path, read):
    lines = b'\xef\xbb\xbf{"text": "One."}\r\n{"text": "Gr\xf6sse."}\n{"text": "Zw\xc3\xb6lf."}\n'
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    for name in ("a.jsonl", "b.jsonl.gz"):
        with pytest.raises(InputError, match=rf"{name}, line 2: this is not utf-8 text \(byte 0xf6\); pass its encoding, for example --encoding latin-1, or keep the rest"):
            read(tmp_path / name)
        assert [passage.text for passage in read(tmp_path / name, skip_bad=True)] == ["One.", "Zwölf."]
    (tmp_path / "c.jsonl").write_text('{"text": "Größe."}\n{"text": "Two."}\n', encoding="utf-16")
    assert [passage.text for passage in read(tmp_path / "c.jsonl", encoding="utf-16")] == ["Größe.", "Two."]


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.json", b'[{"text": "One."}, {"text": "Gr\xf6sse."}, {"text": "Zw\xc3\xb6lf."}]', "row 2"),
        ("a.json", b'[{"text": "One."}, {"passages": [{"text": "x", "title": "\xf6"}]}, {"text": "Zw\xc3\xb6lf."}]', "row 2"),
        ("a.json", b'{"text": "One."}\n{"text": "Gr\xf6sse."}\n{"text": "Zw\xc3\xb6lf."}\n', "line 2"),
        ("a.csv", b"id,text\r\n1,One.\r\n2,Gr\xf6sse.\r\n3,Zw\xc3\xb6lf.\r\n", "line 3"),
        ("a.tsv", b"id\ttext\n1\tOne.\n\xf6\tTwo.\n3\tZw\xc3\xb6lf.\n", "line 3"),
    ],
)
def test_a_badly_encoded_row_costs_that_row_only(tmp_path, read, caplog, name, content, where):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}, {where}: this is not utf-8 text \(byte 0xf6\); pass its encoding, for example --encoding latin-1, or keep the rest"):
        read(tmp_path / name)
    with caplog.at_level("WARNING"):
        assert [passage.text for passage in read(tmp_path / name, skip_bad=True)] == ["One.", "Zwölf."]
    assert f"1 bad row or file was left out (1 in {tmp_path / name}); the first: {tmp_path / name}, {where}: this is not utf-8 text" in caplog.text
    passages = read(tmp_path / name, encoding="latin-1")
    assert len(passages) == 3 and "ö" in passages[1].text + passages[1].title + passages[1].id


def test_a_badly_encoded_file_without_rows_is_named(tmp_path, read, caplog):
    (tmp_path / "bad.json").write_bytes(b'{"text": "Gr\xf6sse')
    (tmp_path / "bad.csv").write_bytes(b"id,text,\xf6\n1,One.,2\n")
    (tmp_path / "good.json").write_text('{"text": "One."}')
    for name, where in (("bad.json", ""), ("bad.csv", ", line 1")):
        with pytest.raises(InputError, match=rf"{name}{where}: this is not utf-8 text"):
            read(tmp_path / name)
    with caplog.at_level("WARNING"):
        assert [passage.text for passage in read(tmp_path, skip_bad=True)] == ["One."]
    assert f"2 bad rows or files were left out (1 in {tmp_path / 'bad.csv'}, 1 in {tmp_path / 'bad.json'}); the first: " in caplog.text


def test_sources_are_files_read_to_their_end(tmp_path, builder):
    (tmp_path / "a.jsonl").write_text('{"text": "One."}\n{broken\n')
    (tmp_path / "b.txt").write_text("Two.")
    (tmp_path / "c.txt").write_text("")
    sources: set[str] = set()
    assert len(list(read_passages([tmp_path], builder=builder, settings=IndexSettings(), skip_bad=True, sources=sources))) == 2
    assert sources == {str(tmp_path / "b.txt"), str(tmp_path / "c.txt")}


def test_strange_sections_of_html_are_skipped(tmp_path, read):
    (tmp_path / "a.html").write_text("<p>One.</p><![foo[bar]]><p>Two.</p>")
    assert read(tmp_path / "a.html")[0].text.startswith("One.") and "Two." in read(tmp_path / "a.html")[0].text
