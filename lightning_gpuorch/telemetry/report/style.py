"""How does the report look? Colours are chosen for light and dark, and tell apart without red against green."""

STYLE = """
:root{--page:#f6f7f9;--card:#fff;--text:#1b1f27;--soft:#5c6675;--rule:#e3e7ed;--lane:#eceff3;--work:#3b76d6;
--wait:#e9a23b;--transfer:#7d5bbe;--good:#1f7a55;--warn:#a35b00;--bad:#b3261e;--restart:#6b3fb5;--band:#3b76d63d;
--s0:#3b76d6;--s1:#d55e00;--s2:#0b8a6b;--s3:#b0479a;--s4:#8a6d00;--s5:#2a9bc4;--s6:#6b3fb5;--s7:#6f7683}
@media(prefers-color-scheme:dark){:root{--page:#12151b;--card:#1b2028;--text:#e6e9ee;--soft:#9aa5b4;--rule:#2d3440;
--lane:#262d38;--work:#5c97f0;--wait:#f0b455;--transfer:#a58ae0;--good:#5fcf9e;--warn:#f0a848;--bad:#ff8177;
--restart:#b597ee;--band:#5c97f04d;--s0:#6ea3f2;--s1:#f08a45;--s2:#43c8a2;--s3:#e58ad0;--s4:#d6bb4a;--s5:#64c6ea;
--s6:#b597ee;--s7:#a4adba}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:15px/1.5 system-ui,-apple-system,"Segoe UI","DejaVu Sans",
sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 20px 48px}
h1{font-size:22px;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:16px;margin:0 0 10px}
.note{font-weight:400;font-size:13px;color:var(--soft);margin-left:6px}
.outcome{font-size:17px;font-weight:600;margin:0}.facts{color:var(--soft);margin:2px 0 16px;overflow-wrap:anywhere}
.good{color:var(--good)}.warn{color:var(--warn)}.bad{color:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:10px;margin-bottom:14px}
.tile,section{background:var(--card);border:1px solid var(--rule);border-radius:8px}
.tile{padding:10px 14px}.tile b{display:block;font-size:21px;font-variant-numeric:tabular-nums;line-height:1.25}
.tile span{font-size:13px;color:var(--soft)}
section{padding:16px 18px 14px;margin-bottom:14px}
svg{display:block;width:100%;height:auto;overflow:visible}
.label{font-size:11px;fill:var(--soft)}.grid{stroke:var(--rule);stroke-width:1}
.line{fill:none;stroke-width:1.6;stroke-linejoin:round}.band{fill:var(--band)}
rect.lane{fill:var(--lane)}rect.work{fill:var(--work)}rect.wait{fill:var(--wait)}
.mark path{stroke:var(--card);stroke-width:1.2;paint-order:stroke}
.mark.oom path{fill:var(--warn)}.mark.restart path{fill:var(--restart)}.mark.warn path{fill:var(--wait);
stroke:var(--text)}
.mark.bad path{fill:var(--bad);stroke:var(--bad);stroke-width:2.4}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;margin:8px 0 0;font-size:13px;color:var(--soft)}
.legend span{display:inline-flex;align-items:center;gap:6px}
.key{display:inline-block;width:14px;height:10px;border-radius:2px}.symbol{width:14px;height:14px;display:inline-block}
i.work{background:var(--work)}i.wait{background:var(--wait)}i.transfer{background:var(--transfer)}
i.lane{background:var(--lane)}i.band{background:var(--band)}
.s0{stroke:var(--s0)}.s1{stroke:var(--s1)}.s2{stroke:var(--s2)}.s3{stroke:var(--s3)}.s4{stroke:var(--s4)}
.s5{stroke:var(--s5)}.s6{stroke:var(--s6)}.s7{stroke:var(--s7)}
i.s0{background:var(--s0)}i.s1{background:var(--s1)}i.s2{background:var(--s2)}i.s3{background:var(--s3)}
i.s4{background:var(--s4)}i.s5{background:var(--s5)}i.s6{background:var(--s6)}i.s7{background:var(--s7)}
.split{display:grid;grid-template-columns:64px 1fr 150px;gap:10px;align-items:center;font-size:13px;margin-top:5px;
font-variant-numeric:tabular-nums}
.split span:last-child{color:var(--soft);text-align:right}
.bar{display:flex;height:14px;border-radius:3px;overflow:hidden;background:var(--lane)}.bar i{display:block;height:100%}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:5px 14px 5px 0;border-bottom:1px solid var(--rule);vertical-align:top}
th{color:var(--soft);font-weight:500;white-space:nowrap}td{overflow-wrap:anywhere}
.num{text-align:right;white-space:nowrap}tr:last-child td{border-bottom:0}
details summary{cursor:pointer;color:var(--soft);margin-bottom:6px}
.nothing,footer{color:var(--soft);font-size:13.5px}.nothing{margin:0}footer p{margin:2px 0}
@media print{body{background:#fff}section,.tile{break-inside:avoid}}
"""
