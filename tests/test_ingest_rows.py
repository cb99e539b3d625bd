"""Rows: datasets saved and on the hub, other columns, values of their own."""
# ruff: noqa: F811  (the fixtures are those of the neighbouring file)

import pytest
from test_ingest import builder, read  # noqa: F401

from refrag.errors import InputError, NotFoundError
from refrag.index import documents


@pytest.fixture
def hub(monkeypatch):
    """The hub has every dataset."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, timeout: None)
    documents.check_on_hub.cache_clear()
    yield
    documents.check_on_hub.cache_clear()


def test_a_dataset_on_the_hub_is_read_by_its_name(tmp_path, read, monkeypatch, hub):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "rows.jsonl").write_text('{"id": "a", "text": "One."}\n{"id": "b", "text": "Two."}\n')
    (tmp_path / "more.jsonl").write_text('{"id": "c", "text": "Three."}\n')
    files, real = {"train": str(tmp_path / "rows.jsonl"), "test": str(tmp_path / "more.jsonl")}, datasets.load_dataset
    asked = []

    def load_dataset(name, subset, **options):  # there is no hub here: the same rows, from files
        asked.append((name, subset))
        return real("json", data_files=files, cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    assert [(passage.id, passage.text) for passage in read("someone/facts")] == [("a", "One."), ("b", "Two."), ("c", "Three.")]
    assert [passage.id for passage in read("someone/facts:test", subset="small")] == ["c"]
    assert asked == [("someone/facts", None), ("someone/facts", "small")]
    with pytest.raises(NotFoundError, match=r"The hub gave no dataset someone/facts:nosplit \(.+\): check the name, its split \(owner/name:train\) and --subset"):
        read("someone/facts:nosplit")


def test_the_text_may_stand_in_another_column(tmp_path, read):
    (tmp_path / "a.jsonl").write_text('{"id": "a", "body": "One.", "year": 7}\n{"body": 5}\n')
    (tmp_path / "a.csv").write_text("id,body\nb,Two.\n")
    with pytest.raises(InputError, match=r'a.jsonl, line 1: a row must have a string under "text" .*; name the column that holds it, such as --text-column body, or keep'):
        read(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match=r'a.jsonl, line 2: a row must have a string under "body" or a list under "passages", has a int there; mend it'):
        read(tmp_path / "a.jsonl", text_column="body")
    passages = read(tmp_path, text_column="body", skip_bad=True)
    assert [(passage.id, passage.text) for passage in passages] == [("b", "Two."), ("a", "One.")]
    assert passages[1].metadata["year"] == 7 and "body" not in passages[1].metadata
    with pytest.raises(InputError, match=r"a.csv: the header must name a column 'text', has id, body; name the column that holds the text, such as --text-column body"):
        read(tmp_path / "a.csv")


def test_a_row_keeps_its_own_source_and_start(tmp_path, read):
    (tmp_path / "a.csv").write_text("id,text,source,start\na,One.,wiki,5\n")
    [passage] = read(tmp_path / "a.csv")
    assert passage.metadata == {"source": str(tmp_path / "a.csv"), "row_source": "wiki", "start": "5", "end": 4}


def test_missing_values_of_pandas_are_left_out(tmp_path, read):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["One.", "Two."], "year": [1742.0, float("nan")]}), tmp_path / "a.parquet")
    assert [passage.metadata.get("year") for passage in read(tmp_path / "a.parquet")] == [1742.0, None]


def test_where_everything_is_bad_that_is_said(tmp_path, read):
    (tmp_path / "a.jsonl").write_text('{"text": 5}\nbroken\n')
    with pytest.raises(InputError, match=r"Not one row or file could be read, 2 were bad; the first: .*a.jsonl, line 1: a row must have a string"):
        read(tmp_path / "a.jsonl", skip_bad=True)


def test_a_dataset_that_breaks_off_is_one_sentence(tmp_path, read, monkeypatch, hub):
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_list([{"id": "a", "text": "One."}])
    whole.save_to_disk(str(tmp_path / "saved"))
    next((tmp_path / "saved").glob("*.arrow")).write_bytes(bytes(20))
    with pytest.raises(InputError, match=r"saved: this dataset cannot be read \(.+\); save it again, or keep the rest with --skip-bad"):
        read(tmp_path / "saved")

    def rows():
        yield {"id": "a", "text": "One."}
        raise ValueError("the line is gone")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **options: {"train": rows()})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"someone/facts: this dataset cannot be read from here \(the line is gone\); get it again"):
        read("someone/facts")
    assert [passage.text for passage in read("someone/facts", skip_bad=True)] == ["One."]


def test_a_name_that_is_neither_here_nor_on_the_hub(tmp_path, read, monkeypatch):
    import huggingface_hub

    def absent(self, name, *, timeout):
        raise FileNotFoundError(f"Dataset '{name}' doesn't exist.")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", absent)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFoundError, match=r"There is no file or folder no/where, and the hub gave no dataset of this name \(Dataset 'no/where' doesn't exist\): check the name"):
        read("no/where")
    with pytest.raises(NotFoundError, match=r"There is no file or folder no/where.txt: check the path"):
        read("no/where.txt")


def test_metadata_that_is_no_mapping_is_kept_as_it_is(tmp_path, read):
    (tmp_path / "rows.jsonl").write_text('{"id": "a", "text": "One.", "metadata": "2019, north"}\n{"id": "b", "text": "Two.", "metadata": null}\n{"id": "c", "text": "Three.", "metadata": {"year": 2019}}\n')
    first, second, third = (passage.metadata for passage in read(tmp_path / "rows.jsonl"))
    assert first["metadata"] == "2019, north" and "metadata" not in second and third["year"] == 2019 and "metadata" not in third
