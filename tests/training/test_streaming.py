"""Streamed text: what a resumed run trains on and reads, and that a stream packs as everything else does."""

import json
import signal
import subprocess
import sys
from itertools import islice

import datasets
import pytest
import streamed
import torch
from datasets import Dataset, IterableDataset
from helpers import gpt, python_environment, real_text, train_tokenizer
from torch.utils.data import DataLoader
from transformers import default_data_collator

from sas_hf.training import DataRecipe, PackedStream, training_data


FILES, PER_FILE = 4, 14


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Files of short documents, so that a run of a few steps passes several."""
    folder = tmp_path_factory.mktemp("texts")
    documents = [text[:140] for text in real_text()[: FILES * PER_FILE]]
    for number in range(FILES):
        part = documents[number * PER_FILE : (number + 1) * PER_FILE]
        Dataset.from_dict({"text": part}).to_parquet(folder / f"{number}.parquet")
    return folder


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory):
    """A run that nothing interrupts."""
    return streamed.run(str(tmp_path_factory.mktemp("whole")), f"{texts}/*.parquet")


def stream(texts, tokenizer=None, **fields):
    recipe = {"sequence_length": 32, "shuffle_buffer": 5, "streaming": True, "train": f"{texts}/*.parquet"} | fields
    return training_data(DataRecipe(**recipe), tokenizer or train_tokenizer(), seed=3).train


def test_killed_and_resumed_it_trains_on_the_same_batches_to_the_same_weights(whole, texts, tmp_path):
    command = [sys.executable, streamed.__file__, str(tmp_path), f"{texts}/*.parquet", "kill"]
    killed = subprocess.run(command, env=python_environment(), check=False, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    saved = json.loads((tmp_path / "checkpoint-6" / "stream.json").read_text())
    assert (saved["step"], saved["rows"]) == (6, 6 * streamed.ROWS_PER_STEP)

    tokenizer = streamed.counting_tokenizer()
    resumed = streamed.run(str(tmp_path), f"{texts}/*.parquet", tokenizer=tokenizer)
    assert resumed.batches == whole.batches[6 * 2 :]
    weights = dict(resumed.model.named_parameters())
    assert all(torch.equal(weights[name], weight) for name, weight in whole.model.named_parameters())
    assert resumed.state.log_history[-2] == pytest.approx(whole.state.log_history[-2])  # its epoch as well
    # Three steps and the two batches ahead take so many tokens; one block is read again and one may be begun.
    tokens = sum(len(tokenizer.encode(text)) + 1 for text in tokenizer.texts[2 * streamed.BUFFER :])
    assert tokens <= (3 * streamed.ROWS_PER_STEP + 2 * 3) * streamed.LENGTH


def test_a_larger_batch_goes_on_at_the_same_row(whole, texts, tmp_path):
    streamed.run(str(tmp_path), f"{texts}/*.parquet", max_steps=3)
    resumed = streamed.run(str(tmp_path), f"{texts}/*.parquet", max_steps=5, per_device_train_batch_size=6)
    rows = [row for batch in whole.batches[3 * 2 :] for row in batch]
    assert [row for batch in resumed.batches for row in batch] == rows[: 2 * 12]
    saved = json.loads((tmp_path / "checkpoint-5" / "stream.json").read_text())
    assert saved["rows"] == 3 * 6 + 2 * 12


def test_two_processes_train_on_different_rows_and_resume(texts, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", streamed.__file__]
    done = subprocess.run(
        [*command, str(tmp_path), f"{texts}/*.parquet", "twice"],
        env=python_environment(),
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"process-{number}.json").read_text()) for number in range(2)]
    steps = zip(*(each["whole"] for each in found), strict=True)
    dealt = [row for batches in steps for batch in batches for row in batch]
    assert dealt == [row["input_ids"] for row in islice(stream(texts), streamed.STEPS * 12)]
    for each in found:
        assert each["again"] == each["whole"][6 * 2 :] and each["same"]


SOURCES = {
    "parquet": {},
    "the first documents held out": {"validation_documents": 17},
    "text files": {"document_separator": "<|endoftext|>"},
    "one row is one document": {"shuffle_buffer": 1},
    "python-reference": {"train": "python-reference", "sequence_length": 128, "shuffle_buffer": 10},
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_place_can_be_taken_up_again(source, texts, tmp_path):
    """Also places that a DataLoader has read past, and those of the second and third time through the files."""
    fields = SOURCES[source]
    if source == "text files":
        for number, path in enumerate(sorted(texts.iterdir())):
            documents = Dataset.from_parquet(str(path), cache_dir=str(tmp_path))["text"]
            (tmp_path / f"{number}.txt").write_text("\n<|endoftext|>\n".join(documents))
        fields = fields | {"train": f"{tmp_path}/*.txt"}
    whole = stream(texts, **fields)
    rows, places = [], {}
    for number, row in enumerate(islice(whole, 250)):
        rows.append(row)
        if number % 9 == 8:
            behind = number - number % 4
            places[behind] = json.loads(json.dumps(whole.state_dict(behind)))
    assert source == "python-reference" or places[max(places)]["pass"] > 0
    again = stream(texts, **fields)
    for place, state in places.items():
        again.load_state_dict(state)
        assert list(islice(again, 5)) == rows[place : place + 5], place
    assert list(islice(again, 5)) == rows[:5]  # an iteration without a place is one from the beginning


def test_a_resumed_stream_opens_no_file_that_was_passed(texts, tmp_path):
    for path in texts.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tokenizer = streamed.counting_tokenizer()
    first, again = stream(tmp_path, tokenizer), stream(tmp_path)
    rows = list(islice(first, 90))
    first_file = next(
        path for path in tmp_path.iterdir() if tokenizer.texts[0] in datasets.Dataset.from_parquet(str(path))["text"]
    )
    first_file.write_bytes(b"gone")
    again.load_state_dict(first.state_dict(85))
    assert list(islice(again, 5)) == rows[85:]
    with pytest.raises(Exception, match="Parquet"):  # which a start from the beginning needs
        next(iter(again))


def test_a_pass_gives_every_document_once_in_an_order_of_its_own(texts):
    tokenizer = streamed.counting_tokenizer()
    passes = stream(texts, tokenizer, sequence_length=2)
    for _ in passes:
        if len(tokenizer.texts) > 2 * FILES * PER_FILE:
            break
    count = FILES * PER_FILE
    first, second = tokenizer.texts[:count], tokenizer.texts[count : 2 * count]
    assert sorted(first) == sorted(second) == sorted(text[:140] for text in real_text()[:count])
    assert first != second and first != sorted(first)


def test_streamed_rows_are_those_of_the_cache(texts, tmp_path):
    """Without shuffling, file by file, both pack the same."""
    fields = {"train": str(texts / "0.parquet"), "shuffle_buffer": 1, "cache": str(tmp_path)}
    cached = stream(texts, **fields, streaming=False)
    assert list(islice(stream(texts, **fields), len(cached))) == list(cached)


def test_a_batch_of_streamed_rows_keeps_documents_apart(texts):
    batch = next(iter(DataLoader(stream(texts), batch_size=8, collate_fn=default_data_collator)))
    model = gpt("sas_k5_gqa", vocab_size=len(train_tokenizer()))
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, position_ids=batch["position_ids"]).logits
    begun = [(row, place) for row, place in (batch["position_ids"] == 0).nonzero().tolist() if place > 0]
    assert len({row for row, _ in begun}) > 1
    for row, first in begun:
        (gradient,) = torch.autograd.grad(logits[row, first:].square().sum(), embedded, retain_graph=True)
        reached = gradient.abs().sum(-1) > 0
        assert reached[row, first:].any() and not reached[row, :first].any()
        assert not reached[[other for other in range(len(reached)) if other != row]].any()


def test_what_a_stream_refuses(texts):
    rows = stream(texts)
    list(islice(rows, 20))
    with pytest.raises(ValueError, match="Row 500 is not within"):
        rows.state_dict(500)
    rows.state_dict(20)
    with pytest.raises(ValueError, match="Row 0 is not within"):
        rows.state_dict(0)
    with pytest.raises(ValueError, match="`dataloader_num_workers` must be 0"):
        next(iter(DataLoader(rows, num_workers=1, collate_fn=default_data_collator)))
    place = rows.state_dict(20)
    with pytest.raises(ValueError, match="that an earlier version of sas_hf packed, without the end of each document"):
        rows.load_state_dict({name: value for name, value in place.items() if name != "layout"})
    nothing = IterableDataset.from_generator(lambda: iter([{"text": ""}, {"text": None}]))
    with pytest.raises(ValueError, match="no text in the column 'text'"):
        next(iter(PackedStream(nothing, "text", train_tokenizer(), 8, 1, seed=0)))
