"""The page of `phimr data report`: one HTML file without anything from elsewhere, for a phone and for a laptop."""

from __future__ import annotations

from typing import Final

TEMPLATE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Data report</title>
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
.tile b { display: block; font-size: 1.45rem; font-variant-numeric: tabular-nums; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 14px; }
figure { margin: 0; padding: 12px 14px; }
figcaption { font-weight: 600; margin-bottom: 8px; overflow-wrap: anywhere; }
figure img { width: 100%; height: auto; display: block; }
.card { padding: 14px 16px; margin-bottom: 14px; }
.head { display: flex; flex-wrap: wrap; gap: 4px 12px; align-items: baseline; justify-content: space-between; }
.badge { background: #eef2f7; border-radius: 99px; padding: 1px 10px; font-size: .8rem; color: var(--soft); }
table { border-collapse: collapse; width: 100%; margin-top: 10px; font-size: .9rem; }
td { padding: 3px 0; vertical-align: middle; }
td.name { padding-right: 12px; overflow-wrap: anywhere; width: 40%; }
td.count { text-align: right; padding-left: 12px; white-space: nowrap; width: 1%;
  font-variant-numeric: tabular-nums; }
.track { background: transparent; height: 14px; }
.fill { height: 14px; border-radius: 3px; background: var(--drop); min-width: 1px; }
.kept .fill { background: var(--kept); }
.came .fill { background: var(--bar); }
.kept td, .came td { font-weight: 600; }
.facts { margin-top: 8px; }
footer { margin-top: 36px; }
@media (max-width: 520px) { main { padding: 12px 10px 32px; } td.name { width: 46%; } .card { padding: 12px; } }
</style>
</head>
<body>
<main>
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
</main>
</body>
</html>
"""
