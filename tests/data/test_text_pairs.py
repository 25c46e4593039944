"""Pairs from every kind of file and from a dataset's folder, and what is refused."""

import json

import pytest
from datasets import Dataset
from toy_translation import toy_pairs, write_lines

from sas_hf.data.text_pairs import PairColumns, encode_side, read_pairs, train_pair_tokenizer


ROWS = [{"en": 'a "cat", old', "es": "un gato viejo"}, {"en": "NA", "es": "7"}]
COLUMNS = PairColumns("en", "es", ("data.source_column", "data.target_column"))


def files_of(folder):
    """The two rows in every form."""
    (folder / "a.csv").write_text('id,en,es\n1,"a ""cat"", old",un gato viejo\n2,NA,7\n')
    (folder / "a.tsv").write_text('en\tes\n"a ""cat"", old"\tun gato viejo\nNA\t7\n')
    (folder / "a.json").write_text(json.dumps(ROWS))
    write_lines(folder / "a.jsonl", ROWS)
    Dataset.from_list(ROWS).to_parquet(folder / "a.parquet")
    nested = [{"id": number, "translation": row} for number, row in enumerate(ROWS)]
    write_lines(folder / "nested.jsonl", nested)
    Dataset.from_list(nested).to_parquet(folder / "nested.parquet")
    return sorted(folder.iterdir())


def test_every_form_gives_the_same_pairs(tmp_path):
    for path in files_of(tmp_path):
        found = read_pairs(str(path), COLUMNS, "data.train")
        assert [dict(row) for row in found] == [{"source": row["en"], "target": row["es"]} for row in ROWS], path
    both = read_pairs(str(tmp_path / "*.parquet"), COLUMNS, "data.train")
    assert both["target"][:] == ["un gato viejo", "7"] * 2


def test_a_dataset_that_the_hub_would_give(tmp_path, monkeypatch):
    """`datasets` reads a folder under its name as it reads the Hub."""
    (tmp_path / "books").mkdir()
    Dataset.from_list([{"translation": row} for row in ROWS]).to_parquet(tmp_path / "books" / "train.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sas_hf.data.text_pairs.find_files", lambda source, field: None)
    found = read_pairs("books", COLUMNS, "data.train", cache=str(tmp_path / "cache"))
    assert found["source"][:] == [row["en"] for row in ROWS]
    with pytest.raises(ValueError, match="'fr', which `translation` of books of the Hub does not have. .* are en, es"):
        read_pairs("books", PairColumns("en", "fr"), "data.train", cache=str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match="no dataset with a split 'tset'|nor a dataset with a split 'tset'"):
        read_pairs("books", COLUMNS, "data.train", split="tset", cache=str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "en,es\na,b\nc\n", "has 1 fields in the row that ends in line 3, but 2 columns"),
        ("a.csv", "en,es\na,b\nc,\nd, \n", "'es', which is empty in line 3 of .*; 2 texts are"),
        ("a.csv", "en,spanish\na,b\n", "`data.target_column` is 'es', which .* Its columns are en, spanish"),
        ("a.csv", "en,es\n", "has no pairs"),
        ("a.csv", "", "is empty"),
        ("a.jsonl", '{"en": "a", "es": null}\n', "'es', which is empty in line 1"),
        ("a.jsonl", '{"en": "a", "es": "b"}\n{"en": "c"}\n', "'es', which line 2 of .* does not have"),
        ("a.jsonl", '{"en": "a", "es": ["b", "c"]}\n', "'es', but in line 1 of .* that holds .*, not text"),
        ("a.json", '{"en": ["a", "c"], "es": ["b"]}', "holds .*, not text"),
        (
            "a.jsonl",
            '{"translation": {"en": "a"}}\n',
            "which `translation` in line 1 of .* does not have. Its columns are en",
        ),
        ("a.jsonl", '{"translation": {"en": "a", "es": ""}}\n', "'es', which is empty in line 1 of"),
        ("a.txt", "a\tb\n", "is no table; pairs stand in two columns"),
    ],
)
def test_what_are_no_pairs_is_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_pairs(str(tmp_path / name), COLUMNS, "data.train")


def test_parquet_of_other_things_is_refused(tmp_path):
    Dataset.from_list([{"en": "a", "es": 1}]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="`data.target_column` is 'es', but in row 1 of .* that holds 1, not text"):
        read_pairs(str(tmp_path / "a.parquet"), COLUMNS, "data.train")
    Dataset.from_list([{"translation": {"en": "a", "es": None}}, {"translation": {"en": "a", "es": "b"}}]).to_parquet(
        tmp_path / "b.parquet"
    )
    with pytest.raises(ValueError, match="'es', which is empty in row 1 of"):
        read_pairs(str(tmp_path / "b.parquet"), COLUMNS, "data.train")


def test_a_vocabulary_without_room_for_all_bytes_is_refused():
    pairs = Dataset.from_dict({"source": ["a"], "target": ["b"]})
    with pytest.raises(ValueError, match="`vocab_size` is 200; .* needs at least 259"):
        train_pair_tokenizer(pairs, 200)


def test_a_target_ends_also_where_the_tokenizer_ends_none():
    pairs = toy_pairs()
    texts = [row["es"] for row in pairs[:4]]
    tokenizer = train_pair_tokenizer(Dataset.from_dict({"source": texts, "target": texts}), 300)
    with_end, _ = encode_side(tokenizer, texts, 99, target=True)
    tokenizer.backend_tokenizer.post_processor = None
    assert tokenizer.eos_token_id not in tokenizer(texts[0]).input_ids
    for length in (99, 6):
        found, _ = encode_side(tokenizer, texts, length, target=True)
        assert found == [[*ids[: length - 1], 2] if len(ids) > length else ids for ids in with_end]
    assert tokenizer.eos_token_id not in encode_side(tokenizer, texts, 99, target=False)[0][0]
