"""Pages in one file: a template of this package filled in, with nothing to load from anywhere else."""

from __future__ import annotations

import base64
import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmtune.record.runfolder import write_whole
from vlmtune.record.samples import thumbnail

if TYPE_CHECKING:
    from PIL import Image

THUMBNAIL_SIDE = 220
STYLE = Path(__file__).with_name("style.css")
"""The style that all pages share."""


def write(path: Path, template: Path, **values: Any) -> Path:
    """Write the page `path` from a template, which may include others of its folder and of this one."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # Answers and questions are anybody's text: everything is escaped.
    loader = FileSystemLoader([template.parent, Path(__file__).parent])
    options: dict[str, Any] = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    page = Environment(loader=loader, autoescape=True, **options).get_template(template.name).render(values)
    write_whole(path, page)
    return path


def source_hash(text: str) -> str:
    """How a page's Content-Security-Policy names the one script or style that it allows."""
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


def data_uri(image: Image.Image) -> str:
    """A small copy of an image, as the address of an `<img>`."""
    buffer = io.BytesIO()
    thumbnail(image, THUMBNAIL_SIDE).save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
