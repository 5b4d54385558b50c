"""The report's style sheet: system fonts, light and dark, narrow screens, paper."""

STYLE = """
:root {
  --ink: #1d2329; --soft: #5a6570; --line: #dde2e7; --paper: #fbfbfa; --card: #fff;
  --link: #0b62a4; --code: #f1f3f5;
  --holds: #00664a; --holds-bg: #dcf3ea; --corrected: #7a5200; --corrected-bg: #fdefcf;
  --refuted: #a03c00; --refuted-bg: #fbe2d5; --not-run: #4f5963; --not-run-bg: #e9ecef;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e4e8ec; --soft: #a0abb6; --line: #343c44; --paper: #14181c; --card: #1c2126;
    --link: #7cc0f5; --code: #242b32;
    --holds: #7fe0bd; --holds-bg: #0d3a2d; --corrected: #f5ce7a; --corrected-bg: #41300a;
    --refuted: #ffb08a; --refuted-bg: #4a210c; --not-run: #b7c0c9; --not-run-bg: #2c343b;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 2.5rem clamp(1rem, 4vw, 3rem); max-width: 100rem;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  color: var(--ink); background: var(--paper);
}
h1 { font-size: 2.1rem; line-height: 1.15; letter-spacing: -.02em; margin: 0 0 .5rem; }
h2 { font-size: 1.35rem; margin: 3rem 0 1rem; }
h3 { font-size: 1.15rem; margin: 0 0 .25rem; }
a { color: var(--link); text-underline-offset: .15em; overflow-wrap: break-word; }
code, pre { font: .88em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { background: var(--code); border-radius: 6px; padding: .7rem .9rem; overflow-x: auto; }
.lede { font-size: 1.1rem; max-width: 42rem; margin: 0 0 .5rem; }
.meta, .small, footer { color: var(--soft); font-size: .85rem; }
.summary { display: flex; flex-wrap: wrap; gap: .6rem; list-style: none; padding: 0;
  margin: 1.5rem 0 0; }
.summary li { padding: .55rem 1rem; border: 1px solid var(--line); border-radius: 8px;
  background: var(--card); }
.summary b { font-size: 1.35rem; margin-right: .2rem; font-variant-numeric: tabular-nums; }
.summary .holds, .badge.holds { color: var(--holds); background: var(--holds-bg); }
.summary .corrected, .badge.corrected { color: var(--corrected); background: var(--corrected-bg); }
.summary .refuted, .badge.refuted { color: var(--refuted); background: var(--refuted-bg); }
.summary .not-run, .badge.not-run { color: var(--not-run); background: var(--not-run-bg); }
.badge, .tag { display: inline-block; white-space: nowrap; border-radius: 1rem;
  padding: .05rem .65rem; font-size: .85rem; font-weight: 600; }
.tag { color: var(--corrected); border: 1px dashed currentColor; font-size: .75rem; }
.demo { max-width: 48rem; border-left: 4px solid var(--corrected); padding: .5rem 1rem;
  background: var(--corrected-bg); border-radius: 0 6px 6px 0; }
.scroll { overflow: auto; border: 1px solid var(--line); border-radius: 8px;
  background: var(--card); }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .6rem .8rem;
  border-bottom: 1px solid var(--line); }
tbody tr:last-child > * { border-bottom: 0; }
thead th { position: sticky; top: 0; z-index: 1; background: var(--card); white-space: nowrap;
  box-shadow: inset 0 -1px var(--line); color: var(--soft); font-weight: 600; }
.what { min-width: 16rem; max-width: 26rem; }
.what code { color: var(--soft); }
.value { min-width: 8rem; max-width: 24rem; overflow-wrap: break-word;
  font-variant-numeric: tabular-nums; }
.value:has(dl) { min-width: 18rem; }
.num { text-align: right; font-variant-numeric: tabular-nums; }
dl { display: grid; grid-template-columns: minmax(6rem, 1fr) fit-content(11rem); gap: .1rem .8rem;
  margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: normal; }
.value details { margin-top: .2rem; } .value summary { font-weight: 400; color: var(--soft); }
.none { color: var(--soft); }
.config { width: auto; } .config th { font-weight: 400; }
.config th, .config td { padding: .25rem .8rem; }
.links { columns: 14rem; padding-left: 1.1rem; margin: 0; }
.experiment { margin: 2rem 0; padding-top: 1.75rem; border-top: 1px solid var(--line); }
.question { font-size: 1.05rem; max-width: 44rem; margin: 0 0 .35rem; }
figure { margin: 1.5rem 0; max-width: 60rem; }
.card { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 1rem; }
.card img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { color: var(--soft); font-size: .92rem; max-width: 46rem; margin-top: .5rem; }
summary { cursor: pointer; font-weight: 600; font-size: .92rem; }
tr:target, figure:target .card { outline: 2px solid var(--link); outline-offset: -1px; }
footer { margin-top: 4rem; border-top: 1px solid var(--line); padding-top: 1rem; }
@media screen and (max-width: 100rem) {
  .claims thead { display: none; }
  .claims tr { display: grid;
    grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr));
    gap: .2rem 1rem; padding: .6rem 0; border-bottom: 1px solid var(--line); }
  .claims td { border: 0; padding: .3rem .8rem; min-width: 0; max-width: none; text-align: left; }
  .claims .value:has(dl) { min-width: 0; }
  .claims td:nth-child(n + 3)::before { content: attr(data-head); display: block;
    color: var(--soft); font-weight: 600; font-size: .8rem; }
}
@media (max-width: 40rem) {
  body { padding: 1.25rem 1rem; font-size: 15px; } h1 { font-size: 1.7rem; }
  .what { min-width: 14rem; }
}
@media print {
  :root { --ink: #000; --soft: #444; --line: #bbb; --paper: #fff; --card: #fff; --link: #000;
    --code: #f4f4f4; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  .scroll { overflow: visible; border: 0; }
  .what, .value { min-width: 0; }
  thead th { position: static; } nav { display: none; }
  figure, tr { break-inside: avoid; } .experiment { break-before: page; }
  .badge, .summary li { border: 1px solid #777; }
}
"""
