"""The page's style sheet."""

from __future__ import annotations

from typing import Final

__all__ = ["STYLE"]

STYLE: Final = """
:root {
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans",
    sans-serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  color-scheme: light dark;
  --ink: #1f2937; --soft: #6b7280; --line: #e5e7eb; --rule: #9ca3af; --page: #fff;
  --lede: #374151; --said: #4b5563;
  --warn: #b45309; --warn-page: #fffbeb; --bad-page: #fef3f2; --bad-line: #b42318;
  --good-page: #f2fbf6; --good-line: #067647; --mark: #92400e; --mark-page: #fef3c7;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --ink: #e5e7eb; --soft: #9ca3af; --line: #30363f; --rule: #6b7280; --page: #14171c;
    --lede: #d1d5db; --said: #b6bcc6;
    --warn: #f0a64b; --warn-page: #2b2213; --bad-page: #311a19; --bad-line: #f97066;
    --good-page: #10281d; --good-line: #3ccb8a; --mark: #fcd38a; --mark-page: #46320f;
    --label: #d1d5db; --grey: #9ca3af; --bad: #f97066; --paper: #14171c;
    --axis: #6b7280; --grid: #2a3038;
    --series-0: #4ba3e3; --series-1: #f2803a; --series-2: #2fc796; --series-3: #e39ac3;
    --series-4: #f0b429; --series-5: #8fd0f5; --series-6: #f3f4f6; --series-7: #c8a168;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 1080px; padding: 36px 40px 64px;
  font: 15px/1.55 var(--font); color: var(--ink); background: var(--page);
}
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 {
  font-size: 18px; margin: 44px 0 12px; padding-top: 14px; border-top: 1px solid var(--line);
}
h3 { font-size: 15px; margin: 30px 0 6px; }
p { margin: 0 0 10px; overflow-wrap: anywhere; }
.lede { font-size: 16px; color: var(--lede); max-width: 46em; }
.note, figcaption {
  color: var(--said); font-size: 14px; max-width: 62em; overflow-wrap: anywhere;
}
.banner {
  margin: 14px 0 0; padding: 10px 14px; border-left: 4px solid var(--warn);
  background: var(--warn-page);
  overflow-wrap: anywhere;
}
.banner.bad { border-color: var(--bad-line); background: var(--bad-page); }
.banner.good { border-color: var(--good-line); background: var(--good-page); }
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
table.figures tbody th[scope] { min-width: 9em; color: var(--lede); }
table.figures { min-width: min(100%, 560px); }
table.figures thead th:not(:empty):not(:first-child) { min-width: 5.5em; }
table.grouped tbody th[scope="rowgroup"] { font-weight: 600; width: 12em; color: var(--ink); }
table.grouped tbody { border-bottom: 1px solid var(--rule); }
thead th { font-weight: 600; border-bottom: 1.5px solid var(--rule); vertical-align: bottom; }
thead small { font-weight: 400; color: var(--soft); }
tr.group th { padding-top: 14px; font-weight: 600; }
table.facts { width: 100%; table-layout: fixed; }
table.facts th:first-child { width: 150px; color: var(--soft); }
table.facts td { vertical-align: top; padding-right: 22px; }
.code { font: 12.5px/1.5 var(--mono); }
.differs {
  font-size: 11px; color: var(--mark); background: var(--mark-page); padding: 0 5px;
  border-radius: 7px;
}
.scroll { overflow-x: auto; }
.scroll > table { margin-bottom: 8px; }
.swipe { display: none; }
footer { margin-top: 48px; color: var(--soft); font-size: 13px; }
@media (max-width: 860px) {
  body { padding: 24px 22px 40px; }
  table { font-size: 12px; }
  .code { font-size: 11px; }
  table.figures td, table.figures thead th:not(:first-child) { padding-left: 9px; }
  table.figures tbody th[scope] { min-width: 0; }
}
@media screen and (max-width: 700px) {
  body { padding: 18px 16px 32px; }
  h1 { font-size: 22px; }
  /* As large as they are drawn: shrunk to a phone, nobody could read them. */
  svg.plot { width: 1000px; }
  .swipe { display: block; margin: 6px 0 0; font-size: 12.5px; color: var(--soft); }
  table { font-size: 13px; }
  .code { font-size: 12px; }
  table.figures tbody th[scope], table.figures thead th:first-child { min-width: 7em; }
  table.figures thead th:not(:empty):not(:first-child) { min-width: 6.5em; }
  table.grouped tbody th[scope="rowgroup"] { min-width: 8em; width: auto; }
  table.figures td { white-space: nowrap; }
  table.figures tr.group th { position: sticky; left: 0; }
  table.facts th:first-child { width: 92px; padding-right: 8px; }
  table.facts td { min-width: 9em; padding-right: 10px; }
  table.facts:has(thead) { min-width: 560px; }
}
@media print {
  @page { size: A4; margin: 14mm; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  figure, tr, .grouped tbody, .banner { break-inside: avoid; }
  h2, h3, thead { break-after: avoid; }
  .banner, .differs { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
