"""The stock Trainer on real text: it learns, accumulates gradients exactly, resumes to the bit, and trains LoRA."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import resumable
import torch
from helpers import (
    CHECKPOINTING,
    USE_CPU,
    assert_all_close,
    assert_identical,
    gpt,
    gpt_config,
    python_environment,
    real_text,
    token_ids,
    train_tokenizer,
    vit,
)
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from sas_hf import (
    SASGPTForCausalLM,
    SASGPTForQuestionAnswering,
    SASGPTForSequenceClassification,
    SASGPTForTokenClassification,
    SASViTForMaskedImageModeling,
)
from sas_hf.training import DurableTrainer


def texts(count: int, max_length: int = 48) -> list[dict]:
    tokenizer = train_tokenizer()
    return [dict(tokenizer(text, truncation=True, max_length=max_length)) for text in real_text()[:count]]


def trainer_of(model, folder, data, collator=None, callbacks=None, **options) -> Trainer:
    options = {"save_strategy": "no", "report_to": "none", "use_cpu": USE_CPU, "disable_tqdm": True} | options
    collator = collator or DataCollatorForLanguageModeling(train_tokenizer(), mlm=False)
    arguments = TrainingArguments(str(folder), **options)
    return Trainer(model, arguments, train_dataset=data, data_collator=collator, callbacks=callbacks)


def language_model(variant: str, **overrides) -> SASGPTForCausalLM:
    return SASGPTForCausalLM(gpt_config(variant, vocab_size=400, initializer_range=0.02, **overrides))


@pytest.mark.parametrize("variant", ["mha", "sas_k5_gqa", "sas_learned"])
def test_the_loss_goes_down(variant, tmp_path):
    data, unseen = texts(264)[:200], texts(264)[200:]
    trainer = trainer_of(
        language_model(variant), tmp_path, data, max_steps=50, per_device_train_batch_size=8, learning_rate=1e-2
    )
    before = trainer.evaluate(unseen)["eval_loss"]
    trainer.train()
    after = trainer.evaluate(unseen)["eval_loss"]
    assert before == pytest.approx(torch.tensor(400.0).log().item(), abs=0.3)  # as good as guessing
    assert after < before - 1.0


class KeepGradients(TrainerCallback):
    """The gradients of the first optimizer step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def causal_lm():
    data = texts(8)
    for row, example in enumerate(data):  # prompts that do not count, of uneven length
        example["labels"] = [-100] * (5 * row % 13) + example["input_ids"][5 * row % 13 :]
    return SASGPTForCausalLM, {}, data, DataCollatorForTokenClassification(train_tokenizer())


def token_classification():
    data = texts(8)
    for row, example in enumerate(data):
        example["labels"] = [-100 if i % (row + 2) == 0 else i % 3 for i in range(len(example["input_ids"]))]
    fields = {"num_labels": 3, "classifier_dropout": 0.0}
    return SASGPTForTokenClassification, fields, data, DataCollatorForTokenClassification(train_tokenizer())


def sequence_classification(problem_type, num_labels, label):
    data = [example | {"labels": label(row)} for row, example in enumerate(texts(8))]
    fields = {"num_labels": num_labels, "problem_type": problem_type}
    return SASGPTForSequenceClassification, fields, data, DataCollatorWithPadding(train_tokenizer())


def question_answering():
    data = [example | {"start_positions": row, "end_positions": row + 3} for row, example in enumerate(texts(8))]
    return SASGPTForQuestionAnswering, {}, data, DataCollatorWithPadding(train_tokenizer())


TASKS = {
    "causal LM": causal_lm,
    "token classification": token_classification,
    "single label": lambda: sequence_classification("single_label_classification", 3, lambda row: row % 3),
    "inferred single label": lambda: sequence_classification(None, 3, lambda row: row % 3),
    "regression": lambda: sequence_classification("regression", 1, lambda row: row / 4 - 1),
    "regression of three": lambda: sequence_classification("regression", 3, lambda row: [row / 4, 0.5, -row / 8]),
    "multi-label": lambda: sequence_classification("multi_label_classification", 3, lambda row: [1.0, row % 2, 0.0]),
    "question answering": question_answering,
}


