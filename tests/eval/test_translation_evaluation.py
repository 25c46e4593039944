"""Translators through `sas-hf eval`: sacrebleu's numbers, exact losses, paired differences, refusals."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from sacrebleu.metrics import BLEU, CHRF
from toy_translation import LENGTH, toy_bart, toy_pairs, toy_tokenizer, write_lines
from transformers import (
    BartForSequenceClassification,
    BartModel,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)
from typer.testing import CliRunner

from sas_hf.cli import app
from sas_hf.data.text_pairs import encode_side
from sas_hf.eval import EvaluationResult, Report, evaluate_translation
from sas_hf.eval.comparison import compare


COLUMNS = {"source_column": "en", "target_column": "es"}
COUNT = 40


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Pairs, a model that has not learnt, and one that has learnt a little (by the stock Trainer)."""
    folder = tmp_path_factory.mktemp("translators")
    write_lines(folder / "pairs.jsonl", toy_pairs()[400 : 400 + COUNT])
    model, tokenizer = toy_bart(folder / "new"), toy_tokenizer()
    rows = [
        {"input_ids": source, "labels": target}
        for source, target in zip(
            encode_side(tokenizer, [row["en"] for row in toy_pairs()[:256]], LENGTH, target=False)[0],
            encode_side(tokenizer, [row["es"] for row in toy_pairs()[:256]], LENGTH, target=True)[0],
            strict=True,
        )
    ]
    arguments = TrainingArguments(
        str(folder / "trainer"),
        max_steps=40,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer, model)).train()
    model.save_pretrained(folder / "learnt")
    tokenizer.save_pretrained(folder / "learnt")
    return folder


@pytest.fixture(scope="module")
def results(place):
    return {
        name: evaluate_translation(str(place / name), place / "pairs.jsonl", **COLUMNS, num_beams=1, batch_size=7)
        for name in ("new", "learnt")
    }


def test_scores_are_those_of_the_translations_that_generate_gives(place, results):
    result = results["learnt"]
    task = result.tasks["translation"]
    model, tokenizer = toy_bart().from_pretrained(place / "learnt").eval(), toy_tokenizer()
    rows = toy_pairs()[400 : 400 + COUNT]
    losses, right, count = [], 0, 0
    for row, sample in zip(rows, task.samples, strict=True):
        assert (sample["source"], sample["reference"]) == (row["en"], row["es"])
        inputs = tokenizer(row["en"], return_tensors="pt")
        tokens = model.generate(**inputs, num_beams=1, do_sample=False, max_length=LENGTH)
        assert tokenizer.decode(tokens[0], skip_special_tokens=True).strip() == sample["hypothesis"]
        labels = torch.tensor([tokenizer(text_target=row["es"]).input_ids])
        output = model(**inputs, labels=labels)
        assert sample["loss"] == pytest.approx(output.loss.item(), rel=1e-4)
        losses.append(output.loss.item() * labels.numel())
        right, count = right + output.logits.argmax(-1).eq(labels).sum().item(), count + labels.numel()
    hypotheses, references = ([sample[name] for sample in task.samples] for name in ("hypothesis", "reference"))
    assert task.metrics["bleu"].value == BLEU().corpus_score(hypotheses, [references]).score > 0
    assert task.metrics["chrf"].value == CHRF().corpus_score(hypotheses, [references]).score
    assert task.metrics["loss"].value == pytest.approx(sum(losses) / count, rel=1e-4)
    assert task.metrics["token_accuracy"].value == pytest.approx(right / count)
    # One number a pair, whose mean is the metric.
    for name in ("loss", "token_accuracy"):
        assert math.fsum(task.scores[name]) / COUNT == pytest.approx(task.metrics[name].value)
    assert "tok:13a" in task.details["signatures"]["bleu"] and task.details["num_beams"] == 1
    assert task.num_samples == COUNT and result.num_parameters == model.num_parameters()


def test_beams_a_limit_and_a_live_model(place, results):
    model, tokenizer = toy_bart().from_pretrained(place / "learnt"), toy_tokenizer()
    model.train()
    settings = copy.deepcopy(model.generation_config)
    options = COLUMNS | {"tokenizer": tokenizer, "limit": 6}
    beams = evaluate_translation(model, place / "pairs.jsonl", **options, num_beams=4).tasks["translation"]
    greedy = evaluate_translation(model, place / "pairs.jsonl", **options).tasks["translation"]
    assert model.training and model.generation_config.to_dict() == settings.to_dict()
    assert (beams.num_samples, beams.num_available, beams.details["num_beams"]) == (6, COUNT, 4)
    wanted = [sample["hypothesis"] for sample in results["learnt"].tasks["translation"].samples[:6]]
    assert [sample["hypothesis"] for sample in greedy.samples] == wanted
    tokens = model.eval().generate(
        **tokenizer(toy_pairs()[400]["en"], return_tensors="pt"), num_beams=4, max_length=LENGTH
    )
    assert tokenizer.decode(tokens[0], skip_special_tokens=True).strip() == beams.samples[0]["hypothesis"]


def test_a_given_tokenizer_is_used_as_the_models_own_and_left_as_it_is(place, results):
    tokenizer = toy_tokenizer()
    tokenizer.padding_side = "left"  # which takes positions of a BART
    found = evaluate_translation(
        str(place / "learnt"), place / "pairs.jsonl", **COLUMNS, num_beams=1, batch_size=7, tokenizer=tokenizer
    )
    expected = results["learnt"].tasks["translation"]
    assert found.tasks["translation"].metrics == expected.metrics
    assert found.tasks["translation"].samples == expected.samples
    assert tokenizer.padding_side == "left"
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="has no pad or no eos token"):
        evaluate_translation(str(place / "learnt"), place / "pairs.jsonl", **COLUMNS, tokenizer=tokenizer)


