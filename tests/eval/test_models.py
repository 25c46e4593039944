"""What can be evaluated: any causal model, adapters, several at once; and what cannot, told before it is loaded."""

import contextlib
import json
import shutil

import huggingface_hub
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

from sas_hf import (
    SASGPTConfig,
    SASGPTForCausalLM,
    SASGPTForSequenceClassification,
    SASViTConfig,
    SASViTForImageClassification,
)
from sas_hf.eval import SASHFLM, evaluate
from sas_hf.eval.evaluation import training_step
from sas_hf.eval.models import inspect_model


# What peft asks Transformers for.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_a_checkpoint_is_not_run_and_not_offered(file, checkpoint, tmp_path, monkeypatch):
    """Without being told, Transformers asks at a terminal whether to run it."""
    monkeypatch.setattr("builtins.input", lambda _: "y")
    folder = shutil.copytree(checkpoint, tmp_path / "with-code")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w').close()\nclass Own: pass\n")
    named = {"config.json": {"AutoConfig": "own.Own"}, "tokenizer_config.json": {"AutoTokenizer": ["own.Own", None]}}
    unknown = {"config.json": {"model_type": "own"}, "tokenizer_config.json": {"tokenizer_class": "OwnTokenizer"}}
    settings = json.loads((folder / file).read_text()) | {"auto_map": named[file]} | unknown[file]
    (folder / file).write_text(json.dumps(settings))
    with contextlib.suppress(ValueError):
        inspect_model(folder)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def adapter(model, checkpoint, tmp_path):
    """Folder of a LoRA adapter whose base is `checkpoint`, and that changes what the model says."""
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def responses(result, task="arc_easy"):
    return [sample["responses"] for sample in result.tasks[task].samples]


@pytest.fixture
def gpt2(tokenizer, tmp_path):
    config = GPT2Config(vocab_size=384, n_embd=16, n_layer=1, n_head=2, n_positions=512, initializer_range=0.3)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_several_models_in_one_call(checkpoint, gpt2, data):
    results = evaluate([checkpoint, gpt2], "arc_easy", data=data, device="cpu", log_samples=True)
    assert [result.model for result in results] == [str(checkpoint), str(gpt2)]
    for result in results:
        alone = evaluate(result.model, "arc_easy", data=data, device="cpu", log_samples=True)
        assert responses(alone) == responses(result)
    assert responses(results[0]) != responses(results[1])
    with pytest.raises(ValueError, match="`output` is 'x.json', for one model"):
        evaluate([checkpoint, gpt2], "arc_easy", data=data, output="x.json")
    with pytest.raises(ValueError, match="`model` is an empty list"):
        evaluate([], "arc_easy", data=data)


def test_all_models_are_looked_over_first(checkpoint, data, never_loaded):
    with pytest.raises(FileNotFoundError, match="`model`: nowhere does not exist"):
        evaluate([checkpoint, "./nowhere"], "arc_easy", data=data)


def test_an_adapter_stands_for_its_base_with_it(checkpoint, model, adapter, tokenizer, data):
    options = {"data": data, "device": "cpu", "log_samples": True}
    base = evaluate(checkpoint, "arc_easy", **options)
    by_folder = evaluate(adapter, "arc_easy", **options)
    named = evaluate(checkpoint, "arc_easy", adapter=adapter, **options)
    live = PeftModel.from_pretrained(SASGPTForCausalLM.from_pretrained(checkpoint), adapter)
    found = evaluate(live, "arc_easy", data=data, tokenizer=tokenizer, log_samples=True)
    assert responses(by_folder) == responses(named) == responses(found) != responses(base)
    assert by_folder.adapter == named.adapter == str(adapter)
    assert (by_folder.model, base.adapter) == (str(adapter), None)
    assert by_folder.num_parameters > base.num_parameters


