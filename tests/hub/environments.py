"""Virtual environments of their own, with every package of the running one: with sas_hf, and truly without it."""

import json
import os
import site
import subprocess
import sysconfig
import venv
from pathlib import Path

import sas_hf


PACKAGE = Path(sas_hf.__file__).parent


def make_environment(folder: Path, with_package: bool) -> Path:
    """Make a virtual environment of links to the installed packages, in a fraction of a second; gives its Python.

    Whatever installs sas_hf here (a folder, an editable install's finder) is left out. With the package, the package
    under test is linked in.
    """
    venv.EnvBuilder(symlinks=True).create(folder)
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": folder, "installed_base": folder}))
    for source in site.getsitepackages():
        for entry in Path(source).glob("*"):
            if "sas_hf" not in entry.name and not (packages / entry.name).exists():
                (packages / entry.name).symlink_to(entry)
    if with_package:
        (packages / PACKAGE.name).symlink_to(PACKAGE)
    return folder / "bin" / "python"


def run_script(python: Path, script: str, *arguments, home: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run a script in that environment, away from this repository, with Hugging Face's caches in `home`.

    It has no terminal to ask at, so a question whether to trust code is answered with an error.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(
        [python, "-I", "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=home,
        env=environment,
        stdin=subprocess.DEVNULL,
    )


def report_of(run: subprocess.CompletedProcess) -> dict:
    """What the script printed as the last line, JSON; its error output if it failed."""
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])