def first_gradients(task: str, folder, **options) -> dict[str, torch.Tensor]:
    model_class, fields, data, collator = TASKS[task]()
    torch.manual_seed(0)
    fields |= {"vocab_size": 400, "pad_token_id": 0, "initializer_range": 0.05}  # gradients near 1: float32 resolves
    model = gpt("sas_k5_gqa", model_class=model_class, **fields)
    keep = KeepGradients()
    options = {"max_steps": 1, "max_grad_norm": 0.0, "learning_rate": 0.0} | options
    trainer_of(model, folder, data, collator, [keep], **options).train()
    return keep.gradients


# The Trainer counts `labels` alone: answers to questions are averaged per batch, right for batches of one size.
ACCUMULATIONS = [(task, *split) for task in TASKS for split in ((4, 2), (2, 4), (3, 3))]
ACCUMULATIONS.remove(("question answering", 3, 3))


@pytest.mark.parametrize(("task", "batch", "steps"), ACCUMULATIONS)
def test_accumulated_gradients_equal_those_of_one_batch(task, batch, steps, tmp_path):
    whole = first_gradients(task, tmp_path, per_device_train_batch_size=8)
    accumulated = first_gradients(task, tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=steps)
    assert max(gradient.abs().max() for gradient in whole.values()) > 1e-3
    assert_all_close(accumulated, whole, 1e-6)


class Mine(SASGPTForCausalLM):
    """As a user writes one; no table of Transformers has its name."""


def wrapped(model, kind: str):
    if kind == "lora":
        return get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    if kind == "prefix":
        return get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    if kind == "subclass":
        return Mine(model.config).eval()
    return torch.compile(model, backend="eager") if kind == "compiled" else model


def smoothed(logits: torch.Tensor, targets: torch.Tensor, epsilon: float) -> torch.Tensor:
    """The mean over targets that are not -100 of the cross-entropy with smoothed labels."""
    surprise, counted = -logits.log_softmax(-1), targets != -100
    hit = surprise.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    return ((1 - epsilon) * hit + epsilon * surprise.mean(-1))[counted].mean()


# The stock Trainer looks for a name, which neither prefix tuning nor `torch.compile` shows it: of Llama no more than
# of this model. `DurableTrainer` looks for the loss.
SMOOTHED = [(Trainer, kind) for kind in ("plain", "lora", "subclass")]
SMOOTHED += [(DurableTrainer, kind) for kind in ("plain", "lora", "prefix", "compiled", "subclass")]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft calls what Transformers deprecates
@pytest.mark.parametrize(("trainer_class", "kind"), SMOOTHED)
def test_smoothed_labels_are_shifted(trainer_class, kind, tmp_path, tolerate_deprecations):
    model = wrapped(gpt("mha" if kind == "compiled" else "sas_k5_gqa", simulation_cache="base"), kind).eval()
    ids = token_ids(3, 12)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    inputs["labels"][0, :5] = -100
    arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=0.3, use_cpu=USE_CPU, report_to=[])
    with torch.no_grad():
        found = trainer_class(model, arguments).compute_loss(model, dict(inputs))
        logits = model(input_ids=ids, attention_mask=inputs["attention_mask"]).logits
    torch.testing.assert_close(found, smoothed(logits[:, :-1], inputs["labels"][:, 1:], 0.3))
    assert trainer_class(model, arguments)._loss_shifts_labels, "accumulated batches count the targets"


@pytest.mark.parametrize("trainer_class", [Trainer, DurableTrainer])
def test_smoothed_labels_of_tokens_and_of_rows_are_not_shifted(trainer_class, tmp_path):
    arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=0.3, use_cpu=USE_CPU, report_to=[])
    ids = token_ids(3, 12)
    for model_class, shape in ((SASGPTForTokenClassification, (3, 12)), (SASGPTForSequenceClassification, (3,))):
        model = gpt(model_class=model_class, num_labels=5, pad_token_id=0)
        labels = torch.randint(0, 5, shape)
        with torch.no_grad():
            found = trainer_class(model, arguments).compute_loss(model, {"input_ids": ids, "labels": labels})
            torch.testing.assert_close(found, smoothed(model(ids).logits, labels, 0.3))


def test_a_model_trained_on_smoothed_labels_says_what_comes_next(tmp_path):
    row = list(range(3, 35))
    data = [{"input_ids": row, "labels": row}]
    options = {"max_steps": 50, "learning_rate": 1e-2, "label_smoothing_factor": 0.1}
    trainer = trainer_of(language_model("sas", num_hidden_layers=1), tmp_path, data, **options)
    trainer.train()
    with torch.no_grad():
        predicted = trainer.model.eval()(torch.tensor([row])).logits.argmax(-1)[0]
    assert (predicted[:-1] == torch.tensor(row[1:])).float().mean() > 0.9


