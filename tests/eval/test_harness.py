"""The model type: the harness's own numbers, whatever the batches, and batches that keep within memory."""

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from transformers import AutoConfig, T5Config, T5ForConditionalGeneration

from sas_hf import SASGPTConfig, SASGPTForCausalLM
from sas_hf.eval import SASHFLM, evaluate
from sas_hf.eval.harness import bytes_per_sequence, control_group_memory
from sas_hf.eval.task_loading import SHIPPED_TASKS, task_manager


@pytest.fixture
def requests(text):
    sentences = text.splitlines()
    pairs = [(" ".join(sentences[i : i + 1 + i % 4]), " " + sentences[100 + i]) for i in range(40)]
    return [Instance("loglikelihood", {}, pair, 0, metadata=("task", i, 1)) for i, pair in enumerate(pairs)]


def score(model, requests):
    return torch.tensor([value for value, _ in model.loglikelihood(requests, disable_tqdm=True)])


def test_registered_under_its_name():
    assert get_model("sas_hf") is SASHFLM


@pytest.mark.parametrize("task", ["arc_easy", "sas_continuation"])
def test_equals_the_harness_s_own_model(task, checkpoint, data):
    folder = {"arc_easy": "allenai/ai2_arc/ARC-Easy", "sas_continuation": "sas_hf/continuation/default"}[task]
    # The form in which the harness itself lets a stock task read another source.
    source = {
        "task": task,
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"validation": str(data / folder / "validation.parquet")}},
        "training_split": None,
        "validation_split": "validation",
        "test_split": None,
    }
    for num_fewshot in (0, 2):
        expected = simple_evaluate(
            HFLM(str(checkpoint), device="cpu"),
            tasks=[{"group": "local", "task": [source]}],
            num_fewshot=num_fewshot,
            task_manager=task_manager(),
        )
        result = evaluate(
            checkpoint,
            task,
            data=data,
            num_fewshot=num_fewshot,
            batch_size=1,
            truncation=True,
            device="cpu",
            log_samples=True,
        )
        assert (result.num_truncated > 0) == (num_fewshot > 0 and task == "sas_continuation")

        assert [sample["responses"] for sample in result.tasks[task].samples] == [
            [responses[0] for responses in sample["resps"]] for sample in expected["samples"][task]
        ]
        for metric in ("acc", "acc_norm"):
            assert result.tasks[task].metrics[metric].value == expected["results"][task][f"{metric},none"]
            assert result.tasks[task].metrics[metric].stderr == expected["results"][task][f"{metric}_stderr,none"]


def test_log_likelihoods_do_not_depend_on_the_batches(checkpoint, requests):
    one_by_one = score(SASHFLM(str(checkpoint), batch_size=1, device="cpu"), requests)
    assert one_by_one.std() > 1
    by_seven = score(SASHFLM(str(checkpoint), batch_size=7, device="cpu"), requests)
    automatic = SASHFLM(str(checkpoint), memory_budget=6_000_000, device="cpu")
    torch.testing.assert_close(by_seven, one_by_one, atol=1e-4, rtol=0)
    torch.testing.assert_close(score(automatic, requests), one_by_one, atol=1e-4, rtol=0)
    assert len(set(automatic.chosen_batch_sizes)) > 2


@pytest.mark.parametrize("budget", [1, 3_000_000, 6_000_000, 1 << 40])
def test_automatic_batches_keep_within_the_budget(budget, checkpoint, requests, monkeypatch):
    model = SASHFLM(str(checkpoint), memory_budget=budget, device="cpu")
    shapes = []
    call = model._model_call
    monkeypatch.setattr(model, "_model_call", lambda inputs: shapes.append(tuple(inputs.shape)) or call(inputs))
    model.loglikelihood(requests, disable_tqdm=True)

    assert sum(rows for rows, _ in shapes) == len(requests)
    assert [rows for rows, _ in shapes] == model.chosen_batch_sizes
    for rows, length in shapes:
        assert rows == 1 or rows * bytes_per_sequence(model.config, length) <= budget
    if budget == 1:
        assert {rows for rows, _ in shapes} == {1}
    elif budget == 1 << 40:
        assert shapes[0][0] == len(requests)
    else:  # not one more would have fitted; shorter requests come in larger batches
        rows, length = shapes[0]
        assert (rows + 1) * bytes_per_sequence(model.config, length) > budget
        assert shapes[-2][0] > rows


