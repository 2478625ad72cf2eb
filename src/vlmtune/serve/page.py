"""The page as one HTML file, and what it may do."""

from __future__ import annotations

import functools
from pathlib import Path

from vlmtune.record.pages import STYLE, source_hash

HERE = Path(__file__).parent


@functools.cache
def page() -> str:
    """The page with its style and its script, which are the same for all models."""
    style, script = _sources()
    html = (HERE / "page.html").read_text("utf-8")
    return html.replace("/* style */", style).replace("/* script */", script)


@functools.cache
def policy() -> str:
    """The Content-Security-Policy: this one script and style, images and answers of this server, and nothing else."""
    style, script = map(source_hash, _sources())
    allowed = {
        "default-src": "'none'",
        "script-src": script,
        "style-src": style,
        "img-src": "'self' data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in allowed.items())


def _sources() -> tuple[str, str]:
    style = STYLE.read_text("utf-8") + (HERE / "page.css").read_text("utf-8")
    return style, (HERE / "page.js").read_text("utf-8")
