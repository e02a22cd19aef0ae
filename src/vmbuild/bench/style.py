"""How the page of a report looks: one style sheet, light and dark, from a phone's width to a desk's."""

CSS = """
:root{color-scheme:light dark;
--page:#f9f9f7;--card:#fcfcfb;--ink:#0b0b0b;--ink2:#52514e;--muted:#6f6e69;--grid:#e1e0d9;--axis:#c3c2b7;
--ring:rgba(11,11,11,.10);--s0:#2a78d6;--s1:#eb6834;--s2:#1baf7a;--s3:#4a3aa7;--good:#006300;--warn:#8a5a00}
@media (prefers-color-scheme:dark){:root{
--page:#0d0d0d;--card:#1a1a19;--ink:#fff;--ink2:#c3c2b7;--muted:#98968f;--grid:#2c2c2a;--axis:#4a4a46;
--ring:rgba(255,255,255,.10);--s0:#3987e5;--s1:#d95926;--s2:#199e70;--s3:#9085e9;--good:#0ca30c;--warn:#fab219}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;
-webkit-text-size-adjust:100%}
main{max-width:60rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .25rem;letter-spacing:-.01em}
h2{font-size:1.25rem;margin:3rem 0 .25rem}
h3{font-size:.95rem;margin:0 0 .75rem;font-weight:600}
p{margin:.25rem 0 1rem;color:var(--ink2);max-width:42rem}
p.verdict{font-size:1.1rem;color:var(--ink)}
code{font:.875em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
pre{font:.8rem/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;margin:0;overflow-x:auto}
.card{background:var(--card);border:1px solid var(--ring);border-radius:10px;padding:1.1rem 1.2rem;margin:0 0 1rem}
.tiles{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:1rem}
.tile .big{font-size:2rem;font-weight:600;line-height:1.1;letter-spacing:-.02em}
.tile .big small{font-size:1rem;font-weight:400;color:var(--ink2);letter-spacing:0}
.small{font-size:.85rem;color:var(--ink2)}
.legend{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;margin:0 0 1rem;padding:0;list-style:none;font-size:.875rem;
color:var(--ink2)}
.legend i,.dot{display:inline-block;width:.7rem;height:.7rem;border-radius:3px;margin-right:.45rem;background:var(--c)}
.s0{--c:var(--s0)}.s1{--c:var(--s1)}.s2{--c:var(--s2)}.s3{--c:var(--s3)}
.row{display:grid;grid-template-columns:minmax(0,13rem) minmax(0,1fr) 8.5rem;gap:0 1rem;align-items:center;
padding:.6rem 0;border-top:1px solid var(--grid)}
.row.wide{grid-template-columns:minmax(0,13rem) minmax(0,1fr)}
.row:first-of-type{border-top:0}
.row .name{font-size:.875rem;overflow-wrap:anywhere;overflow:hidden;
display:-webkit-box;-webkit-line-clamp:3;-webkit-box-orient:vertical}
.row .name.step{font:.8rem/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.row .ratio{font-size:.875rem;text-align:right;font-variant-numeric:tabular-nums}
.ratio b{font-weight:600}
.bar{display:flex;align-items:center;height:1.15rem;font-size:.8rem;font-variant-numeric:tabular-nums;color:var(--ink2);
white-space:nowrap}
.bar .track{position:relative;flex:1;height:100%;margin-right:4.6rem}
.bar .fill{position:absolute;left:0;top:3px;bottom:3px;min-width:2px;background:var(--c);border-radius:0 4px 4px 0}
.bar .span{position:absolute;top:50%;height:2px;margin-top:-1px;background:var(--ink);opacity:.55}
.bar .value{position:absolute;top:0;margin-left:.45rem}
.forest .axis{position:relative;height:1.3rem;font-size:.75rem;color:var(--muted)}
.forest .axis span{position:absolute;transform:translateX(-50%)}
.forest .plot{position:relative;height:1.5rem}
.forest .plot:before{content:"";position:absolute;top:0;bottom:0;left:var(--one);border-left:1px solid var(--axis)}
.forest .line{position:absolute;top:50%;height:2px;margin-top:-1px;background:var(--c);min-width:2px}
.forest .point{position:absolute;top:50%;width:10px;height:10px;margin:-5px 0 0 -5px;border-radius:50%;
background:var(--c);box-shadow:0 0 0 2px var(--card)}
.chart{display:grid;grid-template-columns:3.4rem minmax(0,1fr);gap:0 .5rem;margin:0 0 1.25rem}
.chart .y{position:relative;font-size:.75rem;color:var(--muted);height:9rem}
.chart .y span{position:absolute;right:0;transform:translateY(-50%);font-variant-numeric:tabular-nums}
.chart svg{display:block;width:100%;height:9rem;overflow:visible}
.chart .x{position:relative;grid-column:2;height:1.4rem;font-size:.75rem;color:var(--muted);
font-variant-numeric:tabular-nums}
.chart .x span{position:absolute;transform:translateX(-50%);white-space:nowrap}
.chart .x span:first-child{transform:none}
.chart .x span:last-child{transform:translateX(-100%)}
.chart path{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round;vector-effect:non-scaling-stroke}
.chart line{stroke:var(--grid);vector-effect:non-scaling-stroke}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.875rem;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:.4rem .75rem;border-top:1px solid var(--grid);vertical-align:top}
th:first-child,td:first-child{text-align:left;padding-left:0}
thead th{border-top:0;font-weight:600;white-space:nowrap}
table.facts td{text-align:left}
table.facts th{text-align:left;font-weight:400;color:var(--ink2);padding-left:0;white-space:nowrap}
.warn{color:var(--warn);font-weight:600}
details summary{cursor:pointer;font-size:.95rem;font-weight:600}
details[open] summary{margin-bottom:.75rem}
@media (max-width:40rem){
main{padding:1.5rem .9rem 3rem}h1{font-size:1.45rem}
.card{padding:1rem .9rem}
.tiles{grid-template-columns:1fr;gap:0}
.row,.row.wide{grid-template-columns:minmax(0,1fr) auto}
.row .ratio{grid-column:2;grid-row:1}.row .bars{grid-column:1/3;margin-top:.35rem}
.row .name{-webkit-line-clamp:2}
.forest .row .plot{grid-column:1/3}.forest .row.head .name,.forest .row.head .ratio{display:none}
.forest .row.head .axis{grid-column:1/3}
th,td{padding:.4rem .5rem}
table.facts,table.facts tbody,table.facts tr,table.facts th,table.facts td{display:block;border-top:0;padding:0}
table.facts tr{border-top:1px solid var(--grid);padding:.4rem 0}
}
@media print{body{background:#fff}.card{break-inside:avoid}}
"""
