"""The site that `make docs` builds: strictly, with links that lead somewhere, and nothing from another host."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import ctrl_csc_hf

if find_spec("mkdocs") is None:
    pytest.skip("mkdocs is not installed: pip install 'ctrl-csc-hf[docs]'", allow_module_level=True)

ROOT = Path(__file__).parents[1]


class Page(HTMLParser):
    """The anchors of a page, its links, and the addresses of all that a browser loads to show it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors, self.links, self.loaded = {""}, [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if "href" in values:
            (self.links if tag == "a" else self.loaded).append(values["href"])
        self.loaded += [values[name] for name in ("src", "srcset", "data", "poster") if name in values]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html")}


def is_elsewhere(address: str) -> bool:
    return bool(urlsplit(address).scheme or urlsplit(address).netloc)


def test_every_link_and_every_file_of_a_page_is_there(site: Path, pages: dict[Path, Page]) -> None:
    missing = []
    for path, page in pages.items():
        for address in (address for address in page.links + page.loaded if not is_elsewhere(address)):
            parts = urlsplit(address)
            folder = site if parts.path.startswith("/") else path.parent
            target = (folder / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or (target in pages and unquote(parts.fragment) not in pages[target].anchors):
                missing.append((path.relative_to(site), address))
    assert len(pages) > 20 and not missing


def test_pages_load_nothing_from_another_host(site: Path, pages: dict[Path, Page]) -> None:
    loaded = [address for page in pages.values() for address in page.loaded]
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        loaded += re.findall(r"url\(['\"]?([^'\")]+)", text) + re.findall(r"@import\s+['\"]([^'\"]+)", text)
    assert len(loaded) > 100
    assert not [address for address in loaded if is_elsewhere(address) and not address.startswith("data:")]


def test_every_public_name_has_an_entry(pages: dict[Path, Page]) -> None:
    entries = {anchor for path, page in pages.items() if path.parent.name == "api" for anchor in page.anchors}
    assert {f"ctrl_csc_hf.{name}" for name in ctrl_csc_hf.__all__} <= entries


def test_pages_of_files_outside_docs_are_in_the_site(site: Path) -> None:
    for card in (ROOT / "checkpoints").glob("*/README.md"):
        title = next(line for line in card.read_text(encoding="utf-8").splitlines() if line.startswith("# "))
        assert title.removeprefix("# ") in (site / "checkpoints" / card.parent.name / "index.html").read_text("utf-8")
    assert (site / "tour.ipynb").read_bytes() == (ROOT / "docs" / "tour.ipynb").read_bytes()
