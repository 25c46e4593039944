"""The text of a recipe: what is refused and how, and what packed sequences the rest gives."""

import copy
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
        ({"train": "@latin.txt"}, "latin.txt is not text in UTF-8: its byte 1 is 0xe4; convert it"),
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