def test_an_adapter_is_put_on_the_revision_that_it_names(
    adapter, checkpoint, config, tokenizer, data, tmp_path, monkeypatch
):
    """Of a base on the Hub, here in its cache; the main branch has other weights. Kept answers are of the commit."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    here = evaluate(adapter, "arc_easy", data=data, device="cpu", log_samples=True)
    torch.manual_seed(1)
    SASGPTForCausalLM(config).save_pretrained(tmp_path / "newer")
    tokenizer.save_pretrained(tmp_path / "newer")
    for branch, commit, folder in (("first", "a" * 40, checkpoint), ("main", "b" * 40, tmp_path / "newer")):
        shutil.copytree(folder, tmp_path / "hub/models--sas--base/snapshots" / commit)
        (tmp_path / "hub/models--sas--base/refs").mkdir(exist_ok=True)
        (tmp_path / "hub/models--sas--base/refs" / branch).write_text(commit)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings |= {"base_model_name_or_path": "sas/base", "revision": "first"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    there = evaluate(adapter, "arc_easy", data=data, device="cpu", log_samples=True)
    assert responses(there) == responses(here)
    assert inspect_model(adapter).commit == "a" * 40 and inspect_model("sas/base").commit == "b" * 40


def test_kept_answers_are_of_one_commit(checkpoint, data, tmp_path, monkeypatch):
    """A name on the Hub stands for other weights once its branch has moved."""
    repository = tmp_path / "hub" / "models--team--base"
    (repository / "refs").mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    found = []
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(checkpoint, repository / "snapshots" / commit)
        (repository / "refs" / "main").write_text(commit)
        options = {"data": data, "device": "cpu", "log_samples": True}
        found.append(evaluate("team/base", "arc_easy", cache=tmp_path / "answers", **options))
        model = SASGPTForCausalLM.from_pretrained(checkpoint)
        model.lm_head.weight.data.mul_(-1)
        model.save_pretrained(checkpoint)
    assert found[1].num_reused == 0
    assert responses(found[0]) != responses(found[1])


def test_an_adapter_leaves_a_padded_vocabulary_alone(tokenizer, data, config, tmp_path):
    """The harness would cut the embedding down to the tokenizer's size and change every probability."""
    padded = SASGPTForCausalLM(SASGPTConfig(**config.to_diff_dict() | {"vocab_size": 512}))
    padded.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = SASGPTForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")  # does nothing
    results = evaluate(
        [tmp_path / "base", tmp_path / "adapter"], "arc_easy", data=data, device="cpu", log_samples=True
    )
    assert responses(results[0]) == responses(results[1])


def test_unusable_adapters(checkpoint, adapter, model, tokenizer, data, tmp_path, never_loaded):
    with pytest.raises(ValueError, match=r"`adapter` is .*no adapter_config.json"):
        evaluate(checkpoint, "arc_easy", adapter=checkpoint, data=data)
    with pytest.raises(ValueError, match="`adapter` is given with a live model"):
        evaluate(model, "arc_easy", adapter=adapter, tokenizer=tokenizer, data=data)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="without an adapter's weights"):
        evaluate(adapter, "arc_easy", data=data)
    text = (adapter / "adapter_config.json").read_text()
    (adapter / "adapter_config.json").write_text(text.replace(str(checkpoint), "/no/such/base"))
    with pytest.raises(FileNotFoundError, match="is '/no/such/base', where no model is"):
        evaluate(adapter, "arc_easy", data=data)


