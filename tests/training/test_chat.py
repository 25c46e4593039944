"""Instruction fine-tuning by the real `SFTTrainer`: what the loss is on, LoRA, whole checkpoints, refusals."""

import copy
import json
import re
import sys
from pydoc_data.topics import topics

import pytest
import torch
from datasets import Dataset
from helpers import USE_CPU, assert_identical, gpt_config, train_tokenizer
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TrainingArguments

from sas_hf import SASGPTForCausalLM
from sas_hf.training.recipe import DataRecipe, ModelRecipe, TrainingRecipe, load_recipe
from sas_hf.training.recipe_checks import check_recipe
from sas_hf.training.run import train
from sas_hf.training.tasks.chat import load_splits, make_chat_trainer


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft to Transformers
PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


def chat_tokenizer(template: str | None = None):
    tokenizer = copy.deepcopy(train_tokenizer())
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def conversations(first: int, count: int) -> list[dict]:
    """What Python's own help answers, in short."""
    rows = []
    for topic in sorted(topics)[first : first + count]:
        title, _, text = topics[topic].strip().partition("\n")
        turns = [("user", f"What is {topic}?"), ("assistant", title), ("user", "More."), ("assistant", text[-60:])]
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns], "source": topic})
    return rows


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chats")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in conversations(0, 32)))
    Dataset.from_list(conversations(32, 10)).to_parquet(folder / "validation.parquet")
    return folder


def trainer_of(chats, output, model=None, data=None, tokenizer=None, start=None, **options):
    """`start`: folder from which the model is loaded, after it is made there."""
    torch.manual_seed(0)
    config = gpt_config("sas_k5_gqa", vocab_size=402, initializer_range=0.02, max_position_embeddings=128)
    fields = {"sequence_length": 128}
    if chats is not None:
        fields |= {"train": str(chats / "train.jsonl"), "cache": str(chats / "cache")}
    recipe = TrainingRecipe(
        task="chat",
        model=ModelRecipe(**{"chat_template": "chatml"} | (model or {})),
        data=DataRecipe(**fields | (data or {})),
    )
    options = {"per_device_train_batch_size": 4, "lr_scheduler_type": "constant", "learning_rate": 1e-2} | options
    arguments = TrainingArguments(str(output), report_to="none", use_cpu=USE_CPU, disable_tqdm=True, **options)
    tokenizer = tokenizer or chat_tokenizer()
    if start is None:
        return make_chat_trainer(recipe, lambda: SASGPTForCausalLM(config), tokenizer, arguments)
    config.eos_token_id = tokenizer.eos_token_id
    SASGPTForCausalLM(config).save_pretrained(start)
    return make_chat_trainer(recipe, lambda: SASGPTForCausalLM.from_pretrained(start), tokenizer, arguments)


def test_it_learns_what_the_assistant_says(chats, tmp_path):
    data = {"validation": str(chats / "validation.parquet"), "max_validation_sequences": 8}
    trainer = trainer_of(chats, tmp_path, data=data, max_steps=16, save_strategy="no")
    tokenizer = trainer.processing_class
    assert len(trainer.train_dataset) == 32 and len(trainer.eval_dataset) == 8
    for row, conversation in zip(trainer.train_dataset, conversations(0, 32), strict=True):
        targets = [token for token in row["labels"] if token != -100]
        said = [message["content"] for message in conversation["messages"] if message["role"] == "assistant"]
        expected = "".join(f"{text}<|im_end|>" for text in said)
        found = tokenizer.decode(targets)
        assert found and found == (expected if len(row["input_ids"]) < 128 else expected[: len(found)])
    # TRL scores the last hidden states itself; it must be what the model's own loss is.
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(3)])
    expected = trainer.model.eval()(**batch).loss
    torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(batch)), expected, atol=1e-5, rtol=0)

    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=True)
    assert trainer.evaluate()["eval_loss"] < before - 0.6
    trainer.save_model()
    AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


SUMS = [
    {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"It is {n}."}]}
    for n in range(40)
]
EOT_TEMPLATE = (
    "{% for message in messages %}{{ bos_token + message['role'] + message['content'] + ' <eot>' }}{% endfor %}"
)


