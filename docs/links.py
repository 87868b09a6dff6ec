"""Links to files that the site does not hold (code, tests, raw results), shown as names.

A Markdown extension, which `.mkdocs.yml` names. In the repository the same links lead to files.
"""

import re

from markdown import Markdown
from markdown.extensions import Extension
from markdown.preprocessors import Preprocessor

# On the site lie pages and pictures, one directory deep: "../../" leads out of it.
_LINK = re.compile(r"\[([^\]]*)\]\((?!https?://|#)([^)#\s]+)([^)\s]*)\)")


def on_site(text: str) -> str:
    """Return a page's text without its links to files that the site does not hold.

    Examples:
        >>> on_site("[cost](cost.md#time), [its test](../../tests/test_cost.py)")
        '[cost](cost.md#time), its test'
    """

    def kept(match: re.Match[str]) -> str:
        inside = not match[2].startswith("../../") and match[2].endswith((".md", ".png"))
        return match[0] if inside else match[1]

    return _LINK.sub(kept, text)


class RepositoryLinks(Extension):
    """The extension."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Have each page pass through `on_site` before anything else."""
        md.preprocessors.register(_Links(md), "repository-links", 1000)


class _Links(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        return on_site("\n".join(lines)).split("\n")
