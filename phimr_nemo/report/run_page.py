"""The page of `phimr report`, on the shell that all pages share (:mod:`phimr_nemo.report.page`)."""

from __future__ import annotations

from typing import Final

TEMPLATE: Final = """{% extends "page" %}
{% block title %}{{ title }}{% endblock %}
{% block style %}
.pictures { grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); margin-bottom: 14px; }
.scroll { overflow-x: auto; }
th, .scroll td { padding: 5px 12px 5px 0; text-align: left; }
th { vertical-align: bottom; }
.scroll td { overflow-wrap: anywhere; min-width: 3.2em; }
.scroll td:first-child { min-width: 8em; }
th, .scroll td { border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); font-size: .82rem; }
.scroll td { font-variant-numeric: tabular-nums; }
.scroll td:first-child { font-weight: 600; }
tr:last-child td { border-bottom: 0; }
details { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 10px 14px;
  margin-bottom: 8px; }
summary { cursor: pointer; overflow-wrap: anywhere; }
pre { overflow-x: auto; font-size: .8rem; margin: 10px 0 2px; }
@media (max-width: 520px) { th, .scroll td { font-size: .8rem; padding-right: 9px; } }
{% endblock %}
{% macro shown(table) %}<section class="card"><h3>{{ table.title }}</h3>
<div class="scroll"><table><thead><tr>{% for cell in table.header %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% if table.note %}<div class="soft facts">{{ table.note }}</div>{% endif %}
</section>
{% endmacro %}
{% block body %}
<h1>{{ title }}</h1>
<div class="soft">{{ roots | join(", ") }}</div>
<div class="tiles">
{% for tile in tiles %}<div class="tile"><b>{{ tile.value }}</b><span class="soft">{{ tile.name }}</span></div>
{% endfor %}</div>
{% for section in sections %}<h2>{{ section.title }}</h2>
{% if section.pictures %}<div class="pictures">
{% for picture in section.pictures %}<figure><figcaption>{{ picture.title }}</figcaption>
<img alt="{{ picture.title }}" src="data:image/png;base64,{{ picture.data }}"></figure>
{% endfor %}</div>{% endif %}
{% for table in section.tables %}{{ shown(table) }}{% endfor %}
{% endfor %}
{% if configs %}<h2>Configurations</h2>
{% for config in configs %}<details><summary>{{ config.name }} <span class="badge">{{ config.stage }}</span></summary>
<pre>{{ config.text }}</pre></details>
{% endfor %}{% endif %}
<footer class="soft">{{ versions }}</footer>
{% endblock %}
"""
