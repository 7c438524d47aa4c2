"""Texts that a model, a person or a file may bring, and that must stay text: nothing runs, nothing is fetched.

What would run sets window.hit, opens a dialog or asks the address FAR for something.
"""

FAR = "http://198.51.100.7"  # an address for documentation: nobody is there
HIT = "window.hit=1"

SCRIPTS = (
    f"<script>{HIT}</script>",
    f"<script src='{FAR}/s.js'></script>",
    f"</script><script>{HIT}</script>",
    f"<img src=x onerror='{HIT}'>",
    f"<svg onload='{HIT}'>",
    f"<svg><script>{HIT}</script></svg>",
    f"<svg><animate onbegin='{HIT}' attributeName=x dur=1s></svg>",
    f"<body onload='{HIT}'>",
    f"<details open ontoggle='{HIT}'>more</details>",
    f"<input autofocus onfocus='{HIT}'>",
    f"<marquee onstart='{HIT}'>m</marquee>",
    f"<video><source onerror='{HIT}'></video>",
    f'"><img src=x onerror="{HIT}">',
    f"'-{HIT}-'",
    f"</textarea><script>{HIT}</script>",
    f"</title></style></pre></td></table><script>{HIT}</script>",
    f"<!--<img src='--><img src=x onerror={HIT}//'>",
    f"<math><mtext><table><mglyph><style><img src=x onerror={HIT}></style></table></math>",
    f"&lt;script&gt;{HIT}&lt;/script&gt;",
    f"&#60;img src=x onerror={HIT}&#62;",
    f"\\u003cscript\\u003e{HIT}\\u003c/script\\u003e",
    f"<scr<script>ipt>{HIT}</scr</script>ipt>",
    f"<a href='javascript:{HIT}'>a</a>",
    f"<form action='javascript:{HIT}'><button>send</button></form>",
)
FETCHES = (
    f"![image]({FAR}/i.png)",
    f'![image]({FAR}/i.png "title")',
    f"[![badge]({FAR}/b.svg)]({FAR}/)",
    f"![ref][r]\n\n[r]: {FAR}/ref.png",
    f"<img src='{FAR}/i.png'>",
    f"<img srcset='{FAR}/a.png 1x, {FAR}/b.png 2x'>",
    f"<iframe src='{FAR}/'></iframe>",
    f"<object data='{FAR}/o.swf'></object><embed src='{FAR}/e.swf'>",
    f"<link rel=stylesheet href='{FAR}/c.css'><link rel=prefetch href='{FAR}/p'>",
    f"<style>@import '{FAR}/c.css'; body {{ background: url({FAR}/bg.png) }}</style>",
    f"<div style='background:url({FAR}/d.png)'>d</div>",
    f"<base href='{FAR}/'>",
    f"<meta http-equiv=refresh content='0;url={FAR}/'>",
    f"<audio src='{FAR}/a.mp3' autoplay></audio><video poster='{FAR}/v.png'></video>",
    f"<picture><source srcset='{FAR}/p.webp'><img></picture>",
    f"![x](//198.51.100.7/i.png) ![y](data:image/svg+xml,<svg onload={HIT}>)",
    f"{FAR}/bare and www.198.51.100.7.example and <{FAR}/auto> and me@198.51.100.7.example",
)
MARKS = (
    f"[click](javascript:{HIT}) [data](data:text/html,<script>{HIT}</script>) [vb](vbscript:x)",
    f"[ref link][j]\n\n[j]: javascript:{HIT}",
    f"$\\href{{javascript:{HIT}}}{{k}}$ $$\\includegraphics{{{FAR}/k.png}}$$ \\(x^2\\) \\[y\\]",
    f"$\\htmlData{{a=b}}{{x}}$ $\\url{{{FAR}/}}$ $\\def\\a{{\\a\\a}}\\a$",
    f"```mermaid\ngraph TD; A-->B; click A '{FAR}/' _blank\n```",
    f"```html\n<script>{HIT}</script>\n```",
    "# heading\n## two\n- a\n- b\n1. one\n> quote\n---\n***",
    "| a | b |\n| --- | --- |\n| <b>c</b> | ~~d~~ |",
    ":red[red] :blue-background[blue] :rainbow[all] :small[s] :green-badge[b] :gray[:red[nested]]",
    ":material/delete: :material/home: :streamlit: :smile: :+1: :heart:",
    "~~struck~~ __bold__ *i* `code` ^up^ ==mark== [^1] [ ] [x] <- -> -- ... (c)",
    "<b>bold</b><u>under</u><h1>big</h1><br><hr><center>middle</center>",
    "$5 and $10, \\$3; a_b_c; 2*3*4; #1; @all; 100%; ~/x; C:\\new\\tmp",
    "{{ 7*7 }} ${7*7} #{7*7} <%= 7*7 %> {0} {name} %s %(x)s {project}",
)
CHARACTERS = (
    "left \u202eright-to-left\u202c \u2066isolate\u2069 \u200fmark\u200e end",
    "nul \x00 bell \x07 backspace \x08 escape \x1b[31mred\x1b[0m \x1b]8;;" + FAR + "\x07link\x1b]8;;\x07",
    "Z̸̢̛a̴l̵g̶o̷ \u0301\u0301\u0301 \ufeff\u200b\u2060\u00ad invisible \U000e0041 tag",
    "word" * 400,
    "line\u2028separator\u2029paragraph\x85next\x0bvertical\x0cform \r\n crlf \r cr",
    "👨‍👩‍👧‍👦 🏳️‍🌈 \ud83d 你好，月亮。 مرحبا \uffff \ufffe".replace("\ud83d", "\ufffd"),
)
TEXTS = (*SCRIPTS, *FETCHES, *MARKS, *CHARACTERS)
HALF_TAGS = (
    "<img src=x onerror='",
    f"![half]({FAR}/",
    "$$\\frac{",
    ":red[",
    "```",
    "<script>",
    "[a](javascript:",
    "<!--",
)
# What no page of ours has, whatever the texts are.
NEVER = ", ".join(
    (
        *(f"[{name}*='198.51.100.7']" for name in ("src", "srcset", "href", "data", "style", "poster")),
        *(f"a[href^='{scheme}:']" for scheme in ("javascript", "data", "vbscript", "mailto")),
        *(f"[{name}]" for name in ("action", "onerror", "onload", "ontoggle", "onfocus", "onstart", "onbegin")),
        *(".katex", "base", "marquee", "embed", "object", "math", "meta[http-equiv=refresh]"),
    )
)
