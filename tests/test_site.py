"""The documentation site: it is built without a warning, has every public name, and reads on a screen of any width."""

import functools
import http.server
import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import threading
import types
import zlib
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
WIDTHS = (1280, 400)


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = load(ROOT / "docs" / "site" / "reference.py")
PUBLIC = reference.public_names()


def test_what_is_read_as_public_is_what_python_exports():
    read = {}
    for name in PUBLIC:
        read.setdefault(name.module, []).append(name.name)
    assert {"sas_hf", "sas_hf.conversion", "sas_hf.eval", "sas_hf.training"} <= set(read)
    for module, names in read.items():
        assert names == sorted(importlib.import_module(module).__all__), module


@pytest.mark.parametrize("public", PUBLIC, ids=lambda public: f"{public.module}.{public.name}")
def test_a_public_name_has_a_docstring(public):
    """And its methods, but for those that a class of another library has, too."""
    assert public.doc, f"{public.home}.{public.name}"
    value = getattr(importlib.import_module(public.module), public.name)
    if inspect.isclass(value):
        theirs = [vars(parent) for parent in value.__mro__ if not parent.__module__.startswith("sas_hf")]
        for name, member in vars(value).items():
            method = isinstance(member, property | functools.cached_property | classmethod | types.FunctionType)
            if method and not name.startswith("_") and not any(name in members for members in theirs):
                assert member.__doc__, f"{public.home}.{public.name}.{name}"


def test_the_reference_lists_every_public_name():
    pages = reference.pages()
    text = "\n".join(pages.values())
    for name in PUBLIC:
        page = pages["sas_hf.modeling" if name.module.startswith("sas_hf.modeling") else name.module]
        assert f"::: {name.module}.{name.name}\n" in page or f"`{name.name}`: [" in page, name
    places = re.findall(r"^::: (\S+)$", text, flags=re.M)
    assert len(places) == len(set(places))


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_a_links_words_say_what_is_behind_it(page):
    """On the site nobody knows files."""
    assert not re.findall(r"\[[\w/]+\.md\]\(", (ROOT / page).read_text())


def test_every_page_of_the_documentation_has_a_place_and_says_what_to_do_next():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in sorted((ROOT / "docs").glob("*.md")):
        assert f"docs/{page.name}\n" in navigation, page.name
        heading = re.findall(r"^## (.*)$", page.read_text(), flags=re.M)[-1]
        assert heading == "What to do next", page.name
        assert "](" in page.read_text().rpartition("## What to do next")[2], page.name


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Built as `make docs` does."""
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip('mkdocs is not installed: pip install -e ".[docs]"')
    folder = tmp_path_factory.mktemp("site")
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env=environment,
        text=True,
        capture_output=True,
    )
    assert built.returncode == 0, built.stderr
    return folder


def test_every_public_name_is_in_the_built_reference(site):
    """By the inventory that other documentations link to us by; and source is shown."""
    listed = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    names = {line.split()[0] for line in listed.splitlines()}
    assert {f"{name.home}.{name.name}" for name in PUBLIC} <= names
    page = (site / "reference" / "sas_hf.conversion" / "index.html").read_text()
    for shown in ("Source code in", "Raises:", "Returns:", "ConversionError"):
        assert shown in page


def test_searches_find_docstrings_and_not_the_source_below_them(site):
    index = (site / "search" / "search_index.json").read_text()
    assert "sas_hf.conversion.fold_checkpoint" in index and "def fold_checkpoint" not in index


def test_no_page_asks_a_network(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|iframe)[^>]* src=\"?([^\" >]+)", page.read_text())
        loaded += re.findall(
            r"<link[^>]* rel=\"?(?:stylesheet|preconnect)\"?[^>]* href=\"?([^\" >]+)", page.read_text()
        )
        assert loaded and not [one for one in loaded if re.match(r"(https?:)?//", one)], page


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address(site):
    """Of a server that has the site: search needs one."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown(), thread.join(), server.server_close()


# What lies beyond the right edge, and in no box that scrolls.
BEYOND = """[...document.querySelectorAll('.md-content *')].filter(e => {
  const box = e.getBoundingClientRect();
  if (!box.width || box.right <= innerWidth + 1) return false;
  for (let p = e.parentElement; p && p !== document.body; p = p.parentElement)
    if (getComputedStyle(p).overflowX !== 'visible' && p.getBoundingClientRect().right <= innerWidth + 1)
      return false;
  return true;
}).map(e => e.outerHTML.slice(0, 80)).slice(0, 3)"""

# Code that is wider than its box; source below a docstring, too.
CUT = """[...document.querySelectorAll('pre, pre > code')].filter(e => e.scrollWidth > e.clientWidth)
.map(e => e.textContent.split('\\n').reduce((a, b) => a.length < b.length ? b : a)).slice(0, 3)"""


@pytest.mark.parametrize("width", WIDTHS)
def test_no_page_scrolls_sideways(width, site, address, browser):
    """Nor does any code on a desktop, where a comment at its right would be out of sight."""
    page = browser.open(address, width=width)
    for path in sorted(site.rglob("index.html")):
        page.go(address + path.relative_to(site).as_posix())
        assert page.run("document.scrollingElement.scrollWidth") <= width, path
        assert page.run(BEYOND) == [], path
        assert width < 1280 or page.run(CUT) == [], path
    assert [said for said in page.complaints() if not said.startswith(f"asked for {address}")] == []
    page.close()


def test_search_finds_what_is_asked_for(address, browser):
    page = browser.open(address)
    page.click("[data-md-component=search-query]")
    page.send("Input.insertText", text="fold_checkpoint")
    page.press("End")  # the page looks for what is written when a key comes up
    found = page.run(
        """new Promise((done, fail) => { const end = Date.now() + 60000; const look = () => {
        const links = [...document.querySelectorAll('.md-search-result__link')].map(link => link.href);
        if (links.length) done(links); else if (Date.now() > end) fail(new Error('nothing is found'));
        else setTimeout(look, 100); }; look(); })"""
    )
    place = r"/reference/sas_hf\.conversion/.*#sas_hf\.conversion\.fold_checkpoint$"
    assert any(re.search(place, link) for link in found), found
    page.close()
