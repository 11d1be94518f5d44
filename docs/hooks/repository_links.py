"""A hook of mkdocs: links to files of the repository outside docs lead to pages that show them.

A page in docs may so link ``../examples/link_documents.py`` as it does where the repository is
read. A Markdown file becomes a page as it is; of any other the page shows the text. Links of
notebooks, which mkdocs does not follow, lead where those of pages do, or are warned about.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

log = get_plugin_logger("repository links")
ROOT = Path(__file__).resolve().parents[2]
FOLDER = "repository"  # of the site: where these pages are
_LINK = re.compile(r"(?<=\]\()(?P<path>[^)#:\s]+)(?=[)#])")
_SOURCE = re.compile(r'href="(?P<path>[^"#:]+\.(?:md|ipynb|py|json))(?P<anchor>#[^"]*)?"')
_LANGUAGES = {".py": "python", ".json": "json", ".toml": "toml"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each file outside docs that a page links to, or one of the pages added."""
    waiting = list(files.documentation_pages())
    while waiting:
        source = waiting.pop()
        for path in _outside(source.content_string, _in_repository(source.src_uri)):
            if files.get_file_from_path(_in_site(path)) is None:
                page = File.generated(config, _in_site(path), content=_shown(path))
                page.inclusion = InclusionLevel.NOT_IN_NAV
                files.append(page)
                waiting.append(page)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links from and to the pages added lead to where the site has what they name."""
    source = page.file.src_uri
    here = _in_repository(source)

    def moved(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), match["path"]))
        if not (ROOT / path).is_file() or (here.startswith("docs/") and path.startswith("docs/")):
            return match["path"]  # as it is, for mkdocs to judge
        return posixpath.relpath(_in_site(path), posixpath.dirname(source))

    return _LINK.sub(moved, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links of a notebook lead to pages of the site."""
    source = page.file.src_uri
    if not source.endswith(".ipynb"):
        return html
    folder = posixpath.dirname(_in_repository(source))

    def moved(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match["path"]))
        target = files.get_file_from_path(_in_site(path))
        if target is None:
            log.warning(f"{source} links to {match['path']}, which is not there")
            return match[0]
        return f'href="{target.url_relative_to(page.file)}{match["anchor"] or ""}"'

    return _SOURCE.sub(moved, html)


def _outside(markdown: str, here: str) -> set[str]:
    """The files of the repository outside docs that the page at `here` links to."""
    folder = posixpath.dirname(here)
    paths = (
        posixpath.normpath(posixpath.join(folder, m["path"])) for m in _LINK.finditer(markdown)
    )
    return {path for path in paths if not path.startswith("docs/") and (ROOT / path).is_file()}


def _in_site(path: str) -> str:
    """Where the site's sources have a file of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{FOLDER}/{path}" if path.endswith(".md") else f"{FOLDER}/{path}.md"


def _in_repository(source: str) -> str:
    """The path in the repository of a page of the site."""
    if source.startswith(f"{FOLDER}/"):
        path = source.removeprefix(f"{FOLDER}/")
        return path if (ROOT / path).is_file() else path.removesuffix(".md")
    return f"docs/{source}"


def _shown(path: str) -> str:
    """A file of the repository as Markdown."""
    text = (ROOT / path).read_text()
    if path.endswith(".md"):
        return text
    language = _LANGUAGES.get(Path(path).suffix, "text")
    return f"# {path}\n\n````{language}\n{text}````\n"
