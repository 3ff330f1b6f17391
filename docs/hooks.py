"""What mkdocs does not know of this repository: links that leave docs/, and pages that have no others beside them."""

import re

#: [text](../launch/README.md): beside docs/ there is no page to go to.
_OUTSIDE = re.compile(r"\[([^]]+)\]\((\.\./(?!\.\.)[^)]+)\)")


def on_page_markdown(markdown, page, **_):
    """Returns a page's text with each link that leaves docs/ as the name of the file."""
    if page.parent is None:
        page.meta.setdefault("hide", ["navigation"])  # a column with nothing else in it
    if "/" in page.file.src_uri:
        return markdown
    return _OUTSIDE.sub(lambda link: f"{link[1]} (`{link[2].removeprefix('../')}`)", markdown)
