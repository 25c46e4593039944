"""Perplexity against a plain loop over windows, in float64; and what is refused before the model is loaded."""

import copy
import csv
import json
import math

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import sas_hf.eval.evaluation
from sas_hf import SASGPTForCausalLM
from sas_hf.eval import PerplexityText, Report, evaluate
from sas_hf.eval.comparison import compare
from sas_hf.eval.perplexity import choose_lengths


@pytest.fixture
def text_file(text, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(text[:3000] + " Fünf Wörter.")  # bytes are not characters
    return path


def reference(model, tokenizer, text, length, stride):
    """Negative log-likelihood of the text in nats, and its number of tokens, by the definition."""
    stream = [tokenizer.eos_token_id, *tokenizer.encode(text)]
    total, predicted = 0.0, 1  # the first token of the stream is given
    while predicted < len(stream):
        end = min(predicted + (length if predicted == 1 else stride), len(stream))
        start = max(0, end - 1 - length)
        logits = model(torch.tensor([stream[start : end - 1]])).logits[0].log_softmax(-1)
        for place in range(predicted, end):
            total -= logits[place - 1 - start, stream[place]].item()
        predicted = end
    return total, len(stream) - 1


@pytest.mark.parametrize("stride", [None, 16])
def test_against_a_plain_loop(stride, checkpoint, tokenizer, text_file):
    lengths = (32, 64, 128)
    result = evaluate(checkpoint, perplexity=PerplexityText(text_file, lengths, stride), device="cpu")
    model = SASGPTForCausalLM.from_pretrained(checkpoint, dtype=torch.float64).eval()
    text = text_file.read_text()
    assert list(result.tasks) == [f"perplexity@{length}" for length in lengths]
    with torch.no_grad():
        for length in lengths:
            task = result.tasks[f"perplexity@{length}"]
            total, tokens = reference(model, tokenizer, text, length, stride or length)
            assert task.metrics["perplexity"].value == pytest.approx(math.exp(total / tokens), rel=1e-5)
            bits = total / math.log(2) / len(text.encode())
            assert task.metrics["bits_per_byte"].value == pytest.approx(bits, rel=1e-5)
            assert task.metrics["nll"].value == pytest.approx(total / tokens, rel=1e-5)
            assert task.details == {
                "context_length": length,
                "stride": stride or length,
                "windows": "sliding" if stride else "disjoint",
                "tokens": tokens,
                "bytes": len(text.encode()),
                "documents": 1,
            }
            assert task.num_samples == 1 + math.ceil((tokens - length) / (stride or length))
            assert 0 < task.metrics["nll"].stderr < task.metrics["nll"].value


def test_two_models_are_compared_window_by_window(checkpoint, text_file, tmp_path):
    perturbed = SASGPTForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        perturbed.get_input_embeddings().weight *= 1.05
    perturbed.save_pretrained(tmp_path / "perturbed")
    models = [checkpoint, tmp_path / "perturbed"]
    first, second = evaluate(
        models, tokenizer=checkpoint, perplexity=PerplexityText(text_file, (32, 64)), device="cpu"
    )
    for found in compare(first, second):
        name = found.name.removesuffix(": bits_per_byte")
        a, b = first.tasks[name], second.tasks[name]
        gain = b.metrics["bits_per_byte"].value - a.metrics["bits_per_byte"].value
        assert found.difference == pytest.approx(gain, rel=1e-9, abs=1e-12) and gain != 0
        assert (found.unit, found.num_samples) == ("bits per byte", a.num_samples)
        # The windows' own difficulty, shared by both, is not in it.
        assert 0 < found.stderr < 0.5 * a.metrics["bits_per_byte"].stderr
        assert f"| {found.name} | {gain:+.5f} |" in Report([first, second]).markdown()
    task = second.tasks["perplexity@32"]  # what rounding alone would do is no difference
    task.scores["bits_per_byte"] = [value + 1e-8 for value in first.tasks["perplexity@32"].scores["bits_per_byte"]]
    assert (compare(first, second)[0].difference, compare(first, second)[0].significant) == (0.0, False)
    other = evaluate(checkpoint, perplexity=PerplexityText(text_file, (32, 64), stride=16), device="cpu")
    assert compare(first, second)[0].name == "perplexity@32: bits_per_byte"
    assert compare(first, other) == []  # other windows: left out, and no reason to refuse the tasks


def test_documents_are_one_stream(checkpoint, tokenizer, text, text_file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(text[5000:6000])
    joined = tmp_path / "joined.txt"
    joined.write_text(text_file.read_text() + tokenizer.eos_token + other.read_text())
    two = evaluate(checkpoint, perplexity=PerplexityText((text_file, other), (64,)), device="cpu")
    one = evaluate(checkpoint, perplexity=PerplexityText(joined, (64,)), device="cpu")
    assert two.tasks["perplexity@64"].details["documents"] == 2
    assert two.tasks["perplexity@64"].metrics["nll"] == one.tasks["perplexity@64"].metrics["nll"]


def test_the_first_tokens_only(checkpoint, tokenizer, text_file, tmp_path):
    start = tokenizer.encode(text_file.read_text())[:200]
    (tmp_path / "start.txt").write_text(tokenizer.decode(start))
    limited = evaluate(checkpoint, perplexity=PerplexityText(text_file, (64,), max_tokens=200), device="cpu")
    cut = evaluate(checkpoint, perplexity=PerplexityText(tmp_path / "start.txt", (64,)), device="cpu")
    assert limited.tasks["perplexity@64"].details["tokens"] == 200
    assert limited.tasks["perplexity@64"].metrics == cut.tasks["perplexity@64"].metrics


def test_the_paper_s_lengths_where_model_and_text_allow(checkpoint, text_file, tmp_path):
    assert choose_lengths(PerplexityText("unused"), 20000) == [512, 1024, 2048, 4096, 8192, 16384]
    assert choose_lengths(PerplexityText("unused"), 2048) == [512, 1024, 2048]
    assert choose_lengths(PerplexityText("unused"), 300) == [300]
    result = evaluate(checkpoint, perplexity=text_file, device="cpu")
    assert list(result.tasks) == ["perplexity@512"]


def test_rows_of_a_dataset(checkpoint, write_parquet, text, tmp_path):
    rows = [{"body": line} for line in text.splitlines()[:20]]
    write_parquet(rows, tmp_path, "corpus", "validation.parquet")
    source = PerplexityText(tmp_path / "corpus", (32,), split="validation", column="body")
    task = evaluate(checkpoint, perplexity=source, device="cpu").tasks["perplexity@32"]
    assert task.details["documents"] == 20 and task.split == "validation"
    assert task.details["bytes"] == sum(len(row["body"].encode()) for row in rows)
    with pytest.raises(ValueError, match="`column` is 'text'; .* has body"):
        evaluate(checkpoint, perplexity=PerplexityText(tmp_path / "corpus", split="validation"))
    with pytest.raises(ValueError, match="`split` is 'test'; .* has validation"):
        evaluate(checkpoint, perplexity=tmp_path / "corpus")


def test_tables_are_read_as_tables(checkpoint, write_parquet, text, tmp_path):
    """And the token between documents is what ends a text in training, also where another begins one."""
    rows = [{"n": 1, "text": line} for line in text.splitlines()[:20] if line.strip()]
    write_parquet(rows, tmp_path, "table.parquet")
    (tmp_path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open(tmp_path / "table.csv", "w", newline="") as file:
        csv.writer(file).writerows([("n", "text"), *(row.values() for row in rows)])
    found = [
        evaluate(checkpoint, perplexity=PerplexityText(tmp_path / f"table.{kind}", (32,)), device="cpu")
        for kind in ("parquet", "jsonl", "csv")
    ]
    details = [result.tasks["perplexity@32"].details for result in found]
    assert details[0]["documents"] == len(rows) and details[0] == details[1] == details[2]
    assert details[0]["bytes"] == sum(len(row["text"].encode()) for row in rows)
    for kind in ("jsonl", "csv"):
        with pytest.raises(
            ValueError, match=f"`column` is 'body', which .*table.{kind} does not have. Its columns are n, text"
        ):
            evaluate(checkpoint, perplexity=PerplexityText(tmp_path / f"table.{kind}", column="body"))
        with pytest.raises(FileNotFoundError, match="no such file"):
            evaluate(checkpoint, perplexity=f"nowhere.{kind}")


def test_the_end_of_a_document_is_predicted(checkpoint, tokenizer, text, tmp_path):
    """Where a text begins and ends with tokens of its own, as in training: the end stands between documents."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(5)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    parts = text[:250], text[5000:5200]
    for number, part in enumerate(parts):
        (tmp_path / f"{number}.txt").write_text(part)
    files = tuple(tmp_path / f"{number}.txt" for number in range(2))
    result = evaluate(checkpoint, tokenizer=tmp_path / "tokenizer", perplexity=PerplexityText(files), device="cpu")
    first, second = (tokenizer.encode(part, add_special_tokens=False) for part in parts)
    stream = torch.tensor([[5, *first, tokenizer.eos_token_id, *second]])
    model = SASGPTForCausalLM.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        expected = model(stream, labels=stream).loss.item()
    assert stream.shape[1] < 512
    assert result.tasks["perplexity@512"].metrics["nll"].value == pytest.approx(expected, rel=1e-4)


def test_what_is_refused_before_the_model_is_loaded(checkpoint, text_file, tmp_path, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("the model was loaded before the error")

    monkeypatch.setattr(sas_hf.eval.evaluation, "SASHFLM", load)
    with pytest.raises(ValueError, match="`context_lengths` has 1024, but the model's context is 512 tokens"):
        evaluate(checkpoint, perplexity=PerplexityText(text_file, (64, 1024)))
    with pytest.raises(FileNotFoundError, match="no such file"):
        evaluate(checkpoint, perplexity=tmp_path / "nothing.txt")
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="there is no text"):
        evaluate(checkpoint, perplexity=tmp_path / "blank.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(ValueError, match="is not text in UTF-8"):
        evaluate(checkpoint, perplexity=tmp_path / "binary")
    for fields, message in (
        ({"stride": 0}, "`stride` is 0"),
        ({"stride": -1}, "`stride` is -1"),
        ({"max_tokens": 0}, "`max_tokens` is 0"),
        ({"context_lengths": (32,), "stride": 33}, "`stride` is 33, more than"),
        ({"context_lengths": (1,)}, "`context_lengths` has 1;"),
        ({"context_lengths": ()}, "`context_lengths` is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            PerplexityText(text_file, **fields)


def test_options_that_nothing_would_heed(checkpoint, text_file, never_loaded):
    for field, value in (("split", "dev"), ("column", "body"), ("config", "raw")):
        with pytest.raises(ValueError, match=f"`{field}` is '{value}', of a dataset, but .*text.txt is a text file"):
            evaluate(checkpoint, perplexity=PerplexityText(text_file, **{field: value}))
    with pytest.raises(ValueError, match="`stride` is 513, more than the context length 512"):
        evaluate(checkpoint, perplexity=PerplexityText(text_file, stride=513))
    for field, value in (("limit", 3), ("num_fewshot", 0), ("data", "x"), ("truncation", True), ("log_samples", True)):
        with pytest.raises(ValueError, match=f"`{field}` is {value!r}, but there are no `tasks`"):
            evaluate(checkpoint, perplexity=text_file, **{field: value})
    with pytest.raises(ValueError, match="`add_bos_token` is 'False', but there are no `tasks`"):
        evaluate(checkpoint, perplexity=text_file, add_bos_token=False)


def test_bytes_are_the_text_s_whatever_the_tokenizer_makes_of_it(model, tokenizer, tmp_path):
    """A tokenizer that drops accents decodes to fewer bytes than it read."""
    own = copy.deepcopy(tokenizer)
    own.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    text = "Ünd härter. " * 20
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "more.txt").write_text("Ende")
    count = len(own.encode("Ünd härter." * 1 + " Ünd härter." * 11))
    for sources in (tmp_path / "text.txt", (tmp_path / "text.txt", tmp_path / "more.txt")):
        source = PerplexityText(sources, (16,), max_tokens=count)
        details = evaluate(model, perplexity=source, tokenizer=own).tasks["perplexity@16"].details
        assert details["bytes"] == len(("Ünd härter. " * 12).strip().encode())
    whole = PerplexityText((tmp_path / "text.txt", tmp_path / "more.txt"), (16,), max_tokens=10**6)
    details = evaluate(model, perplexity=whole, tokenizer=own).tasks["perplexity@16"].details
    assert details["bytes"] == len(text.encode()) + 4


def test_unknown_tokens_are_told(model, tmp_path):
    words = Tokenizer(models.WordLevel({"<unk>": 0, "known": 1, "</s>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    own = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    (tmp_path / "text.txt").write_text("known other known strange " * 10)
    task = evaluate(model, perplexity=PerplexityText(tmp_path / "text.txt", (16,)), tokenizer=own).tasks[
        "perplexity@16"
    ]
    assert task.notes == ["20 tokens are <unk>, which stands for any text: the bits per byte are too few"]


def test_a_text_too_short_for_the_context(checkpoint, tmp_path):
    (tmp_path / "short.txt").write_text("A few words.")
    with pytest.raises(ValueError, match=r"`context_lengths` has 256, but .*short.txt has \d+ tokens"):
        evaluate(checkpoint, perplexity=PerplexityText(tmp_path / "short.txt", (256,)), device="cpu")
