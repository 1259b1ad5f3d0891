"""The report page's style sheet: light, dark, phone and print, without a font or picture from elsewhere."""

_DARK = """color-scheme:dark;--page:#13171c;--panel:#1a2027;--ink:#e7ebef;--soft:#a0abb7;--line:#323a44;
--shade:72,152,214;--gain:72,152,214;--loss:222,132,60;--good:#7cc4f4;--bad:#f0a35e;--s1:#5fb0ea;--s2:#e9954a;--s3:#4cc49b;--s4:#dc9ac0;--s5:#e8c25a;
--s6:#a3aeba;--s7:#b7a4ec"""

# Series colours follow Okabe and Ito's palette, which any colour vision tells apart; --shade is one hue, more or less.
STYLE = (
  f"""
:root{{color-scheme:light;--page:#fff;--panel:#f6f7f9;--ink:#1a2028;--soft:#5a6572;--line:#d9dee4;--shade:31,111,168;
--gain:31,111,168;--loss:213,94,0;--good:#0b5d91;--bad:#a84a00;--s1:#0072b2;--s2:#d55e00;--s3:#00805e;--s4:#b1588c;--s5:#a87900;--s6:#7d8792;--s7:#6a4fb3;
--serif:"Iowan Old Style","Palatino Linotype",Palatino,"Book Antiqua",Georgia,serif}}
@media screen and (prefers-color-scheme:dark){{:root{{{_DARK}}}}}
"""
  + """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0 auto;padding:2.6rem 1.25rem 4rem;max-width:74rem;background:var(--page);color:var(--ink);
font:400 1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
font-variant-numeric:tabular-nums;overflow-wrap:break-word}
h1,h2{font-family:var(--serif);font-weight:600;line-height:1.2;text-wrap:balance}
h1{font-size:2.3rem;margin:.1rem 0 .3rem;letter-spacing:-.01em}
h2{font-size:1.42rem;margin:3.2rem 0 .25rem;padding-top:1rem;border-top:1px solid var(--line)}
h3{font-size:.95rem;margin:1.4rem 0 .4rem}
p{margin:.5rem 0}
.kicker{font-size:.76rem;letter-spacing:.09em;text-transform:uppercase;color:var(--soft);margin:0}
.note,figcaption{color:var(--soft);font-size:.88rem;max-width:48rem;margin:.2rem 0 .9rem}
.lead{font-family:var(--serif);font-size:1.1rem;line-height:1.5;max-width:50rem;margin:1.5rem 0 0}
.lead p{margin:.55rem 0;padding-left:1rem;border-left:2px solid var(--line)}
ol.flow{list-style:none;display:flex;flex-wrap:wrap;gap:.5rem 2.2rem;margin:1.6rem 0 .3rem;padding:0}
ol.flow li{position:relative;flex:1 1 11rem;max-width:17rem;border:1px solid var(--line);border-top:4px solid var(--s1);
border-radius:.4rem;background:var(--panel);padding:.55rem .85rem .65rem;min-width:0}
ol.flow li+li::before{content:"→";position:absolute;left:-1.72rem;top:50%;transform:translateY(-55%);color:var(--soft);
font-size:1.3rem}
ol.flow b{display:block;overflow-wrap:anywhere}
ol.flow small{display:block;color:var(--soft);font-size:.82rem;line-height:1.45}
ol.flow.arms{gap:.5rem;margin-top:.2rem}
ol.flow.arms li{border-top:2px dashed var(--s2);background:none;padding-top:.45rem}
ol.flow.arms li+li::before{content:none}
.scroll{overflow-x:auto;margin:.5rem 0}
table{border-collapse:collapse;font-size:.91rem}
table.wide{width:100%}
th,td{padding:.42rem .75rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap;vertical-align:top}
th{font-weight:600}
thead th{border-bottom:2px solid var(--ink);vertical-align:bottom}
tbody th,th:first-child,td.left,th.left{text-align:left}
tbody th{font-weight:500}
th:first-child{position:sticky;left:0;background:var(--page);z-index:1}
th small,td small{display:block;color:var(--soft);font-weight:400;font-size:.78rem;line-height:1.35}
tr.group th{font-size:.74rem;letter-spacing:.07em;text-transform:uppercase;color:var(--soft);padding-top:.9rem}
tr.stage th{text-transform:none;letter-spacing:0;font-size:.88rem;color:inherit;font-weight:600}
tr.arm th,tr.baseline th{font-style:italic;font-weight:400}
tr.baseline td{color:var(--soft)}
td small{white-space:normal;min-width:5.5rem}
td[style] small{color:inherit;opacity:.82}
td.wrap{white-space:normal;overflow-wrap:anywhere;min-width:8rem}
.piece{white-space:nowrap}
td.best{font-weight:700}
td.gained{color:var(--good);font-weight:600}
td.forgotten{color:var(--bad);font-weight:600}
td.kept,td.cannot{color:var(--soft)}
thead th{white-space:normal}table.confusion thead th{white-space:nowrap}
table.confusion td,table.confusion th{padding:.28rem .5rem;text-align:center}
table.confusion tbody th{text-align:left}
table.confusion td.hit{outline:1.5px solid var(--ink);outline-offset:-2px}
table.confusion th.turned span{writing-mode:vertical-rl;transform:rotate(180deg);text-align:left}
section.gate{border:1px solid var(--line);border-left:.5rem solid var(--soft);border-radius:.4rem;
background:var(--panel);padding:.5rem 1rem .7rem;margin:1.2rem 0}
section.gate.passed{border-left-color:var(--s1)}section.gate.failed{border-left-color:var(--s2)}
.gate .outcome{margin:.2rem 0;color:var(--soft)}.gate .outcome b{color:var(--ink);font-size:1.1rem;margin-right:.6rem}
.gate.failed .outcome b,td.mark.failed{color:var(--bad)}.gate.passed .outcome b,td.mark.passed{color:var(--good)}
.gate th:first-child{background:none;position:static}.gate td,.gate th{border-bottom:0;padding:.15rem 1rem .15rem 0}
.gate td.left{white-space:normal}td.mark{font-weight:600;text-align:left}td.mark.pending{color:var(--soft)}
tr.further th{font-weight:400}
.figures{display:flex;flex-wrap:wrap;gap:.6rem 2rem}
figure{margin:.4rem 0;flex:1 1 22rem;max-width:33rem;min-width:0}
.figures.small figure{flex:1 1 15rem;max-width:21rem}
figure h3{margin:.3rem 0}
svg{display:block;width:100%;height:auto}
svg text{font-family:inherit!important}
.key{display:inline-block;width:.8em;height:.8em;margin:0 .35em 0 .9em;border-radius:2px;vertical-align:-.05em}
.key:first-child{margin-left:0}
details{margin:.7rem 0}
summary{cursor:pointer;font-weight:600;padding:.2rem 0}
.sample{border:1px solid var(--line);border-radius:.4rem;margin:.7rem 0;overflow:hidden;font-size:.9rem}
.sample>div{padding:.65rem .9rem}
.sample .given{background:var(--panel);display:grid;grid-template-columns:3fr 2fr;gap:.6rem 1.6rem}
.sample .answers{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(13.5rem,100%),1fr));gap:.8rem 1.4rem}
.sample .short{grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr))}
.sample h4{margin:0 0 .15rem;font-size:.75rem;font-weight:600;color:var(--soft);overflow-wrap:anywhere}
.sample h4.arm{font-style:italic;font-weight:400}
.sample p{margin:0;white-space:pre-wrap;overflow-wrap:anywhere}
.right{color:var(--good);font-weight:600}.wrong{color:var(--bad)}
footer{margin-top:3.5rem;border-top:1px solid var(--line);color:var(--soft);font-size:.85rem;padding-top:.8rem}
@media (max-width:40rem){body{padding:1.4rem 1rem 3rem}h1{font-size:1.8rem}.lead{font-size:1.06rem}
ol.flow:not(.arms){flex-direction:column;gap:1.5rem}ol.flow li{flex:none;max-width:none}
ol.flow:not(.arms) li+li::before{content:"↓";left:50%;top:-1.02rem;transform:translate(-50%,-35%)}
ol.flow.arms{flex-direction:column}
.sample .given{grid-template-columns:1fr}th,td{padding:.38rem .55rem}tbody th{white-space:normal;min-width:7rem;
max-width:9rem;overflow-wrap:normal}tr.group th{white-space:nowrap}
.gate tbody th{min-width:0}.gate td,.gate th{padding-right:.6rem}}
@media print{@page{margin:12mm}html{font-size:62%}body{max-width:none;padding:0;print-color-adjust:exact;
-webkit-print-color-adjust:exact}.scroll{overflow:visible}th:first-child{position:static}
h2,h3,summary,section>.note,.lead p{break-after:avoid}.lead p:last-child{break-after:auto}h2{margin-top:2rem}
figure,.sample,tr,.note,ol.flow li,section.gate{break-inside:avoid}th,td{padding:.25rem .4rem;white-space:normal}
td.mark{white-space:nowrap}}
"""
)
