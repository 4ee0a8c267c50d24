"""Stops the build where a public name has no text, or no place in the reference."""

import inspect
from collections.abc import Iterator

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

import sirfshampoo

logger = logging.getLogger(__name__)


def public_names() -> Iterator[tuple[str, object]]:
    """Yield the public names, and those of what a class itself defines."""
    for name in sirfshampoo.__all__:
        value = getattr(sirfshampoo, name)
        yield f"sirfshampoo.{name}", value
        if not inspect.isclass(value):
            continue
        for member, found in vars(value).items():
            if not member.startswith("_") and (
                callable(found) or isinstance(found, property | classmethod)
            ):
                yield f"sirfshampoo.{name}.{member}", found


def check(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn, which is an error in the build, of each name that is missing."""
    documented = env.domains["py"].objects
    for name, value in public_names():
        if not (inspect.getdoc(value) or "").strip():
            logger.warning("%s has no docstring", name)
        if name not in documented:
            logger.warning("%s is not in the API reference", name)


def setup(app: Sphinx) -> dict[str, bool]:
    """Check once all pages are read."""
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
