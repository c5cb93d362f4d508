"""What can be wrong with a page that only a browser sees. Every check returns the problems that it found, as words."""

from __future__ import annotations

from tests.report.browser import Browser

_WIDE = """
if (document.scrollingElement.scrollWidth <= innerWidth) return [];
const wide = [...document.body.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right > innerWidth + 0.5
    && !e.parentElement.closest('.scroll, .picture, nav, pre'));
return [`the page is ${document.scrollingElement.scrollWidth} wide`, ...wide.map(e => e.outerHTML.slice(0, 90))];
"""
_HEADINGS = """
return [...document.querySelectorAll('h1, h2, h3, h4')].filter(e => {
    const box = e.getBoundingClientRect();
    return !e.checkVisibility({visibilityProperty: true, opacityProperty: true}) || box.width < 2 || box.height < 2
        || box.left < 0 || box.right > innerWidth + 0.5;
}).map(e => `not to be seen: ${e.textContent}`);
"""
# The colour behind a text is that of the first opaque box or shape under its middle.
_CONTRAST = """
const parse = (text) => {
    const numbers = text.match(/[\\d.]+/g).map(Number);
    return numbers.length > 3 ? numbers : [...numbers, 1];
};
const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3]));
const light = (c) => {
    const [r, g, b] = c.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const paint = (e) => {
    const style = getComputedStyle(e);
    const isShape = e instanceof SVGGeometryElement;
    // a line has no inside, and is thinner than the halo of a text that lies over it
    if (e instanceof SVGLineElement || e instanceof SVGElement && !isShape) return [0, 0, 0, 0];
    if (isShape && style.fill === 'none') return [0, 0, 0, 0];
    const colour = parse(isShape ? style.fill : style.backgroundColor);
    return [...colour.slice(0, 3), colour[3] * style.opacity * (isShape ? style.fillOpacity : 1)];
};
// checkVisibility() is true for SVG inside of a group that is not displayed
const isShown = (e) => {
    for (let a = e; a; a = a.parentElement) if (getComputedStyle(a).display === 'none') return false;
    return e.checkVisibility();
};
const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
let n = 0;
while (walker.nextNode()) {
    const node = walker.currentNode, e = node.parentElement;
    if (!node.data.trim() || e.closest('script, style, title, .sr, .skip') || !isShown(e)) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const box = [...range.getClientRects()].find(r => r.width > 1 && r.height > 1);
    if (!box) continue;
    const x = box.left + box.width / 2, y = box.top + box.height / 2;
    if (x < 0 || x > innerWidth || y < 0 || y > innerHeight) continue;
    n += 1;
    const below = [];
    for (const layer of document.elementsFromPoint(x, y)) {
        const colour = paint(layer);
        below.push(colour);
        if (colour[3] >= 1) break;
    }
    const back = below.reduceRight((under, colour) => over(colour, under), [255, 255, 255]);
    const style = getComputedStyle(e);
    let alpha = 1;
    for (let a = e; a; a = a.parentElement) alpha *= getComputedStyle(a).opacity;
    const own = parse(e instanceof SVGElement ? style.fill : style.color);
    const front = over([...own.slice(0, 3), own[3] * alpha], back);
    const [a, b] = [light(front), light(back)].sort((p, q) => q - p);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) found.push(`contrast ${ratio.toFixed(2)}: ${node.data.trim().slice(0, 60)}`);
}
return n > 20 ? found : [...found, `only ${n} texts were looked at`];
"""
_COVERED = """
const found = [];
for (const plot of document.querySelectorAll('svg.plot')) {
    const texts = [...plot.querySelectorAll('text')].map(e => [e.textContent, e.getBoundingClientRect()]);
    for (const [i, [a, p]] of texts.entries()) for (const [b, q] of texts.slice(i + 1)) {
        const wide = Math.min(p.right, q.right) - Math.max(p.left, q.left);
        const tall = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
        if (wide > 2 && tall > 4) found.push(`${a} lies over ${b}`);
    }
    for (const [a, p] of texts) if (p.left < -1 || p.right > innerWidth + 1) found.push(`${a} is cut off`);
}
return found;
"""


def problems(browser: Browser, *, width: int, scheme: str = "light") -> list[str]:
    """Whatever is wrong with the open page at this width: the window is made as tall as the page."""
    browser.look(width=width, scheme=scheme)
    height = browser.run("return document.documentElement.scrollHeight")
    browser.look(width=width, height=height, scheme=scheme)
    found = [problem for check in (_WIDE, _HEADINGS, _CONTRAST, _COVERED) for problem in browser.run(check)]
    found += [f"console: {entry['message']}" for entry in browser.log("browser")]
    return found + [
        f"asked for {address}" for address in browser.requests() if not address.startswith(("file:", "data:"))
    ]
