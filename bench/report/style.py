"""The style of a report: light and dark, from the width of a phone on."""

from __future__ import annotations

__all__ = ["STYLE"]

STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --ink: #1d2126; --soft: #565e68;
  --grid: #e1e4e8; --axis: #7d858f; --card: #f3f5f7; --none: #878e98; --eplb: #c84f00;
  --lp: #0067ab; --work: #ccd4dc; --tokens: #b5539a; --copies: #a88400; --limit: #cdd4db;
  --link: #005a96 }
@media (prefers-color-scheme: dark) { :root { --ground: #14171b; --ink: #e9ecef; --soft: #a9b1bb;
  --grid: #2d333a; --axis: #7b848e; --card: #1f242a; --none: #8f98a3; --eplb: #ff8f45;
  --lp: #58b4f2; --work: #47505a; --tokens: #dd8fc6; --copies: #e0bf4a; --limit: #3b434c;
  --link: #7cc4f5 } }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; margin: 0;
  background: var(--ground); color: var(--ink); overflow-wrap: anywhere }
.page { max-width: 760px; margin: 0 auto; padding: 16px }
a { color: var(--link) }
h1 { font-size: 1.55rem; line-height: 1.25; margin: .3rem 0 .6rem }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .5rem; padding-top: 1rem;
  border-top: 1px solid var(--grid) }
h3 { font-size: 1rem; margin: 0 0 .3rem }
p, ul, ol { margin: .5rem 0 } ul, ol { padding-left: 1.3rem }
.source, .note, figcaption { color: var(--soft); font-size: .9rem }
.source { margin: 0 }
.number { font-size: 3.2rem; line-height: 1.1; font-weight: 700; color: var(--lp);
  margin: .6rem 0 0 }
.answers { display: grid; gap: 12px; margin: 1.2rem 0 }
.answers > div { background: var(--card); border-left: 4px solid var(--lp); padding: 12px 14px }
.answers h2 { border: 0; margin: 0; padding: 0; font-size: 1rem }
figure { margin: 1.2rem 0 } figcaption { margin-bottom: .5rem }
figcaption b { display: block; color: var(--ink); font-size: 1rem }
svg { display: block; width: 100%; height: auto }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", sans-serif; fill: var(--ink) }
svg text.soft { fill: var(--soft) } svg text.strong { font-weight: 600 }
svg text.halo { paint-order: stroke; stroke: var(--ground); stroke-width: 4px }
svg image { image-rendering: pixelated }
.ground { fill: var(--ground) } .border { fill: none; stroke: var(--axis) }
.grid { stroke: var(--grid); fill: none } .axis { stroke: var(--axis); fill: none }
.level { stroke: var(--ink); stroke-width: 1.5; fill: none }
.cut { stroke: var(--axis); stroke-dasharray: 2 3; fill: none }
.mark { stroke: var(--ink); stroke-width: 2.5; fill: none }
.line { fill: none; stroke-linejoin: round }
.line.none, .line.size0 { stroke: var(--none) } .line.eplb, .line.size1 { stroke: var(--eplb) }
.line.lp, .line.size2 { stroke: var(--lp) } .line.size3 { stroke: var(--tokens) }
.ring { fill: var(--ground); stroke-width: 2 } .ring.none { stroke: var(--none) }
.fill.none { fill: var(--none) } .fill.eplb { fill: var(--eplb) } .fill.lp { fill: var(--lp) }
.fill.work { fill: var(--work); stroke: var(--axis) } .fill.limit { fill: var(--limit) }
.fill.copies { fill: var(--copies) } .fill.solver { fill: var(--none) }
.fill.tokens { fill: var(--tokens) }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; list-style: none; padding: 0;
  margin: .4rem 0 0; font-size: .85rem }
.legend li { display: flex; align-items: center; gap: 6px }
.swatch { width: 28px; height: 12px; flex: none }
.narrow { display: none } .pairs figure { margin: 0 }
.pairs { display: grid; grid-template-columns: 1fr 1fr; gap: 14px 24px }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums;
  margin: .6rem 0; overflow-wrap: normal }
th, td { padding: .25rem .6rem .25rem 0; text-align: right; vertical-align: top }
th { vertical-align: bottom; color: var(--soft); font-weight: 600;
  border-bottom: 1px solid var(--axis) }
th:first-child, td:first-child { text-align: left }
nav ul { columns: 2; padding-left: 1.1rem } dt { font-weight: 600 } dd { margin: 0 0 .5rem 0 }
code { font-size: .9em }
@media (max-width: 719px) {
  .wide { display: none } .narrow { display: block } .pairs { grid-template-columns: 1fr }
  .number { font-size: 2.6rem } h1 { font-size: 1.3rem } nav ul { columns: 1 }
  th, td { padding-right: .25rem } table { font-size: .68rem } }
@media (min-width: 1180px) {
  .page { max-width: 1022px; display: grid; grid-template-columns: 210px 740px; gap: 0 40px }
  header, main { grid-column: 2 }
  nav { grid-column: 1; grid-row: 1 / span 2; position: sticky; top: 16px; align-self: start;
    font-size: .9rem }
  nav h2 { border: 0; margin: 0; padding: 0 } nav ul { columns: 1 } }
@media print { nav { display: none } }
"""