@pytest.mark.parametrize("kind", ["chatml", "of the text's own end", "chatml, adapters"])
def test_a_model_that_was_trained_on_chats_ends_its_turns(kind, tmp_path):
    """Saved, loaded and asked as a user does it."""
    tokenizer = chat_tokenizer()
    tokenizer.bos_token, tokenizer.pad_token = "<|im_start|>", None
    template = tmp_path / "eot.jinja"
    template.write_text(EOT_TEMPLATE + "{% if add_generation_prompt %}{{ bos_token + 'assistant' }}{% endif %}")
    model = {"chat_template": "chatml" if "chatml" in kind else str(template)}
    if "adapters" in kind:
        model["lora"] = {"r": 8, "target_modules": "all-linear", "modules_to_save": ["embed_tokens", "lm_head"]}
    data = {"train": rows_file(tmp_path, *SUMS[:30]), "validation": rows_file(tmp_path / "held", *SUMS[30:])}
    options = {"max_steps": 60, "learning_rate": 1e-2, "save_strategy": "no", "model": model, "data": data}
    base = tmp_path / "base"
    if "adapters" in kind:
        with pytest.warns(UserWarning, match="does not end at '<.im_end.>'; set the loaded model's"):
            trainer = trainer_of(None, tmp_path / "out", tokenizer=tokenizer, start=base, **options)
    else:
        trainer = trainer_of(None, tmp_path / "out", tokenizer=tokenizer, start=base, **options)
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    end, text_end = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<eot>"])
    assert settings.eos_token_id == ([end, text_end] if "chatml" in kind else text_end)
    assert tokenizer.eos_token_id == (end if "chatml" in kind else text_end) and tokenizer.pad_token_id == text_end
    assert "adapters" in kind or loaded.generation_config.eos_token_id == settings.eos_token_id
    prompt = tokenizer.apply_chat_template(SUMS[3]["messages"][:1], add_generation_prompt=True, return_tensors="pt")
    if "adapters" in kind:
        loaded.generation_config = settings
    made = loaded.generate(**prompt, max_new_tokens=30, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert made[-1] == tokenizer.eos_token_id and len(made) < 30 and "It is" in tokenizer.decode(made)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}{{ m['content'] + '<|end|>' }}{% endfor %}",
            "an assistant's turn by '<|end|>', which",
        ),
        (
            "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}",
            "turn by '\\n', which",
        ),
        (
            "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}<|im_end|>{% endfor %}",
            "by '<|im_end|>' outside of its {% generation %} block",
        ),
        ("{{ raise_exception('No users here') }}", "cannot render a question and its answer: No users here"),
    ],
)
def test_a_template_whose_turns_cannot_end_is_refused(template, message, chats, tmp_path):
    (tmp_path / "own.jinja").write_text(template)
    with pytest.raises(ValueError) as error:
        trainer_of(chats, tmp_path / "out", model={"chat_template": str(tmp_path / "own.jinja")})
    assert "`model.chat_template`" in str(error.value) and message in str(error.value)


def test_chatml_for_a_tokenizer_without_its_tokens_is_refused(chats, tmp_path):
    with pytest.raises(ValueError, match="by '<.im_end.>', which is no special token .* such as '<eot>'"):
        trainer_of(chats, tmp_path / "out", tokenizer=copy.deepcopy(train_tokenizer()))


