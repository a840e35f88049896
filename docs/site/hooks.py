"""Hooks of mkdocs.yml: the site is laid out as the repository, with pages for files outside docs/ and an API reference.

In: Markdown pages and the repository. Out: the pages mkdocs renders. README.md becomes the home page. A file that a page links, or a
source file that it names, becomes a page with its text; docs/reference.md is made from the names of `minilmv2.__all__`.
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path, PurePosixPath

from dialect import indented_by_four, put_formulas, take_formulas, with_code_marked  # mkdocs imports from this folder
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from notebook import notebook_as_markdown

REPO = Path(__file__).resolve().parents[2]
RESULTS = "benchmarks/results"
PAGES = ("*.md", "docs/*.md", "samples/*.md", "examples/*.md", "ds_configs/*.md", f"{RESULTS}/*.md")
COPIED = ("docs/images/*.png", f"{RESULTS}/*.png", "docs/site/*.js", "docs/site/*.css")
# A file that is only named in a code span is shown if it has one of these endings, in one of these folders: others may be private.
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".sh": "bash", ".toml": "toml", ".txt": "text"}
FOLDERS = "benchmarks containers data_prep demo docs ds_configs examples minilmv2 pipeline recipes slurm tests".split()
REFERENCE = "docs/reference.md"
TYPES = ("pipeline.distillation.models.student.StudentConfig", "pipeline.distillation.config.RelationsConfig")
LINK = re.compile(r"\]\((?P<target>[^)#\s:]+)(?P<anchor>#[^)\s]*)?\)")
NAME_IN_CODE = re.compile(r"(?<![`\[\w])`(?P<name>[\w./-]+)`(?!`)")


def slug(heading: str, separator: str = "-") -> str:
    """The anchor that hosting sites give to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", separator)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Anchors as on the repository's page; the measurements, newest first, close the navigation's last section."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slug
    results = [{_title_with_date(name): name} for name in reversed(_found((f"{RESULTS}/*.md",)))]
    (last_section,) = (config.nav or [])[-1].values()
    last_section.append({"Measurements": results})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace the files of docs/ by those of the repository that belong to the site, under their paths in the repository."""
    chosen = Files([file for file in files if file.src_dir != config.docs_dir])  # those of the theme
    pages = _found(PAGES)
    for name in (*pages, *_found(COPIED)):
        chosen.append(File(name, str(REPO), config.site_dir, use_directory_urls=False))
    others = {name for page in pages for name in (*_linked_by(page), *filter(may_be_shown, _named_by(page)))}
    for name in sorted(others - set(chosen.src_uris)):
        uri = f"{name}/index.md" if (REPO / name).is_dir() else f"{name}.md"
        try:
            page = File.generated(config, uri, content=as_page(name), inclusion=InclusionLevel.NOT_IN_NAV)
        except UnicodeDecodeError:  # not text: a picture, an archive
            page = File(name, str(REPO), config.site_dir, use_directory_urls=False)
        chosen.append(page)
    chosen.append(File.generated(config, REFERENCE, content=reference()))
    return chosen


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Link the files that a page names, and write lists and formulas as Python-Markdown reads them."""
    source = page.file.src_uri
    if page.file.generated_by:
        return markdown
    if source == "docs/api.md":
        for name in public_names():
            markdown = markdown.replace(f"\n| `{name}` |", f"\n| [`{name}`](reference.md#minilmv2.{name}) |")
    markdown = take_formulas(markdown, page.meta.setdefault("formulas", []))
    return "\n".join(indented_by_four(linked(markdown.split("\n"), source, files)))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the formulas into the rendered page."""
    return put_formulas(html, page.meta.get("formulas", []))


def public_names() -> list[str]:
    """The names of `minilmv2.__all__`, read without importing torch."""
    tree = ast.parse((REPO / "minilmv2" / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "_MODULES":
            return list(ast.literal_eval(node.value))
    raise ValueError("minilmv2/__init__.py defines no _MODULES")


def reference() -> str:
    """The page with the docstrings of the public names, and the fields of the two configurations that they accept."""
    parts = ["# API reference", "The names of `import minilmv2`. [Python API](api.md) has examples of their use."]
    parts += [f"::: minilmv2.{name}" for name in public_names()]
    parts += [f"::: {name}\n    options: {{members: false}}" for name in TYPES]
    parts += [
        "[Recipes](recipes.md) describes each field: they are the keys of the sections `student` and `relations`."
    ]
    return "\n\n".join(parts) + "\n"


def may_be_shown(name: str) -> bool:
    """Whether a file that is named but not linked becomes a page that shows its text."""
    path = PurePosixPath(name)
    return path.suffix in LANGUAGES and path.parts[0] in FOLDERS and (REPO / name).is_file()


def as_page(name: str) -> str:
    """The Markdown of a page that shows a file, a notebook or the names in a folder. Search leaves it out.

    Raises:
        UnicodeDecodeError: the file is not text
    """
    path = REPO / name
    if path.is_dir():
        body = "\n".join(
            f"- `{entry.name}`" for entry in sorted(path.iterdir()) if not entry.name.startswith(("_", "."))
        )
    elif path.suffix == ".ipynb":
        body = notebook_as_markdown(path.read_text(encoding="utf-8"))
    else:
        fence = "~" * 8
        body = f"{fence} {LANGUAGES.get(path.suffix, 'text')}\n{path.read_text(encoding='utf-8').rstrip()}\n{fence}"
    heading = "" if body.startswith("# ") else f"# {name}\n\n"
    return f"---\nsearch: {{exclude: true}}\n---\n{heading}{body}\n"


def linked(lines: list[str], source: str, files: Files) -> list[str]:
    """Turn links to files into links to their pages, and names of files in code spans into links."""
    folder = PurePosixPath(source).parent

    def page_of(path: str) -> str | None:
        names = (path, f"{path}.md", f"{path}/index.md")
        name = next((name for name in names if files.get_file_from_path(name)), None)
        return name and os.path.relpath(name, folder)

    def link(match: re.Match[str]) -> str:
        target = page_of(os.path.normpath(folder / match["target"]))
        return f"]({target or match['target']}{match['anchor'] or ''})"

    def name_in_code(match: re.Match[str]) -> str:
        name = match["name"]
        target = page_of(name) if "/" in name and name != source else None
        return f"[`{name}`]({target})" if target else match[0]

    return [
        line if in_code else NAME_IN_CODE.sub(name_in_code, LINK.sub(link, line))
        for line, in_code in with_code_marked(lines)
    ]


def _found(patterns: tuple[str, ...]) -> list[str]:
    return sorted(path.relative_to(REPO).as_posix() for pattern in patterns for path in REPO.glob(pattern))


def _title_with_date(name: str) -> str:
    date = PurePosixPath(name).name[: len("2026-11-27")]
    title = (REPO / name).read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
    return title if date in title else f"{title} ({date})"


def _linked_by(page: str) -> set[str]:
    """Paths in the repository that a page links."""
    folder = PurePosixPath(page).parent
    found = LINK.finditer((REPO / page).read_text(encoding="utf-8"))
    targets = {os.path.normpath(folder / match["target"]) for match in found}
    return {name for name in targets if not name.startswith(("..", "/")) and (REPO / name).exists()}


def _named_by(page: str) -> set[str]:
    return {match["name"] for match in NAME_IN_CODE.finditer((REPO / page).read_text(encoding="utf-8"))}
