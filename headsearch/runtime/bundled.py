"""Which study a word on the command line means: a file, a bundled study, or a name in the database."""

from __future__ import annotations

from pathlib import Path

from headsearch.errors import SpecError
from headsearch.fields import guess
from headsearch.study_file import load_study

_PACKAGE = Path(__file__).parents[1]
# In a wheel the studies are inside the package, in a checkout beside it.
FOLDERS = (_PACKAGE / "studies", _PACKAGE.parent / "studies")


def bundled() -> dict[str, Path]:
    """Study files that come with headsearch, by name: ``quickstart``, ``ouyang2025/simclr-cifar10``."""
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for folder in reversed(FOLDERS)
        if folder.is_dir()
        for path in folder.rglob("*.toml")
    }


def study_file(word: str) -> Path:
    """The file that `word` names: a path, else the name of a bundled study.

    Raises:
        SpecError: It is neither; the message lists the bundled ones.
    """
    path = Path(word)
    if path.is_file():
        return path
    known = bundled()
    if (found := known.get(word.removesuffix(".toml"))) is not None:
        return found
    folders = {name.split("/")[0] for name in known if "/" in name}
    if path.exists() or path.suffix == ".toml" or (len(path.parts) != 1 and path.parts[0] not in folders):
        return path  # whoever reads it says what is wrong with it
    raise SpecError(f"{word}: no such study file; bundled are {guess(word, sorted(known)) or 'none'}")


def study_name(word: str) -> str:
    """`word` as the name of a study in the database; a study file stands for the study in it."""
    return load_study(study_file(word)).name if word.endswith(".toml") else word
