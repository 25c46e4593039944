"""Tasks read from a folder: which split and which examples, fresh data, and errors that say what is missing."""

import os

import pytest

from sas_hf.eval import evaluate
from sas_hf.eval.task_loading import load_tasks, task_manager


ARC = ("allenai", "ai2_arc", "ARC-Easy")


def contexts(task, num_fewshot):
    task.set_config(key="num_fewshot", value=num_fewshot)
    task.set_fewshot_seed(0)
    task.build_all_requests()
    return [request.args[0] for request in task.instances]


@pytest.mark.parametrize(
    "splits, evaluated, shown",
    [
        (["validation"], "validation", "validation"),
        (["test"], "test", "test"),
        (["validation", "test"], "test", "validation"),
        (["train", "validation"], "validation", "train"),
        (["train", "validation", "test"], "test", "train"),
    ],
)
def test_splits(splits, evaluated, shown, tmp_path, arc_rows, write_parquet):
    for split in splits:
        rows = [row | {"question": f"{split} {row['question']}"} for row in arc_rows]
        write_parquet(rows, tmp_path, *ARC, f"{split}.parquet")
    _, tasks = load_tasks(["arc_easy"], tmp_path)
    task = tasks["arc_easy"]
    assert task.config.test_split == evaluated
    for context in contexts(task, num_fewshot=3):
        *examples, question = (part.removeprefix("Question: ") for part in context.split("\n\n"))
        assert question.startswith(evaluated)
        assert len(examples) == 3 and all(example.startswith(shown) for example in examples)
        # A question among its own examples would give the answer away.
        asked = question.split("\n")[0]
        assert all(example.split("\n")[0] != asked for example in examples)


def test_changed_data_are_read_anew(tmp_path, arc_rows, write_parquet):
    def questions():
        return load_tasks(["arc_easy"], tmp_path)[1]["arc_easy"].eval_docs["question"][:]

    path = write_parquet(arc_rows, tmp_path, *ARC, "validation.parquet")
    before, status = questions(), path.stat()
    write_parquet([row | {"question": row["question"].swapcase()} for row in arc_rows], path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert questions() == [question.swapcase() for question in before]


def test_the_index_is_left_as_it_was(data):
    entry = task_manager().task_index["arc_easy"]
    load_tasks(["arc_easy"], data)
    assert task_manager().task_index["arc_easy"] is entry
    with pytest.raises(FileNotFoundError):
        load_tasks(["arc_easy", "piqa"], data)
    assert task_manager().task_index["arc_easy"] is entry


def test_a_group_is_aggregated(checkpoint, tmp_path, write_parquet):
    subjects = sorted(task_manager().task_index["mmlu_stem_tasks"].tags)
    for number, subject in enumerate(subjects):
        name = subject.removeprefix("mmlu_")
        rows = [
            {"question": f"{name} {i}", "subject": name, "choices": ["w", "x", "y", "z"], "answer": i % 4}
            for i in range(2 + number % 3)
        ]
        for split in ("dev", "test"):
            write_parquet(rows, tmp_path, "cais", "mmlu", name, f"{split}.parquet")
    result = evaluate(checkpoint, "mmlu_stem", data=tmp_path, num_fewshot=2, device="cpu")
    assert sorted(result.tasks) == subjects
    scores = [(task.metrics["acc"].value, task.num_samples) for task in result.tasks.values()]
    mean = sum(value * count for value, count in scores) / sum(count for _, count in scores)
    assert result.groups["mmlu_stem"]["acc"].value == pytest.approx(mean)
    assert {(task.split, task.num_fewshot) for task in result.tasks.values()} == {("test", 2)}


def test_unknown_tasks_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"no task 'arc_eazy'.*'arc_easy'"):
        evaluate("unused", ["arc_eazy"])
    with pytest.raises(ValueError, match=r"no task 'sas_continuations'.*'sas_continuation'"):
        evaluate("unused", ["sas_continuations"])
    with pytest.raises(ValueError, match="`tasks` is empty"):
        evaluate("unused", [])


def test_missing_data(data, tmp_path, arc_rows, write_parquet):
    with pytest.raises(FileNotFoundError, match=r"'piqa'.*data/baber/piqa/default.*validation\.parquet"):
        load_tasks(["piqa"], data)
    with pytest.raises(FileNotFoundError, match=r"'arc_challenge'.*ai2_arc/ARC-Challenge"):
        load_tasks(["ai2_arc"], data)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        load_tasks(["arc_easy"], tmp_path / "nowhere")
    write_parquet(arc_rows, tmp_path, *ARC, "train.parquet")
    with pytest.raises(FileNotFoundError, match=r"ARC-Easy/test\.parquet or .*validation\.parquet.*\['train'\]"):
        load_tasks(["arc_easy"], tmp_path)
    with pytest.raises(ValueError, match="make_continuation_task"):
        load_tasks(["sas_continuation"], None)


def test_damaged_data(data, arc_rows, write_parquet):
    path = data.joinpath(*ARC, "validation.parquet")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"validation\.parquet is not a whole Parquet file"):
        load_tasks(["arc_easy"], data)
    # Whole at its end, damaged within.
    path.write_bytes(whole[:20] + bytes(40) + whole[60:])
    with pytest.raises(ValueError, match=r"^\S+validation\.parquet is not a whole Parquet file"):
        load_tasks(["arc_easy"], data)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="not a whole Parquet file"):
        load_tasks(["arc_easy"], data)
    write_parquet([{"question": row["question"]} for row in arc_rows], path)
    with pytest.raises(ValueError, match=r"'arc_easy' cannot use the data.*choices.*columns"):
        load_tasks(["arc_easy"], data)


def test_tasks_whose_data_cannot_be_replaced(data):
    for task in ("squadv2", "niah_single_1"):  # a Python class, a function that makes the samples
        with pytest.raises(ValueError, match=f"'{task}' gets its data by code of its own"):
            load_tasks([task], data)
    with pytest.raises(ValueError, match=r"'flan_held_in' defines tasks of its own"):
        load_tasks(["flan_held_in"], data)


def test_a_task_asked_for_twice(data):
    items, tasks = load_tasks(["arc_easy", "arc_easy"], data)
    assert len(items) == 1 and list(tasks) == ["arc_easy"]
