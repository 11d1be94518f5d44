"""A hook of mkdocs: pages have on the site the structure that they have in the repository.

Python-Markdown, which mkdocs uses, and CommonMark differ: a list right below a paragraph is text to
the one and a list to the other. What the two take for different numbers of elements is a warning,
and an error with ``--strict``, and so is a list of a docstring that became text; a blank line or
four columns of indentation settle it.
"""

import re

from markdown_it import MarkdownIt
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

log = get_plugin_logger("same page")
ELEMENTS = ("table", "tr", "li", "ul", "ol", "pre", "img", "strong", "em", "h1", "h2", "h3")
_written: dict[str, str] = {}  # pages by their source, as they were handed over


def _counts(html: str) -> dict[str, int]:
    return {name: len(re.findall(rf"<{name}[ >]", html)) for name in ELEMENTS}


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> None:
    """Keep the text that mkdocs will render; notebooks are rendered by their plugin."""
    if not page.file.src_uri.endswith(".ipynb"):
        _written[page.file.src_uri] = markdown


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> None:
    """Hold what came of it against CommonMark's."""
    for paragraph in re.findall(r"<p>(.*?)</p>", html, re.DOTALL):
        if re.search(r"^- ", paragraph, re.MULTILINE):
            log.warning(
                f"{page.file.src_uri}: put a blank line in front of the list in {paragraph}"
            )
    markdown = _written.pop(page.file.src_uri, None)
    if markdown is None or re.search(r"^::: ", markdown, re.MULTILINE):
        return  # a notebook, or a page of docstrings
    there = _counts(MarkdownIt("commonmark").enable("table").render(markdown))
    here = _counts(html)
    for name in ELEMENTS:
        if there[name] != here[name]:
            log.warning(
                f"{page.file.src_uri}: {here[name]} <{name}> on the site, {there[name]} by "
                "CommonMark: put a blank line in front of lists and tables, and indent what "
                "belongs to an item by four columns"
            )
