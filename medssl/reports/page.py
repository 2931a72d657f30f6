"""What all pages share: templates, style, and images that lie inside the file."""

from __future__ import annotations

import base64
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def environment() -> Environment:
    """Return the templates, with all text escaped."""
    made = Environment(
        loader=PackageLoader("medssl.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["data_uri"] = data_uri
    return made


def style(*names: str) -> Markup:
    """Return the style sheets of these names, one after the other."""
    folder = files("medssl.reports").joinpath("templates")
    sheets = [folder.joinpath(name).read_text(encoding="utf-8") for name in names]
    return Markup("".join(sheets))  # noqa: S704  (our own files)


def data_uri(image: bytes, kind: str = "png") -> str:
    """Return an image as an address that needs no other file."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
