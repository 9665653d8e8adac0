"""The page's style sheet."""

from __future__ import annotations

from typing import Final

__all__ = ["STYLE"]

STYLE: Final = """
:root {
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans",
    sans-serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  --ink: #1f2937; --soft: #6b7280; --line: #e5e7eb;
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 1080px; padding: 36px 40px 64px;
  font: 15px/1.55 var(--font); color: var(--ink); background: #fff;
}
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 {
  font-size: 18px; margin: 44px 0 12px; padding-top: 14px; border-top: 1px solid var(--line);
}
h3 { font-size: 15px; margin: 30px 0 6px; }
p { margin: 0 0 10px; overflow-wrap: anywhere; }
.lede { font-size: 16px; color: #374151; max-width: 46em; }
.note, figcaption { color: #4b5563; font-size: 14px; max-width: 62em; overflow-wrap: anywhere; }
.banner {
  margin: 14px 0 0; padding: 10px 14px; border-left: 4px solid #b45309; background: #fffbeb;
  overflow-wrap: anywhere;
}
.banner.bad { border-color: #b42318; background: #fef3f2; }
.banner.good { border-color: #067647; background: #f2fbf6; }
.banner strong { margin-right: .4em; }
figure { margin: 26px 0 34px; }
figure h3 { margin: 0 0 8px; }
figcaption { margin-top: 8px; }
svg.plot { display: block; width: 100%; height: auto; }
svg.plot text { font-family: var(--font) !important; }
table { border-collapse: collapse; margin: 10px 0 22px; font-size: 13.5px; line-height: 1.4; }
th { font-weight: 500; text-align: left; vertical-align: top; }
th, td {
  padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); overflow-wrap: anywhere;
}
table.figures td, table.figures thead th:not(:first-child) {
  text-align: right; font-variant-numeric: tabular-nums; padding: 4px 0 4px 18px;
}
table.figures tbody th[scope] { min-width: 9em; color: #374151; }
table.figures { min-width: min(100%, 560px); }
table.figures thead th:not(:empty):not(:first-child) { min-width: 5.5em; }
table.grouped tbody th[scope="rowgroup"] { font-weight: 600; width: 12em; color: var(--ink); }
table.grouped tbody { border-bottom: 1px solid #9ca3af; }
thead th { font-weight: 600; border-bottom: 1.5px solid #9ca3af; vertical-align: bottom; }
thead small { font-weight: 400; color: var(--soft); }
tr.group th { padding-top: 14px; font-weight: 600; }
table.facts { width: 100%; table-layout: fixed; }
table.facts th:first-child { width: 150px; color: var(--soft); }
table.facts td { vertical-align: top; padding-right: 22px; }
.code { font: 12.5px/1.5 var(--mono); }
.differs {
  font-size: 11px; color: #92400e; background: #fef3c7; padding: 0 5px; border-radius: 7px;
}
footer { margin-top: 48px; color: var(--soft); font-size: 13px; }
@media (max-width: 860px) {
  body { padding: 24px 22px 40px; }
  table { font-size: 12px; }
  .code { font-size: 11px; }
  table.figures td, table.figures thead th:not(:first-child) { padding-left: 9px; }
  table.figures tbody th[scope] { min-width: 0; }
}
@media print {
  @page { size: A4; margin: 14mm; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  figure, tr, .grouped tbody, .banner { break-inside: avoid; }
  h2, h3, thead { break-after: avoid; }
  .banner, .differs { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
