"""The documents point at what is there: every link, anchor, path and module that they name exists."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]

LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(r"(?:(?<=\./)|(?<![\w/.]))(?:pocd|scripts|tests|docs|config|systemd)/[\w./@-]*\w")  # not /etc/pocd/…
MODULE = re.compile(r"(?<![\w/.])(?:pocd|scripts|tests)(?!\.(?:toml|service)\b)(?:\.[a-z_]\w*)+")


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to a document's headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(document: Path) -> Iterator[str]:
    for link in LINK.findall(document.read_text()):
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        if "://" not in link and not (target.exists() and (not anchor or anchor in anchors(target.read_text()))):
            yield link


def unknown_names(text: str) -> Iterator[str]:
    """Give the paths and modules of this checkout that a text names and that are not there."""
    yield from (path for path in PATH.findall(text) if not (ROOT / path).exists())
    for name in MODULE.findall(text):
        path = ROOT / name.replace(".", "/")
        if not (path.exists() or path.with_suffix(".py").exists()):
            yield name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    assert not list(dead_links(document))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_path_and_module_that_is_named_exists(document: Path) -> None:
    assert not list(unknown_names(document.read_text()))


def test_what_is_not_there_is_found(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text("# A `b` c\n[a](#a-b-c) [b](#b) [c](c.md) [d](page.md#a-b-c) [e](http://127.0.0.1/e)\n")
    assert list(dead_links(document)) == ["#b", "c.md"]
    text = "./scripts/test, scripts/bench.py, /etc/pocd/pocd.toml, pocd.service, pocd.compute.stages, pocd.validator"
    assert list(unknown_names(text)) == ["scripts/bench.py", "pocd.validator"]
