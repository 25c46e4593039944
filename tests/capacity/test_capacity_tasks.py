"""Every batch is what its task says, by plain loops; errors have their chance and their floor."""

import itertools

import pytest
import torch
from transformers.modeling_outputs import SequenceClassifierOutput

from sas_hf.capacity.tasks import LENGTH, LETTERS, NOISE, RUN, TASKS, WORDS, find_task


ROWS = 40


def batch_of(name: str, level: int, seed: int = 3):
    return TASKS[name].make_batch(level, ROWS, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("things", [4, 8])
def test_fetch(things):
    batch = batch_of("fetch", things)
    assert batch["sequence"].shape == (ROWS, LENGTH, things)
    for sequence, label in zip(batch["sequence"].tolist(), batch["labels"].tolist(), strict=True):
        assert label == [pytest.approx(sum(max(step[i] for step in sequence) for i in range(things)), rel=1e-5)]


@pytest.mark.parametrize("features", [2, 8])
def test_nearest(features):
    batch, by_product = batch_of("nearest", features), 0
    parts = (batch[name].tolist() for name in ("sequence", "query", "labels"))
    for sequence, (query,), label in zip(*parts, strict=True):
        distances = [sum((a - b) ** 2 for a, b in zip(step[:features], query, strict=True)) for step in sequence]
        products = [sum(a * b for a, b in zip(step[:features], query, strict=True)) for step in sequence]
        assert label == sequence[distances.index(min(distances))][features:]
        by_product += label == sequence[products.index(max(products))][features:]
    assert by_product < ROWS / 2  # the largest product is another point


def answers(batch) -> list[list[tuple[int, list[int]]]]:
    """Of each row what is asked for, and all that stands before."""
    found = []
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        asked = [place for place, label in enumerate(labels) if label != -100]
        assert [labels[place] for place in asked] == [ids[place] for place in asked]
        found.append([(ids[place], ids[:place]) for place in asked])
    return found


def test_mqar():
    for row in answers(batch_of("mqar", 8)):
        assert len(row) == 8 and len({before[-1] for _, before in row}) == 8
        told = row[0][1][:16]
        values = dict(zip(told[::2], told[1::2], strict=True))
        assert len(values) == 8 and max(values) < WORDS <= min(values.values()) < 2 * WORDS
        assert all(answer == values[before[-1]] for answer, before in row)


def test_induction():
    gaps = set()
    for row in answers(batch_of("induction", 16)):
        assert len(row) == RUN - 1
        for answer, before in row:
            *earlier, word = before
            first = earlier.index(word)
            assert earlier.count(word) == 1 and before[first + 1] == answer
        whole = row[-1][1]
        begin = whole.index(whole[2 * RUN + 16 - RUN])
        assert set(whole[:begin]) <= set(range(WORDS, WORDS + NOISE)) and len(whole) == 2 * RUN + 15
        gaps.add(16 - begin)
    assert min(gaps) >= 0 and max(gaps) <= 16 and len(gaps) > 8  # places tell nothing


def test_copying():
    for row in answers(batch_of("copying", 32)):
        told = row[0][1]
        assert told[-1] == LETTERS and max(told[:-1]) < LETTERS
        assert [answer for answer, _ in row] == told[:-1]
        followers = {letter: {b for a, b in itertools.pairwise(told) if a == letter} for letter in told}
        assert max(map(len, followers.values())) > 1  # a letter alone does not tell the next


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_decides_a_batch(name):
    level = TASKS[name].levels[0]
    first, again, other = (batch_of(name, level, seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[part], again[part]) for part in first)
    assert not any(torch.equal(first[part], other[part]) for part in first)


@pytest.mark.parametrize("name", TASKS)
def test_chance_and_floor_of_an_error(name):
    """Who knows nothing has the chance, who knows all has nothing, or half an answer."""
    task, level = TASKS[name], TASKS[name].levels[0]
    batch = task.make_batch(level, 2000, torch.Generator().manual_seed(0))
    labels = batch["labels"]
    if task.vocab_size is None:
        right, blind = labels, labels.mean(0).expand_as(labels)
    else:
        wanted = torch.cat((labels[:, 1:], labels[:, :1]), dim=1)
        right = torch.nn.functional.one_hot(wanted.clamp(min=0), task.vocab_size)
        blind = torch.nn.functional.one_hot(torch.full_like(wanted, labels.max().item()), task.vocab_size)
    found = {}
    for told, logits in (("right", right), ("blind", blind)):
        parts = [{"labels": labels[:700]}, {"labels": labels[700:]}]
        outputs = [SequenceClassifierOutput(logits=part.float()) for part in (logits[:700], logits[700:])]
        found[told] = task.error(zip(outputs, parts, strict=True))
    assert found["blind"] == pytest.approx(task.chance(level), abs=0.02)
    floor = 0 if task.vocab_size is None else 0.5 / ((labels != -100).sum().item() + 1)
    assert found["right"] == pytest.approx(floor)


def test_an_unknown_task():
    with pytest.raises(ValueError, match="There is no task 'fetsh'; known are fetch, mqar, nearest"):
        find_task("fetsh")
