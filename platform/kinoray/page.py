"""Self-contained HTML pages: everything in one file, everything escaped, nothing loaded and nothing run but our own.

Names of videos and classes come from strangers: they reach a page only as escaped text or attribute values, control and
direction marks are spelled out, and the page's Content-Security-Policy allows its own script and style by hash and
nothing else.
"""

import base64
import hashlib

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kinoray import __version__
from kinoray.console import visible

__all__ = ["render_page"]


def render_page(template: str, values: dict[str, object], *, styles: tuple[str, ...], script: str = "") -> str:
    """A template of kinoray/templates as one file.

    Args:
        template: its name; it has the filters visible, percent and number, and `policy`, `style`, `script`, `version`.
        styles: names of the style sheets, one after the other in the page's style element.
        script: name of the script; none for "".
    """
    environment = Environment(
        loader=PackageLoader("kinoray", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(visible=visible, percent=_percent, number=_number)
    style = "".join(_source(environment, name) for name in styles)
    code = _source(environment, script) if script else ""
    allowed = f"script-src '{_sha256(code)}'; " if code else ""
    return environment.get_template(template).render(
        **values,
        version=__version__,
        policy=f"default-src 'none'; img-src data:; style-src '{_sha256(style)}'; {allowed}"
        "base-uri 'none'; form-action 'none'",
        style=Markup(style),  # our own files
        script=Markup(code),
    )


def _source(environment: Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _sha256(text: str) -> str:
    """The source expression that allows exactly this inline script or style."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}"


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}%"


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"
