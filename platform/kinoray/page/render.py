"""Self-contained HTML pages: everything in one file, everything escaped, nothing loaded and nothing run but our own.

Names of videos and classes come from strangers: they reach a page only as escaped text or attribute values, control and
direction marks are spelled out, and the page's Content-Security-Policy allows its own style by hash and nothing else.
A site of several files (the report's) has its style and script beside it, and allows them by a nonce.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kinoray import __version__
from kinoray.console import many, visible

__all__ = ["asset", "render_page", "render_site_page"]

_NOTHING_ELSE = "base-uri 'none'; form-action 'none'"


def render_page(template: str, values: Mapping[str, object], *, styles: Sequence[str]) -> str:
    """A template of kinoray/page as one file.

    Args:
        template: its name; it extends page.html.j2.
        values: what it needs besides what `_render` gives it.
        styles: names of the style sheets, one after the other in the page's style element; page.css is the first.
    """
    style = asset(styles)
    digest = base64.b64encode(hashlib.sha256(style.encode("utf-8")).digest()).decode("ascii")
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; {_NOTHING_ELSE}"
    return _render(template, {**values, "policy": policy, "style": Markup(style)})  # our own files


def render_site_page(template: str, values: Mapping[str, object], *, nonce: str, media: Sequence[str] = ()) -> str:
    """A template of kinoray/page as the page of a site, whose style and scripts lie beside it.

    Args:
        nonce: what their elements carry; nobody whose text is on the page may foresee it.
        media: from where it may play videos, as a policy has it: `'self'`, `file:`, an origin.
    """
    plays = f" media-src {' '.join(media)};" if media else ""
    policy = (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src data:;{plays} "
        f"{_NOTHING_ELSE}; require-trusted-types-for 'script'; trusted-types kinoray"
    )
    return _render(template, {**values, "policy": policy, "nonce": nonce})


def asset(names: Sequence[str]) -> str:
    """Files of kinoray/page, one after the other."""
    loader = PackageLoader("kinoray", "page")
    environment = Environment(loader=loader, autoescape=True)
    return "".join(loader.get_source(environment, name)[0] for name in names)


def _render(template: str, values: Mapping[str, object]) -> str:
    """The template with the filters visible, many, percent and number, and with `version`."""
    environment = Environment(
        loader=PackageLoader("kinoray", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(visible=visible, many=many, percent=_percent, number=_number)
    return environment.get_template(template).render(**values, version=__version__)


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}%"


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"
