"""How every page looks: a column of cards, in the reader's light or dark, readable on a phone."""

STYLE = """
:root { --paper: #ffffff; --card: #f5f6f8; --ink: #1c2128; --soft: #57606a; --rule: #d0d7de;
  --c0: #0b5cad; --c1: #b84a00; --c2: #1a7f37; --c3: #8250df; --c4: #a40e5b; --c5: #5b5f00;
  --good: #116329; --bad: #a40e26; --warn: #7d4e00; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #12161c; --card: #1c222b; --ink: #e6edf3; --soft: #9da7b3; --rule: #39424e;
    --c0: #6cb6ff; --c1: #f69d50; --c2: #6bc46d; --c3: #b99bff; --c4: #ff80c0; --c5: #c9c94a;
    --good: #6bc46d; --bad: #ff8b8b; --warn: #e5b567; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 20px 16px 60px; }
h1 { margin: 0; font-size: 1.8rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 36px 0 12px; font-size: 1.2rem; border-bottom: 1px solid var(--rule); padding-bottom: 4px; }
.over { margin: 0; color: var(--soft); }
.state { display: inline-block; font-size: 0.9rem; font-weight: 600; border: 2px solid; border-radius: 999px;
  padding: 1px 12px; vertical-align: middle; color: var(--warn); }
.state.finished { color: var(--good); } .state.not-a-number, .state.crashed, .state.killed { color: var(--bad); }
.message { border-left: 4px solid var(--warn); padding: 8px 12px; background: var(--card); overflow-wrap: anywhere; }
.message.finished { border-color: var(--good); } .message.not-a-number, .message.crashed { border-color: var(--bad); }
dl { display: flex; flex-wrap: wrap; gap: 10px 28px; margin: 16px 0 0; }
dt { color: var(--soft); font-size: 0.85rem; } dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr)); gap: 16px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(250px, 100%), 1fr)); gap: 16px; }
figure, article { margin: 0; padding: 12px; background: var(--card); border-radius: 10px; min-width: 0; }
figcaption { font-weight: 600; margin-bottom: 6px; }
figure > svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 12px; } svg .grid { stroke: var(--rule); stroke-width: 1; }
svg polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg :is(polyline, line).dashed { stroke-dasharray: 5 4; }
.swatch line { stroke-width: 3; } .swatch { width: 24px; height: 8px; margin-right: 6px; }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); }
.c3 { stroke: var(--c3); } .c4 { stroke: var(--c4); } .c5 { stroke: var(--c5); }
circle { fill: var(--card); stroke-width: 2; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 6px 0 0; padding: 0;
  font-size: 0.85rem; }
article img { display: block; width: 100%; height: auto; border-radius: 6px; }
article dl { flex-direction: column; gap: 8px; margin-top: 8px; } article dd { font-weight: 400; }
.question { font-weight: 600; margin: 8px 0 0; overflow-wrap: anywhere; }
.as { color: var(--good); } .otherwise { color: var(--bad); }
.where { color: var(--soft); font-size: 0.85rem; margin: 8px 0 0; overflow-wrap: anywhere; }
details { margin-top: 8px; } summary { cursor: pointer; } details ul { padding-left: 20px; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; }
th, td { text-align: left; padding: 5px 18px 5px 0; border-bottom: 1px solid var(--rule); font-weight: 400; }
td { font-variant-numeric: tabular-nums; vertical-align: top; }
.starts td:not(:last-child) { white-space: nowrap; } .starts td:last-child { min-width: 16rem; }
thead th { color: var(--soft); font-size: 0.85rem; white-space: nowrap; }
pre { background: var(--card); padding: 12px; border-radius: 10px; overflow-x: auto; font-size: 0.85rem; }
"""
