"""A hook of mkdocs: the reference has every public name of the packages.

Public is what a package or subpackage, or a module right below a package, lists in ``__all__``. A
name that no page shows is a warning, and an error with ``--strict``.
"""

import ast
import zlib
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger

log = get_plugin_logger("public names")
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("picache", "sparsity", "demand")
_HEADER_LINES = 4  # of an inventory of Sphinx, which mkdocstrings writes; the rest is compressed


def on_post_build(config: MkDocsConfig) -> None:
    """Look for each name in the inventory of what the site describes."""
    inventory = (Path(config.site_dir) / "objects.inv").read_bytes()
    entries = zlib.decompress(inventory.split(b"\n", _HEADER_LINES)[_HEADER_LINES]).decode()
    described = {line.split(" ", 1)[0] for line in entries.splitlines()}
    for package in PACKAGES:
        of_package = _listed(ROOT / package / "__init__.py")
        wanted = {f"{package}.{name}" for name in of_package}
        for path in [*(ROOT / package).glob("*.py"), *(ROOT / package).glob("*/**/__init__.py")]:
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            wanted |= {
                f"{module.removesuffix('.__init__')}.{name}" for name in _listed(path) - of_package
            }
        for name in sorted(wanted - described):
            last = name.rpartition(".")[2]
            if any(other.endswith(f".{last}.{last}") for other in described):
                continue  # a function by the name of its module, which hides it: compare.compare
            log.warning(f"{name} is public, and no page of docs/reference shows it")


def _listed(path: Path) -> set[str]:
    """The names in a module's ``__all__``."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()
