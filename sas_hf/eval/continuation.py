"""`sas_continuation` from a plain text: which of four continuations follows this passage? Needs no network."""

import io
import random
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..report.files import write_atomically


TASK = "sas_continuation"
CONTEXT_SENTENCES = 3
NUM_CONTINUATIONS = 4
# Shorter "sentences" are numbering and headings, longer ones tables and code.
MIN_WORDS, MAX_WORDS = 4, 60
# So many sentences are drawn for each wrong continuation wanted, and those nearest in length to the true one taken:
# otherwise the shortest continuation, being the most probable, would decide the question.
DRAWN_PER_DISTRACTOR = 8


def make_continuation_task(text: str, folder: str | Path, num_questions: int = 200, seed: int = 0) -> Path:
    """
    Write the questions of the task `sas_continuation` from a text that the model was not trained on.

    A question is three consecutive sentences, the sentence that follows them, and three others of about its length
    from elsewhere in the text. Questions do not overlap. The same text, number and seed give the same questions.

    Args:
        text: plain text; `num_questions` need somewhat more than four times as many sentences.
        folder: to be given to [`evaluate`] as `data`; what it holds for other tasks stays.

    Returns:
        the file written, `<folder>/sas_hf/continuation/default/validation.parquet`, with the columns context (str),
        continuations (list of 4 str) and label (int).

    Raises:
        ValueError: when the text is too short.
    """
    if num_questions < 1:
        raise ValueError(f"`num_questions` is {num_questions}; it must be positive.")
    passages = split_passages(text, CONTEXT_SENTENCES + 1)
    # A sentence that occurs twice could be right and wrong at once.
    sentences = list(dict.fromkeys(sentence for passage in passages for sentence in passage))
    possible = len(passages) if len(sentences) >= 2 * (CONTEXT_SENTENCES + NUM_CONTINUATIONS) else 0
    if num_questions > possible:
        raise ValueError(
            f"`text` has {len(text):,} characters, enough for {possible} questions of {CONTEXT_SENTENCES + 1} "
            f"consecutive sentences, but `num_questions` is {num_questions}. Give a longer text or ask for fewer."
        )

    rng = random.Random(seed)
    rows = [make_question(passage, sentences, rng) for passage in rng.sample(passages, num_questions)]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    path = Path(folder) / "sas_hf" / "continuation" / "default" / "validation.parquet"
    write_atomically(path, buffer.getvalue())
    return path


def split_passages(text: str, size: int) -> list[list[str]]:
    """Consecutive sentences of `text`, `size` at a time, with white space made single; odd sentences break a run."""
    passages: list[list[str]] = []
    run: list[str] = []
    for sentence in re.split(r"(?<=[.!?])\s+", text):
        words = sentence.split()
        if not MIN_WORDS <= len(words) <= MAX_WORDS:
            run = []
            continue
        run.append(" ".join(words))
        if len(run) == size:
            passages.append(run)
            run = []
    return passages


def make_question(passage: list[str], sentences: list[str], rng: random.Random) -> dict:
    """One row: the passage without its last sentence, that sentence among wrong ones, and where it stands."""
    *context, truth = passage
    distractors = NUM_CONTINUATIONS - 1
    drawn = rng.sample(sentences, min(len(sentences), DRAWN_PER_DISTRACTOR * distractors + len(passage)))
    elsewhere = [sentence for sentence in drawn if sentence not in passage]
    continuations = sorted(elsewhere, key=lambda sentence: abs(len(sentence) - len(truth)))[:distractors]
    label = rng.randrange(NUM_CONTINUATIONS)
    continuations.insert(label, truth)
    return {"context": " ".join(context), "continuations": continuations, "label": label}
