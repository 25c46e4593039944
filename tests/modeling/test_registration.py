"""What Transformers and its relatives know of these architectures, against what they know of Llama and of ViT."""

import pytest
import transformers
from helpers import GPT_BASE, USE_CPU, VIT_BASE, gpt_config
from transformers import LlamaConfig, PreTrainedModel, Trainer, TrainingArguments, ViTConfig
from transformers.modelcard import TrainingSummary
from transformers.models.auto import modeling_auto
from transformers.utils.generic import can_return_loss, find_labels

import sas_hf
from sas_hf import SASGPTConfig, SASViTConfig


RELATIVES = [("llama", "Llama", "sas_gpt", "SASGPT"), ("vit", "ViT", "sas_vit", "SASViT")]
CONFIGURATIONS = {"Llama": LlamaConfig, "ViT": ViTConfig, "SASGPT": SASGPTConfig, "SASViT": SASViTConfig}
SIZES = {"Llama": GPT_BASE, "SASGPT": GPT_BASE, "ViT": VIT_BASE, "SASViT": VIT_BASE}
HEADS = [
    (their_prefix, name, f"{their_prefix}{name.removeprefix(prefix)}")
    for _, their_prefix, _, prefix in RELATIVES
    for name in sas_hf.__all__
    if name.startswith(prefix) and issubclass(getattr(sas_hf, name), PreTrainedModel)
]
# By which the Trainer, generation and backends judge a model without asking for its name.
JUDGED_BY = ["main_input_name", "input_modalities", "_is_stateful", "supports_gradient_checkpointing"]
JUDGED_BY += [name for name in dir(PreTrainedModel) if name.startswith(("_supports_", "_can_compile"))]


@pytest.mark.parametrize(("relative", "their_prefix", "model_type", "prefix"), RELATIVES)
def test_every_table_of_class_names_that_has_the_relative_has_its_counterpart(
    relative, their_prefix, model_type, prefix
):
    named = {}
    for name in dir(modeling_auto):
        if name.startswith("MODEL_") and name.endswith("_NAMES") and relative in getattr(modeling_auto, name):
            counterpart = getattr(modeling_auto, name)[relative].replace(their_prefix, prefix)
            if hasattr(sas_hf, counterpart):
                named[name] = counterpart
    assert len(named) >= 4, "Transformers keeps its tables elsewhere: see where, and `register`"
    assert {name: getattr(modeling_auto, name).get(model_type) for name in named} == named


@pytest.mark.parametrize(("relative", "their_prefix", "model_type", "prefix"), RELATIVES)
def test_every_auto_class_that_makes_the_relative_makes_its_counterpart(relative, their_prefix, model_type, prefix):
    made, expected = {}, {}
    for name in dir(transformers):
        mapping = (
            getattr(getattr(transformers, name), "_model_mapping", None) if name.startswith("AutoModel") else None
        )
        if mapping is not None and CONFIGURATIONS[their_prefix] in mapping:
            counterpart = mapping[CONFIGURATIONS[their_prefix]].__name__.replace(their_prefix, prefix)
            if hasattr(sas_hf, counterpart):
                expected[name] = getattr(sas_hf, counterpart)
                made[name] = mapping.get(CONFIGURATIONS[prefix], None)
    assert len(expected) >= 3
    assert made == expected


@pytest.mark.parametrize(("prefix", "name", "relative"), HEADS, ids=[name for _, name, _ in HEADS])
def test_a_head_is_judged_as_the_relatives(prefix, name, relative):
    ours, theirs = (
        getattr(source, head)(CONFIGURATIONS[kind](**SIZES[kind]))
        for source, head, kind in ((sas_hf, name, name[:6]), (transformers, relative, prefix))
    )
    assert find_labels(type(ours)) == find_labels(type(theirs))
    assert can_return_loss(type(ours)) == can_return_loss(type(theirs))
    assert ours.loss_type == theirs.loss_type
    assert ours.can_generate() == theirs.can_generate()
    assert {flag: getattr(ours, flag) for flag in JUDGED_BY} == {flag: getattr(theirs, flag) for flag in JUDGED_BY}


def test_a_model_card_of_the_trainer_names_the_task(tmp_path):
    model = sas_hf.SASGPTForCausalLM(gpt_config())
    trainer = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=USE_CPU, report_to=[]))
    assert TrainingSummary.from_trainer(trainer).tasks == "text-generation"


def test_the_tables_do_not_disturb_the_auto_classes():
    """Transformers looks in its own modules for what its tables name, if its configurations have the model type."""
    mapping = modeling_auto.MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING
    made = dict(mapping.items())
    assert len(mapping) == len(made) == len(mapping.keys()) == len(mapping.values())
    assert made[ViTConfig] is transformers.ViTForMaskedImageModeling
    assert made[SASViTConfig] is sas_hf.SASViTForMaskedImageModeling
    assert LlamaConfig not in mapping


def test_no_harness_doubts_that_a_sas_gpt_is_a_causal_language_model(tmp_path, caplog):
    from lm_eval.models.huggingface import HFLM

    finder = object.__new__(HFLM)
    finder._get_backend(gpt_config(), trust_remote_code=False)
    assert finder.backend == "causal"
    assert "neither marked as CausalLM" not in caplog.text and "cannot be determined" not in caplog.text
