"""Translation by the real `Seq2SeqTrainer`: it learns, is exact and resumable, scores by sacrebleu, refuses."""

import json
import statistics
import subprocess
import sys

import pytest
import torch
from helpers import USE_CPU, assert_all_close, assert_identical, python_environment
from huggingface_hub import ModelCard
from peft import AutoPeftModelForSeq2SeqLM
from sacrebleu.metrics import BLEU, CHRF
from safetensors.torch import load_file
from test_trainer import KeepGradients
from torch import nn
from toy_translation import LENGTH, VOCABULARY, toy_bart, toy_pairs, toy_tokenizer, write_lines
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    MBartTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from sas_hf.training.arguments import training_arguments
from sas_hf.training.recipe import load_recipe
from sas_hf.training.reporting import read_log
from sas_hf.training.run import train
from sas_hf.training.tasks import find_task


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Files of pairs, and a tiny BART with its tokenizer in `bart`."""
    folder = tmp_path_factory.mktemp("toy")
    write_lines(folder / "train.jsonl", toy_pairs()[:400])
    write_lines(folder / "validation.jsonl", toy_pairs()[400:420])
    toy_bart(folder / "bart")
    return folder


def recipe_of(toy, output, *changes, **fields):
    return load_recipe(
        {
            "task": "translation",
            "model": {"checkpoint": str(toy / "bart")},
            "data": {
                "train": str(toy / "train.jsonl"),
                "validation": str(toy / "validation.jsonl"),
                "source_column": "en",
                "target_column": "es",
                "sequence_length": LENGTH,
            },
            "training": {
                "output_dir": str(output),
                "max_steps": 8,
                "per_device_train_batch_size": 16,
                "learning_rate": 1e-2,
                "logging_steps": 2,
                "save_strategy": "no",
                "use_cpu": USE_CPU,
                "disable_tqdm": True,
            },
        }
        | fields,
        changes,
    )


def trainer_of(toy, output, *changes, **fields):
    recipe = recipe_of(toy, output, *changes, **fields)
    return find_task("translation").make_trainer(recipe, training_arguments(recipe))


EVALUATED = ("training.eval_strategy=steps", "training.eval_steps=4")
WITHOUT_PACKAGE = """
import sys
sys.modules["sas_hf"] = None
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForSeq2SeqLM, AutoTokenizer))
assert tokenizer(text_target="el gato").input_ids[-1] == tokenizer.eos_token_id
print(tokenizer.decode(model.generate(**tokenizer(sys.argv[2], return_tensors="pt"))[0], skip_special_tokens=True))
"""


@pytest.fixture(scope="module")
def learnt(toy, tmp_path_factory):
    """The folder of a run that has learnt the language, and its results."""
    folder = tmp_path_factory.mktemp("runs") / "learnt"
    steps = ("training.max_steps=160", "training.eval_steps=80", "training.warmup_steps=15")
    return folder, train(recipe_of(toy, folder, *EVALUATED, *steps))


def test_it_learns_to_translate_and_shows_what(learnt):
    folder, results = learnt
    assert results["eval_bleu"] > 80 and results["eval_chrf"] > 80 and results["eval_token_accuracy"] > 0.9
    evaluated = [line for line in read_log(folder) if "eval_bleu" in line]
    assert [line["step"] for line in evaluated] == [80, 160] and (folder / "loss.png").is_file()

    # The numbers are sacrebleu's, of the references as they stand in the file.
    found = json.loads((folder / "translations" / "step-160.json").read_text())
    hypotheses = [pair["translation"] for pair in found["pairs"]]
    references = [row["es"] for row in toy_pairs()[400:420]]
    assert [pair["reference"] for pair in found["pairs"]] == references
    assert results["eval_bleu"] == BLEU().corpus_score(hypotheses, [references]).score
    assert results["eval_chrf"] == CHRF().corpus_score(hypotheses, [references]).score

    card = ModelCard.load(folder / "README.md")
    speeds = [line["steps_per_second"] for line in read_log(folder) if "loss" in line]
    assert f"An epoch took {25 / statistics.median(speeds):,.1f} seconds" in card.text and min(speeds) > 0
    assert card.data.pipeline_tag == "translation" and f"BLEU {results['eval_bleu']:.2f}" in card.text
    for pair in found["pairs"][:8]:
        assert all(f": {pair[name]}" in card.text for name in ("source", "reference", "translation"))
    assert found["pairs"][8]["source"] not in card.text

    # What was trained translates the same by Transformers alone, as long as it may.
    settings = GenerationConfig.from_pretrained(folder)
    assert settings.max_length == LENGTH + 1 and settings.temperature is None
    command = [sys.executable, "-c", WITHOUT_PACKAGE, folder, found["pairs"][0]["source"]]
    alone = subprocess.run(command, capture_output=True, text=True, env=python_environment())
    assert alone.stdout.strip() == hypotheses[0], alone.stderr


def loss_by_hand(model, rows, smoothing: float) -> torch.Tensor:
    """The mean over all targets of all rows, each row by itself."""
    total, count = 0.0, 0
    for row in rows:
        labels = torch.tensor([row["labels"]])
        logits = model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).logits
        total += nn.functional.cross_entropy(logits[0], labels[0], label_smoothing=smoothing, reduction="sum")
        count += labels.numel()
    return total / count


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(("batch", "accumulated"), [(8, 1), (2, 4), (3, 3)])
def test_gradient_accumulation_changes_nothing(toy, tmp_path, batch, accumulated, smoothing):
    """Of BART, too, whose own loss does not count the targets of a step."""
    rows = [row | {"es": f"{row['es']} {'y ' * (number % 5)}"} for number, row in enumerate(toy_pairs()[:8])]
    changes = [f"data.train={write_lines(tmp_path / 'train.jsonl', rows)}", "data.validation=null"]
    changes += [f"training.per_device_train_batch_size={batch}", f"training.label_smoothing_factor={smoothing}"]
    changes += [f"training.gradient_accumulation_steps={accumulated}", "training.max_steps=1"]
    trainer = trainer_of(toy, tmp_path / "run", *changes, "training.max_grad_norm=0.0")
    expected_model = AutoModelForSeq2SeqLM.from_pretrained(toy / "bart").train()
    loss_by_hand(expected_model, trainer.train_dataset, smoothing).backward()
    keep = KeepGradients()
    trainer.add_callback(keep)
    trainer.train()
    expected = {name: weight.grad for name, weight in expected_model.named_parameters() if weight.grad is not None}
    assert_all_close(keep.gradients, expected, 1e-5)


def test_validation_is_of_the_likelihood_and_of_every_target(toy, learnt, tmp_path):
    """Neither smoothed nor of the translations; grouping by length leaves the references in their places."""
    changes = ("training.label_smoothing_factor=0.3", "training.train_sampling_strategy=group_by_length")
    start = {"model": {"checkpoint": str(learnt[0])}}
    trainer = trainer_of(toy, tmp_path, *changes, "training.per_device_eval_batch_size=20", **start)
    rows = trainer.eval_dataset
    metrics = trainer.evaluate()
    model = trainer.model.eval()
    assert metrics["eval_loss"] == pytest.approx(loss_by_hand(model, rows, 0.0).item(), rel=1e-4)
    right = targets = 0
    for row in rows:
        labels = torch.tensor([row["labels"]])
        guesses = model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).logits.argmax(-1)
        right, targets = right + guesses.eq(labels).sum().item(), targets + labels.numel()
    assert metrics["eval_token_accuracy"] == pytest.approx(right / targets)
    pairs = json.loads((tmp_path / "translations" / "step-0.json").read_text())["pairs"]
    tokenizer = trainer.processing_class
    for pair in pairs[:4]:
        tokens = model.generate(**tokenizer(pair["source"], return_tensors="pt"), max_length=LENGTH + 1, num_beams=1)
        assert tokenizer.decode(tokens[0], skip_special_tokens=True).strip() == pair["translation"]


SMALL = {
    "vocab_size": VOCABULARY,
    "decoder_vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "max_position_embeddings": LENGTH,
    "initializer_range": 0.1,
}


def sas_model(kind: str, **fields) -> dict:
    """A new model, whose tokenizer is made on the pairs."""
    fields |= {"num_simulated_heads": 12, "simulated_head_dim": 18} if kind == "sas" else {}
    return {"model": {"config": f"nmt-{kind}", "overrides": SMALL | fields}}


@pytest.mark.parametrize("kind", ["efficient"])  # "sas" is below
def test_new_models_of_the_paper_learn_with_a_tokenizer_that_is_made_on_the_pairs(toy, tmp_path, kind):
    fields = sas_model(kind, hidden_dropout=0.0)
    steps = ("training.max_steps=160", "training.eval_steps=80", "training.warmup_steps=15")
    results = train(recipe_of(toy, tmp_path / "run", *EVALUATED, *steps, **fields))
    assert results["eval_bleu"] > 20 and results["eval_token_accuracy"] > 0.7
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    settings = loaded.generation_config
    assert (settings.decoder_start_token_id, settings.eos_token_id, settings.pad_token_id) == (1, 2, 0)
    pair = json.loads((tmp_path / "run" / "translations" / "step-160.json").read_text())["pairs"][0]
    tokens = loaded.generate(**tokenizer(pair["source"], return_tensors="pt"))
    assert tokenizer.decode(tokens[0], skip_special_tokens=True).strip() == pair["translation"]


def test_a_killed_run_goes_on_to_the_same_weights(toy, tmp_path, monkeypatch):
    """Tokenizer, log and translations, too."""
    changes = [*EVALUATED, "training.save_strategy=steps", "training.save_steps=4", "training.max_steps=10"]
    fields = sas_model("sas", hidden_dropout=0.1)
    whole = train(recipe_of(toy, tmp_path / "whole", *changes, **fields))
    trainer_class = type(trainer_of(toy, tmp_path / "other"))
    step = trainer_class.training_step

    def killed(self, *args, **kwargs):
        if self.state.global_step == 6:
            raise MemoryError("killed")
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(trainer_class, "training_step", killed)
        train(recipe_of(toy, tmp_path / "part", *changes, **fields))
    assert (tmp_path / "part" / "checkpoint-4").is_dir()
    assert train(recipe_of(toy, tmp_path / "part", *changes, **fields)) == whole
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "part")]
    assert_identical(weights[1], weights[0])
    for name in (
        "tokenizer.json",
        "translations/step-4.json",
        "translations/step-8.json",
        "translations/step-10.json",
    ):
        assert (tmp_path / "part" / name).read_text() == (tmp_path / "whole" / name).read_text(), name


def test_the_best_model_is_that_of_the_highest_bleu_and_the_card_shows_its_translations(toy, learnt, tmp_path):
    """The first step has a rate of 0; those after it spoil what was learnt."""
    best = ["training.load_best_model_at_end=true", "training.metric_for_best_model=bleu", "training.warmup_steps=3"]
    best += ["training.eval_strategy=steps", "training.eval_steps=1", "training.save_strategy=steps"]
    best += ["training.save_steps=1", "training.save_total_limit=1", "training.max_steps=4"]
    start = {"model": {"checkpoint": str(learnt[0])}}
    results = train(recipe_of(toy, tmp_path / "run", *best, "training.learning_rate=0.5", **start))
    scores = {line["step"]: line["eval_bleu"] for line in read_log(tmp_path / "run") if "eval_bleu" in line}
    assert results["eval_bleu"] == scores[1] == learnt[1]["eval_bleu"] > max(scores[step] for step in (2, 3, 4))
    assert results["step"] == 1
    shown, last = (
        json.loads((tmp_path / "run" / "translations" / f"step-{step}.json").read_text())["pairs"][0]["translation"]
        for step in (1, 4)
    )
    card = (tmp_path / "run" / "README.md").read_text()
    assert shown != last and f"**translation**: {shown}  \n" in card


def test_a_conversion_translates_as_its_source_and_trains(toy, learnt, tmp_path):
    """BART with simulated attention in every place, made by the run."""
    model = {"checkpoint": str(learnt[0]), "conversion": {}}
    trainer = trainer_of(toy, tmp_path / "run", "training.max_steps=2", model=model)
    assert (
        type(trainer.model).__name__ == "SASSeq2SeqForConditionalGeneration" and (tmp_path / "run" / "base").is_dir()
    )
    found = trainer.evaluate()
    for name in ("eval_bleu", "eval_chrf", "eval_loss", "eval_token_accuracy"):
        assert found[name] == pytest.approx(learnt[1][name], rel=1e-3), name
    trainer.train()
    assert trainer.evaluate()["eval_loss"] != found["eval_loss"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft to Transformers
def test_adapters_translate(toy, tmp_path):
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    changes = ("training.eval_strategy=epoch", "training.max_steps=4")
    fields = {"model": {"checkpoint": str(toy / "bart"), "lora": lora}}
    results = train(recipe_of(toy, tmp_path / "run", *changes, **fields))
    assert results["eval_bleu"] >= 0
    loaded = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "run")
    assert loaded.active_peft_config.task_type == "SEQ_2_SEQ_LM"
    assert "AutoPeftModelForSeq2SeqLM" in (tmp_path / "run" / "README.md").read_text()


def test_the_tokenizer_of_a_translation_is_one_for_both_sides():
    """Every text is known, a target ends, and decoding gives the text back."""
    tokenizer = toy_tokenizer()
    assert isinstance(tokenizer, PreTrainedTokenizerFast) and len(tokenizer) <= VOCABULARY
    for text in ("el pájaro rojo", "¿Qué? 日本 🦜", " two  spaces "):
        for side in ("text", "text_target"):
            ids = tokenizer(**{side: text})["input_ids"]
            assert ids[-1] == tokenizer.eos_token_id and tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.get_vocab() == toy_tokenizer().get_vocab()
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


def test_too_long_texts_are_cut_off_counted_and_told(toy, tmp_path):
    with pytest.warns(UserWarning) as told:
        trainer = trainer_of(toy, tmp_path, "data.sequence_length=9", "training.max_steps=1")
    lengths = [len(ids) for ids in toy_tokenizer()([row["es"] for row in toy_pairs()[:400]]).input_ids]
    expected = f"{sum(length > 9 for length in lengths)} targets are longer than `data.sequence_length` = 9 tokens"
    assert any(expected in str(warning.message) for warning in told)
    rows = trainer.train_dataset
    assert max(map(len, rows["labels"])) == max(map(len, rows["input_ids"])) == 9
    assert {row[-1] for row in rows["labels"]} == {2}  # a cut text ends, too


MULTILINGUAL = {"source_language": "en_XX", "target_language": "es_XX"}


def mbart_tokenizer() -> MBartTokenizer:
    words = {word for row in toy_pairs() for text in row.values() for word in text.split()}
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    return MBartTokenizer(vocab=[(token, 0.0) for token in [*special, "▁", *(f"▁{word}" for word in sorted(words))]])


def other_models(kind: str, folder) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": LENGTH}
    tokenizer = toy_tokenizer()
    if kind == "marian":
        tokens = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "forced_eos_token_id": None}
        model = MarianMTModel(MarianConfig(vocab_size=VOCABULARY, **sizes, **tokens))
    elif kind == "t5":
        sizes = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        tokens = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
        model = T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **sizes, **tokens))
    else:
        tokenizer = mbart_tokenizer()
        tokens = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": None}
        model = MBartForConditionalGeneration(MBartConfig(vocab_size=len(tokenizer), **sizes, **tokens))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("kind", ["marian", "t5", "mbart"])
def test_other_encoder_decoders_of_transformers_learn(toy, tmp_path, kind):
    other_models(kind, tmp_path / kind)
    languages = [f"data.{name}={value}" for name, value in MULTILINGUAL.items()] if kind == "mbart" else []
    model = {"checkpoint": str(tmp_path / kind)}
    steps = ["training.max_steps=40", "training.eval_steps=20"]
    results = train(recipe_of(toy, tmp_path / "run", *EVALUATED, *steps, *languages, model=model))
    losses = [line["eval_loss"] for line in read_log(tmp_path / "run") if "eval_loss" in line]
    assert losses[1] < losses[0] < 6 and results["eval_chrf"] > 5
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    if kind == "mbart":  # whoever loads it translates into the language that it was trained for
        assert (tokenizer.src_lang, tokenizer.tgt_lang) == ("en_XX", "es_XX")
        spanish = tokenizer.convert_tokens_to_ids("es_XX")
        assert loaded.generation_config.decoder_start_token_id == loaded.config.decoder_start_token_id == spanish
    pair = json.loads((tmp_path / "run" / "translations" / "step-40.json").read_text())["pairs"][0]
    tokens = loaded.generate(**tokenizer(pair["source"], return_tensors="pt"))
    assert tokenizer.decode(tokens[0], skip_special_tokens=True).strip() == pair["translation"]


NEW, SHORT = ("model.checkpoint=null", "model.config=nmt-standard"), "data.sequence_length=20"


def pairs_in(tmp_path, *rows: dict, name="train.jsonl") -> str:
    return write_lines(tmp_path / name, list(rows))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.source_column=null"], "`data.source_column` is not given; name the column"),
        (["data.target_column=null"], "`data.target_column` is not given"),
        (["data.source_column=es"], "`data.source_column` and `data.target_column` are both 'es'"),
        (
            ["data.target_column=spanish"],
            "`data.target_column` is 'spanish', which .*jsonl does not have. Its columns are en, es",
        ),
        (["data.source_column=eng"], "`data.source_column` is 'eng', which .* does not have; did you mean 'en'\\?"),
        (["data.validation=@train.jsonl"], "names .*train.jsonl, which is trained on"),
        (["data.train=missing.csv"], "`data.train` names missing.csv, which does not exist"),
        (["data.sequence_length=25"], "`data.sequence_length` is 25, but the model's `max_position_embeddings` is 24"),
        (["data.sequence_length=2"], "`data.sequence_length` is 2; it must be at least 3"),
        (["data.max_validation_sequences=0"], "`data.max_validation_sequences` is 0; it must be at least 1"),
        (["data.source_language=en_XX"], "`data.source_language` is 'en_XX', but the tokenizer .* has no languages"),
        (["data.text_column=words"], "`data.text_column` is 'words', but `task: translation` does not look at it"),
        (["data.validation_split=test"], "`data.validation` and `data.validation_split` are both given"),
        (["data.validation=null", "data.validation_split=test"], "only a dataset of the Hub has splits"),
        (["training.prediction_loss_only=true"], "`training.prediction_loss_only` is true, but BLEU"),
        (["training.eval_do_concat_batches=false"], "`training.eval_do_concat_batches` is false, but BLEU"),
        (
            ["model.checkpoint=null", "model.config=imdb-standard"],
            "imdb-standard is a sas_encoder that has no AutoModelForSeq2SeqLM",
        ),
        (
            ["model.overrides.decoder_start_token_id=null"],
            "`decoder_start_token_id` is None, so that no translation could begin",
        ),
        (["model.overrides.pad_token_id=null"], "`pad_token_id` is None, but its tokenizer pads with 0"),
        (["model.overrides.vocab_size=300"], "The tokenizer has 320 tokens, but the model's `vocab_size` is 300"),
        (["model.lora={r: 4}"], "`model.lora.target_modules` is missing"),
        (
            [*NEW, "model.overrides={vocab_size: 200, decoder_vocab_size: 200}", SHORT],
            "needs at least 259, one for each",
        ),
        (
            [*NEW, "model.overrides={vocab_size: 400}", SHORT],
            "but the tokenizer that is made on the data serves both sides",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_trained_is_refused_before_a_model_is_built(toy, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr("sas_hf.training.tasks.translation.starting_model", lambda *args: pytest.fail("was built"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        trainer_of(toy, tmp_path / "run", *(change.replace("@", f"{toy}/") for change in changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["text", "training"])
def test_pairs_that_are_alike_or_swapped_are_told(toy, tmp_path, kind):
    rows = toy_pairs()
    if kind == "text":
        same = [{"en": row["en"], "es": row["en"]} for row in rows[:40]]
        train_file = pairs_in(tmp_path, *same)
        with pytest.raises(ValueError, match="All pairs of `data.train` have the same text on both sides"):
            trainer_of(toy, tmp_path / "run", f"data.train={train_file}")
        train_file = pairs_in(tmp_path, *same, *rows[40:100])
        with pytest.warns(UserWarning, match="40 of the 100 pairs of `data.train` have the same text on both sides"):
            trainer_of(toy, tmp_path / "run", f"data.train={train_file}")
    else:
        swapped = pairs_in(tmp_path, *({"en": row["es"], "es": row["en"]} for row in rows[400:440]))
        with pytest.warns(UserWarning, match="Source and target of `data.validation` seem to be swapped"):
            trainer_of(toy, tmp_path / "run", f"data.validation={swapped}")


def test_languages_that_a_tokenizer_lacks_or_needs_are_named(toy, tmp_path):
    other_models("mbart", tmp_path / "mbart")
    model = {"checkpoint": str(tmp_path / "mbart")}
    with pytest.raises(ValueError, match="`data.source_language` is not given, .* it knows .*en_XX, es_XX"):
        trainer_of(toy, tmp_path / "run", model=model)
    given = ["data.source_language=en_XX", "data.target_language=es"]
    with pytest.raises(ValueError, match="`data.target_language` is 'es', for which the tokenizer has no token"):
        trainer_of(toy, tmp_path / "run", *given, model=model)
