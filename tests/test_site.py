"""The documentation site: it builds without a warning, is whole, and looks as it should in a browser."""

from __future__ import annotations

import http.server
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest

import hbfunc

pytest.importorskip("material", reason="the extra docs")
import pages  # the hook

pytest_plugins = ("browsing",)

ROOT = Path(__file__).parents[1]
LOOKED_AT = ["index", "optimizers/soap", "migration", "side_by_side", "results", "reference/sweep"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder that `.ci/run` has built, or one that is built now."""
    if "HBFUNC_SITE" in os.environ:
        return Path(os.environ["HBFUNC_SITE"])
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", ".mkdocs.yml", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return folder


class Addresses(HTMLParser):
    """What a page loads, what it links to, and the anchors that it has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads, self.links, self.anchors = [], [], {"", "__tabbed"}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors |= {given[k] for k in ("id", "name") if given.get(k)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if given.get("src"):
            self.loads.append(given["src"])
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.loads.append(given["href"])


def test_no_link_is_dead_and_nothing_is_loaded_from_another_host(site):
    found = {path: Addresses(path) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(found) > 50
    assert [x for page in found.values() for x in page.loads if re.match(r"(https?:)?//", x)] == []
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet
    dead = []
    for path, page in found.items():
        for address in [*page.loads, *page.links]:
            target, _, anchor = address.partition("#")
            if re.match(r"\w+:", target):
                continue
            there = (path.parent / target).resolve() if target else path
            if not there.is_file() or (anchor and there in found and anchor not in found[there].anchors):
                dead.append((path.relative_to(site).as_posix(), address))
    assert dead == []


def test_every_public_name_has_its_place(site):
    """Recipes and classes on their pages, the rest in the reference."""
    text = "".join(path.read_text(encoding="utf-8") for path in (site / "reference").glob("*.html"))
    told = "".join(path.read_text(encoding="utf-8") for path in (site / "optimizers").glob("*.html"))
    names = [n for n in hbfunc.__all__ if callable(getattr(hbfunc, n))]
    assert [n for n in names if not re.search(rf'id="(\w+-)?{n}"', text) and not re.search(rf"\b{n}\b", told)] == []
    assert {path.stem for path in (site / "optimizers").glob("*.svg")} == set(pages.TITLES)


@pytest.mark.parametrize("recipe", pages.ELSEWHERE)
def test_what_is_said_to_be_elsewhere_is_there(recipe):
    """As far as the libraries are installed."""
    assert recipe in pages.TITLES
    for name in pages.ELSEWHERE[recipe]:
        library, *path = name.split(".")
        if importlib.util.find_spec(library) is None:
            continue
        there = importlib.import_module(library)
        for part in path:
            there = getattr(there, part)


@pytest.fixture(scope="module")
def address(site):
    """The site as a server gives it: read from a disk it is without its search."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


# What is wrong with a page: images that did not come, and what is wider than its place and cannot be scrolled.
WRONG = """() => ({
    images: [...document.images].filter(image => !image.complete || !image.naturalWidth).map(image => image.src),
    page: document.documentElement.scrollWidth > innerWidth,
    outside: [...document.querySelectorAll('.md-content *')]
        .filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('pre, .md-typeset__scrollwrap'))
        .map(e => e.outerHTML.slice(0, 80)),
    tables: [...document.querySelectorAll('.md-typeset__scrollwrap')]
        .filter(e => innerWidth > 1000 && e.scrollWidth > e.clientWidth + 1).map(e => e.innerText.slice(0, 80)),
})"""


@pytest.mark.parametrize("width", [1400, 390])
def test_what_a_browser_shows(address, browser, width, tmp_path):
    """Pages on a desk and on a phone, where wide tables may be scrolled, but not the page."""
    for name in LOOKED_AT:
        page = browser.new_page(viewport={"width": width, "height": 1200})
        said, loaded = [], []
        page.on("console", lambda message, said=said: said.append((message.type, message.text)))
        page.on("pageerror", lambda error, said=said: said.append(("error", str(error))))
        page.on("request", lambda request, loaded=loaded: loaded.append(request.url))
        page.goto(f"{address}/{name}.html", wait_until="networkidle")
        picture = page.screenshot(path=tmp_path / f"{name.replace('/', '-')}.png", full_page=True)
        assert len(picture) > 30_000, name
        wrong = page.evaluate(WRONG)
        assert wrong == {"images": [], "page": False, "outside": [], "tables": []}, (name, wrong)
        assert [x for x in said if x[0] in ("error", "warning")] == [], name
        assert [url for url in loaded if not url.startswith((address, "data:", "blob:"))] == [], name
        page.close()


def test_the_search_finds(address, browser):
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.goto(f"{address}/index.html", wait_until="networkidle")
    page.click(".md-search__input")  # which loads the index
    page.locator(".md-search__input").press_sequentially("orthogonalize")
    page.wait_for_selector(".md-search-result__item a[href*='muon']", timeout=60_000)
    page.close()
