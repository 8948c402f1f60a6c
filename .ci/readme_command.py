"""Print one of the README's two commands: the shell block that follows ``<!-- command: NAME -->``."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def readme_command(name: str) -> str:
    """Return the text of the marked shell block."""
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    pattern = rf"<!-- command: {re.escape(name)} -->\s*```bash\n(.*?)```"
    found = re.findall(pattern, readme, flags=re.DOTALL)
    if len(found) != 1:
        sys.exit(f"README.md must hold exactly one command marked {name!r}; found {len(found)}")
    return found[0].strip()


if __name__ == "__main__":
    print(readme_command(sys.argv[1]))
