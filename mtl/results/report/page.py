"""The shell of a report: one HTML file that asks nobody for anything, for any width, both schemes and paper."""

from __future__ import annotations

from collections.abc import Mapping

from mtl.results.report.markup import Html, Piece, joined, tag
from mtl.results.report.palette import NUM_LINES, variables

# Whatever a page may hold, a browser fetches nothing for it and runs nothing.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

_STYLE = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--page);color:var(--text);font:15px/1.55 Inter,system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue","Noto Sans",Arial,sans-serif;overflow-wrap:anywhere}
header,main,footer{max-width:76rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:2.25rem}
h1{font-size:1.9rem;line-height:1.2;letter-spacing:-.015em;margin:.1rem 0 .4rem;font-weight:650}
h2{scroll-margin-top:1.4rem;font-size:1.2rem;letter-spacing:-.01em;margin:0 0 .25rem;font-weight:650}
h3{font-size:.95rem;margin:1.5rem 0 .35rem;font-weight:650}
p{margin:.35rem 0 .7rem;max-width:75ch}
.kind,.note,figcaption small,.about{color:var(--muted)}
.kind{margin:0;font-size:.78rem;letter-spacing:.08em;text-transform:uppercase}
.note{font-size:.87rem}
a{color:var(--link);text-underline-offset:.15em}
nav{margin:1rem 0 1.25rem;font-size:.87rem}
nav ul{display:flex;flex-wrap:wrap;gap:.15rem 1.1rem;list-style:none;margin:0;padding:0}
nav a{text-decoration:none}
nav a:hover{text-decoration:underline}
:focus-visible{outline:2px solid var(--link);outline-offset:2px}
section{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:1.15rem 1.35rem 1.3rem;
margin:0 0 1rem}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(10.5rem,1fr));gap:.9rem 1.5rem;margin:.4rem 0 1rem}
dt{color:var(--muted);font-size:.8rem}
dd{margin:0;font-size:.95rem;font-weight:550}
.good{color:var(--good)}.bad{color:var(--bad)}.warn{color:var(--warn)}
.scroll{position:relative;overflow-x:auto;margin:.6rem 0;max-width:100%;background-repeat:no-repeat;
background-image:linear-gradient(to right,var(--card) 40%,transparent),linear-gradient(to left,var(--card) 40%,
transparent),linear-gradient(to right,var(--rule),transparent),linear-gradient(to left,var(--rule),transparent);
background-position:0 0,100% 0,0 0,100% 0;background-size:3rem 100%,3rem 100%,.8rem 100%,.8rem 100%;
background-attachment:local,local,scroll,scroll}
table{border-collapse:collapse;font-size:.87rem;font-variant-numeric:tabular-nums;overflow-wrap:normal}
caption{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
th,td{padding:.3rem .9rem .3rem 0;border-bottom:1px solid var(--rule);text-align:left;vertical-align:baseline;
white-space:nowrap}
th:last-child,td:last-child{padding-right:.3rem}
thead th{color:var(--muted);font-weight:550;border-bottom-color:var(--muted);font-size:.8rem;vertical-align:bottom}
tbody th{font-weight:500}
tbody tr.main th,tbody tr.main td{font-weight:650}
.num{text-align:right}
td.words{white-space:normal;min-width:13rem}
td.best{color:var(--good);font-weight:650}
td.best::after{content:"";display:inline-block;width:.38rem;height:.38rem;border-radius:50%;background:var(--good);
margin-left:.3rem;vertical-align:.1em}
td:not(.best).mark::after,th.mark::after{content:"";display:inline-block;width:.38rem;margin-left:.3rem}
tr.first th,tr.first td{border-top:1px solid var(--muted)}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono","Liberation Mono",monospace;
font-size:.84em}
pre{background:var(--shade);border-radius:7px;padding:.75rem .9rem;overflow-x:auto;line-height:1.45;white-space:pre;
overflow-wrap:normal;margin:.4rem 0 .8rem}
ul.list{padding-left:1.1rem;margin:.4rem 0}
ul.list li{margin:.4rem 0}
.sr{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
.bar{display:flex;gap:2px;margin:.7rem 0 .9rem;border-radius:7px;overflow:hidden}
.bar div{background:var(--shade);padding:.4rem 0;text-indent:.6rem;font-size:.82rem;min-width:0;overflow:hidden;
text-overflow:ellipsis;white-space:nowrap;border-top:3px solid var(--tint)}
.bar small{display:block;color:var(--muted);overflow:hidden;text-overflow:ellipsis}
.map td{padding:0;border:2px solid var(--card);text-align:center;min-width:5.2rem;height:1.5rem;font-size:.76rem}
.map th{padding:.05rem .9rem .05rem 0;border:0;font-size:.8rem}
.map thead th{text-align:center;padding:0 .3rem .3rem}.map thead th:first-child{text-align:left;padding-left:0}
.map.narrow td{min-width:1.3rem}
.frozen{background:var(--frozen);color:var(--frozen-text)}.trained{background:var(--trained);color:var(--trained-text)}
.partly{background:var(--partly);color:var(--partly-text)}.idle{background:var(--idle);color:var(--idle-text)}
.keys{display:flex;flex-wrap:wrap;gap:.25rem .9rem;list-style:none;padding:0;margin:.4rem 0 .9rem;font-size:.8rem}
.keys li{display:flex;align-items:center;gap:.35rem}
.keys i{width:.85rem;height:.85rem;border-radius:3px;display:inline-block;flex:none;border:1px solid var(--rule)}
.keys i.line{height:0;border-style:solid;border-width:3px 0 0;border-color:var(--tint);border-radius:0;width:1.1rem}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,19rem),1fr));gap:1rem 1.5rem;margin:.6rem 0}
figure{margin:0;min-width:0}
figcaption{font-size:.84rem;font-weight:600;line-height:1.35;margin-bottom:.2rem}
figcaption small{display:block;font-weight:400;font-size:.77rem}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font:10.5px Inter,system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",Arial,sans-serif;fill:var(--muted);
font-variant-numeric:tabular-nums}
svg .grid{stroke:var(--rule);stroke-width:1}
svg .band{fill:var(--shade)}
svg .zero{stroke:var(--muted);stroke-dasharray:3 3}
svg .line{fill:none;stroke-width:1.7;stroke-linejoin:round;stroke-linecap:round}
svg .range{opacity:.22;stroke:none}
svg .name{fill:var(--text)}
LINES
.strips{max-width:27rem}.strips figcaption{margin-top:.8rem}
.split{display:grid;gap:0 2.5rem;align-items:start}.split figure{max-width:26rem}
@media (min-width:64rem){.split{grid-template-columns:auto minmax(17rem,26rem)}}
.heat td{text-align:center;padding:.3rem .7rem;border:2px solid var(--card);line-height:1.3}
.heat th{border:0}
.heat thead th{text-align:center;padding-right:.7rem}
.heat small{display:block;color:inherit;font-size:.72rem;opacity:1}
.cold{background:color-mix(in srgb,var(--cold) var(--share),var(--card))}
.warm{background:color-mix(in srgb,var(--warm) var(--share),var(--card))}
.panels td{padding:2px;border:0;text-align:center;min-width:6.8rem;width:15%;white-space:normal;font-size:.8rem}
.panels th{border:0;padding:2px .8rem 2px 0;font-size:.8rem;vertical-align:middle}
.panels tbody th{white-space:normal;max-width:7.5rem;position:sticky;left:0;background:var(--card);z-index:1}
.panels thead th{text-align:center;padding:2px}
.panels img{display:block;width:100%;height:auto;border-radius:4px}
.panels img.map{image-rendering:pixelated}
.panels{width:100%}
.gradient{display:flex;align-items:center;gap:.5rem;font-size:.8rem;margin:.3rem 0 .7rem;flex-wrap:wrap}
.gradient i{width:12rem;height:.8rem;border-radius:3px;display:block}
details{margin:.7rem 0}
summary{cursor:pointer;font-size:.87rem;color:var(--link)}
footer{color:var(--muted);font-size:.8rem;padding-top:.25rem;padding-bottom:2rem}
@media (max-width:34rem){body{font-size:14px}header,main,footer{padding-left:.75rem;padding-right:.75rem}
header{padding-top:1.25rem}section{padding:.95rem .9rem 1rem}h1{font-size:1.55rem}
dl{grid-template-columns:repeat(auto-fit,minmax(8.2rem,1fr));gap:.7rem 1rem}
table{font-size:.8rem}th,td{padding-right:.5rem}.panels tbody th{max-width:6rem;padding-right:.3rem}}
@media print{body{background:#fff;font-size:11px}nav{display:none}section{border:0;padding:0;margin:0 0 1.2rem}
figure,tr,h2,h3{break-inside:avoid}h2,h3{break-after:avoid}.scroll{overflow:visible}
th,td{padding-right:.5rem}pre{white-space:pre-wrap;overflow-wrap:anywhere}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}details::details-content{content-visibility:visible;
block-size:auto}}
"""


def style() -> str:
    """The page's style sheet; paper is light."""
    lines = "".join(
        f"svg .line-{n}{{stroke:var(--line-{n})}}svg .dot-{n},svg .range-{n}{{fill:var(--line-{n})}}"
        f".tint-{n}{{--tint:var(--line-{n})}}"
        for n in range(NUM_LINES)
    )
    dark = f"@media screen and (prefers-color-scheme:dark){{:root{{color-scheme:dark;{variables(1)}}}}}"
    return f":root{{color-scheme:light;{variables(0)}}}{dark}{_STYLE.replace('LINES', lines)}"


