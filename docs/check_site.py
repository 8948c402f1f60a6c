"""Look at the built documentation in a headless browser: ``python docs/check_site.py FOLDER [--pictures FOLDER]``.

Every page must open without an error of its scripts; every link and picture inside the site must lead somewhere, headings
included; nothing may run off the page in a wide or narrow window; dark must differ from light; and the search must find a
class. Needs Chromium or Chrome; without one it says so and stops.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.server
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SOUGHT = "AutoPathGuide"
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 800}

# What a page says of itself, in one call: its links, the pictures that didn't load, its anchors and its background.
REPORT = """() => ({
    links: [...document.querySelectorAll('a[href]')].map(a => a.href),
    broken: [...document.images].filter(i => !i.complete || i.naturalWidth === 0).map(i => i.src),
    anchors: [...document.querySelectorAll('[id]')].map(e => e.id),
    background: getComputedStyle(document.body).backgroundColor,
})"""
OVERFLOW = "() => Math.max(0, document.documentElement.scrollWidth - window.innerWidth)"


class Handler(http.server.SimpleHTTPRequestHandler):
    """A server that doesn't write a line per request."""

    def log_message(self, format: str, *args: object) -> None:
        """Write nothing."""

    def copyfile(self, source: IO[bytes], outputfile: IO[bytes]) -> None:
        """Send a file; a browser that has left the page meanwhile doesn't want it."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            super().copyfile(source, outputfile)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on this machine; yields its address."""
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()


def check(folder: Path, browser_path: str, pictures: Path | None) -> list[str]:
    """Return what is wrong with the site, a line for each fault."""
    from playwright.sync_api import sync_playwright

    pages = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.html") if "_modules" not in p.parts)
    faults: list[str] = []
    links: dict[str, set[str]] = {}
    anchors: dict[str, set[str]] = {}
    with served(folder) as root, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        context = browser.new_context(viewport=WIDE)
        # Nothing is fetched from elsewhere: formulas are typeset by a script from outside, which isn't what is looked at.
        context.route("**/*", lambda r: r.continue_() if r.request.url.startswith(root) else r.abort())
        page = context.new_page()
        current = ""
        page.on("pageerror", lambda error: faults.append(f"{current}: {error}"))
        for current in pages:
            page.set_viewport_size(WIDE)
            answer = page.goto(urljoin(root, current), wait_until="load")
            if answer is None or not answer.ok:
                faults.append(f"{current}: does not open")
                continue
            report, overflow = page.evaluate(REPORT), {"wide": page.evaluate(OVERFLOW)}
            page.set_viewport_size(NARROW)
            overflow["narrow"] = page.evaluate(OVERFLOW)
            links[current], anchors[current] = set(report["links"]), set(report["anchors"])
            faults += [
                f"{current}: picture {src} is missing" for src in report["broken"] if src.startswith(root)
            ]
            faults += [
                f"{current}: {pixels} pixels wider than the {name} window"
                for name, pixels in overflow.items()
                if pixels
            ]
        for current, found in links.items():
            for link in sorted(found):
                target, anchor = urldefrag(link)
                if not target.startswith(root):
                    continue
                name = unquote(urlsplit(target).path).lstrip("/") or "index.html"
                if not (folder / name).is_file():
                    faults.append(f"{current}: dead link {name}")
                elif anchor and name in anchors and unquote(anchor) not in anchors[name]:
                    faults.append(f"{current}: no heading {unquote(anchor)} in {name}")
        current = "search.html"
        page.set_viewport_size(WIDE)
        page.goto(urljoin(root, f"search.html?q={SOUGHT}"))
        try:
            page.wait_for_selector("#search-results li a", timeout=20_000)
        except Exception:
            faults.append(f"the search doesn't find {SOUGHT}")
        current = "index.html"
        colours = {}
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.goto(urljoin(root, current), wait_until="load")
            colours[scheme] = page.evaluate(REPORT)["background"]
            if pictures is not None:
                for name, size in (("wide", WIDE), ("narrow", NARROW)):
                    page.set_viewport_size(size)
                    page.screenshot(path=pictures / f"index_{scheme}_{name}.png")
        if colours["light"] == colours["dark"]:
            faults.append("dark looks like light")
        browser.close()
    print(f"{len(pages)} pages, {sum(map(len, links.values()))} links, {len(faults)} faults")
    return faults


def main() -> None:
    """Check the site named on the command line; the exit status is 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the built site")
    parser.add_argument("--pictures", type=Path, help="where to put pictures of the first page")
    arguments = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print(f"not checked: none of {', '.join(BROWSERS)} is installed")
        return
    if arguments.pictures is not None:
        arguments.pictures.mkdir(parents=True, exist_ok=True)
    faults = check(arguments.folder.resolve(), browser, arguments.pictures)
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