def test_image_models_and_other_heads_are_refused(checkpoint, config, tokenizer, data, tmp_path, never_loaded):
    vit_sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    vit_sizes |= {"image_size": 16, "patch_size": 8}
    vit = ViTConfig(**vit_sizes)
    ViTForImageClassification(vit).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match=r"`model_type` is 'vit', which takes images.*--images"):
        evaluate(tmp_path / "vit", "arc_easy", data=data)
    # Ours, of which `is_causal=False` is true too, but no help.
    SASViTForImageClassification(SASViTConfig(**vit_sizes)).save_pretrained(tmp_path / "sas_vit")
    with pytest.raises(ValueError, match=r"`model_type` is 'sas_vit', which takes images.*--images"):
        evaluate(tmp_path / "sas_vit", "arc_easy", data=data)
    with pytest.raises(ValueError, match="ViTForImageClassification, which has no language model head"):
        evaluate(ViTForImageClassification(vit), "arc_easy", data=data)
    SASGPTForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    with pytest.raises(ValueError, match="holds a SASGPTForSequenceClassification.*no causal language model head"):
        evaluate(tmp_path / "classifier", "arc_easy", data=data)
    BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(tmp_path / "bert")
    shutil.copy(checkpoint / "model.safetensors", tmp_path / "bert")
    with pytest.raises(ValueError, match="holds a BertForMaskedLM"):
        evaluate(tmp_path / "bert", "arc_easy", data=data)


def test_requests_longer_than_the_context(config, tokenizer, data, tmp_path):
    torch.manual_seed(0)
    short = SASGPTForCausalLM(SASGPTConfig(**config.to_diff_dict() | {"max_position_embeddings": 100}))
    short.forward = None  # any forward pass fails
    with pytest.raises(
        ValueError, match=r"\d+ of \d+ requests are longer than the model's context of 100.*truncation"
    ):
        evaluate(short, "arc_easy", data=data, tokenizer=tokenizer)
    tiny = SASGPTForCausalLM(SASGPTConfig(**config.to_diff_dict() | {"max_position_embeddings": 8}))
    with pytest.raises(ValueError, match="Even their continuations alone are"):
        evaluate(tiny, "arc_easy", data=data, tokenizer=tokenizer, truncation=True)
    del short.forward
    result = evaluate(short, "arc_easy", data=data, tokenizer=tokenizer, truncation=True)
    assert result.num_truncated > 0 and result.max_length == 100


def test_more_examples_than_there_are(checkpoint, data, never_loaded):
    with pytest.raises(ValueError, match=r"'arc_easy' is to show 8 examples, but its split 'validation' has 7"):
        evaluate(checkpoint, "arc_easy", num_fewshot=8, data=data)


def test_the_beginning_of_text_is_recorded_and_can_be_chosen(checkpoint, tokenizer, data):
    assert evaluate(checkpoint, "arc_easy", data=data, limit=1, device="cpu").beginning_of_text == {
        "token": "<|endoftext|>",
        "always": False,
        "requested": None,
    }
    model = HFLM(str(checkpoint), device="cpu")
    assert model.tok_encode("a")[0] != tokenizer.eos_token_id


def test_training_steps(checkpoint, tmp_path):
    assert training_step("runs/checkpoint-500") == 500
    assert training_step("runs/mine-step1000") == 1000
    assert training_step("HuggingFaceTB/SmolLM2-135M") is None
    (tmp_path / "trainer_state.json").write_text('{"global_step": 7}')
    assert training_step(str(tmp_path)) == 7


def test_batches_and_bits_are_hf_s(gpt2, text, monkeypatch):
    pairs = [(sentence, " " + sentence[:20]) for sentence in text.splitlines()[:18]]
    pairs += [(pairs[0][0], " " + letter) for letter in "ab"]  # these need one row between them
    requests = [Instance("loglikelihood", {}, pair, 0, metadata=("task", i, 1)) for i, pair in enumerate(pairs)]
    for batch_size in (1, 4):
        answers, batches = [], []
        for kind in (HFLM, SASHFLM):
            model = kind(str(gpt2), device="cpu", batch_size=batch_size)
            call, seen = model._model_call, []
            monkeypatch.setattr(model, "_model_call", lambda ids, call=call, seen=seen: seen.append(ids) or call(ids))
            answers.append(model.loglikelihood(requests, disable_tqdm=True))
            batches.append([ids.tolist() for ids in seen])
        assert batches[0] == batches[1] and answers[0] == answers[1]
