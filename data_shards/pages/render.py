"""HTML pages from Jinja2 templates: one frame, everything escaped, no external request.

In: a template that extends `frame.html`, and values. Out: one HTML document with its style sheets
and scripts inside, which works from disk and by mail. A package with templates of its own passes
their folder.
"""

import base64
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

TEMPLATES = Path(__file__).with_name("templates")


class Section(NamedTuple):
    """An entry of the navigation: the id of the section and its title."""

    key: str
    title: str


def render_page(
    template: str,
    *,
    title: str,
    command: str,
    sections: Sequence[Section] = (),
    folder: Path = TEMPLATES,
    **values: object,
) -> str:
    """Render a page.

    Args:
        template: a file in `folder` or among the shared templates.
        command: the command that wrote the page, for the footer.
        sections: what the navigation lists.
        values: further values of the template. Strings are escaped, `Markup` is not.

    Raises:
        jinja2.UndefinedError: the template uses a value that is missing.
    """
    values |= {"title": title, "command": command, "sections": sections}
    return _environment(folder).get_template(template).render(values) + "\n"


@cache
def _environment(folder: Path) -> Environment:
    environment = Environment(
        loader=FileSystemLoader([folder, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}

    def asset(name: str) -> Markup:
        """A style sheet or script from beside the templates, as it is."""
        assert environment.loader is not None
        return Markup(environment.loader.get_source(environment, name)[0])

    environment.globals["asset"] = asset
    environment.filters |= {"fixed": fixed, "base64": _base64}
    return environment


def fixed(value: float | None, spec: str = ".3f") -> str:
    """A number in the given format; '-' where it is None or not finite."""
    return "-" if value is None or not math.isfinite(value) else format(value, spec)


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