def test_two_models_are_compared_pair_by_pair(results, tmp_path):
    found = {each.name: each for each in compare(results["new"], results["learnt"])}
    bleu, loss = found["translation: bleu"], found["translation: loss"]
    metrics = [results[name].tasks["translation"].metrics for name in ("new", "learnt")]
    assert bleu.difference == pytest.approx(metrics[1]["bleu"].value - metrics[0]["bleu"].value)
    assert bleu.significant and bleu.p_value < 0.05 and bleu.unit == "of 100"
    assert (
        loss.difference == pytest.approx(metrics[1]["loss"].value - metrics[0]["loss"].value) and loss.unit == "nats"
    )
    # By another tokenizer, tokens are others; the translations can be compared all the same.
    other = copy.deepcopy(results["learnt"])
    other.tasks["translation"].details["tokens"] = "others"
    assert {each.name for each in compare(results["new"], other)} == {"translation: bleu", "translation: chrf"}
    other.tasks["translation"].questions = "others"
    with pytest.raises(ValueError, match="were asked different questions in task 'translation'"):
        compare(results["new"], other)

    results["learnt"].save(tmp_path / "learnt.json")
    again = EvaluationResult.load(tmp_path / "learnt.json")
    report = Report([results["new"], again])
    files = report.save(tmp_path / "report")
    texts = (tmp_path / "report" / "translations-2.txt").read_text().splitlines()
    samples = again.tasks["translation"].samples
    assert texts == [sample["hypothesis"] for sample in samples] and tmp_path / "report" / "report.md" in files
    page = (tmp_path / "report" / "report.md").read_text()
    for sample in samples[:10]:
        assert f"**source**: {sample['source']}" in page and f": {sample['hypothesis']}" in page
    assert (
        f"{metrics[1]['bleu'].value:.2f} ± " in page
        and again.tasks["translation"].details["signatures"]["chrf"] in page
    )
    assert f"{bleu.difference:+.2f}" in page and f"(p {bleu.p_value:.3f})" in page


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command(place, tmp_path):
    pairs = ["--pairs", place / "pairs.jsonl", "--source-column", "en", "--target-column", "es", "--limit", "8"]
    run = invoke("eval", place / "new", place / "learnt", *pairs, "--report", tmp_path / "out")
    assert run.exit_code == 0, run.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [len(result["tasks"]["translation"]["samples"]) for result in report["results"]] == [8, 8]
    assert "BLEU" in run.output and "translations-2.txt" in run.output.replace("\n", "")
    for changes, message in (
        (pairs[:2], "`--pairs` needs `--source-column` and `--target-column`"),
        ([*pairs, "--perplexity", "x.txt"], "Give either `--tasks` or `--perplexity`"),
        ([*pairs, "--num-fewshot", "1"], "`--num-fewshot` is 1, but translations are scored without it"),
        (["--tasks", "piqa", "--beams", "2"], "`--beams` is 2, but there are no `--pairs`"),
        ([*pairs, "--beams", "0"], "`num_beams` is 0; it must be at least 1"),
        ([*pairs[:5], "fr"], "`target_column` is 'fr', which"),
    ):
        run = invoke("eval", place / "new", *changes)
        assert run.exit_code == 1 and message in run.stderr, run.output


def test_what_does_not_translate_is_refused(place, tmp_path):
    pairs = place / "pairs.jsonl"
    config = toy_bart().config
    BartForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text('{"model_type": "gpt2"}')
    BartModel(config).save_pretrained(tmp_path / "bare")
    for model, message in (
        (tmp_path / "classifier", "holds a BartForSequenceClassification, which does not translate"),
        (tmp_path / "gpt", "has `model_type` 'gpt2', which is no encoder-decoder"),
        ("nmt-standard", "'nmt-standard' is a named configuration, which has no weights"),
        (tmp_path / "bare", "There is no tokenizer in"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_translation(str(model), pairs, **COLUMNS)
    with pytest.raises(ValueError, match="`source_language` is 'en', but the tokenizer .* has no languages"):
        evaluate_translation(str(place / "new"), pairs, **COLUMNS, source_language="en")
    broken = toy_bart()
    torch.nn.init.constant_(broken.model.shared.weight, float("nan"))
    with pytest.raises(ValueError, match="Logits are not numbers"):
        evaluate_translation(broken, pairs, **COLUMNS, tokenizer=toy_tokenizer())


def test_what_is_longer_than_the_model_is_cut_off_and_said(place, tmp_path):
    long = [{"en": " ".join([row["en"]] * 4), "es": row["es"]} for row in toy_pairs()[:3]]
    path = write_lines(tmp_path / "long.jsonl", [*long, toy_pairs()[3]])
    result = evaluate_translation(str(place / "new"), path, **COLUMNS)
    assert result.num_truncated == 3
    assert any(
        f"3 sources longer than the model's {LENGTH} positions" in note for note in result.tasks["translation"].notes
    )
    assert Path(path).is_file()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft to Transformers
@pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings=True:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_adapters_of_one_side_of_tied_weights_are_refused(place, tmp_path):
    """In merge's words: what they are together would be scored wrongly."""
    model = toy_bart().from_pretrained(place / "new")
    assert model.config.tie_word_embeddings
    get_peft_model(model, LoraConfig(target_modules=["lm_head"], init_lora_weights=False)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="give other numbers once they are merged.*one side of weights that are tied"):
        evaluate_translation(str(tmp_path), place / "pairs.jsonl", **COLUMNS)
