"""Recipes: read, overridden, built on one another; what is wrong with one is said by name before anything runs."""

import pytest
import yaml

from sas_hf.training.arguments import training_arguments
from sas_hf.training.recipe import load_recipe, recipe_from_dict, recipe_names


RECIPE = {
    "model": {"config": "sas-125m", "tokenizer": "python-reference"},
    "data": {"train": "python-reference"},
    "training": {"output_dir": "runs/unused", "use_cpu": True},
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def test_the_command_line_overrides_any_field(file):
    changes = [
        "training.max_steps=7",
        "training.learning_rate=6e-4",
        "model.overrides.hidden_size=64",
        "training.save_strategy=no",
        "batch_size=16",
    ]
    recipe = load_recipe(file, [*changes, "data.train=[a.txt, b.txt]", "data.cache=null"])
    assert recipe.training == RECIPE["training"] | {
        "max_steps": 7,
        "learning_rate": 0.0006,
        "save_strategy": "no",
    }
    assert recipe.model.overrides == {"hidden_size": 64} and recipe.model.config == "sas-125m"
    assert (recipe.batch_size, recipe.data.train, recipe.data.cache) == (16, ["a.txt", "b.txt"], None)
    assert recipe_from_dict(recipe.to_dict()) == recipe


def test_a_recipe_builds_on_another(file, tmp_path):
    (tmp_path / "longer.yaml").write_text("base: recipe.yaml\ntraining: {max_steps: 9}\n")
    (tmp_path / "longest.yaml").write_text("base: longer.yaml\nmodel: {config: mha-125m}\n")
    recipe = load_recipe(tmp_path / "longest.yaml")
    assert recipe.training == RECIPE["training"] | {"max_steps": 9}
    assert (recipe.model.config, recipe.model.tokenizer) == ("mha-125m", "python-reference")
    (tmp_path / "longer.yaml").write_text("base: longest.yaml\n")
    with pytest.raises(ValueError, match="is the `base` of itself"):
        load_recipe(tmp_path / "longest.yaml")


PAPER = {"125m": (6e-4, 3e-5), "350m": (3e-4, 6e-5), "760m": (2e-4, 1e-5), "1.5b": (1e-4, 1e-5)}


@pytest.mark.parametrize("kind", ["mha", "sas"])
@pytest.mark.parametrize("size", PAPER)
def test_the_papers_pretraining(kind, size):
    recipe = load_recipe(f"fineweb-edu-{kind}-{size}")
    arguments = training_arguments(recipe)
    assert (recipe.model.config, recipe.data.config) == (f"{kind}-{size}", "sample-100BT")
    assert (arguments.learning_rate, arguments.lr_scheduler_kwargs) == (PAPER[size][0], {"min_lr": PAPER[size][1]})
    assert (arguments.max_steps, arguments.warmup_steps, arguments.max_grad_norm) == (100_000, 2000, 1.0)
    assert (arguments.adam_beta1, arguments.adam_beta2, arguments.weight_decay) == (0.9, 0.95, 0.1)
    assert arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps == 480
    assert recipe.data.sequence_length == 1024
    assert recipe.training["output_dir"] == f"runs/fineweb-edu-{kind}-{size}"


def test_every_recipe_of_the_package_can_be_run():
    names = recipe_names()
    assert {"cpu", "fine-tune", "lora", "fineweb-edu-sas-1.5b"} <= set(names)
    folders = {load_recipe(name).training["output_dir"] for name in names}
    assert folders == {f"runs/{name}" for name in names}


def test_the_batch_is_the_same_on_any_number_of_devices(file, monkeypatch):
    recipe = load_recipe(file, ["batch_size=48", "training.per_device_train_batch_size=4"])
    assert training_arguments(recipe).gradient_accumulation_steps == 12
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(ValueError, match="`batch_size` is 48; 5 devices .* cannot share it evenly"):
        training_arguments(recipe)


def test_null_takes_a_training_field_of_the_base_away():
    recipe = load_recipe("fine-tune", ["batch_size=8", "training.gradient_accumulation_steps=null"])
    assert training_arguments(recipe).gradient_accumulation_steps == 2
    with pytest.raises(ValueError, match="set one of them to null"):
        load_recipe("fine-tune", ["batch_size=8"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("modle.config=x", "`modle` is no field of a recipe; did you mean `model`?"),
        ("model.confg=x", r"`model.confg` is no field of a recipe; did you mean `model.config`\?"),
        (
            "training.max_step=7",
            r"`training.max_step` is no field of `TrainingArguments`; did you mean `training.max_s",
        ),
        ("training.max_steps=many", "`training.max_steps` is 'many'; it must be a whole number"),
        ("training.max_steps=1.5", "`training.max_steps` is 1.5; it must be a whole number"),
        ("training.use_cpu=1", "`training.use_cpu` is 1; it must be true or false"),
        ("training.bf16=yes please", "`training.bf16` is 'yes please'; it must be true or false or 'auto'"),
        ("data.sequence_length=true", "`data.sequence_length` is True; it must be a whole number"),
        ("data.train=[1]", r"`data.train` is \[1\]; it must be text or a list, each text or null"),
        ("data=3", "`data` is 3; it must hold fields and values"),
        ("data.train=null", "`data.train` is not given"),
        ("data.streaming=true", "a stream has no length; set `training.max_steps`"),
        ("task=chatt", "`chatt` is no `task` of a recipe; did you mean `chat`"),
        (
            "model.checkpoint=folder",
            "`model.config` is 'sas-125m' and `model.checkpoint` is 'folder'; give exactly one",
        ),
        ("model.config=null", "`model.config` is None and `model.checkpoint` is None; give exactly one"),
        ("model.revision=main", "`model.revision` is 'main', of a checkpoint"),
        ("training.max_steps=0", "`training.max_steps` is 0; it must be at least 1, or -1"),
        ("training.max_steps=-5", "`training.max_steps` is -5"),
        ("training.logging_steps=-3", "`training.logging_steps` is -3; it must be above 0"),
        (
            "training.per_device_train_batch_size=0",
            "`training.per_device_train_batch_size` is 0; .* at least 1",
        ),
        ("training.weight_decay=-1", "`training.weight_decay` is -1; it must be at least 0"),
        ("batch_size=-2", "`batch_size` is -2; it must be a multiple"),
        ("=40", "must be of the form FIELD=VALUE"),
        ("model.conversion={}", "`model.conversion` is {}, of a checkpoint"),
        ("model.chat_template=chatml", "`model.chat_template` is 'chatml', but `task: language_modeling` does not"),
        ("training.output_dir=null", "`training.output_dir` is not given"),
        ("training.resume_from_checkpoint=x", "goes on from its own last checkpoint by itself"),
        ("training.save_only_model=true", "`training.save_only_model` is True, but a run could not go on"),
        ("training.ignore_data_skip=true", "would train on its first data again"),
        ("training.restore_callback_states_from_checkpoint=true", "goes on from its own last checkpoint by itself"),
        ("training.enable_jit_checkpoint=true", "SIGTERM saves a checkpoint of every run"),
        ("training.bf16_full_eval=true", "would leave it in that precision; evaluate .* by `sas-hf eval --dtype`"),
        ("training.fp16_full_eval=true", "would leave it in that precision"),
        ("training.label_names=[x]", r"`training.label_names` is \['x'\], but a recipe's task decides"),
        ("training.dataloader_drop_last=true", "would leave samples out of evaluations, too"),
        ("training.push_to_hub=true", "`training.push_to_hub` is True, but .* shared by `sas-hf export`"),
        ("training.hub_model_id=a/b", "`training.hub_model_id` is 'a/b', but .* shared by `sas-hf export`"),
        ("training.do_train=false", "`training.do_train` is False, but the Trainer does not look at it"),
        ("training.train_sampling_strategy=group_by_length", "all its samples are of one length"),
        ("training.metric_for_best_model=perplexity", "is 'perplexity'; an evaluation of this task has loss"),
        ("training.greater_is_better=true", "`training.greater_is_better` is true, which takes the worst loss"),
        ("training.optim_args=rank=3", "`training.optim_args` is 'rank=3', but adamw_torch_fused does not look at it"),
        ("training.optim_target_modules=[q_proj]", "is given, for GaLore and Apollo, but `training.optim` is adamw"),
        ("simulation_learning_rate=0", "`simulation_learning_rate` is 0; it must be positive"),
        ("training.learning_rate=-1e-4", "`training.learning_rate` is -0.0001; it must be positive"),
        ("minimum_learning_rate=1.0", "`minimum_learning_rate` is 1.0; it must be from 0 to"),
        ("batch_size=12", "`batch_size` is 12; it must be a multiple of `training.per_device_train_batch_size` = 8"),
        ("evaluation.steps=0", "`evaluation.steps` is 0; it must be at least 1"),
        ("training.eval_strategy=steps", "there is nothing to evaluate on; give `data.validation`"),
        ("training.max_steps", "must be of the form FIELD=VALUE"),
        ("task.x=3", "'task.x' names a field of 'task', which holds 'language_modeling'"),
        ("model.overrides={", "The value of .* is no YAML"),
    ],
)
def test_a_recipe_that_cannot_be_run_is_refused_by_field(change, message, file):
    with pytest.raises(ValueError, match=message):
        load_recipe(file, ["task=language_modeling", change])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["minimum_learning_rate=0", "training.lr_scheduler_type=linear"], "the end of a cosine, but"),
        (
            ["batch_size=8", "training.gradient_accumulation_steps=2"],
            "given as well, by this recipe or one that it builds on; set one of them to null",
        ),
        (["model.lora={r: 4}", "model.trainable=[norm]"], "both say what is trained"),
        (["batch_size=8", "training.auto_find_batch_size=true"], "`batch_size` is 8, but `training.auto_find_batch_s"),
        (
            ["batch_size=8", "training.accelerator_config={split_batches: true}"],
            "`batch_size` is 8, .*split_batch",
        ),
        (
            ["data.streaming=true", "training.max_steps=2", "training.train_sampling_strategy=sequential"],
            "is 'sequential', but a stream comes in its own order",
        ),
        (["data.streaming=true", "training.max_steps=2", "training.data_seed=1"], "`training.seed` shuffles a stream"),
        (["task=image_classification", "training.remove_unused_columns=true"], "the inputs are made of them"),
        (["task=image_classification", "training.eval_do_concat_batches=false"], "accuracy is of all batches"),
        (
            [
                "data.validation_documents=2",
                "training.eval_strategy=steps",
                "training.eval_steps=10",
                "training.save_steps=20",
                "training.load_best_model_at_end=true",
            ],
            "`training.eval_steps` is 10 and `training.save_steps` is 20, so that the best model may not be saved",
        ),
        (["model.trainable=[]"], "`model.trainable` is \\[\\], and nothing would be trained"),
    ],
)
def test_fields_that_contradict_each_other(changes, message, file):
    with pytest.raises(ValueError, match=message):
        load_recipe(file, changes)