def section(key: str, title: str, *pieces: Piece) -> Html:
    """A part of the page under a heading, to which the table of contents leads."""
    return tag("section", tag("h2", title, id=key), *pieces, aria_labelledby=key)


def page(title: str, kind: str, intro: Piece, parts: Mapping[str, tuple[str, Piece]], footer: Piece) -> str:
    """A whole page.

    Args:
        title: Its heading.
        kind: What kind of page it is, above the heading.
        intro: What stands below the heading.
        parts: By key, the title and the content of each section; one whose content is empty is left out.
        footer: The last line.
    """
    shown = {key: part for key, part in parts.items() if part[1]}
    contents = tag("ul", *(tag("li", tag("a", name, href=f"#{key}")) for key, (name, _) in shown.items()))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        # Else a browser asks for an icon.
        tag("link", rel="icon", href="data:,"),
        tag("style", Html(style())),
    )
    body = tag(
        "body",
        tag("header", tag("p", kind, class_="kind"), tag("h1", title), intro),
        tag(
            "main",
            tag("nav", contents, aria_label="Contents"),
            *(section(key, name, content) for key, (name, content) in shown.items()),
        ),
        tag("footer", footer),
    )
    return f"<!doctype html>\n{tag('html', joined([head, body]), lang='en')}\n"
