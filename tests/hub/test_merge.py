"""`sas-hf merge`: an adapter of any architecture and its base become one checkpoint that computes what both do."""

import json

import pytest
import torch
from helpers import gpt, sas_hf, train_tokenizer
from peft import LoraConfig, PeftModel, PromptTuningConfig, TaskType, VBLoRAConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from sas_hf.hub.merge import merge_adapter


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft to Transformers
SMALL = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}


def save_base(model, folder):
    model.save_pretrained(folder)
    train_tokenizer(300).save_pretrained(folder)
    return folder


def save_adapter(model_class, base, folder, **settings):
    """An adapter that changes what its base computes, and what both compute."""
    options = {"r": 4, "init_lora_weights": False} | settings
    adapted = get_peft_model(model_class.from_pretrained(base), LoraConfig(**options)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_()
    adapted.save_pretrained(folder)
    return adapted


def ids():
    return torch.randint(300, (2, 11), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["llama", "sas"])
def test_a_merged_decoder_computes_what_base_and_adapter_do(kind, tmp_path):
    torch.manual_seed(0)
    model = (
        gpt("sas", vocab_size=300) if kind == "sas" else LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **SMALL))
    )
    base = save_base(model, tmp_path / "base")
    adapted = save_adapter(
        AutoModelForCausalLM,
        base,
        tmp_path / "adapter",
        target_modules=["q_proj", "o_proj"],
        task_type=TaskType.CAUSAL_LM,
    )
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(merged) is type(model) and not isinstance(merged, PeftModel)
    assert not torch.allclose(model.eval()(ids()).logits, adapted(ids()).logits, atol=1e-2)
    torch.testing.assert_close(merged(ids()).logits, adapted(ids()).logits, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("a b")["input_ids"]
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_a_head_comes_with_the_adapter_or_not_at_all(tmp_path):
    settings = {"target_modules": ["query"], "task_type": TaskType.SEQ_CLS}
    for name, model_class in {"body": BertModel, "masked": BertForMaskedLM}.items():
        base = save_base(model_class(BertConfig(num_attention_heads=4, **SMALL)), tmp_path / name)
        adapted = save_adapter(AutoModelForSequenceClassification, base, tmp_path / f"{name}-adapter", **settings)
        if name == "body":
            merge_adapter(tmp_path / "body-adapter", tmp_path / "merged")
            merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
            torch.testing.assert_close(merged(ids()).logits, adapted(ids()).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="lacks weights of BertForSequenceClassification: bert.pooler"):
        merge_adapter(tmp_path / "masked-adapter", tmp_path / "nothing")  # began anew in training, and was not saved
    file = tmp_path / "body-adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"modules_to_save": None}))
    with pytest.raises(ValueError, match="lacks weights of BertForSequenceClassification: classifier"):
        merge_adapter(tmp_path / "body-adapter", tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_a_head_may_have_other_labels_than_the_base(tmp_path):
    base = save_base(BertModel(BertConfig(num_attention_heads=4, **SMALL)), tmp_path / "base")
    (base / "LICENSE").write_text("Terms.")
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# Base\n")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    options = LoraConfig(target_modules=["query"], task_type=TaskType.SEQ_CLS, init_lora_weights=False)
    adapted = get_peft_model(model, options).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(ids()).logits, adapted(ids()).logits, rtol=1e-4, atol=1e-4)
    assert merged.config.num_labels == 3
    assert (tmp_path / "merged" / "LICENSE").read_text() == "Terms."
    assert "license: apache-2.0" in (tmp_path / "merged" / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("side", ["lm_head", "embed_tokens"])
def test_one_side_of_tied_weights_is_not_merged(side, tmp_path):
    """peft adds the difference to the weight that both sides are."""
    config = LlamaConfig(num_attention_heads=4, tie_word_embeddings=True, **SMALL)
    base = save_base(LlamaForCausalLM(config), tmp_path / "base")
    save_adapter(AutoModelForCausalLM, base, tmp_path / "adapter", target_modules=[side], task_type=TaskType.CAUSAL_LM)
    with pytest.raises(ValueError, match="give other numbers once they are merged"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_vectors_that_all_layers_share_are_no_missing_weights(tmp_path):
    base = save_base(LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **SMALL)), tmp_path / "base")
    options = VBLoRAConfig(r=4, num_vectors=16, vector_length=8, topk=2, target_modules=["q_proj"])
    options.init_logits_std = options.init_vector_bank_bound = 1.0
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), options).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not torch.allclose(AutoModelForCausalLM.from_pretrained(base)(ids()).logits, merged(ids()).logits)
    torch.testing.assert_close(merged(ids()).logits, adapted(ids()).logits, rtol=1e-4, atol=1e-4)


def test_a_bias_that_was_trained_with_an_adapter_is_missed(tmp_path):
    base = save_base(gpt("sas", vocab_size=300, attention_bias=True), tmp_path / "base")
    save_adapter(AutoModelForCausalLM, base, tmp_path / "adapter", target_modules=["q_proj"], bias="all")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    lost = sorted(name for name in weights if name.endswith("_simulation.heads.expansion.bias"))[0]
    del weights[lost]
    save_file(weights, file)
    with pytest.raises(ValueError, match=f"lacks weights of its adapter: {lost}"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_embeddings_that_grew_and_are_adapted_themselves(tmp_path):
    base = save_base(LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **SMALL)), tmp_path / "base")
    for name, head in {"whole": ["lm_head"], "without": None}.items():
        model = AutoModelForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(304)
        options = LoraConfig(target_modules=["embed_tokens"], modules_to_save=head, init_lora_weights=False)
        adapted = get_peft_model(model, options).eval()
        adapted.save_pretrained(tmp_path / name)
        if head:
            run = sas_hf("merge", tmp_path / name, tmp_path / "merged")
            assert run.returncode == 0 and "Warning" not in run.stderr, run.stderr
            merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
            torch.testing.assert_close(merged(ids() + 4).logits, adapted(ids() + 4).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="holds embeddings for added tokens, but lacks their rows of the output"):
        merge_adapter(tmp_path / "without", tmp_path / "nothing")


def test_what_peft_cannot_do_is_said_in_a_line(tmp_path):
    base = save_base(LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **SMALL)), tmp_path / "base")
    save_adapter(AutoModelForCausalLM, base, tmp_path / "adapter", target_modules=["q_proj"])
    file = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(file.read_text())
    for wrong, told in (
        ({"lora_alpha": None}, "peft cannot merge .*adapter: TypeError"),
        ({"init_lora_weights": "pissa_niter_4"}, "is drawn anew each time"),
    ):
        file.write_text(json.dumps(settings | wrong))
        with pytest.raises(ValueError, match=told):
            merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_what_cannot_be_merged_is_refused_before_anything_is_written(tmp_path):
    base = save_base(LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **SMALL)), tmp_path / "base")
    with pytest.raises(ValueError, match="holds a model and no adapter"):
        merge_adapter(base, tmp_path / "merged")
    with pytest.raises(FileNotFoundError, match="does not exist; there is .*base"):
        merge_adapter(tmp_path / "bse", tmp_path / "merged")
    prompts = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), prompts).save_pretrained(tmp_path / "prompts")
    with pytest.raises(ValueError, match="cannot be merged into weights"):
        merge_adapter(tmp_path / "prompts", tmp_path / "merged")
    settings = json.loads((base / "config.json").read_text()) | {"model_type": "unheard_of"}
    save_adapter(AutoModelForCausalLM, base, tmp_path / "adapter", target_modules=["q_proj"])
    (base / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="`model_type` 'unheard_of', which Transformers .* does not know"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
