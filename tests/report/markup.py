"""Reads a page as what matters to a test: elements with attributes and text, and what a browser would load."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "img", "input", "br", "hr"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    parents: tuple[str, ...]
    text: str = ""


@dataclass
class Page(HTMLParser):
    elements: list[Element] = field(default_factory=list)
    unclosed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._open: list[Element] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        parents = tuple(element.tag for element in self._open)
        element = Element(tag, {name: value or "" for name, value in attrs}, parents)
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open[-1].tag != tag:
            self.unclosed.append(tag)
            return
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.text += data

    def all(self, *tags: str) -> list[Element]:
        return [element for element in self.elements if element.tag in tags]

    def section(self, id_: str) -> str:
        """The text of the element with this id, runs of white space as one space."""
        return next(" ".join(e.text.split()) for e in self.elements if e.attributes.get("id") == id_)


def parse(html: str) -> Page:
    page = Page()
    page.feed(html)
    page.close()
    page.unclosed += [element.tag for element in page._open]
    return page


def loaded(page: Page) -> list[str]:
    """Every address that a browser would follow without being asked, but for pictures inside the file."""
    names = ("src", "href", "srcset", "poster", "data", "action", "xlink:href")
    found = [e.attributes[name] for e in page.elements if e.tag != "a" for name in names if name in e.attributes]
    return [address for address in found if not address.startswith(("data:", "#"))]
