"""The page of `phimr data report`, on the shell that all pages share (:mod:`phimr_nemo.report.page`)."""

from __future__ import annotations

from typing import Final

TEMPLATE: Final = """{% extends "page" %}
{% block title %}Data report{% endblock %}
{% block style %}
td.name { padding-right: 12px; overflow-wrap: anywhere; width: 40%; }
td.count { text-align: right; padding-left: 12px; white-space: nowrap; width: 1%;
  font-variant-numeric: tabular-nums; }
.track { background: transparent; height: 14px; }
.fill { height: 14px; border-radius: 3px; background: var(--drop); min-width: 1px; }
.kept .fill { background: var(--kept); }
.came .fill { background: var(--bar); }
.kept td, .came td { font-weight: 600; }
@media (max-width: 520px) { td.name { width: 46%; } }
{% endblock %}
{% block body %}
<h1>Data report</h1>
<div class="soft">{{ roots | join(", ") }}</div>
<div class="tiles">
{% for tile in tiles %}<div class="tile"><b>{{ tile.value }}</b><span class="soft">{{ tile.name }}</span></div>
{% endfor %}</div>
{% if pictures %}<h2>At a glance</h2>
<div class="pictures">
{% for picture in pictures %}<figure><figcaption>{{ picture.title }}</figcaption>
<img alt="{{ picture.title }}" src="data:image/png;base64,{{ picture.data }}"></figure>
{% endfor %}</div>{% endif %}
<h2>Step by step</h2>
{% for step in steps %}<section class="card">
<div class="head"><h3>{{ step.name }}</h3><span class="badge">{{ step.kind }}</span></div>
<div class="soft">{% if step.inputs %}from {{ step.inputs | join(", ") }}{% else %}first step{% endif %}</div>
<table>
{% for line in step.lines %}<tr class="{{ line.role }}"><td class="name">{{ line.name }}</td>
<td><div class="track"><div class="fill" style="width: {{ line.percent }}%"></div></div></td>
<td class="count">{{ line.count }}</td></tr>
{% endfor %}</table>
{% if step.facts %}<div class="soft facts">{{ step.facts | join(" · ") }}</div>{% endif %}
</section>
{% endfor %}
<footer class="soft">Counts are those of the manifests; a bar is a share of what came in. Lengths of responses whose
tokens are unknown are estimated from their characters. {{ versions }}</footer>
{% endblock %}
"""
