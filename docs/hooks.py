"""Hooks for mkdocs: the docstrings write types in the form of transformers, which shows its marks in the reference."""

import re
from typing import Any


def on_page_content(html: str, page: Any, **kwargs: Any) -> str:
    """Take backticks, stars and brackets out of the types on the reference page."""
    if page.file.src_uri != "reference.md":
        return html
    html = re.sub(r"\[<code>(\w+)</code>\]", r"<code>\1</code>", html)
    html = re.sub(r"\[`(\w+)`\]", r"\1", html)
    return html.replace("`", "").replace("*optional*", "optional")
