"""What is released: the wheel holds every file of the package, the workflows run pinned actions with few rights, and
the citation can be read."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import sas_hf


ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PINNED = re.compile(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}")
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))


def files_of_package() -> set[str]:
    """Those that git knows; all that lie there, where this is no checkout."""
    listed = subprocess.run(["git", "ls-files", "-z", "sas_hf"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        return {name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()}
    found = (path for path in (ROOT / "sas_hf").rglob("*") if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in found if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Wheel and sdist of a copy of what is released, by the build backend that pyproject.toml names."""
    folder = tmp_path_factory.mktemp("release")
    for name in (*files_of_package(), "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    build = "from setuptools import build_meta as b; b.build_wheel('dist'); b.build_sdist('dist')"
    done = subprocess.run([sys.executable, "-c", build], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,), (sdist,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    return wheel, sdist


def test_the_wheel_holds_every_file_of_the_package(built):
    """A data file whose pattern pyproject.toml lacks is there in an editable install, and missing for users."""
    with zipfile.ZipFile(built[0]) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(f"sas_hf-{sas_hf.__version__}.dist-info/METADATA").decode()
    package = files_of_package()
    assert {"sas_hf/py.typed", "sas_hf/report/printed/sas.json"} < package
    assert not package - names
    assert {name.split("/")[0] for name in names} == {"sas_hf", f"sas_hf-{sas_hf.__version__}.dist-info"}
    assert f"\nVersion: {sas_hf.__version__}\n" in metadata and "\nLicense-Expression: Apache-2.0\n" in metadata


def test_the_sdist_builds_the_same(built):
    with tarfile.open(built[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert not files_of_package() - names and {"pyproject.toml", "README.md", "LICENSE"} < names
    assert not any(name.startswith("tests") for name in names)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_pinned_actions_with_few_rights(workflow):
    parsed = yaml.safe_load(workflow.read_text())
    assert parsed["permissions"] == {"contents": "read"}
    assert "pull_request_target" not in parsed[True]  # `on`, to YAML: it would run a stranger's code with our rights
    steps = [step for job in parsed["jobs"].values() for step in job["steps"]]
    for step in steps:
        assert "run" in step or PINNED.fullmatch(step["uses"]), step
    assert all(step["with"]["persist-credentials"] is False for step in steps if "checkout" in step.get("uses", ""))
    rights = {name: job["permissions"] for name, job in parsed["jobs"].items() if "permissions" in job}
    assert rights == ({"publish": {"id-token": "write"}} if workflow.stem == "release" else {})


def test_there_is_a_workflow_for_each_job():
    assert [path.stem for path in WORKFLOWS] == ["docs", "lint", "release", "tests"]


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_issue_forms_are_as_github_reads_them(form):
    parsed = yaml.safe_load(form.read_text())
    assert parsed["name"] and parsed["description"]
    fields = [field for field in parsed["body"] if field["type"] != "markdown"]
    assert fields and all(field["attributes"]["label"] for field in fields)
    assert len({field["id"] for field in fields}) == len(fields)


def test_the_citation_names_both_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["authors"] == [{"name": "the sas_hf developers"}]
    assert {citation["title"], citation["license"]} == {"sas_hf", "Apache-2.0"} and citation["message"]
    readme = (ROOT / "README.md").read_text()
    papers = [reference["identifiers"][0]["value"] for reference in citation["references"]]
    assert papers == ["arXiv:2507.07694", "arXiv:2403.01643"] and all(paper in readme for paper in papers)