@pytest.mark.parametrize(
    ("recipe", "change", "named"),
    [
        ("chat", "data.text_column=words", "`data.text_column` is 'words', but `task: chat`"),
        ("image-classification", "data.validation_documents=4", "`data.validation_documents` is 4, but `task: image_"),
        ("image-classification", "data.config=first", "`data.config` is 'first', but `task: image_classification`"),
    ],
)
def test_fields_of_another_task_are_refused(recipe, change, named):
    with pytest.raises(ValueError, match=named):
        load_recipe(recipe, [change])


def test_what_this_machine_lacks_is_said_before_a_run(file):
    with pytest.raises(ValueError, match="`training.report_to` names 'tensorbord', which is not installed or unknown"):
        training_arguments(load_recipe(file, ["training.report_to=tensorbord"]))
    assert training_arguments(load_recipe(file, ["training.bf16=auto"])).bf16 is False
    with pytest.raises(ValueError, match="`training.fp16` is true, but the device is a CPU"):
        training_arguments(load_recipe(file, ["training.fp16=true"]))


def test_neither_a_file_nor_a_recipe(tmp_path):
    with pytest.raises(FileNotFoundError, match="fineweb-edu-sas-125 is no file, nor a recipe .*fineweb-edu-sas-125m"):
        load_recipe("fineweb-edu-sas-125")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"must hold fields and values, but holds \[1, 2\]"):
        load_recipe(tmp_path / "list.yaml")


def test_fields_at_their_defaults_are_no_matter(file):
    changes = ["training.save_only_model=false", "training.push_to_hub=false", "training.label_names=null"]
    assert load_recipe(file, [*changes, "training.greater_is_better=false"]).training["save_only_model"] is False
    load_recipe(file, ["task=image_classification", "training.metric_for_best_model=eval_accuracy"])


def test_an_evaluation_that_is_no_number_is_said(file):
    """The Trainer's own default leaves batches whose loss is NaN out of the mean."""
    assert training_arguments(load_recipe(file)).logging_nan_inf_filter is False
