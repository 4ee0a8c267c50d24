"""Every public name has an example in its docstring, and it says what is so."""

import doctest
import inspect

import pytest
import torch

import sirfshampoo

NAMES = {name: getattr(sirfshampoo, name) for name in sirfshampoo.__all__}


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_public_name_runs(name: str) -> None:
    text = inspect.cleandoc(NAMES[name].__doc__ or "")
    known = {"torch": torch} | NAMES
    test = doctest.DocTestParser().get_doctest(text, known, name, None, 0)
    assert test.examples, f"{name} has no example"
    told: list[str] = []
    doctest.DocTestRunner(verbose=False).run(test, out=told.append)
    assert not told, "".join(told)