def test_validation_on_the_chats_that_are_trained_on_is_refused(chats, tmp_path):
    train = str(chats / "train.jsonl")
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in conversations(4, 5)))
    for data, message in (
        ({"validation": train}, "train.jsonl, which is trained on, too"),
        ({"validation": f"{chats}/*.jsonl"}, "train.jsonl, which is trained on, too"),
        ({"validation": str(tmp_path / "other.jsonl")}, "All conversations to validate on are trained on, too"),
        ({"validation_split": "test"}, "but only a dataset of the Hub has splits; name other files"),
        ({"validation_documents": 4}, "`data.validation_documents` is 4, of texts; name conversations"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            trainer_of(chats, tmp_path / "out", data=data)


def test_the_shipped_recipe_takes_files_of_ones_own(chats, tmp_path):
    """Whose validation goes before the split of the Hub dataset that it names."""
    files = [f"data.train={chats / 'train.jsonl'}", f"data.validation={chats / 'validation.parquet'}"]
    recipe = load_recipe("chat", [*files, f"data.cache={tmp_path}"])
    check_recipe(recipe)
    train, validation = load_splits(recipe.data, PLAIN_TEMPLATE)
    assert (len(train), len(validation)) == (32, 10)


def test_lora_goes_on_from_a_checkpoint_to_the_same_adapters(chats, tmp_path):
    options = {"model": {"lora": LORA}, "save_steps": 2}
    trainer_of(chats, tmp_path / "whole", max_steps=4, **options).train(resume_from_checkpoint=True)
    trainer_of(chats, tmp_path / "part", max_steps=2, **options).train(resume_from_checkpoint=True)
    trainer = trainer_of(chats, tmp_path / "part", max_steps=4, **options)
    trainer.train(resume_from_checkpoint=True)
    whole, part = (
        load_file(tmp_path / run / "checkpoint-4" / "adapter_model.safetensors") for run in ("whole", "part")
    )
    assert_identical(part, whole)
    assert all("lora_" in name for name in whole)
    # The layers beneath are as they were, and the adapters belong to them.
    untrained = trainer_of(chats, tmp_path / "other").model
    tokens = torch.arange(1, 40)[None]
    loaded = PeftModel.from_pretrained(untrained, tmp_path / "part" / "checkpoint-4").eval()
    assert torch.equal(loaded(tokens).logits, trainer.model.eval()(tokens).logits)


def test_a_save_that_fails_leaves_the_last_checkpoint(chats, tmp_path):
    trainer = trainer_of(chats, tmp_path, max_steps=4, save_steps=2)
    save = trainer._save_rng_state

    def fails_at_the_end(folder):
        if trainer.state.global_step == 4:
            raise OSError("No space left on device")
        save(folder)

    trainer._save_rng_state = fails_at_the_end
    with pytest.raises(OSError, match="No space"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint-2"]
    assert not (tmp_path / ".unfinished").exists()


def test_only_chosen_parameters_change(chats, tmp_path):
    trainer = trainer_of(
        chats, tmp_path, model={"trainable": ["expansion"]}, max_steps=2, save_strategy="no", weight_decay=0.1
    )
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    after = trainer.model.named_parameters()
    changed = {name for name, parameter in after if not torch.equal(parameter, before[name])}
    assert changed and all("expansion" in name for name in changed)


def test_a_template_without_marks_trains_on_everything_and_says_so(chats, tmp_path):
    template = tmp_path / "plain.jinja"
    template.write_text(PLAIN_TEMPLATE)
    with pytest.warns(UserWarning, match="does not mark the assistant's turns"):
        trainer = trainer_of(chats, tmp_path, model={"chat_template": str(template)})
    assert all(row["labels"] == row["input_ids"] for row in trainer.train_dataset)


def rows_file(tmp_path, *rows: dict) -> str:
    tmp_path.mkdir(exist_ok=True)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


SPOKEN = [{"role": "assistant", "content": "Yes."}]
LONG = [{"role": "assistant", "content": "word " * 60}]
SILENT = {"messages": [{"role": "user", "content": "Hello?"}]}
LATE = {"messages": [{"role": "user", "content": "word " * 60}, {"role": "assistant", "content": "Yes."}]}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "once"}], "has no column `messages`; its columns are text."),
        ([*conversations(0, 2), SILENT | {"source": "s"}], "1 of 3 do not, for instance [{"),
        ([{"messages": "once"}], "must have `messages`, a list of role and content"),
        (
            [{"conversations": [{"from": "human", "value": "a"}]}],
            "columns are conversations. Make lists of `role`",
        ),
        ([{"prompt": "a", "completion": "b"}], "its columns are prompt, completion. Make a user's and an assistant's"),
        ([{"messages": [{"role": "user", "content": ["a"]}, *SPOKEN]}], "must have `messages`, a list of role and"),
        ([{"messages": SPOKEN, "tools": [{"name": "add"}]}], "rows.jsonl has `tools`, which the chat template would"),
        (
            [{"messages": [{**SPOKEN[0], "tool_calls": [{"name": "add"}]}]}],
            "rows.jsonl has `tool_calls`, which the",
        ),
        ([{"messages": [*SPOKEN, *LONG]}, {"messages": LONG}], None),
        ([{"messages": LONG}], "No assistant ends a turn within the first `data.sequence_length` = 32 tokens"),
        ([LATE], "No assistant speaks within the first `data.sequence_length` = 32 tokens"),
    ],
)
def test_other_data_is_refused(rows, message, chats, tmp_path):
    data = {"train": rows_file(tmp_path, *rows), "sequence_length": 32}
    if message is None:
        assert len(trainer_of(chats, tmp_path / "out", data=data).train_dataset) == len(rows)
        return
    with pytest.raises(ValueError) as error:
        trainer_of(chats, tmp_path / "out", data=data)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ({"chat_template": None}, {}, "has no chat template; give `model.chat_template` a Jinja file, or `chatml`."),
        ({"chat_template": "chatlm"}, {}, "`model.chat_template` is 'chatlm', which is no file"),
        ({"chat_template": f"{sys.executable}"}, {}, f"{sys.executable} is not text in UTF-8"),
        ({}, {"train": None}, "`data.train` is missing"),
        ({}, {"train": "nowhere.jsonl"}, "`data.train` names nowhere.jsonl, which does not exist"),
        ({}, {"train": ["a/b", "c/d"]}, "a/b, which does not exist; of Hub datasets give one"),
        ({}, {"train": "no-body/no-chats"}, "no-body/no-chats is no file here, nor a dataset with a split 'train'"),
        ({}, {"streaming": True}, "`data.streaming` is for language modelling"),
        ({"lora": {"rank": 4}}, {}, "`model.lora` has no field 'rank'"),
    ],
)
def test_other_recipes_are_refused(model, data, message, chats, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        trainer_of(chats, tmp_path / "out", model=model, data=data)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("sizes", "data", "message"),
    [
        ({}, {"sequence_length": 129}, "`data.sequence_length` is 129, but the model's `max_position_embeddings`"),
        ({"vocab_size": 401}, {}, "The tokenizer has 402 tokens, but the model's `vocab_size` is 401"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_the_chats_are_read(sizes, data, message, tmp_path):
    chat_tokenizer().save_pretrained(tmp_path / "tokenizer")
    overrides = {"vocab_size": 402, "max_position_embeddings": 128} | sizes
    recipe = TrainingRecipe(
        task="chat",
        model=ModelRecipe(config="sas-125m", tokenizer=str(tmp_path / "tokenizer"), overrides=overrides),
        data=DataRecipe(**{"train": "nowhere.jsonl"} | data),
        training={"output_dir": str(tmp_path / "out"), "use_cpu": USE_CPU},
    )
    with pytest.raises(ValueError) as error:
        train(recipe)
    assert message in str(error.value) and not (tmp_path / "out").exists()