@pytest.mark.parametrize(("hidden", "same"), [(3, True), (None, False)])
def test_accumulated_gradients_of_masked_images_need_equally_many_hidden_patches(hidden, same, tmp_path):
    """The Trainer cannot count them: the README says when the sentence holds, and that it holds no further."""

    def gradients_of(batch, steps):
        torch.manual_seed(0)
        model = vit("sas", model_class=SASViTForMaskedImageModeling, initializer_range=0.05)
        data = [
            {"pixel_values": torch.rand(3, 12, 12), "bool_masked_pos": torch.arange(9) < (hidden or row + 1)}
            for row in range(8)
        ]
        keep = KeepGradients()
        options = {"max_steps": 1, "max_grad_norm": 0.0, "learning_rate": 0.0, "remove_unused_columns": False}
        options |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}
        trainer_of(model, tmp_path, data, default_data_collator, [keep], **options).train()
        return keep.gradients

    whole, parts = gradients_of(8, 1), gradients_of(2, 4)
    distance = max((parts[name] - gradient).abs().max() for name, gradient in whole.items())
    scale = max(gradient.abs().max() for gradient in whole.values())
    assert scale > 1e-3 and (distance < 1e-5 * scale) == same


def test_activation_checkpointing_in_the_trainer(tmp_path):
    plain = first_gradients("causal LM", tmp_path, per_device_train_batch_size=8)
    checkpointed = first_gradients("causal LM", tmp_path, per_device_train_batch_size=8, **{CHECKPOINTING: True})
    assert_all_close(checkpointed, plain, 1e-6)


def test_a_killed_run_resumes_to_the_bit(tmp_path):
    """SIGKILL between two checkpoints, then a new process: as if nothing had happened."""
    command = [sys.executable, str(Path(resumable.__file__)), str(tmp_path / "killed")]
    killed = subprocess.run([*command, "kill"], env=python_environment(), check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [folder.name for folder in (tmp_path / "killed").glob("checkpoint-*")] == ["checkpoint-4"]
    subprocess.run([*command, "resume"], env=python_environment(), check=True)

    whole = resumable.run(str(tmp_path / "whole"))
    resumed = SASGPTForCausalLM.from_pretrained(tmp_path / "killed")
    assert_identical(dict(resumed.named_parameters()), dict(whole.model.named_parameters()))
    optimizer = torch.load(tmp_path / "killed" / "final_optimizer.pt")
    for index, state in whole.optimizer.state_dict()["state"].items():
        assert_identical(optimizer["state"][index], state)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft to Transformers
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear", ["expansion", "residual"]], ids=str)
def test_lora_trains_and_merges(targets, tmp_path):
    """Adapters alone learn, on the projections and on the simulation's own maps, and merge into the weights."""
    base = language_model("sas_k5_gqa")
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    trainer_of(model, tmp_path, texts(40), max_steps=6, per_device_train_batch_size=8, learning_rate=1e-1).train()
    adapters = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    assert any("lora_B" in name and parameter.abs().max() > 0 for name, parameter in adapters.items())
    for name, parameter in base.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, before[name.replace(".base_layer", "")]), name

    ids = torch.tensor([texts(1)[0]["input_ids"]])
    with torch.no_grad():
        adapted = model.eval()(ids).logits
        model.save_pretrained(tmp_path / "adapter")
        fresh = language_model("sas_k5_gqa").eval()
        fresh.load_state_dict(before, strict=False)  # without `lm_head`, which is tied
        assert (fresh(ids).logits - adapted).abs().max() > 1e-2
        loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
        torch.testing.assert_close(loaded(ids).logits, adapted)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, adapted, atol=1e-4, rtol=0)
    assert merged.state_dict().keys() == language_model("sas_k5_gqa").state_dict().keys()


def test_bfloat16_training_step(tmp_path):
    model = language_model("sas_k5_gqa")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = trainer_of(model, tmp_path, texts(8), max_steps=2, bf16=True, learning_rate=1e-3)
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32 and torch.isfinite(parameter).all()
        assert not torch.equal(parameter, before[name]), name
