"""One word, one meaning: every argument of every public function is a word of the glossary."""

from __future__ import annotations

import importlib
import inspect
import re
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import stochdyn as sd

PAGE = Path(__file__).parent.parent / "docs" / "glossary.md"
WORD = re.compile(r"^\| `(\w+)` \| (.+?) \|", flags=re.MULTILINE)


def public_functions(inherited: bool = False) -> Iterator[tuple[str, Callable[..., object]]]:
    """Yield all public functions, constructors and methods with their names, inherited ones if wanted.

    Records that functions return aren't made by users, so their constructors are left out.
    """
    packages = [sd, *(getattr(sd, n) for n in dir(sd) if isinstance(getattr(sd, n), types.ModuleType))]
    for package in packages:
        for name in dir(package):
            value = getattr(package, name)
            if not getattr(value, "__module__", "").startswith("stochdyn"):
                continue
            owner = f"{package.__name__}.{name}"
            if inspect.isfunction(value):
                yield owner, value
            if not inspect.isclass(value) or issubclass(value, BaseException):
                continue
            if not (hasattr(value, "__dataclass_fields__") or hasattr(value, "_fields")):
                yield owner, value.__init__
            kinds = value.__mro__ if inherited else (value,)
            own = [kind for kind in kinds if kind.__module__.startswith("stochdyn")]
            for attribute, member in (item for kind in own for item in vars(kind).items()):
                function = getattr(member, "__func__", member)
                if not attribute.startswith("_") and inspect.isfunction(function):
                    yield f"{owner}.{attribute}", function


def public_words(inherited: bool = False) -> dict[str, set[str]]:
    """Return the argument names of all public functions, with who has them."""
    words: dict[str, set[str]] = defaultdict(set)
    for owner, function in public_functions(inherited):
        for name in inspect.signature(function).parameters:
            if name not in ("self", "cls", "args", "kwargs") and not name.startswith("_"):
                words[name].add(owner)
    return words


def glossary() -> dict[str, str]:
    return dict(WORD.findall(PAGE.read_text(encoding="utf-8")))


def test_every_word_is_in_the_glossary() -> None:
    known = glossary()
    strangers = {word: sorted(owners)[:3] for word, owners in public_words().items() if word not in known}
    assert not strangers, f"words that docs/glossary.md doesn't have: {strangers}"


def test_the_glossary_has_no_word_that_nobody_uses() -> None:
    unused = sorted(set(glossary()) - set(public_words(inherited=True)))
    assert not unused, f"words of docs/glossary.md that no public signature has: {unused}"


@pytest.mark.parametrize(
    "word",
    [
        "num_path",
        "n_samples",
        "n_steps",
        "n_draws",
        "iterations",
        "outer",
        "max_sweeps",
        "obs_ts",
        "rng",
        "eps",
        "tol",
    ],
)
def test_words_that_have_another_name_stay_out(word: str) -> None:
    assert word not in public_words()


def test_documented_packages_can_be_imported() -> None:
    for name in dir(sd):
        value = getattr(sd, name)
        if isinstance(value, types.ModuleType):
            assert importlib.import_module(value.__name__) is value


def test_every_source_of_randomness_may_be_a_seed() -> None:
    """But for the methods that subclasses write, which are given a generator."""
    hooks = ("draw", "reset")
    strict = {
        owner
        for owner, function in public_functions(inherited=True)
        for name, parameter in inspect.signature(function).parameters.items()
        if name == "generator"
        and "int" not in str(parameter.annotation)
        and str(parameter.annotation) != "Generator"
        and owner.rpartition(".")[2] not in hooks
    }
    assert not strict
