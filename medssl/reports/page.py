"""What all pages share: templates, style, script, and images that lie inside the file."""

from __future__ import annotations

import base64
import hashlib
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
    text = files("medssl.reports").joinpath("templates", "page.js").read_text(encoding="utf-8")
    made.globals["script"] = Markup(text)  # noqa: S704  (our own file)
    # The page lets this one script run, and no other that might get into it.
    digest = hashlib.sha256(text.encode()).digest()
    made.globals["script_digest"] = f"sha256-{base64.b64encode(digest).decode()}"
    return made


def data_uri(image: bytes, kind: str = "png") -> str:
    """Return an image as an address that needs no other file."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
