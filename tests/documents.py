"""The documents as data: their blocks, the commands in them, their words in code, their links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")))
PROGRAMS = ("robustdeq", "python", "pip")
"""What a block that is only indented begins with if it holds commands, not formulas."""


@dataclass(frozen=True)
class Block:
    """A block of code: its language, the file that it is the text of (if any), and the text."""

    language: str
    title: str
    text: str


def blocks(page: str) -> list[Block]:
    found = []
    for token in _tokens(page):
        if token.type == "fence":
            language, _, rest = token.info.strip().partition(" ")
            title = re.search(r'title="([^"]+)"', rest)
            found.append(Block(language, title[1] if title else "", token.content))
        elif token.type == "code_block":
            plain = token.content.startswith(PROGRAMS)
            found.append(Block("sh" if plain else "formula", "", token.content))
    return found


def files(page: str) -> dict[str, str]:
    """The files that a page asks its reader to write, by name."""
    return {block.title: block.text for block in blocks(page) if block.title}


def script(page: str) -> str:
    """A page's Python, as one program."""
    held = [b.text for b in blocks(page) if b.language == "python" and not b.title]
    return "\n".join(held)


def commands(page: str) -> list[str]:
    """A page's commands in order, each by itself, without comments."""
    lines = [
        line
        for block in blocks(page)
        if block.language == "sh" and not block.title
        for line in block.text.replace("\\\n", " ").splitlines()
    ]
    parts = (part for line in lines for part in uncommented(line).split(" && "))
    return [command for part in parts if (command := part.strip())]


def uncommented(line: str) -> str:
    """The line up to the first `#` that begins a word outside of quotes."""
    return re.match(r"""(?:[^\s'"#]|'[^']*'|"[^"]*"|\s+(?!\s*#)|(?<=\S)#)*""", line)[0]


def program(command: str) -> str:
    """The program's own name, wherever it stands."""
    return Path(shlex.split(command)[0]).name


def arguments(command: str) -> list[str]:
    return shlex.split(command)[1:]


def words(page: str) -> list[str]:
    """What stands in the text as code."""
    return [t.content for t in _inline(page) if t.type == "code_inline"]


def links(page: str) -> list[str]:
    """Targets of links and images that are in this repository."""
    held = [t.attrs.get("href", t.attrs.get("src", "")) for t in _inline(page)]
    return [str(link) for link in held if link and not re.match(r"\w+:", str(link))]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    tokens = _parsed(page.read_text())
    texts = [tokens[k + 1].content for k, t in enumerate(tokens) if t.type == "heading_open"]
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", text.lower())) for text in texts}


def _inline(page: str) -> Iterator[Token]:
    for token in _tokens(page):
        yield from token.children or ()


def _tokens(page: str) -> list[Token]:
    return _parsed((ROOT / page).read_text())


def _parsed(text: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(text)
