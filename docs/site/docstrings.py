"""Docstrings refer as Transformers' do, [`name`] or [`~package.name`]; mkdocstrings links [`name`][package.name]."""

import re

import griffe
import reference


class Links(griffe.Extension):
    """Links what the reference has; what it has not is plain code."""

    def __init__(self):
        self.places = {}
        for name in reversed(reference.public_names()):
            self.places[name.name] = f"{name.module}.{name.name}"

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"\[`(~?[\w.]+)`\]", self.link, obj.docstring.value)

    def link(self, found: re.Match) -> str:
        written = found[1].lstrip("~")
        place = self.places.get(written.rpartition(".")[2]) if not written.startswith("transformers") else None
        return f"[`{written}`][{place}]" if place else f"`{written}`"
