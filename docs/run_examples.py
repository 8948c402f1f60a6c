"""Run every Python block of the README and of the guides, page by page, each block in the names of those before it.

A block below a line ``<!-- not run -->`` is shown only. Usage: ``python docs/run_examples.py [PAGE ...]``.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"(<!-- not run -->\s*)?^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> list[tuple[int, str]]:
    """Return line number and source of the blocks of a page that are to be run."""
    text = page.read_text(encoding="utf-8")
    return [
        (text[: found.start(2)].count("\n") + 1, found.group(2))
        for found in FENCE.finditer(text)
        if found.group(1) is None
    ]


def run(page: Path) -> bool:
    """Run a page in a folder of its own; returns whether all went well."""
    names: dict[str, object] = {"__name__": "__main__"}
    pyro = sys.modules.get("pyro")
    if pyro is not None:  # a reader starts every page in a process of its own
        pyro.clear_param_store()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for line, source in blocks(page):
                start = time.perf_counter()
                padded = "\n" * (line - 1) + source
                exec(compile(padded, str(page), "exec"), names)
                print(
                    f"{page.relative_to(ROOT)}:{line} ran in {time.perf_counter() - start:.1f} s", flush=True
                )
        except Exception:
            traceback.print_exc()
            return False
        finally:
            os.chdir(ROOT)
    return True


def main() -> None:
    """Run the pages named on the command line, or all."""
    pages = [Path(name).resolve() for name in sys.argv[1:]]
    pages = pages or [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
    failed = [page for page in pages if not run(page)]
    if failed:
        sys.exit(f"failed: {', '.join(str(page.relative_to(ROOT)) for page in failed)}")


if __name__ == "__main__":
    main()
