"""Links to what the site does not hold (code, tests, raw results), shown as names.

mkdocs calls this for every page. In the repository the same links lead to files, as a test says.
"""

import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r"\[([^\]]*)\]\((?!https?://|#)([^)#\s]+)([^)\s]*)\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Return a page's text without its links to what is not on the site."""
    docs = Path(config["docs_dir"])
    here = Path(page.file.abs_src_path).parent

    def kept(match: re.Match[str]) -> str:
        target = (here / match[2]).resolve()
        on_site = target.is_relative_to(docs) and target.suffix in (".md", ".png")
        return match[0] if on_site else match[1]

    return _LINK.sub(kept, markdown)
