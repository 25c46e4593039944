"""Docstrings are written as Transformers' are; here they become what mkdocstrings reads."""

import re

import griffe
import reference


class AsTransformersWrites(griffe.Extension):
    """[`name`] and [`~package.name`] are links where the reference has the name, else plain code; types of arguments,
    "(`int`, *optional*)", lose the marks that mkdocstrings would show."""

    def __init__(self):
        self.places = {name: f"{home}.{name}" for names in reference.BESIDE.values() for name, home in names.items()}
        for name in reversed(reference.public_names()):
            self.places[name.name] = f"{name.module}.{name.name}"

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring:
            text = re.sub(r"\[`(~?[\w.]+)`\]", self.link, obj.docstring.value)
            text = re.sub(r"^ +[\w, ]+ \(`.*\):$", lambda line: re.sub("[`*]", "", line[0]), text, flags=re.M)
            obj.docstring.value = text

    def link(self, found: re.Match) -> str:
        written = found[1].lstrip("~")
        place = self.places.get(written.rpartition(".")[2]) if not written.startswith("transformers") else None
        return f"[`{written}`][{place}]" if place else f"`{written}`"
