"""The text of a recipe: what is refused and how, and what packed sequences the rest gives."""

import copy
import csv
import json
import os
from pydoc_data.topics import topics

import pytest
from datasets import Dataset
from helpers import real_text, train_tokenizer

from sas_hf.training import DataRecipe, check_data, training_data
from sas_hf.training.data import _load_from_hub


DOCUMENTS = [text[:200] for text in real_text()[:40]]
LENGTH = 32


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Good and bad files."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(2):
        part = DOCUMENTS[number * 20 : (number + 1) * 20]
        Dataset.from_dict({"text": part, "n": list(range(20))}).to_parquet(folder / f"part-{number}.parquet")
    whole = (folder / "part-0.parquet").read_bytes()
    (folder / "damaged.parquet").write_bytes(whole[: len(whole) // 2])
    Dataset.from_dict({"texts": DOCUMENTS, "id": DOCUMENTS}).to_parquet(folder / "texts.parquet")
    Dataset.from_dict({"text": [""]}).select([]).to_parquet(folder / "rows.parquet")
    (folder / "one.txt").write_text("\n\n".join(DOCUMENTS[:20]))
    (folder / "several.txt").write_text("\n<|endoftext|>\n".join(DOCUMENTS))
    with open(folder / "table.csv", "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([["n", "text"], *([n, text] for n, text in enumerate(DOCUMENTS))])
    with open(folder / "table.TSV", "w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([["text", "n"], *([text, ""] for text in DOCUMENTS)])
    rows = [{"text": text, "n": [n]} for n, text in enumerate(DOCUMENTS)]
    lines = [json.dumps(row) for row in [*rows[:3], {"text": None}, {"text": ""}, *rows[3:]]]
    (folder / "lines.jsonl").write_text("\r\n".join(lines), encoding="utf-8-sig")
    (folder / "list.json").write_text(json.dumps(rows, indent=1))
    (folder / "quotes.csv").write_text("text,n\nAn unquoted comma, here,1\n")
    (folder / "words.csv").write_text("text\nNA\nnull\n0012\n" + "nan\n" * 40)
    (folder / "columns.csv").write_text("txt,n\na,1\n")
    (folder / "twice.csv").write_text("text,text\na,1\n")
    (folder / "header.csv").write_text("text,n\n")
    (folder / "number.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    (folder / "other.jsonl").write_text('{"text": "a"}\n{"content": "b"}\n')
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "half.jsonl").write_text('{"text": "\\ud800"}\n')
    (folder / "packed.txt.gz").write_bytes(b"\x1f\x8b\x08\x00rest")
    (folder / "words.docx").write_bytes(b"PK\x03\x04\x14\x00rest")
    (folder / "late.txt").write_bytes(b"text " * 300_000 + b"\xe4")
    (folder / "empty.txt").touch()
    (folder / "short.txt").write_text("A short text.")
    (folder / "latin.txt").write_bytes("Käse".encode("latin-1") * 100)
    return folder


def recipe(folder, **fields):
    """Names beginning with `@` are of the folder."""

    def resolve(value):
        if isinstance(value, list):
            return [resolve(entry) for entry in value]
        return str(folder / value[1:]) if isinstance(value, str) and value.startswith("@") else value

    fields = {"sequence_length": LENGTH, "cache": str(folder / "cache")} | fields
    return DataRecipe(**{name: resolve(value) for name, value in fields.items()})


def expected_targets(documents, tokenizer):
    return [
        token
        for text in documents
        for token in (*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id)
    ]


def targets(rows):
    return [token for row in rows for token in row["labels"] if token != -100]


def assert_packed(rows, documents, tokenizer, length=LENGTH):
    """Each token and each end is a target once, in order, but for those that fill no row at the end."""
    found, expected = targets(rows), expected_targets(documents, tokenizer)
    assert found and found == expected[: len(found)] and len(expected) - len(found) < length


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({}, ValueError, "`data.train` is None; name text or parquet files"),
        ({"train": []}, ValueError, "`data.train` is \\[\\]"),
        ({"train": "@nowhere.txt"}, FileNotFoundError, "`data.train` names .*nowhere.txt, which does not exist"),
        ({"train": ["@one.txt", "nowhere"]}, FileNotFoundError, "`data.train` names nowhere, which does not exist"),
        ({"train": "@nothing-*.parquet"}, FileNotFoundError, "`data.train` is .*nothing-.*, which no file matches"),
        ({"train": "@"}, ValueError, "names the folder .*; name its files, such as .*/\\*.parquet"),
        ({"train": ["@one.txt", "@part-0.parquet"]}, ValueError, "give files of one kind"),
        ({"train": "@empty.txt"}, ValueError, "`data.train` names .*empty.txt, which is empty"),
        ({"train": "@rows.parquet"}, ValueError, "rows.parquet, which has no rows"),
        ({"train": "@damaged.parquet"}, ValueError, "damaged.parquet, a damaged parquet file .*; fetch it again"),
        ({"train": "@texts.parquet"}, ValueError, "'text', .* mean 'texts'\\? Its columns are texts, id"),
        (
            {"train": "@part-0.parquet", "text_column": "n"},
            ValueError,
            "in .*part-0.parquet that holds int64, not text",
        ),
        ({"train": "@one.txt", "validation": "@empty.txt"}, ValueError, "`data.validation` names .*empty.txt"),
        ({"train": "@one.txt", "validation_split": "test"}, ValueError, "only a dataset of the Hub has splits"),
        (
            {"train": "@one.txt", "validation": "@one.txt", "validation_documents": 1},
            ValueError,
            "`data.validation` and `data.validation_documents` are both given",
        ),
        ({"train": "@nowhere.csv"}, FileNotFoundError, "`data.train` names .*nowhere.csv, which does not exist"),
        ({"train": "nowhere.jsonl"}, FileNotFoundError, "`data.train` names nowhere.jsonl, which does not exist"),
        (
            {"train": ["@table.csv", "@lines.jsonl"]},
            ValueError,
            "csv .table.csv. and json .lines.jsonl.; give",
        ),
        ({"train": "@columns.csv"}, ValueError, "'text', .*columns.csv does not have; .* Its columns are txt, n"),
        ({"train": "@twice.csv"}, ValueError, "'text', which .*twice.csv has several times"),
        ({"train": "@header.csv"}, ValueError, "header.csv, which has no rows"),
        ({"train": "@quotes.csv"}, ValueError, "quotes.csv has 3 fields in .* line 2, but 2 columns"),
        ({"train": "@half.jsonl"}, ValueError, "half.jsonl is not text in UTF-8: in line 1"),
        ({"train": "@lines.jsonl", "text_column": "n"}, ValueError, "in line 1 of .*lines.jsonl that holds \\[0\\]"),
        ({"train": "@latin.txt"}, ValueError, "latin.txt is not text in UTF-8: its byte 1 is 0xe4; convert it"),
        ({"train": "@packed.txt.gz"}, ValueError, "packed.txt.gz is not text .* its byte 1 is 0x8b; .* or unpack it"),
        ({"train": "@words.docx"}, ValueError, "words.docx is not text in UTF-8: its byte 5 is 0x00"),
        ({"train": "@one.txt", "text_column": "texts"}, ValueError, "`data.text_column` is 'texts', of tables"),
        (
            {"train": "@table.csv", "document_separator": "--"},
            ValueError,
            "`data.document_separator` is '--'",
        ),
        ({"train": "@one.txt", "sequence_length": 1}, ValueError, "`data.sequence_length` is 1; .* at least 2"),
        ({"train": "@one.txt", "shuffle_buffer": 0}, ValueError, "`data.shuffle_buffer` is 0"),
        ({"train": "@one.txt", "max_validation_sequences": 0}, ValueError, "`data.max_validation_sequences` is 0"),
    ],
)
def test_what_is_refused_before_anything_is_built(fields, error, message, folder):
    with pytest.raises(error, match=message):
        check_data(recipe(folder, **fields))
    assert not (folder / "cache").exists() or not list((folder / "cache").glob("**/*.incomplete"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": "@short.txt"}, "documents of `data.train` have fewer than `data.sequence_length` = 32 tokens"),
        ({"train": "@one.txt", "validation": "@short.txt"}, "documents of `data.validation` have fewer"),
        ({"train": "@late.txt"}, "late.txt is not text in UTF-8: its byte 1,500,000 is 0xe4"),
        ({"train": "@number.jsonl"}, "in line 2 of .*number.jsonl that holds 3, not text"),
        ({"train": "@other.jsonl"}, "'text', which line 2 of .*other.jsonl does not have. Its columns are content"),
        ({"train": "@broken.jsonl"}, "broken.jsonl is no JSON with an object on each line: line 2"),
    ],
)
def test_what_only_reading_it_shows(fields, message, folder, tokenizer):
    with pytest.raises(ValueError, match=message):
        training_data(recipe(folder, **fields), tokenizer, seed=0)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_dataset_out_of_reach_is_refused_in_words(streaming, folder, tokenizer):
    unreachable = recipe(folder, train="nobody/nothing", streaming=streaming)
    check_data(unreachable)  # which looks at nothing but the recipe and files
    with pytest.raises(FileNotFoundError, match="nobody/nothing is no file here, nor a dataset that the Hub gives"):
        training_data(unreachable, tokenizer, seed=0)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_with_splits(streaming, folder, tokenizer, tmp_path):
    """A folder in the layout of the Hub's datasets, as `load_dataset` reads both."""
    for number, split in enumerate(["train", "validation"]):
        (tmp_path / f"{split}.parquet").write_bytes((folder / f"part-{number}.parquet").read_bytes())
    settings = recipe(folder, streaming=streaming)
    documents = _load_from_hub(settings, str(tmp_path), "validation", streaming)
    assert [text for texts in documents.texts() for text in texts] == DOCUMENTS[20:]
    with pytest.raises(FileNotFoundError, match="nor a dataset that the Hub gives: .*split.*tests"):
        _load_from_hub(settings, str(tmp_path), "tests", streaming)
    settings.text_column = "txt"
    with pytest.raises(ValueError, match="of the Hub does not have; did you mean 'text'\\? Its columns are text, n"):
        _load_from_hub(settings, str(tmp_path), "train", streaming)


@pytest.mark.parametrize(
    ("fields", "documents"),
    [
        ({"train": "@part-*.parquet"}, DOCUMENTS),
        ({"train": ["@part-1.parquet", "@part-0.parquet"]}, DOCUMENTS[20:] + DOCUMENTS[:20]),
        ({"train": "@one.txt"}, ["\n\n".join(DOCUMENTS[:20])]),
        ({"train": "@several.txt", "document_separator": "<|endoftext|>"}, DOCUMENTS),
        ({"train": "@texts.parquet", "text_column": "texts"}, DOCUMENTS),
        ({"train": "@table.csv"}, DOCUMENTS),
        ({"train": "@table.TSV"}, DOCUMENTS),
        ({"train": "@lines.jsonl"}, DOCUMENTS),
        ({"train": "@list.json"}, DOCUMENTS),
        ({"train": "@words.csv"}, ["NA", "null", "0012"] + ["nan"] * 40),
    ],
)
def test_every_document_is_packed_once_and_in_order(fields, documents, folder, tokenizer):
    found = training_data(recipe(folder, **fields), tokenizer, seed=0)
    assert_packed(found.train, documents, tokenizer)
    assert found.validation is None


def test_the_built_in_text_needs_no_files(folder, tokenizer):
    data = training_data(
        recipe(folder, train="python-reference", sequence_length=512, validation_documents=3), tokenizer, seed=0
    )
    ends = targets(data.train).count(tokenizer.eos_token_id)
    held_out = [topics[topic].strip() for topic in sorted(topics)[:3]]
    assert ends in (len(topics) - 3, len(topics) - 4)  # the last document may be in what fills no row
    assert_packed(data.validation, held_out, tokenizer, 512)


@pytest.mark.parametrize("streaming", [False, True])
def test_held_out_documents_are_not_trained_on(streaming, folder, tokenizer):
    fields = {"train": "@part-*.parquet", "validation_documents": 5, "sequence_length": 16, "streaming": streaming}
    data = training_data(recipe(folder, **fields), tokenizer, seed=0)
    assert_packed(data.validation, DOCUMENTS[:5], tokenizer, 16)
    if not streaming:
        assert_packed(data.train, DOCUMENTS[5:], tokenizer, 16)


def test_validation_is_the_start_of_its_text(folder, tokenizer):
    fields = {"train": "@part-0.parquet", "validation": "@part-1.parquet"}
    some = training_data(recipe(folder, **fields, max_validation_sequences=4), tokenizer, seed=0).validation
    everything = training_data(recipe(folder, **fields, max_validation_sequences=None), tokenizer, seed=0).validation
    assert_packed(everything, DOCUMENTS[20:], tokenizer)
    assert list(some) == list(everything)[:4]


def test_the_cache_serves_again_until_something_changes(tmp_path):
    """What was tokenised once is read again for other seeds; not for other text, lengths or tokenizers."""
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(DOCUMENTS[:20]))
    tokenizer = train_tokenizer()
    settings = {"train": str(path), "cache": str(tmp_path / "cache"), "sequence_length": LENGTH}

    def file(tokenizer=tokenizer, seed=0, **fields):
        (cached,) = training_data(DataRecipe(**(settings | fields)), tokenizer, seed).train.cache_files
        return cached["filename"]

    first = file()
    tokenizer(["used", "and padded"], padding=True, truncation=True, max_length=8)
    assert file() == first and file(seed=1) == first and first.startswith(str(tmp_path / "cache"))
    begins_otherwise = copy.deepcopy(tokenizer)
    begins_otherwise.bos_token = begins_otherwise.pad_token
    others = {file(sequence_length=16), file(tokenizer=train_tokenizer(350)), file(document_separator="---")}
    others.add(file(tokenizer=begins_otherwise))
    path.write_text("\n\n".join(DOCUMENTS[20:]))
    assert len({first, file(), *others}) == 6
    Dataset.from_dict({"text": DOCUMENTS, "other": DOCUMENTS[::-1]}).to_parquet(tmp_path / "two.parquet")
    columns = {file(train=str(tmp_path / "two.parquet"), text_column=name) for name in ("text", "other")}
    assert len(columns) == 2


@pytest.mark.parametrize("train", ["@table.csv", "@lines.jsonl"])
def test_a_stream_of_a_table_is_what_is_cached(train, folder, tokenizer):
    fields = {"train": train, "shuffle_buffer": 1}
    cached = training_data(recipe(folder, **fields), tokenizer, seed=0).train
    stream = training_data(recipe(folder, **fields, streaming=True), tokenizer, seed=0).train
    assert [row for row, _ in zip(stream, cached, strict=False)] == list(cached)


def test_validation_on_a_file_that_is_trained_on_is_refused(folder, tmp_path):
    """By its own name, another, a link or a copy."""
    one = folder / "one.txt"
    (tmp_path / "link.txt").symlink_to(one)
    os.link(one, tmp_path / "hard.txt")
    (tmp_path / "copy.txt").write_bytes(one.read_bytes())
    for name in (one, folder / ".." / folder.name / "one.txt", *tmp_path.iterdir(), f"{folder}/o*.txt"):
        for streaming in (False, True):
            settings = recipe(folder, train=["@several.txt", "@one.txt"], validation=str(name), streaming=streaming)
            with pytest.raises(ValueError, match="`data.validation` names .*, which is trained on, too"):
                check_data(settings)
    check_data(recipe(folder, train="@several.txt", validation="@one.txt"))


@pytest.mark.parametrize(
    "fields",
    [
        {"train": "python-reference", "validation": "python-reference"},
        {"train": "some/texts", "validation": "some/texts"},
        {"train": "some/texts", "validation_split": "train"},
    ],
)
def test_validation_on_the_source_and_split_that_is_trained_on_is_refused(fields, folder):
    with pytest.raises(ValueError, match="which is what is trained on"):
        check_data(recipe(folder, **fields))
    check_data(recipe(folder, train="some/texts", validation_split="test"))


def test_validation_on_documents_that_are_trained_on(folder, tokenizer):
    """Also where they are a part of a longer text, and without reading all that is trained on twice."""
    contained = {"train": "@table.csv", "validation": "@one.txt"}
    for _ in range(2):
        with pytest.raises(ValueError, match="All lines of the documents to validate on are trained on, too"):
            training_data(recipe(folder, **contained), tokenizer, seed=0)
    half = {"train": "@part-0.parquet", "validation": "@list.json", "max_validation_sequences": None}
    with pytest.warns(UserWarning, match=r"(4\d|5\d)% of the lines of the documents to validate on are trained on"):
        training_data(recipe(folder, **half), tokenizer, seed=0)
