"""Markdown of the repository's page as Python-Markdown reads it: lists, blocks of code in them, and formulas.

In: lines or text of a page. Out: the same with other indentation, and formulas as MathML, which browsers draw without a script.
"""

from __future__ import annotations

import re

from latex2mathml.converter import convert

FENCE = re.compile(r"^ *(?P<fence>```+|~~~+) *(?P<language>[\w-]*)")
ITEM = re.compile(r"(?P<indent> *)(?P<marker>[-*+]|\d+[.)])(?P<gap> +)")
CODE_OR_FORMULA = re.compile(
    r"^ *(?P<fence>```+|~~~+)[^\n]*\n.*?^ *(?P=fence) *$|`[^`\n]+`"
    r"|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$\s](?:[^$\n]*[^$\s])?)\$",
    re.MULTILINE | re.DOTALL,
)
CODE = re.compile(r"`[^`\n]+`")
FOLDED = re.compile(r"^<(details|div)\b(?![^>]*\bmarkdown=)")
TAG = re.compile(r"\\tag\{(\w+)\}")


def with_code_marked(lines: list[str]) -> list[tuple[str, bool]]:
    """Each line, and whether it belongs to a fenced block."""
    marked, fence = [], ""
    for line in lines:
        match = FENCE.match(line)
        marked.append((line, bool(fence or match)))
        if match and not fence:
            fence = match["fence"]
        elif match and line.strip() == fence:
            fence = ""
    return marked


def indented_by_four(lines: list[str]) -> list[str]:
    """Indent what belongs to a list item by four columns a level, and put an empty line before a list.

    On the repository's page the text of an item starts at the column of its first word. Python-Markdown requires four columns, and
    an empty line between a paragraph and a list.
    """
    result: list[str] = []
    columns: list[int] = []  # where the text of each open item starts
    after_gap = True  # whether the line above is empty
    was_code = False
    for line, in_code in with_code_marked(lines):
        text = line.lstrip(" ")
        if not text:
            result.append("")
            after_gap, was_code = True, in_code
            continue
        indent = len(line) - len(text)
        item = None if in_code else ITEM.match(line)
        if item and not columns and not after_gap and item["marker"][0] not in "-*+1":
            item = None  # a number at the start of a line of a paragraph; only 1 starts a list there
        opens_code = in_code and not was_code
        if item or opens_code or (after_gap and not in_code):  # else the line continues a paragraph or a block of code
            while columns and indent < columns[-1]:
                columns.pop()
        if item:
            if not columns and not after_gap and not ITEM.match(result[-1]) and not result[-1].startswith("    "):
                result.append("")
            result.append(f"{' ' * 4 * len(columns)}{item['marker']} {line[item.end() :]}")
            columns.append(item.end())
        else:
            nested = max(0, indent - (columns[-1] if columns else 0))
            if opens_code and (fence := FENCE.match(line)):
                text = fence["fence"] + fence["language"]  # the name of a file after the language is not shown
            elif not in_code and indent == 0:
                text = FOLDED.sub(r'<\1 markdown="1"', text)  # else Markdown in such a block stays as it is
            if not in_code and text.startswith("|"):
                text = CODE.sub(lambda code: code[0].replace("\\|", "|"), text)  # Python-Markdown keeps the backslash
            result.append(" " * (4 * len(columns) + nested) + text)
        after_gap, was_code = False, in_code
    return result


def take_formulas(markdown: str, formulas: list[str]) -> str:
    """Replace `$...$` and `$$...$$` outside code by placeholders, whose MathML is appended to `formulas`."""

    def take(match: re.Match[str]) -> str:
        formula = match["block"] or match["inline"]
        if formula is None:
            return match[0]
        if match["inline"]:
            formulas.append(convert(formula))
        else:
            number = TAG.search(formula)
            mathml = convert(TAG.sub("", formula), display="block")
            formulas.append(f'<span class="formula">{mathml}<span>({number[1]})</span></span>' if number else mathml)
        return _placeholder(len(formulas) - 1)

    return CODE_OR_FORMULA.sub(take, markdown)


def put_formulas(html: str, formulas: list[str]) -> str:
    """Put the MathML where its placeholders are."""
    for number, mathml in enumerate(formulas):
        html = html.replace(_placeholder(number), mathml)
    return html


def _placeholder(number: int) -> str:
    return f"FORMULA-{number}-"
