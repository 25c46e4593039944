"""The task made from a text: true questions, the same for the same seed, and refused when the text is too short."""

import pyarrow.parquet as pq
import pytest

from sas_hf.eval import evaluate, make_continuation_task


def test_questions(text, tmp_path):
    path = make_continuation_task(text, tmp_path, num_questions=60)
    assert path == tmp_path / "sas_hf" / "continuation" / "default" / "validation.parquet"
    rows = pq.read_table(path).to_pylist()
    flat = " ".join(text.split())
    sentences = text.splitlines()
    assert len(rows) == len({row["context"] for row in rows}) == 60
    for row in rows:
        context, choices, label = row["context"], row["continuations"], row["label"]
        assert len(set(choices)) == 4 and all(choice in sentences for choice in choices)
        assert context.count(".") == 3
        assert f"{context} {choices[label]}" in flat
        for position, choice in enumerate(choices):
            assert position == label or f"{context} {choice}" not in flat
            assert choice not in context
    assert {row["label"] for row in rows} == {0, 1, 2, 3}
    # Length does not give the answer away: the true continuation is the shortest about as often as any other.
    shortest = sum(min(row["continuations"], key=len) == row["continuations"][row["label"]] for row in rows)
    assert shortest < 30


def test_same_seed_same_questions(text, tmp_path):
    def rows(name, seed):
        return pq.read_table(make_continuation_task(text, tmp_path / name, num_questions=20, seed=seed)).to_pylist()

    assert rows("a", 0) == rows("b", 0)
    assert rows("a", 0) != rows("c", 1)


def test_headings_and_tables_break_a_passage(tmp_path):
    sentence = "The {} of the matter is number {}."
    prose = [sentence.format(word, number) for number in range(40) for word in ("root", "heart", "end", "rest")]
    for start in range(4, len(prose), 5):
        prose.insert(start, "Chapter one.")
    path = make_continuation_task("\n\n".join(prose), tmp_path, num_questions=30)
    for row in pq.read_table(path).to_pylist():
        assert "Chapter" not in row["context"] + "".join(row["continuations"])
        numbers = [int(part.split()[0]) for part in row["context"].replace(".", "").split("number ")[1:]]
        assert len(set(numbers)) == 1


def test_too_short_a_text(text, tmp_path):
    with pytest.raises(ValueError, match=r"enough for \d+ questions.*`num_questions` is 200"):
        make_continuation_task(text, tmp_path)
    with pytest.raises(ValueError, match="enough for 0 questions"):
        make_continuation_task("Too short.", tmp_path, num_questions=1)
    with pytest.raises(ValueError, match="enough for 0 questions"):  # no wrong continuations
        make_continuation_task("\n".join(text.splitlines()[:6]), tmp_path, num_questions=1)
    with pytest.raises(ValueError, match="must be positive"):
        make_continuation_task(text, tmp_path, num_questions=0)
    assert list(tmp_path.iterdir()) == []


def test_scored_like_any_task(checkpoint, data):
    result = evaluate(checkpoint, "sas_continuation", data=data, device="cpu", log_samples=True)
    task = result.tasks["sas_continuation"]
    assert task.num_samples == task.num_available == 10
    assert all(len(sample["responses"]) == 4 for sample in task.samples)
    assert set(task.metrics) == {"acc", "acc_norm"}
