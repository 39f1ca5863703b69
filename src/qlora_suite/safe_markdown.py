"""What a model or a person says as HTML that a parser of Markdown made: none of theirs is in it, and no picture is fetched.

The page's own Markdown would read it again. It is one block of HTML to it, for no line in it is blank, and stays as it is.
"""

import re

from markdown_it import MarkdownIt

_MARKDOWN = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable("table").disable("image")
_BLOCK_OF_CODE = re.compile(r"<pre>.*?</pre>", re.DOTALL)


def safe_markdown(text: str) -> str:
    """Headings, lists, tables, emphasis, links and code are what they are; everything else is shown as it was written."""
    if not text.strip():
        return ""
    made = _BLOCK_OF_CODE.sub(lambda block: block[0].replace("\n", "&#10;"), _MARKDOWN.render(text))
    made = re.sub(r"\n+", "\n", made).strip()
    return f"<div>{made}</div>"
