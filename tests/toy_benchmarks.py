"""Rows of the benchmarks of Tables 1 and 8, in the columns of their stock tasks, from any sentences."""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def _arc(number: int, a: str, b: str, c: str, d: str) -> dict:
    return {"question": a, "choices": {"text": [b, c, d], "label": ["A", "B", "C"]}, "answerKey": "ABC"[number % 3]}


def _sciq(number: int, a: str, b: str, c: str, d: str) -> dict:
    names = ("question", "distractor1", "distractor2", "distractor3", "correct_answer", "support")
    return dict(zip(names, (a, b, c, d, f"{b} {number}", f"{d} {c}"), strict=True))


def _siqa(number: int, a: str, b: str, c: str, d: str) -> dict:
    return {"context": a, "question": "Why?", "answerA": b, "answerB": c, "answerC": d, "label": str(number % 3 + 1)}


def _hellaswag(number: int, a: str, b: str, c: str, d: str) -> dict:
    row = {"ctx_a": a, "ctx_b": b, "activity_label": "Reading", "endings": [b, c, d, a], "label": str(number % 4)}
    return row | {"ind": number, "ctx": f"{a} {b}", "source_id": "", "split": "val", "split_type": "indomain"}


BENCHMARKS = {
    "allenai/ai2_arc/ARC-Easy": _arc,
    "allenai/ai2_arc/ARC-Challenge": lambda n, a, b, c, d: _arc(n, b, a, c, d),
    "Rowan/hellaswag/default": _hellaswag,
    "baber/piqa/default": lambda n, a, b, c, d: {"goal": a, "sol1": b, "sol2": c, "label": n % 2},
    "allenai/sciq/default": _sciq,
    "lighteval/siqa/default": _siqa,
    "allenai/winogrande/winogrande_xl": lambda n, a, b, c, d: {
        "sentence": f"{a} _ {b}",
        "option1": c.split()[0],
        "option2": d.split()[0],
        "answer": "12"[n % 2],
    },
    "aps/super_glue/boolq": lambda n, a, b, c, d: {"passage": a, "question": b, "idx": n, "label": n % 2},
    "allenai/openbookqa/main": lambda n, a, b, c, d: {"question_stem": a} | _arc(n, a, b, c, d),
    "cais/mmlu": lambda n, a, b, c, d: {"question": a, "choices": [a, b, c, d], "answer": n % 4, "subject": "any"},
}


def toy_rows(sentences: list[str], name: str, count: int) -> list[dict]:
    """So many rows of a benchmark, different for every benchmark."""
    rng = random.Random(name)
    make = BENCHMARKS["cais/mmlu" if name.startswith("cais/mmlu") else name]
    return [make(number, *rng.sample(sentences, 4)) for number in range(count)]


def write_table_1(folder: Path, sentences: list[str], count: int) -> Path:
    """A folder with the validation splits of Table 1's seven benchmarks."""
    for name in list(BENCHMARKS)[:7]:
        path = folder / name / "validation.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(toy_rows(sentences, name, count)), path)
    return folder
