"""What every page must be: well-formed and complete in itself."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

VOID = {"meta", "br", "img", "link", "hr", "input"}
_REMOTE = r"""["']?\s*(?:https?:)?//"""
LOADS = rf"(?:src|href|action|data|poster)\s*=\s*{_REMOTE}|url\(\s*{_REMOTE}|@import|<link|<script"


class Nesting(HTMLParser):
    """Checks that each end tag closes the element opened last, and that ids are unique."""

    def __init__(self):
        super().__init__()
        self.open = []
        self.ids = []

    def handle_starttag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, _tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_page(html):
    """Assert that a page is well-formed and loads nothing; return how many figures it has."""
    parser = Nesting()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    assert not re.search(LOADS, html, re.IGNORECASE)
    figures = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    used = {name for figure in figures for name in re.findall(r'(?:url\(#|href="#)([^)"]+)', figure)}
    assert used <= set(parser.ids)
    for figure in figures:
        ET.fromstring(figure)  # noqa: S314 - our own output
    assert "NaN" not in html
    return len(figures)
