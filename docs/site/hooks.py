"""What mkdocs makes the site of: the Markdown of the repository where it lies, and a reference made of docstrings."""

import re
from pathlib import Path

import reference
from mkdocs.structure.files import File, Files


ROOT = reference.ROOT
BESIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")


def on_config(config):
    for entry in config.nav:
        if entry == {"Reference": "REFERENCE"}:
            entry["Reference"] = [{page: f"reference/{page}.md"} for page in reference.pages()]
    return config


def on_files(files: Files, config) -> Files:
    """Sources are named from the root, as GitHub shows them, so that the same links lead from page to page."""

    def from_root(path: str, dest: str | None = None) -> File:
        return File(path, str(ROOT), config.site_dir, config.use_directory_urls, dest_uri=dest)

    docs = [file for file in files if file.src_dir == config.docs_dir]
    found = [file for file in files if file.src_dir != config.docs_dir]
    found += [from_root(f"docs/{file.src_uri}", file.dest_uri) for file in docs if file.inclusion.is_included()]
    found += [from_root(name) for name in BESIDE]
    pages = {file.src_uri: Path(file.abs_src_path) for file in found if file.is_documentation_page()}
    for file in sorted({file for path in pages.values() for file in linked(path)} - {f.src_uri for f in found}):
        found.append(from_root(file))  # source that a page shows, as it is
    for name, text in reference.pages().items():
        found.append(File.generated(config, f"reference/{name}.md", content=text))
    return Files(found)


def on_page_content(html: str, **_) -> str:
    """Searches find what docstrings say, not the source below them."""
    return re.sub(r'<details class="[\w-]*source"', r"\g<0> data-search-exclude", html)


def linked(page: Path) -> set[str]:
    """Files of the repository other than pages that a page links to."""
    targets = re.findall(r"\]\(([^)#\s:]+)", page.read_text())
    paths = {(page.parent / target).resolve() for target in targets}
    return {path.relative_to(ROOT).as_posix() for path in paths if path.is_file() and path.suffix != ".md"}
