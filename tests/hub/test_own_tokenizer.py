"""`sas-hf tokenizer`: of texts and tables, the same each time, refused before anything is written."""

import json

import pytest
from helpers import sas_hf
from transformers import AutoTokenizer

from sas_hf.hub.own_tokenizer import make_tokenizer


WORDS = "the attention of one head and the attention of another head\n"


def test_a_tokenizer_of_texts_loads_and_knows_every_text(tmp_path):
    (tmp_path / "a.txt").write_text(WORDS * 30)
    run = sas_hf("tokenizer", tmp_path / "a.txt", tmp_path / "made", "--size", "275")
    assert run.returncode == 0 and "275 tokens" in run.stdout, run.stderr
    loaded = AutoTokenizer.from_pretrained(tmp_path / "made")
    assert len(loaded) == 275 and len(loaded("the attention")["input_ids"]) < 10
    assert loaded.decode(loaded("Ünseen 漢字")["input_ids"]) == "Ünseen 漢字"
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"words": line}) + "\n" for line in [WORDS.strip()] * 30))
    again = make_tokenizer(str(tmp_path / "b.jsonl"), tmp_path / "again", 275, "words")
    assert again.get_vocab() == loaded.get_vocab()


def test_what_is_wrong_is_said_before_anything_is_written(tmp_path):
    (tmp_path / "a.txt").write_text(WORDS)
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="`size` is 256; it must be at least 257"):
        make_tokenizer(str(tmp_path / "a.txt"), tmp_path / "made", 256)
    with pytest.raises(ValueError, match="there is no text"):
        make_tokenizer(str(tmp_path / "empty.txt"), tmp_path / "made")
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        make_tokenizer(str(tmp_path / "none.txt"), tmp_path / "made")
    with pytest.raises(FileExistsError):
        make_tokenizer(str(tmp_path / "a.txt"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "empty.txt"]
