"""Prints the lower bounds of pyproject.toml as exact versions, for `pip install --constraint` (`make test-lowest`)."""

import re
import tomllib
from itertools import chain
from pathlib import Path


project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
for requirement in chain(project["dependencies"], *project["optional-dependencies"].values()):
    if bound := re.match(r"([\w.-]+)>=([\d.]+)", requirement):
        print(f"{bound[1]}=={bound[2]}")
