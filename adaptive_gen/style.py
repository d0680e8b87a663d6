"""The report page's style: light and dark, readable when printed."""

STYLE = """
:root{--ink:#1b1f24;--soft:#59636e;--paper:#fff;--panel:#f5f7f9;--rule:#d9dee3;
--a:#0969da;--b:#bc4c00;--c:#1a7f37;--d:#cf222e;--e:#8250df;--f:#9a6700}
@media (prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9198a1;--paper:#0d1117;
--panel:#161b22;--rule:#30363d;--a:#58a6ff;--b:#f0883e;--c:#3fb950;--d:#ff7b72;--e:#bc8cff;
--f:#d29922}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
main{max-width:1120px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:2rem;line-height:1.2;margin:0 0 .5rem}h2{font-size:1.15rem;margin:0 0 .25rem}
p{margin:.25rem 0 .75rem;max-width:46rem}.lead{font-size:1.1rem}section>p{color:var(--soft)}
section{margin-top:36px}section>svg{max-width:760px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:14px;margin:22px 0}
.card{background:var(--panel);border:1px solid var(--rule);border-radius:10px;padding:14px 16px}
.card b{display:block;font-size:1.9rem;line-height:1.2}.card span{display:block}
.card small,.card i{color:var(--soft)}.card i{font-style:normal;font-size:.85rem}
.note{background:var(--panel);border-left:4px solid var(--f);padding:10px 14px;max-width:none}
.note.good{border-color:var(--c)}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:0 36px}
svg{width:100%;height:auto;display:block}
.grid{stroke:var(--rule)}.tick,.label{fill:var(--soft);font-size:12px}.label{font-size:13px}
.line{fill:none;stroke-width:2.2}.thin{stroke-width:1.4}
.line.a{stroke:var(--a)}.line.b{stroke:var(--b)}.line.c{stroke:var(--c)}.line.d{stroke:var(--d)}
.line.e{stroke:var(--e)}.line.f{stroke:var(--f)}
.line.ideal{stroke:var(--soft);stroke-width:1.3;stroke-dasharray:5 5}
.line.over{stroke-dasharray:7 7}
.dot.a,.bar.a{fill:var(--a)}.dot.b{fill:var(--b)}.dot.c{fill:var(--c)}.dot.d{fill:var(--d)}
.dot.e{fill:var(--e)}.dot.f{fill:var(--f)}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;color:var(--soft);font-size:.85rem}
.key{display:inline-block;width:11px;height:11px;border-radius:6px;margin-right:6px}
.key.a{background:var(--a)}.key.b{background:var(--b)}.key.c{background:var(--c)}
.key.d{background:var(--d)}.key.e{background:var(--e)}.key.f{background:var(--f)}
.key.ideal{background:var(--soft);height:3px;vertical-align:middle}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;width:100%}
th,td{border-bottom:1px solid var(--rule);padding:6px 10px;text-align:left;vertical-align:top}
th{color:var(--soft);font-weight:600}.chosen td{font-weight:700;background:var(--panel)}
.texts td{white-space:pre-wrap;width:38%}.texts td:first-child{width:24%;color:var(--soft)}
@media (max-width:680px){.texts tr,.texts td{display:block;width:auto!important;border:0}
.texts tr{border-bottom:1px solid var(--rule)}.texts th{display:none}
.texts td::before{content:attr(data-of);display:block;color:var(--soft);font-size:.8rem}}
mark{background:color-mix(in srgb,var(--b) 22%,transparent);color:inherit}
details{margin-top:36px;color:var(--soft)}pre{white-space:pre-wrap;font-size:.8rem}
"""
