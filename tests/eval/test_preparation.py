"""A folder prepared for later: the Hub's data, through a folder that stands for it (there is no network in tests)."""

import pyarrow.parquet as pq
import pytest

from sas_hf.eval import evaluate, prepare_data


def test_a_prepared_folder_gives_the_same_numbers(checkpoint, hub, tmp_path):
    paths = prepare_data(tmp_path / "offline", "sas_table1")
    assert len(paths) == 17 and all(path.is_file() for path in paths)  # test splits where the stock task uses them
    arc = tmp_path / "offline" / "allenai" / "ai2_arc" / "ARC-Easy"
    assert sorted(path.name for path in arc.iterdir()) == ["test.parquet", "train.parquet", "validation.parquet"]
    offline = evaluate(
        checkpoint, "sas_table1_2shot", data=tmp_path / "offline", limit=3, device="cpu", truncation=True
    )
    online = evaluate(checkpoint, "sas_table1_2shot", limit=3, device="cpu", truncation=True)
    for name, task in online.tasks.items():
        assert offline.tasks[name].questions == task.questions
        assert offline.tasks[name].metrics == task.metrics
        assert offline.tasks[name].notes == []


def test_what_is_whole_stays_and_what_is_not_is_made_again(hub, tmp_path):
    folder, said = tmp_path / "offline", []
    (path,) = [path for path in prepare_data(folder, "arc_easy") if path.name == "test.parquet"]
    time = path.stat().st_mtime_ns
    assert prepare_data(folder, "arc_easy", progress=said.append) and "is there" in said[-1]
    assert path.stat().st_mtime_ns == time
    path.write_bytes(path.read_bytes()[:100])
    prepare_data(folder, "arc_easy")
    assert pq.read_table(path).num_rows == 7
    assert len(list(path.parent.iterdir())) == 3


def test_what_cannot_be_prepared(hub, tmp_path):
    with pytest.raises(ValueError, match="no task 'arc_eazy'"):
        prepare_data(tmp_path / "offline", "arc_eazy")
    with pytest.raises(ValueError, match="'squadv2' gets its data by code of its own"):
        prepare_data(tmp_path / "offline", "squadv2")
    with pytest.raises(ValueError, match="`tasks` is empty"):
        prepare_data(tmp_path / "offline", [])
    readme = hub / "allenai" / "sciq" / "README.md"
    lines = readme.read_text().splitlines()
    readme.write_text("\n".join(line for line in lines if "test" not in line))
    with pytest.raises(ValueError, match=r"'sciq' needs the split 'test'; allenai/sciq has \['train', 'validation'\]"):
        prepare_data(tmp_path / "offline", "sciq")
    assert not list((tmp_path / "offline").rglob("*.part"))
