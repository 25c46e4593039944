"""The page in a headless Chromium: what it shows are the model's numbers, and it answers pointer and keyboard."""

import re
import time

import pytest
import torch
from helpers import gpt, seq2seq, train_tokenizer, vit
from PIL import Image

import sas_hf
from sas_hf.looking import Look
from sas_hf.looking.collecting import Place
from sas_hf.looking.inputs import Side


TEXT = "The import statement finds a module, then it binds a name in the local scope."
SIZES = {"vocab_size": 400, "max_position_embeddings": 128}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1}


@pytest.fixture(scope="module")
def found():
    torch.manual_seed(0)
    return sas_hf.look(gpt("sas_k5_gqa", **SIZES), TEXT, processor=train_tokenizer())


@pytest.fixture(scope="module")
def saved(found, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    found.save(path)
    return path


def opened(browser, path, *size, **options):
    """The page, when it has drawn itself."""
    page = browser.open(path, *size, **options)
    page.run(
        "new Promise(done => { const look = () => document.documentElement.dataset.ready ? done() : "
        "setTimeout(look, 10); look(); })"
    )
    return page


def settled(page, script: str):
    """What an expression gives, once the page has drawn what it was asked for."""
    return page.run(f"new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done({script}))))")


def top(page, card: int) -> dict[str, float]:
    """What the list of a card says: labels and percentages."""
    lines = settled(
        page,
        f"Array.from(document.querySelectorAll('.card')[{card}].querySelectorAll('li'), "
        "line => [line.querySelector('b').textContent, line.querySelector('span').textContent])",
    )
    return [(label, 0.0 if text.startswith("<") else float(text.removesuffix(" %"))) for label, text in lines]


def same(shown: list, row: torch.Tensor) -> None:
    """A list of the largest of these weights."""
    assert shown
    for (_, percent), weight in zip(shown, row.sort(descending=True).values.tolist(), strict=False):
        assert percent == pytest.approx(100 * weight, abs=0.9 if weight > 0.095 else 0.15)


def test_every_number_on_the_page(browser, saved, found):
    """Read out of the page, all weights of all maps: base heads, then copies."""
    page, (place,) = opened(browser, saved), found.places
    codes = page.run("Array.from(bytes.subarray(0, content.places[0].maps[0].start))")
    shown = (torch.tensor(codes).float() / 255).square().reshape(2, 16, *place.weights.shape[2:])
    exact = torch.cat((place.base, place.weights), dim=1)
    assert (shown - exact).abs().max() < 0.004
    assert ((shown - exact).abs() < 0.0005)[exact < 0.01].all()
    assert page.run("content.places[0].parted") == [[round(x, 4) for x in layer] for layer in place.parted.tolist()]
    assert page.run("content.places[0].moved") == [[round(x, 4) for x in layer] for layer in place.moved.tolist()]
    for number, (key, weight) in enumerate(place.maps[1].items()):
        values = page.run(
            f"(() => {{ const m = content.places[0].maps[{number}], size = m.rows * m.columns * m.taps; return "
            "Array.from(bytes.subarray(m.start + size, m.start + 2 * size), code => signedValue(code, m.largest[1])); "
            "})()"
        )
        shown = torch.tensor(values).reshape(weight.shape[0], weight.shape[2], weight.shape[1]).transpose(1, 2)
        assert (shown - weight).abs().max() <= 0.009 * weight.abs().max(), key
    assert page.complaints() == []
    page.close()


def test_hover_and_click_change_what_is_shown(browser, saved, found):
    page, (place,) = opened(browser, saved), found.places
    before = top(page, 0)
    page.hover("#source-12")
    same(top(page, 0), place.base[0, 0, 12])
    same(top(page, 1), place.weights[0, 0, 12])
    assert top(page, 0) != before
    page.hover("h1")  # not clicked: as before
    assert top(page, 0) == before
    page.click("#source-9")
    page.hover("h1")
    same(top(page, 2), place.weights[0, 4, 9])
    assert "chosen" in settled(page, "document.getElementById('source-9').className")

    page.click("#glance", 0.99, 0.9)
    assert page.run("document.getElementById('head').textContent") == "Layer 1, base head 3"
    same(top(page, 0), place.base[1, 3, 9])
    same(top(page, 3), place.weights[1, 11, 9])
    parted = f"{place.parted[1, 3]:.2f}"
    assert f"3 copies have parted by {parted}" in page.run("document.getElementById('head-hint').textContent")
    shading = "document.getElementById('source-3').title"
    before = settled(page, shading)
    page.click(".card:nth-child(4) > button")
    page.hover("h1")
    assert settled(page, shading) != before

    page.click("#directions button:nth-child(2)")
    page.hover("h1")
    same(top(page, 1), place.weights[1, 3, :, 9])
    length = place.weights.shape[-1]
    page.hover(".card:nth-child(1) canvas", 2.5 / length, 7.5 / length)
    told = settled(page, "document.getElementById('told').textContent")
    value = 100 * place.base[1, 3, 7, 2].item()
    assert float(re.search(r"base head (?:< )?([\d.]+) %", told)[1]) == pytest.approx(value, abs=0.9)
    page.hover("#figures .figure:nth-child(2) canvas")
    assert "heads: residual: simulated head" in page.run("document.getElementById('maps-told').textContent")
    assert page.complaints() == []
    page.close()


def test_the_keyboard_reaches_heads_and_tokens(browser, saved, found):
    page, (place,) = opened(browser, saved), found.places
    page.run("document.querySelector('.tokens').focus()")
    for key in ("Home", "ArrowRight", "ArrowRight"):
        page.press(key)
    same(top(page, 1), place.weights[0, 0, 2])
    page.run("document.getElementById('glance').focus()")
    for key in ("ArrowDown", "ArrowRight", "ArrowDown"):
        page.press(key)
    assert page.run("document.getElementById('head').textContent") == "Layer 1, base head 1"
    same(top(page, 2), place.weights[1, 5, 2])
    assert page.complaints() == []
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_scrolled_sideways(browser, saved, width, scheme):
    page = opened(browser, saved, width, 800, scheme=scheme)
    assert page.run("[document.documentElement.scrollWidth, innerWidth]") == [width, width]
    colour = page.run("getComputedStyle(document.body).backgroundColor")
    assert colour == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(16, 21, 28)")
    assert page.complaints() == []
    page.close()


def test_cross_attention(browser, tmp_path):
    torch.manual_seed(0)
    model = seq2seq("places", **SIZES, **TOKENS)
    found = sas_hf.look(model, "The import statement", target="names a module", processor=train_tokenizer())
    found.save(tmp_path / "page.html")
    page = opened(browser, tmp_path / "page.html")
    page.click("#places button:nth-child(3)")
    page.hover("#target-3")
    cross = found.places[2]
    same(top(page, 0), cross.base[0, 0, 3])
    same(top(page, 6), cross.weights[0, 10, 3])
    page.hover("#source-2")  # who looks at it
    same(top(page, 1), cross.weights[0, 0, :, 2])
    assert page.complaints() == []
    page.close()


def test_images(browser, tmp_path):
    torch.manual_seed(0)
    Image.new("RGB", (20, 20), (200, 30, 30)).save(tmp_path / "picture.png")
    processor = sas_hf.SASViTImageProcessor(size={"height": 12, "width": 12})
    found = sas_hf.look(vit("sas"), tmp_path / "picture.png", processor=processor)
    found.save(tmp_path / "page.html")
    page, (place,) = opened(browser, tmp_path / "page.html"), found.places
    same(top(page, 1), place.weights[0, 0, 0])  # of the class token
    page.hover(".picture", 0.5, 0.9)  # the third row's second patch
    same(top(page, 1), place.weights[0, 0, 1 + 2 * 3 + 1])
    page.hover(".card:nth-child(2) canvas", 0.1, 0.5)
    same(top(page, 0), place.base[0, 0, 1 + 3])
    assert page.complaints() == []
    page.close()


def test_a_large_page_opens(browser, tmp_path, capsys):
    """12 layers of 12 heads, simulated as 36, of 128 tokens; how long it takes is told, not asked."""
    future = torch.full((128, 128), -torch.inf).triu(1)
    weights, base = (torch.softmax(2 * torch.randn(12, heads, 128, 128) + future, -1) for heads in (36, 12))
    side = Side("Text", [f" word{number}" for number in range(128)], [False] * 128)
    place = Place("self", "source", "source", weights, base)
    start = time.perf_counter()
    Look("large", "SASGPTForCausalLM", [place], {"source": side}).save(tmp_path / "page.html")
    page = opened(browser, tmp_path / "page.html")
    shown = page.run("document.documentElement.dataset.ready")
    with capsys.disabled():
        print(f"\nwritten and opened in {time.perf_counter() - start:.1f} s; the page was drawn after {shown} ms")
    same(top(page, 0), base[0, 0, page.run("state.pinned.index")])
    page.click("#glance", 0.99, 0.5)
    assert page.run("document.getElementById('head').textContent").endswith("base head 11")
    assert page.complaints() == []
    page.close()
