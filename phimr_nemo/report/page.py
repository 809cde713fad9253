"""How every HTML page of this project looks: one file without anything from elsewhere, for a phone and for a laptop.

Templates extend "page" and fill its blocks `title`, `style` and `body`; every value in them is escaped, and the page
itself forbids whatever is not a picture or a style of its own; a page with a script names it in its `policy`.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any, Final

PAGE: Final = "page"
_SHELL: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
content="default-src 'none'; img-src data:; style-src 'unsafe-inline'{% block policy %}{% endblock %}">
{% block head %}{% endblock %}
<title>{% block title %}{% endblock %}</title>
<style>
:root { --ink: #2b2b2b; --soft: #6b7280; --line: #e5e7eb; --card: #ffffff; --page: #f6f7f9; --bar: #4c78a8;
  --drop: #d9dee6; --kept: #54a24b; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.45;
  font: 16px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 20px 16px 48px; }
h1 { font-size: 1.6rem; margin: 8px 0 2px; }
h2 { font-size: 1.15rem; margin: 32px 0 12px; }
h3 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
.soft { color: var(--soft); font-size: .875rem; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 16px; }
.tile, .card, figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 12px 14px; }
.tile b { display: block; font-size: 1.45rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 14px; }
figure { margin: 0; padding: 12px 14px; }
figcaption { font-weight: 600; margin-bottom: 8px; overflow-wrap: anywhere; }
figure img { width: 100%; height: auto; display: block; }
.card { padding: 14px 16px; margin-bottom: 14px; }
.head { display: flex; flex-wrap: wrap; gap: 4px 12px; align-items: baseline; justify-content: space-between; }
.badge { background: #eef2f7; border-radius: 99px; padding: 1px 10px; font-size: .8rem; color: var(--soft); }
table { border-collapse: collapse; width: 100%; margin-top: 10px; font-size: .9rem; }
td { padding: 3px 0; vertical-align: middle; }
.facts { margin-top: 8px; }
footer { margin-top: 36px; }
@media (max-width: 520px) { main { padding: 12px 10px 32px; } .card { padding: 12px; } }
{% block style %}{% endblock %}
</style>
</head>
<body>
<main>
{% block body %}{% endblock %}
</main>
{% block script %}{% endblock %}
</body>
</html>
"""


def render(template: str, **values: Any) -> str:
    """A page from a template that extends `page`; every value in it is escaped."""
    from jinja2 import DictLoader, Environment, StrictUndefined

    environment = Environment(
        autoescape=True, trim_blocks=True, undefined=StrictUndefined, loader=DictLoader({PAGE: _SHELL})
    )
    return environment.from_string(template).render(**values)


def embedded_png(path: Path) -> str:
    """A PNG as the data that stands in a page behind `data:image/png;base64,`."""
    return base64.b64encode(path.read_bytes()).decode("ascii")
