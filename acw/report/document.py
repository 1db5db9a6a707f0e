"""A page: a template of acw/report/templates with its data, in one file that can load nothing."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import jinja2
from markupsafe import Markup

from acw.report.numbers import interval, minus, number
from acw.storage.files import write_atomic

FILE = "report.html"
T = TypeVar("T")
# Heading -> a function that gives the data of a section, None if there is nothing to show.
Sections = Mapping[str, Callable[[T], dict[str, Any] | None]]


def write(folder: Path, template: str, title: str, sections: Sections[T], source: T, **values: Any) -> Path:
    """Writes the page as FILE into a folder and returns its path.

    A section's function is given `source`; the template's block of the function's name shows what it returns, under
    that name. values: further names for the template.
    """
    made = {heading: (section.__name__, section(source)) for heading, section in sections.items()}
    named = {heading: name for heading, (name, data) in made.items() if data is not None}
    script, style = (files("acw.report").joinpath(name).read_text("utf-8") for name in ("page.js", "page.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    asset = {"script": Markup(script), "style": Markup(style), "digest": digest}
    page = _environment().get_template(template)
    lacking = {name: heading for heading, name in named.items() if name not in page.blocks}
    assert not lacking, f"{template} has no block for these sections: {lacking}"
    text = page.render(title=title, headings=named, **asset, **dict(made.values()), **values)
    write_atomic(folder / FILE, text)
    return folder / FILE


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("acw.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "minus": minus, "interval": interval}
    return environment
