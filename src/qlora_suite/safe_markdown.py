"""What a model or a person says as Markdown in which nothing is HTML and no picture is fetched: both are shown as they were written."""

import html
import re

_CODE = re.compile(
    r"""(?P<block> ^\ {0,3} (?P<fence>`{3,}|~{3,}) [^\n`]* \n .*? (?: ^\ {0,3} (?P=fence) [`~]* [ \t]* $ | \Z ) )
      | (?P<inline> (?<!`) `[^`\n]+` (?!`) )""",
    re.MULTILINE | re.DOTALL | re.VERBOSE,
)


def safe_markdown(text: str) -> str:
    """Headings, lists, emphasis, links and code stay. Code is left alone, for Markdown escapes it by itself."""
    parts, done = [], 0
    for code in _CODE.finditer(text):
        parts += [_escaped(text[done : code.start()]), code.group()]
        done = code.end()
    return "".join([*parts, _escaped(text[done:])])


def _escaped(text: str) -> str:
    return html.escape(text, quote=False).replace("![", "&#33;[")