def test_automatic_is_the_default_and_takes_several(checkpoint, requests):
    model = SASHFLM(str(checkpoint), device="cpu")
    model.loglikelihood(requests, disable_tqdm=True)
    assert min(model.chosen_batch_sizes) > 1


def test_no_batch_exceeds_the_maximum(checkpoint, requests):
    model = SASHFLM(str(checkpoint), max_batch_size=6, device="cpu")
    model.loglikelihood(requests, disable_tqdm=True)
    assert model.chosen_batch_sizes == [6] * 6 + [4]


def test_rolling_log_likelihood_with_automatic_batches(checkpoint, text):
    requests = [Instance("loglikelihood_rolling", {}, (text[:4000],), 0, metadata=("task", 0, 1))]
    (expected,) = HFLM(str(checkpoint), device="cpu").loglikelihood_rolling(requests, disable_tqdm=True)
    automatic = SASHFLM(str(checkpoint), device="cpu")
    (value,) = automatic.loglikelihood_rolling(requests, disable_tqdm=True)
    assert value == pytest.approx(expected, abs=1e-2)
    assert automatic.chosen_batch_sizes


def test_more_logits_or_simulation_need_more_memory(config):
    def need(length, **changes):
        return bytes_per_sequence(SASGPTConfig(**config.to_diff_dict() | changes), length)

    assert need(100) >= 3 * 4 * 100 * config.vocab_size
    assert need(100, vocab_size=50_000) > 40 * need(100)
    assert need(100, num_simulated_heads=8) > need(100)
    assert need(200) > 2 * need(100)


def test_control_groups_limit_the_memory(tmp_path):
    membership = tmp_path / "cgroup"
    membership.write_text("0::/job/step\n")
    job = tmp_path / "fs" / "job"
    (job / "step").mkdir(parents=True)

    def limit(folder, maximum, current, inactive_file):
        (folder / "memory.max").write_text(f"{maximum}\n")
        (folder / "memory.current").write_text(f"{current}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {inactive_file}\n")

    assert control_group_memory(tmp_path / "fs", membership) == 1 << 62
    limit(job / "step", "max", 500, 0)
    assert control_group_memory(tmp_path / "fs", membership) == 1 << 62
    limit(job, 1000, 700, 200)
    assert control_group_memory(tmp_path / "fs", membership) == 500
    limit(job / "step", 300, 250, 0)
    assert control_group_memory(tmp_path / "fs", membership) == 50
    assert control_group_memory(tmp_path / "fs", tmp_path / "missing") == 1 << 62


def test_refuses_a_bidirectional_model(config, tmp_path):
    bidirectional = SASGPTConfig(**config.to_diff_dict() | {"is_causal": False})
    with pytest.raises(ValueError, match=r"is_causal=False.*causal decoder"):
        SASHFLM(SASGPTForCausalLM(bidirectional))
    bidirectional.save_pretrained(tmp_path)  # no weights: the configuration is enough to refuse it
    assert not AutoConfig.from_pretrained(tmp_path).is_causal
    with pytest.raises(ValueError, match="is_causal=False"):
        SASHFLM(str(tmp_path), device="cpu")


def test_refuses_an_encoder_decoder():
    model = T5ForConditionalGeneration(T5Config(vocab_size=8, d_model=4, d_kv=2, d_ff=4, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="is_encoder_decoder=True"):
        SASHFLM(model)


def test_the_shipped_task_is_in_its_folder():
    assert task_manager().task_index["sas_continuation"].yaml_path.parent == SHIPPED_TASKS
