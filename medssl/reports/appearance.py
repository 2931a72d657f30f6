"""The page by day and by night: one set of colours each, for text, tables and figures alike.

A figure is drawn once, in the light colours; on the page they become CSS variables, so that it
follows the page from light to dark.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.resources import files

from markupsafe import Markup, escape


@dataclass(frozen=True)
class Theme:
    """Colours of one appearance of the page.

    Text (ink, faint, better, worse) keeps WCAG's contrast of 4.5 to page and wash, curves and
    marks one of 3 to the page. Those of inits come from Okabe and Ito, darkened or lightened for
    that.
    """

    page: str
    ink: str
    faint: str
    line: str
    wash: str
    grid: str
    better: str
    worse: str
    loud: str
    loud_ink: str
    baseline: str
    inits: tuple[str, ...]

    @property
    def reference(self) -> str:
        """The colour of the init that others are compared with."""
        return self.ink

    def variables(self) -> dict[str, str]:
        """Return the colours by the names that they have in style sheets."""
        named = {
            name: getattr(self, name)
            for name in ("page", "ink", "faint", "line", "wash", "grid", "better", "worse", "loud",
                         "loud_ink", "baseline")
        }  # fmt: skip
        inits = {f"init-{number}": colour for number, colour in enumerate(self.inits)}
        return {f"--{name.replace('_', '-')}": value for name, value in (named | inits).items()}


LIGHT = Theme(
    page="#ffffff", ink="#1c2126", faint="#5b656e", line="#d9dde0", wash="#f4f6f7", grid="#e3e6e8",
    better="#00694d", worse="#a13d00", loud="#ffd500", loud_ink="#1c1600", baseline="#838b93",
    inits=("#d55e00", "#0072b2", "#009270", "#aa4499", "#a67c00", "#2b95c9"),
)  # fmt: skip
DARK = Theme(
    page="#171b1f", ink="#e8eaec", faint="#a3adb6", line="#363e45", wash="#1f252a", grid="#2c3338",
    better="#3fd0a4", worse="#ff9e5e", loud="#ffd500", loud_ink="#1c1600", baseline="#8a929a",
    inits=("#ff9e5e", "#6cb8f0", "#3fd0a5", "#e29bd0", "#f0c75e", "#9fd8ff"),
)  # fmt: skip
PRINTED = Theme(
    page="#ffffff", ink="#000000", faint="#444444", line="#bbbbbb", wash="#f4f4f4", grid="#e3e6e8",
    better="#00694d", worse="#a13d00", loud="#ffd500", loud_ink="#1c1600", baseline="#838b93",
    inits=LIGHT.inits,
)  # fmt: skip

_FONTS = "'DejaVu Sans', Verdana, Arial, Helvetica, sans-serif"
_COLOUR = re.compile(r"(?<=: )#[0-9a-f]{6}\b")
_FONT = re.compile(r"font-family: [^;\"]*")
_NAME = re.compile(r"(?<= id=\")[^\"]+(?=\")")


def style(*names: str) -> Markup:
    """Return the colours of both appearances and of paper, then the style sheets of these names."""
    folder = files("medssl.reports").joinpath("templates")
    sheets = [folder.joinpath(name).read_text(encoding="utf-8") for name in names]
    dark, printed = _block(DARK), _block(PRINTED)
    colours = (
        f":root {{ color-scheme: light; {_block(LIGHT)} }}\n"
        f'@media (prefers-color-scheme: dark) {{ :root:not([data-theme="light"]) '
        f"{{ color-scheme: dark; {dark} }} }}\n"
        f':root[data-theme="dark"] {{ color-scheme: dark; {dark} }}\n'
        # As specific as the rules above, and after them: paper is light, whatever was chosen.
        f"@media print {{ :root:root {{ color-scheme: light; {printed} }} }}\n"
    )
    return Markup("".join([colours, *sheets]))  # noqa: S704  (our own files)


def as_file(drawn: str) -> str:
    """Return a drawing of matplotlib's as an SVG file for other programs."""
    return _FONT.sub(f"font-family: {_FONTS}", drawn)


def on_page(drawn: str, name: str, alt: str) -> Markup:
    """Return a drawing of matplotlib's as a part of a page, whose colours and font it takes.

    Args:
        drawn: the SVG file, in colours of `LIGHT` alone.
        name: the figure's; no other figure of the page may have it.
        alt: the content in words.

    Raises:
        ValueError: a colour is none of the theme's, and would not follow it.
    """
    variables = {colour: name for name, colour in reversed(LIGHT.variables().items())}
    body = drawn[drawn.index("<svg") :]
    opening, _, body = body.partition(">")
    box = re.search(r'viewBox="[^"]*"', opening)
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    # Groups are called alike in every figure; what is referred to gets the figure's name.
    body = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", body)
    body = _NAME.sub(lambda found: f"{name}-{found[0]}", body)
    body = re.sub(r'(?<=href="#)|(?<=url\(#)', f"{name}-", body)
    body = re.sub(r"font-family: [^;\"]*(; )?", "", body)

    def themed(found: re.Match[str]) -> str:
        if found[0] not in variables:
            raise ValueError(f"figure {name}: {found[0]} is no colour of the theme")
        return f"var({variables[found[0]]})"

    body = _COLOUR.sub(themed, body)
    body = re.sub(r"\s*\n\s*", " ", body)
    head = (
        f'<svg class="drawn" role="img" {box[0] if box else ""} '
        'xmlns:xlink="http://www.w3.org/1999/xlink" '
    )
    return Markup(f'{head}aria-label="{escape(alt)}">{body}')  # noqa: S704  (matplotlib escapes)


def _block(theme: Theme) -> str:
    return " ".join(f"{name}: {value};" for name, value in theme.variables().items())
