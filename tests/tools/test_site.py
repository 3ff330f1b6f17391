"""The documentation builds without a warning, holds together, loads nothing from elsewhere, and its commands parse.

Needs mkdocs-material and mkdocstrings (.tools).
"""

import html.parser
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

from geotoken_jax import cli

pytest.importorskip("mkdocs", reason="run with PYTHONPATH=.tools")
pytest.importorskip("material")
pytest.importorskip("mkdocstrings")

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={folder}"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr[-3000:]
    return folder


class Page(html.parser.HTMLParser):
    """links: (tag, what it points to). ids: what can be pointed to. text: of scripts and styles in the page."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[tuple[str, str]] = []
        self.ids: set[str] = set()
        self.inline = ""
        self._within = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        held = {name: value or "" for name, value in attrs}
        self.ids |= {held[name] for name in ("id", "name") if name in held}
        self.links += [(tag, held[name]) for name in ("href", "src", "action", "data") if held.get(name)]
        self.links += [(tag, part.split()[0]) for part in held.get("srcset", "").split(",") if part.strip()]
        self._within = tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag):
        self._within = ""

    def handle_data(self, data):
        self.inline += data if self._within else ""


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    found = {path: Page(path) for path in site.rglob("*.html")}
    assert len(found) > 20
    return found


def test_every_link_and_image_of_the_site_is_there(pages: dict[Path, Page], site: Path):
    missing = []
    for path, page in pages.items():
        for _, link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or path.name == "404.html":  # which is for a server's root
                continue
            file, fragment = urldefrag(link)
            target = (path.parent / unquote(file)).resolve() if file else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or (fragment and target in pages and unquote(fragment) not in pages[target].ids):
                missing.append((path.name, link))
    assert not missing


def test_nothing_is_loaded_from_another_host(pages: dict[Path, Page], site: Path):
    loaded = [(path.name, tag, link) for path, page in pages.items() for tag, link in page.links if tag != "a"]
    assert not [found for found in loaded if urlsplit(found[2]).netloc]
    for path, page in pages.items():
        assert not re.search(r"https?://|//[a-z]+\.[a-z]", page.inline), path.name
    for style in site.rglob("*.css"):
        addresses = re.findall(r"(?:url\(|@import)\s*[\"']?([^\"')]+)", style.read_text())
        assert not [address for address in addresses if urlsplit(address).netloc], style.name


def commands(page: Path) -> list[str]:
    """Returns the `geotoken` command lines of a page's code blocks, each on one line, from its verb on."""
    found = []
    for _, language, block in re.findall(r"^( *)```(\w*)\n(.*?)^\1```", page.read_text(), re.M | re.S):
        if language:
            continue
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            if match := re.match(r"(?:.*\s)?(?:\.venv/bin/)?geotoken (?=[a-z])(.*)", line.strip()):
                found.append(re.split(r"\s[>|#]\s?", match[1])[0])
    return found


PAGES = [DOCS / "index.md", *sorted(DOCS.glob("recipes/*.md"))]
COMMANDS = [(page.name, command) for page in PAGES for command in commands(page)]


def test_commands_are_found():
    assert {name for name, _ in COMMANDS} == {page.name for page in PAGES} and len(COMMANDS) > 15


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_every_command_parses_with_flags_and_keys_that_exist(page: str, command: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("GEOTOKEN_TOKEN", "x" * 40)
    options, rest = cli._parser().parse_known_args(shlex.split(command))
    cli._config(options, rest)
