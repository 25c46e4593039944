"""The page: numbers packed beside the code that draws them, in one file that needs nothing else."""

import base64
import json
import re
import zlib
from dataclasses import asdict
from importlib.resources import files

import torch

from .collecting import Place
from .inputs import Side


TITLES = {"self": "Attention", "encoder": "Encoder", "decoder": "Decoder", "cross": "Decoder to encoder"}


class Packed:
    """Bytes one after the other."""

    def __init__(self):
        self.parts, self.size = [], 0

    def add(self, codes: torch.Tensor) -> int:
        """Where they begin."""
        start = self.size
        self.parts.append(codes.contiguous().numpy().tobytes())
        self.size += codes.numel()
        return start

    def text(self) -> str:
        return base64.b64encode(zlib.compress(b"".join(self.parts), 6)).decode()


def weight_codes(weights: torch.Tensor) -> torch.Tensor:
    """Weights from 0 to 1 as bytes, `255·√w`: finer where they are small, within 0.004 everywhere."""
    return (weights.clamp(0, 1).sqrt() * 255).round().byte()


def signed_codes(values: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Numbers as bytes around 128, by the root of their share of the largest; and the largest."""
    largest = values.abs().max().item()
    shares = values / largest if largest else values
    return (128 + (shares.sign() * shares.abs().sqrt() * 127).round()).byte(), largest


def make_page(model: str, architecture: str, places: list[Place], sides: dict[str, Side]) -> str:
    """The page as text; it opens by itself and asks no network."""
    packed = Packed()
    content = {
        "model": model,
        "architecture": architecture,
        "sides": {name: asdict(side) for name, side in sides.items()},
        "places": [_place(place, packed) for place in places],
    }
    template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    data = json.dumps(content, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")  # no </script> of a text
    title = (model.rstrip("/").rpartition("/")[2] or model).replace("&", "&amp;").replace("<", "&lt;")
    parts = {"TITLE": title, "CONTENT": data, "NUMBERS": packed.text()}
    return re.sub("@@([A-Z]+)@@", lambda mark: parts[mark[1]], template)


def _place(place: Place, packed: Packed) -> dict:
    """Maps of a layer: base heads, then copies (of all heads the first, then the second, ...)."""
    weights = place.weights if place.base is None else torch.cat((place.base, place.weights), dim=1)
    return {
        "name": place.name,
        "title": TITLES[place.name],
        "rows": place.rows,
        "columns": place.columns,
        "layers": len(weights),
        "heads": place.num_heads,
        "copies": place.num_copies,
        "start": packed.add(weight_codes(weights)),
        "parted": _numbers(place.parted),
        "moved": _numbers(place.moved),
        "maps": [_map(place, key, packed) for key in (place.maps[0] if place.maps else ())],
    }


def _numbers(values: torch.Tensor | None) -> list[list[float | None]] | None:
    """With four digits, NaN as null."""
    if values is None:
        return None
    return [[None if value != value else round(value, 4) for value in layer] for layer in values.tolist()]


def _map(place: Place, key: tuple[str, str], packed: Packed) -> dict:
    """One of the matrices in all layers, `[layers, rows, κ, columns]`."""
    coded = [signed_codes(maps[key].transpose(1, 2)) for maps in place.maps]
    rows, taps, columns = coded[0][0].shape
    return {
        "side": key[0],
        "name": key[1],
        "rows": rows,
        "columns": columns,
        "taps": taps,
        "start": packed.add(torch.stack([codes for codes, _ in coded])),
        "largest": [largest for _, largest in coded],
    }
