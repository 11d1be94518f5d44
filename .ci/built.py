"""What a folder of built distributions holds, against the checkout.

    python .ci/built.py FOLDER

Exits with a line for each thing that is not as expected.
"""

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterable
from email import message_from_bytes
from email.message import Message
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("picache", "sparsity", "demand")
PLUGIN = "picache_pytest.py"


def tracked() -> set[str]:
    """Files of the checkout that git has."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {name for name in listed.stdout.split("\0") if name}


def differences(what: str, found: Iterable[str], expected: Iterable[str]) -> list[str]:
    """A line for each name on one side alone."""
    lacking, more = set(expected) - set(found), set(found) - set(expected)
    return [f"{what} lacks {name}" for name in sorted(lacking)] + [
        f"{what} has {name}, which git does not have there" for name in sorted(more)
    ]


def faults_of_sdist(path: Path, files: set[str]) -> list[str]:
    """The sdist holds the checkout: all that tests and examples read, and nothing else."""
    with tarfile.open(path) as archive:
        members = {m.name: m for m in archive.getmembers() if not m.isdir()}
        top = path.name.removesuffix(".tar.gz")
        outside = [
            f"{name} is outside of {top}" for name in members if not name.startswith(f"{top}/")
        ]
        found = {name.removeprefix(f"{top}/") for name in members}
    return outside + differences(path.name, found, files | {"PKG-INFO"})


def faults_of_metadata(metadata: Message, project: dict) -> list[str]:
    """Version, Python and core dependencies are those of pyproject.toml."""
    required = metadata.get_all("Requires-Dist") or []
    core = {line.replace(" ", "") for line in required if "extra ==" not in line}
    pairs = [
        ("version", metadata["Version"], project["version"]),
        ("Python", metadata["Requires-Python"], project["requires-python"]),
        ("core dependencies", core, {line.replace(" ", "") for line in project["dependencies"]}),
        (
            "extras",
            set(metadata.get_all("Provides-Extra") or []),
            set(project["optional-dependencies"]),
        ),
    ]
    return [
        f"{what}: {found}, expected {wanted}" for what, found, wanted in pairs if found != wanted
    ]


def faults_of_wheel(path: Path, files: set[str], project: dict) -> list[str]:
    """The wheel holds the three packages with their types, the plugin and the licence, no tests."""
    expected = {f for f in files if f.split("/")[0] in PACKAGES or f == PLUGIN}
    expected |= {f"{package}/py.typed" for package in PACKAGES}
    about = f"picache-{project['version']}.dist-info"
    licence = f"{about}/licenses/LICENSE"
    with zipfile.ZipFile(path) as archive:
        found = {name for name in archive.namelist() if not name.endswith("/")}
        faults = differences(
            path.name,
            found,
            expected
            | {f"{about}/{n}" for n in ("METADATA", "WHEEL", "RECORD", "entry_points.txt")}
            | {licence},
        )
        faults += [
            f"{path.name}: {name} is not the checkout's"
            for name in sorted(expected & found)
            if archive.read(name) != (ROOT / name).read_bytes()
        ]
        if licence in found and archive.read(licence) != (ROOT / "LICENSE").read_bytes():
            faults.append(f"{path.name}: {licence} is not the checkout's")
        entry = "[pytest11]\npicache_pytest = picache_pytest"
        if entry not in archive.read(f"{about}/entry_points.txt").decode():
            faults.append(f"{path.name}: pytest does not find the plugin by its entry point")
        faults += faults_of_metadata(message_from_bytes(archive.read(f"{about}/METADATA")), project)
    return faults


def main() -> None:
    """Check the one sdist and the one wheel of the folder."""
    folder = Path(sys.argv[1])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    stem = f"picache-{project['version']}"
    sdist, wheel = folder / f"{stem}.tar.gz", folder / f"{stem}-py3-none-any.whl"
    built = {path.name for path in folder.iterdir()}
    faults = differences("the folder", built, {sdist.name, wheel.name})
    if not faults:
        files = tracked()
        faults = faults_of_sdist(sdist, files) + faults_of_wheel(wheel, files, project)
    if faults:
        sys.exit("\n".join(faults))
    print(f"{sdist.name} and {wheel.name} hold what they should")


if __name__ == "__main__":
    main()
