"""The frame of every page: head, style, navigation, script; sections as HTML go in, a document out.

Style sheet and script are package data and are written into the page: it makes no request, so it
works from disk and by mail.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources


def document(title: str, intro: str, sections: Sequence[tuple[str, str, str]], command: str) -> str:
    """The whole document; a section is (key, title, inner HTML), `command` wrote the page."""
    links = "".join(f'<a href="#{key}">{name}</a>' for key, name, _ in sections)
    body = "".join(
        f'<section id="{key}" aria-labelledby="{key}-h"><h2 id="{key}-h">{name}</h2>{html}'
        "</section>"
        for key, name, html in sections
    )
    first = sections[0][0]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)} - EmoVerse report</title>
<link rel="icon" href="data:,">
<style>{_asset("data_shards/pages/templates/frame.css")}</style>
</head>
<body>
<a class="skip" href="#{first}">Skip to the results</a>
<header class="bar"><div class="wrap">
<span class="brand"><i aria-hidden="true"></i>EmoVerse</span>
<nav aria-label="Sections">{links}</nav>
<button type="button" id="theme" aria-label="Switch between light and dark">Theme</button>
</div></header>
<main class="wrap">
{intro}
{body}
</main>
<footer class="wrap">Written by <code>{escape(command)}</code>. Every number on this page is
computed from the run directory.</footer>
<script>{_asset("emoverse/report/templates/report.js")}</script>
</body>
</html>
"""


def _asset(name: str) -> str:
    package, _, path = name.partition("/")
    return resources.files(package).joinpath(path).read_text(encoding="utf-8")
