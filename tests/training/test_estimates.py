"""What trainings will take: counted against hand counts and the real Trainer's own numbers, refused where too much."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import real_text, sas_hf, write_idx
from test_chat import chat_tokenizer
from test_study import write_study
from toy_translation import toy_pairs, write_lines
from transformers import AutoModelForCausalLM, LlamaConfig

from sas_hf.configurations import named_config
from sas_hf.report.quantities import count_text, memory_text, operations_text, time_text
from sas_hf.training import estimates, rehearsal, sizes
from sas_hf.training.arguments import training_arguments
from sas_hf.training.estimates import check_memory, count_steps, estimate, padded_lengths
from sas_hf.training.recipe import load_recipe
from sas_hf.training.reporting import read_log
from sas_hf.training.run import train
from sas_hf.training.sizes import count_operations, memory_needed, meta_model
from sas_hf.training.study import load_study, plan_runs, run_study
from sas_hf.training.tasks import TASKS, find_task


GIB = 2**30
LARGE = {"base": "fineweb-edu-sas-125m", "model": {"config": "sas-6.7b"}}
TRAINING = {"output_dir": "unused", "per_device_train_batch_size": 4, "use_cpu": True, "save_strategy": "no"}


def words(count, seed=0):
    return " ".join(
        np.random.default_rng(seed).choice(["a", "bad", "book", "was", "read", "by", "some", "of", "us"], count)
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """What each task reads: 30 samples of varied lengths each, or text."""
    folder = tmp_path_factory.mktemp("data")
    texts = [words(3 + number % 11, number) for number in range(30)]
    write_lines(folder / "texts.jsonl", [{"text": text, "label": n % 3} for n, text in enumerate(texts)])
    write_lines(folder / "pairs.jsonl", toy_pairs()[:30])
    turns = [("user", "Is it?"), ("assistant", "Quite.")]
    write_lines(
        folder / "chats.jsonl", [{"messages": [{"role": r, "content": c + text} for r, c in turns]} for text in texts]
    )
    (folder / "text.txt").write_text("\n".join(real_text()[:40]))
    chat_tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for name, count in {"train": 30, "t10k": 4}.items():
        images = rng.integers(0, 256, (count, 32, 32), dtype=np.uint8)
        write_idx(folder / "images" / f"{name}-images-idx3-ubyte.gz", images)
        write_idx(folder / "images" / f"{name}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8) % 4)
    return folder


def recipe_of(name, data, *changes):
    text = {"train": str(data / "text.txt"), "sequence_length": 16, "cache": str(data / "cache")}
    small = {"config": "mha-cpu", "overrides": {"vocab_size": 512}}
    encoder = {"config": "imdb-standard", "overrides": {"vocab_size": 300}}
    translator = {"vocab_size": 300, "decoder_vocab_size": 300, "hidden_size": 32, "intermediate_size": 32}
    fields = {
        "language_modeling": (small, text),
        "chat": (
            small | {"tokenizer": str(data / "tokenizer"), "chat_template": "chatml"},
            text | {"train": str(data / "chats.jsonl"), "sequence_length": 64},
        ),
        "image_classification": ({"config": "mnist-standard"}, {"train": str(data / "images")}),
        "masked_language_modeling": (encoder, text),
        "text_classification": (encoder, {"train": str(data / "texts.jsonl"), "cache": str(data / "cache")}),
        "translation": (
            {"config": "nmt-standard", "overrides": translator},
            text | {"train": str(data / "pairs.jsonl"), "source_column": "en", "target_column": "es"},
        ),
    }
    model, sources = fields[name]
    return load_recipe({"task": name, "model": model, "data": sources, "training": TRAINING}, changes)


@pytest.fixture
def roomy(monkeypatch):
    """A machine of 24 GiB that nobody else uses; and few steps are timed."""
    monkeypatch.setattr(rehearsal, "ENOUGH", 0)
    for module in (sizes, estimates):
        monkeypatch.setattr(module, "total_memory", lambda device: 24 * GIB)
    for module in (estimates, rehearsal):
        monkeypatch.setattr(module, "available_memory", lambda device: 24 * GIB)


@pytest.mark.parametrize("name", ["mha-cpu", "gqa-cpu", "sas-cpu"])
def test_operations_are_those_of_a_count_by_hand(name):
    config, rows, length = named_config(name), 2, 32
    hidden, heads, key_heads, width = 64, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    linear = hidden * width * (2 * heads + 2 * key_heads) + 3 * hidden * config.intermediate_size
    attention = 2 * length * heads * width
    if name == "sas-cpu":  # queries, keys and values get more heads, and the first two more features
        more, wide = config.num_simulated_heads, config.simulated_head_dim
        linear += 3 * width * (heads * more + more * more) + 2 * more * (width * wide + wide * wide)
        attention = length * more * (wide + width)
    products = config.num_hidden_layers * (linear + attention) + hidden * config.vocab_size
    recipe = load_recipe({"model": {"config": name}, "data": {"train": "x.txt"}, "training": {"output_dir": "unused"}})
    batch = find_task("language_modeling").random_batch(config, rows, (length,))
    # A multiplication and an addition each; the backward pass has two products for each of the forward pass.
    assert count_operations(meta_model(recipe, config), batch) == 2 * 3 * rows * length * products


def test_operations_of_a_large_model_are_about_six_for_each_parameter_and_token():
    recipe = load_recipe("fineweb-edu-mha-125m")
    config = find_task(recipe.task).model_config(recipe)
    model = meta_model(recipe, config)
    parameters, _ = sizes.count_parameters(model)
    batch = find_task(recipe.task).random_batch(config, 3, (1024,))
    by_attention = 3 * 3 * 1024 * 12 * 4 * 1024 * 768
    assert count_operations(model, batch) == pytest.approx(6 * parameters * 3 * 1024 + by_attention, rel=1e-3)


def test_what_depends_on_the_numbers_is_not_counted_but_said():
    class Picky(torch.nn.Linear):
        def forward(self, input_ids):
            return SimpleNamespace(loss=super().forward(input_ids).sum() if input_ids.sum() > 0 else 0)

    with pytest.raises(ValueError, match="a Picky cannot be counted without numbers: "):
        count_operations(Picky(2, 2, device="meta"), {"input_ids": torch.ones(1, 2)})


@pytest.mark.parametrize("name", sorted(TASKS))
def test_random_batches_and_samples_are_as_the_real_trainers(name, data, roomy):
    recipe = recipe_of(name, data)
    task, arguments = find_task(name), training_arguments(recipe)
    config = task.model_config(recipe)
    samples = task.read_samples(recipe, config)
    for field, value in samples.fields.items():
        setattr(config, field, value)
    trainer = task.make_trainer(recipe, arguments)
    assert samples.count == len(trainer.train_dataset)
    (real, *_) = trainer.get_train_dataloader()
    lengths = samples.lengths or [task.longest(recipe, config)]
    if samples.lengths:
        sides = ("input_ids", "labels")[: len(lengths[0])]
        columns = [[len(row) for row in trainer.train_dataset[side]] for side in sides]
        assert sorted(lengths) == sorted(zip(*columns, strict=True))
    lengths = tuple(map(max, zip(*lengths, strict=True)))
    batch = task.random_batch(config, 4, lengths)
    ours = {part: values.dtype for part, values in batch.items()}
    assert ours.items() <= {part: values.dtype for part, values in real.items()}.items()
    assert all(real[part].ndim == values.ndim for part, values in batch.items())
    parameters = sum(weight.numel() for weight in trainer.model.parameters())
    assert sizes.count_parameters(meta_model(recipe, config))[0] == parameters
    pace = estimates.rehearse(recipe, config, lengths, 2)
    assert pace.row > 0 and pace.optimiser > 0 and pace.kept > 0


def test_steps_are_as_the_trainer_counts_them(data, tmp_path, roomy):
    changes = ["training.num_train_epochs=1.5", "training.gradient_accumulation_steps=3", "training.logging_steps=1"]
    recipe = recipe_of("language_modeling", data, *changes, f"training.output_dir={tmp_path / 'run'}")
    samples = find_task(recipe.task).read_samples(recipe, find_task(recipe.task).model_config(recipe))
    train(recipe)
    last = read_log(tmp_path / "run")[-1]
    assert count_steps(training_arguments(recipe), samples.count) == last["step"] > 3
    for count, accumulation, epochs in ((1, 1, 3), (9, 2, 1.5), (12, 5, 1)):
        recipe = recipe_of(
            "text_classification",
            data,
            f"training.gradient_accumulation_steps={accumulation}",
            f"training.num_train_epochs={epochs}",
        )
        arguments = training_arguments(recipe)
        trainer = find_task(recipe.task).make_trainer(recipe, arguments)
        trainer.train_dataset = trainer.train_dataset.take(count)
        trainer.args.output_dir = str(tmp_path / f"{count}")
        trainer.train()
        assert count_steps(arguments, count) == trainer.state.max_steps
    assert count_steps(arguments, None) is None


def test_a_grid_is_estimated_and_nothing_is_written(tmp_path, monkeypatch, roomy):
    monkeypatch.chdir(tmp_path)
    runs = plan_runs(load_study(write_study(tmp_path)))
    told = []
    found = estimate(runs, told.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["study.yaml"]
    assert told == ["mha: real steps", "sas: real steps"]
    mha, sas = found.lines
    for line in found.lines:
        recipe = next(run.recipe for run in runs if run.variant == line.variant)
        model = AutoModelForCausalLM.from_config(find_task(recipe.task).model_config(recipe))
        assert line.parameters == line.trained == sum(weight.numel() for weight in model.parameters())
        assert (line.runs, line.rows, line.steps, line.samples, line.tokens) == (2, 8, 6, 48, 48 * 32)
        assert (line.memory.weights, line.memory.moments) == (4 * line.parameters, 8 * line.parameters)
        assert line.memory.kept > 0 and line.seconds > 0 and line.unknown == ()
    # The simulation's results are not kept, but made again (`recompute_simulation`).
    assert sas.operations > mha.operations and sas.memory.kept < 1.5 * mha.memory.kept
    assert found.operations == 2 * (mha.operations + sas.operations)
    assert found.seconds == pytest.approx(2 * (mha.seconds + sas.seconds))
    grid = found.grid()
    assert grid.header == ["variant", "model", "parameters", "tokens", "steps", "operations", "memory", "time", "runs"]
    assert grid.rows[-1][0] == "all 4" and grid.rows[0][3:5] == ["1.54K", "6"]


def test_the_command_says_what_a_study_will_take(tmp_path):
    done = sas_hf("study", write_study(tmp_path, variants={"sas": {}}), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "steps: 6" in done.stdout and "all 2" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80 and not (tmp_path / "out").exists()


def test_data_that_are_not_given_are_unknown(tmp_path, roomy, monkeypatch):
    monkeypatch.setattr(estimates, "rehearse", lambda *_: estimates.Pace(0.5, 0.25, 10, 1, 3))
    recipe = {"base": "translation", "data": {"train": None}}
    study = {"recipe": recipe, "variants": {"a": {}}, "seeds": [0], "data": {"one": {}, "two": {"train": "none.csv"}}}
    study = load_study(write_study(tmp_path, **study))
    with pytest.raises(ValueError, match="`data.train` is not given"):
        plan_runs(study)
    one, two = estimate(plan_runs(study, needs_data=False)).lines
    assert (one.steps, one.operations, one.seconds, one.samples) == (None,) * 4 and one.parameters > 0
    assert one.unknown[0] == "unknown: data.train is not given"
    assert one.unknown[1] == "lengths of samples are not known: all are taken to have 64 tokens"
    assert two.unknown[0] == "unknown: `data.train` names none.csv, which does not exist"
    grid = estimate(plan_runs(study, needs_data=False)).grid()
    assert "Unknown: data.train is not given (one, a)." in grid.caption and grid.header[1] == "data"
    # As many steps as are asked for need no data.
    (line, _) = estimate(plan_runs(study, ["training.max_steps=100", "training.num_train_epochs=1"], False)).lines
    assert (line.steps, line.samples, line.seconds) == (100, 3200, 3200 * 0.5 + 100 * 0.25)


def test_steps_that_time_decides_are_said_to_be_unknown_whatever_else_is(tmp_path, roomy, monkeypatch):
    monkeypatch.setattr(estimates, "rehearse", lambda *_: estimates.Pace(0.5, 0.25, 10, 1, 3))
    study = {"recipe": {"base": "translation", "data": {"train": None}, "training": {"max_steps": 10}}, "seeds": [0]}
    study |= {"variants": {"a": {}, "b": {"training": {"learning_rate": 0.002}}}}
    study |= {"matched": {"c": {"variant": "a", "to": "b", "by": "seconds"}}}
    runs = plan_runs(load_study(write_study(tmp_path, **study)), needs_data=False)
    line = next(line for line in estimate(runs).lines if line.variant == "c")
    assert line.unknown[0].startswith("steps: until they can be timed")
    assert "unknown: data.train is not given" in line.unknown


def test_a_task_that_does_not_tell_its_batches_is_not_timed(tmp_path, roomy, monkeypatch):
    monkeypatch.setattr(type(find_task("language_modeling")), "random_batch", lambda *_: None)
    (line, _) = estimate(plan_runs(load_study(write_study(tmp_path)))).lines
    assert (line.operations, line.seconds, line.steps) == (None, None, 6)
    assert line.unknown == ("operations and time: the task language_modeling does not tell what a batch of it is",)


def test_a_model_that_the_machine_cannot_hold_is_counted_but_not_timed(tmp_path, roomy):
    study = {"recipe": LARGE, "variants": {"large": {}}, "seeds": [0]}
    (line,) = estimate(plan_runs(load_study(write_study(tmp_path, **study)))).lines
    assert line.parameters > 6.5e9 and line.tokens == 100_000 * 480 * 1024 and line.seconds is None
    assert 6 * line.parameters * line.tokens < line.operations < 10 * line.parameters * line.tokens
    assert line.unknown == ("time not measured: needs 99.1 GiB, this machine has 24 GiB",)
    assert "> 99.1 GiB" in estimates.Estimates([line]).grid().rows[0]


def test_too_large_a_model_is_refused_before_anything_is_built(tmp_path, roomy):
    study = load_study(
        write_study(tmp_path, recipe=LARGE, variants={"large": {}, "small": {"model": {"config": "mha-cpu"}}})
    )
    message = (
        r"`model.config` is sas-6.7b: training it needs about 99.1 GiB of memory \(in GiB: weights 24.8, gradients "
        r"24.8, optimiser 49.6\), and this machine has 24 GiB; distribute it \(docs/distributed.md\)"
    )
    runs = plan_runs(study)
    for refused in (
        lambda: check_memory(runs),
        lambda: run_study(study),
        lambda: train(runs[0].recipe),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    check_memory([run for run in runs if run.variant == "small"])
    assert not list((tmp_path / "out").rglob("*.yaml"))


def test_nobody_is_refused_who_could_train(monkeypatch, roomy):
    """Adapters, what is frozen, other optimisers, shards, and what may lie elsewhere."""

    def needed(*changes, **arguments):
        recipe = load_recipe(LARGE, changes)
        model = meta_model(recipe, find_task(recipe.task).model_config(recipe))
        return memory_needed(
            model, training_arguments(recipe) if not arguments else SimpleNamespace(**arguments)
        ), recipe

    memory, recipe = needed()
    assert memory.gradients == memory.weights == memory.moments / 2
    frozen, _ = needed("model.trainable=[_simulation]")
    assert frozen.weights == memory.weights and frozen.gradients < memory.gradients / 50
    plain, _ = needed("training.optim=sgd")
    assert (plain.gradients, plain.moments) == (memory.gradients, 0)
    alone = {"optim": "adamw_torch", "world_size": 8, "fsdp": None, "deepspeed": None, "fsdp_config": None}
    assert needed(**alone)[0] == memory
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert needed(**alone)[0].sure == pytest.approx(memory.sure / 8, rel=1e-9)
    alone["device"] = torch.device("cpu")
    sizes.check_fits(recipe, SimpleNamespace(**alone))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")  # of which all share this machine
    with pytest.raises(ValueError, match="is sas-6.7b: training it needs"):
        sizes.check_fits(recipe, SimpleNamespace(**alone))
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    sizes.check_fits(recipe, SimpleNamespace(**alone))


def test_adapters_need_little(data, roomy):
    whole = recipe_of("language_modeling", data)
    lora = recipe_of("language_modeling", data, "model.lora={r: 2, target_modules: [q_proj]}")
    counts = []
    for recipe in (whole, lora):
        model = meta_model(recipe, find_task(recipe.task).model_config(recipe))
        counts.append(sizes.count_parameters(model))
    assert counts[1][1] == 2 * 2 * (64 + 64) and counts[1][0] == counts[0][0] + counts[1][1]


def test_padding_is_to_the_longest_of_a_batch():
    lengths = [(1, 9), (2, 8), (3, 7), (4, 6)]
    assert padded_lengths(lengths, 2, "group_by_length") == (3, 8)  # (2, 9) and (4, 7)
    assert padded_lengths(lengths, 4, None) == (4, 9)


def test_any_architecture_is_counted(tmp_path, roomy):
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    config.save_pretrained(tmp_path / "llama")
    recipe = load_recipe(
        {
            "model": {"checkpoint": str(tmp_path / "llama")},
            "data": {"train": "x.txt"},
            "training": {"output_dir": "unused"},
        }
    )
    config = find_task(recipe.task).model_config(recipe)
    batch = find_task(recipe.task).random_batch(config, 1, (8,))
    products = 2 * (4 * 16 * 16 + 3 * 16 * 32 + 2 * 8 * 16) + 16 * 64
    assert count_operations(meta_model(recipe, config), batch) == 2 * 3 * 8 * products


def test_quantities_are_short():
    assert [count_text(n) for n in (7, 950, 999.96, 1540, 125e6, 6.65e9, 2e13)] == [
        *("7", "950", "1.00K", "1.54K", "125M", "6.65B", "20T"),
    ]
    assert [operations_text(n) for n in (0, 2.44e18, 1e9)] == ["0", "2.4e18", "1.0e09"]
    assert [time_text(s) for s in (0.04, 9.4, 59, 61, 3600 * 3.14, 3600 * 30, 86400 * 2.5, 86400 * 110123)] == [
        *("0.0 s", "9.4 s", "59 s", "1.0 min", "3.1 h", "30 h", "2.5 days", "110,000 days"),
    ]
    assert [memory_text(b) for b in (500, 2048, 13.4 * 2**20, 99.14 * GIB, 2.5 * 2**40)] == [
        *("500 B", "2 KiB", "13.4 MiB", "99.1 GiB", "2.50 TiB"),
    ]
