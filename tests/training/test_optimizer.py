"""What a step is made of: weight decay by shape, the simulation's own rate, the schedule's floor, joined rows."""

import pytest
import torch
from helpers import USE_CPU, gpt, real_text, train_tokenizer
from transformers import TrainingArguments, default_data_collator
from transformers.utils.generic import is_flash_attention_requested

from sas_hf.training import pack_documents
from sas_hf.training.models import build_model, load_config
from sas_hf.training.optimizer import RecipeTrainer
from sas_hf.training.recipe import ModelRecipe


def trainer_of(tmp_path, variant="sas_k5_gqa", simulation_learning_rate=None, **options):
    options = {"learning_rate": 1e-3, "weight_decay": 0.1, "use_cpu": USE_CPU, "report_to": "none"} | options
    trainer = RecipeTrainer(gpt(variant), TrainingArguments(str(tmp_path), **options))
    trainer.set_simulation_learning_rate(simulation_learning_rate)
    return trainer


def settings_of(trainer) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay by the parameter's name, each of which must be in exactly one group."""
    groups = trainer.create_optimizer().param_groups
    settings = [(id(weight), (group["lr"], group["weight_decay"])) for group in groups for weight in group["params"]]
    named = dict(trainer.model.named_parameters())
    assert len(settings) == len(dict(settings)) == len(named)
    return {name: dict(settings)[id(weight)] for name, weight in named.items()}


@pytest.mark.parametrize("variant", ["learned", "sas_learned", "super", "qk_norm_sas"])
def test_decay_is_on_tensors_of_two_or_more_dimensions_alone(variant, tmp_path):
    trainer = trainer_of(tmp_path, variant)
    for name, setting in settings_of(trainer).items():
        decay = 0.1 if trainer.model.get_parameter(name).ndim >= 2 else 0.0
        assert setting == (1e-3, decay), name


def test_the_simulation_has_its_own_rate(tmp_path):
    settings = settings_of(trainer_of(tmp_path, simulation_learning_rate=5e-3))
    rates = {name: rate for name, (rate, _) in settings.items()}
    simulation = {name for name, rate in rates.items() if rate == 5e-3}
    assert simulation == {name for name in rates if "_simulation." in name} and len(simulation) > 10
    assert {rate for name, rate in rates.items() if name not in simulation} == {1e-3}
    decays = {name: decay for name, (_, decay) in settings.items()}
    assert decays["model.layers.0.self_attn.q_simulation.heads.expansion.weight"] == 0.1
    assert decays["model.layers.0.self_attn.q_simulation.heads.expansion.bias"] == 0.0


def test_a_rate_for_a_simulation_that_is_not_there(tmp_path):
    with pytest.raises(
        ValueError, match="`simulation_learning_rate` is 0.005, but no parameter of a simulation is tr"
    ):
        trainer_of(tmp_path, "mha", simulation_learning_rate=5e-3)


def test_the_cosine_ends_at_its_floor(tmp_path):
    """nanoGPT's formula between warm-up and end; the simulation's rate keeps its ratio."""
    trainer = trainer_of(
        tmp_path,
        simulation_learning_rate=5e-3,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": 1e-4},
        warmup_steps=4,
    )
    trainer.create_optimizer_and_scheduler(num_training_steps=20)
    rates = []
    for _ in range(21):
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    rates = torch.tensor(rates, dtype=torch.float64)
    progress = (torch.arange(4, 21, dtype=torch.float64) - 4) / 16
    expected = 1e-4 + 0.5 * (1 + torch.cos(torch.pi * progress)) * (1e-3 - 1e-4)
    torch.testing.assert_close(rates[4:, 0], expected)
    torch.testing.assert_close(rates[:4, 0], 1e-3 * torch.arange(4, dtype=torch.float64) / 4)
    torch.testing.assert_close(rates[:, -1], 5 * rates[:, 0])


def test_joined_rows_train_and_evaluate_the_same(tmp_path):
    """As under FlashAttention, which is not there on a CPU; by SDPA both must be the same."""
    packed, found = pack_documents(real_text()[:60], train_tokenizer(), 32), {}
    for joins in (False, True):
        torch.manual_seed(0)
        trainer = RecipeTrainer(
            gpt("sas_k5_gqa", vocab_size=400, initializer_range=0.02),
            TrainingArguments(
                str(tmp_path),
                max_steps=3,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                logging_steps=1,
                save_strategy="no",
                use_cpu=USE_CPU,
                disable_tqdm=True,
                report_to="none",
            ),
            train_dataset=packed,
            eval_dataset=packed.select(range(8)),
            data_collator=default_data_collator,
        )
        trainer.joins_rows = joins
        shapes = set()
        trainer.model.register_forward_pre_hook(
            lambda _, args, kwargs, shapes=shapes: shapes.add(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )
        trainer.train()
        evaluated = trainer.evaluate()["eval_loss"]
        found[joins] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] + [evaluated]
        assert shapes == ({(1, 4 * 32), (1, 8 * 32)} if joins else {(4, 32), (8, 32)})
    assert found[True] == pytest.approx(found[False], abs=1e-5)


def test_a_recipe_chooses_the_attention_implementation(tmp_path):
    flash = load_config(ModelRecipe(config="sas-125m", overrides={"attn_implementation": "flash_attention_2"}))
    assert is_flash_attention_requested(flash)
    gpt("sas").save_pretrained(tmp_path)
    recipe = ModelRecipe(checkpoint=str(tmp_path), overrides={"attn_implementation": "eager"})
    assert build_model(recipe, load_config(recipe)).config._attn_implementation == "eager"


def test_the_validation_loss_is_not_smoothed(tmp_path):
    model, ids = gpt(), torch.arange(3, 15)
    rows = [{"input_ids": ids, "labels": ids}]
    arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=0.3, use_cpu=USE_CPU, report_to=[])
    trainer = RecipeTrainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    with torch.no_grad():
        expected = model(input_ids=ids[None], labels=ids[None]).loss.item()
        smoothed = trainer.compute_loss(model, {"input_ids": ids[None], "labels": ids[None]}).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert abs(smoothed - expected) > 1e-3, "while what is trained stays smoothed"
    assert trainer.compute_loss(model, {"input_ids": ids[None], "labels": ids[None]}).item() == pytest.approx(smoothed)
