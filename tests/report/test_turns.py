"""Turns, ratios in the same round, the time left, and figures that are kept."""

import pytest

from sas_hf.report.kept import keep_figures, kept_figures
from sas_hf.report.turns import TimeLeft, beside_first, take_turns


class Recorded:
    """A job that writes down what happens to it."""

    def __init__(self, name: str, log: list[str]):
        self.name, self.log = name, log

    def __call__(self) -> None:
        self.log.append(self.name)

    def reset(self) -> None:
        self.log.append(f"{self.name} reset")


def test_all_jobs_take_turns_in_another_order_each_round():
    log, told = [], []
    jobs = {name: Recorded(name, log) for name in "abc"}
    times = take_turns(jobs, 2, lambda name, turn: told.append((turn, name)))
    assert told == [(0, "a"), (0, "b"), (0, "c"), (1, "b"), (1, "c"), (1, "a"), (2, "c"), (2, "a"), (2, "b")]
    assert log == [entry for _, name in told for entry in (name, f"{name} reset")]
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2, "c": 2}  # warming up is not timed
    assert all(second > 0 for values in times.values() for second in values)


def test_ratios_are_of_the_same_round():
    figures = beside_first({"a": [1.0, 2.0, 4.0], "b": [2.0, 3.0, 4.0]})
    assert figures["b"] == {"value": 3.0, "ratio": 1.5, "smallest": 1.0, "largest": 2.0, "rounds": [2.0, 3.0, 4.0]}
    assert figures["a"]["ratio"] == figures["a"]["smallest"] == figures["a"]["largest"] == 1.0


def test_time_left_is_told_from_what_is_done():
    left = TimeLeft(8.0)
    assert left.seconds is None
    left.begun -= 100.0  # as if it had begun so long ago
    left.add(2.0)
    assert left.seconds == pytest.approx(300.0, rel=0.05)
    left.add(6.0)
    assert left.seconds == 0.0


def test_figures_are_kept_for_the_same_settings_alone(tmp_path):
    path = tmp_path / "kept.json"
    results = kept_figures(path, {"batch": 1}, "it")
    assert results == {"settings": {"batch": 1}, "figures": {}} == kept_figures(None, {"batch": 1}, "it")
    results["figures"]["a"] = {"value": 2.0}
    keep_figures(None, results)
    assert not path.exists()
    keep_figures(path, results)
    assert kept_figures(path, {"batch": 1}, "it") == results
    with pytest.raises(ValueError, match="it holds figures with batch 1, not 2: choose another, or the same setting"):
        kept_figures(path, {"batch": 2}, "it")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"settings": {}, "figures": []}', "\xff\xfe"])
def test_another_file_is_refused(content, tmp_path):
    path = tmp_path / "kept.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match="it exists and is no file of figures"):
        kept_figures(path, {}, "it")
    assert path.read_bytes() == content.encode("latin-1")
