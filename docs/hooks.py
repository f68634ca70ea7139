"""Hooks of MkDocs that add pages: files outside docs/, `--help` of each command, and the table of the public names."""

import os
import re
import subprocess
import sys
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import mobilevit
from mobilevit.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
SOURCE_LINK = re.compile(r"\]\((?:\.\./)?(src/[\w/]+)\.py\)")
PUBLIC_NAME = re.compile(rf"<code>({'|'.join(mobilevit.__all__)})</code>(?!</a)")
QUALIFIED_NAME = re.compile(r"<code>(mobilevit\.[\w.]+)</code>(?!</a)")
HELP_COLUMNS = "100"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/. Files of the repository keep their path, so that links between them work."""

    def add(path: str, content: str | bytes) -> None:
        files.append(File.generated(config, path, content=content))

    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("benchmarks/**/*.md")]
    for path in [*pages, *ROOT.glob("benchmarks/**/*.png")]:
        add(path.relative_to(ROOT).as_posix(), path.read_bytes())
    add("benchmarks/measurements.md", _measurements())
    for page in [*pages, *ROOT.glob("docs/*.md")]:
        for source in SOURCE_LINK.findall(page.read_text(encoding="utf-8")):
            code = (ROOT / f"{source}.py").read_text(encoding="utf-8")
            add(f"{source}.md", f"---\nhide: [navigation, toc]\n---\n\n# {source}.py\n\n```python\n{code}```\n")
    add("commands/index.md", _help())
    for command in COMMANDS:
        add(f"commands/{command}.md", _help(command))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Adapt links and code blocks: in the site, the pages of docs/ are in its root, together with README.md."""
    path = page.file.src_uri
    if path == "reference/index.md":
        return markdown.replace("<!-- public names -->", _public_names())
    if path == "README.md":
        page.meta["hide"] = ["navigation"]
    if "/" not in path:
        markdown = markdown.replace("](../", "](")
    markdown = (
        markdown.replace("](docs/", "](")
        .replace("](../docs/", "](../")
        .replace("](benchmarks/)", "](benchmarks/measurements.md)")
    )
    return SOURCE_LINK.sub(r"](\1.md)", markdown).replace("```python no-run\n", "```python\n")


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Link code such as `mobilevit.load`, and `load` within the API reference, to its documentation if there is any."""
    html = QUALIFIED_NAME.sub(r'<autoref identifier="\1" optional>\g<0></autoref>', html)
    if page.file.src_uri.startswith("reference/"):
        html = PUBLIC_NAME.sub(r'<autoref identifier="mobilevit.\1" optional>\g<0></autoref>', html)
    return html


def _help(*command: str) -> str:
    """A page with the output of `mobilevit COMMAND --help`."""
    output = subprocess.run(
        [sys.executable, "-m", "mobilevit", *command, "--help"],
        env=os.environ | {"COLUMNS": HELP_COLUMNS, "NO_COLOR": "1"},
        check=True,
        capture_output=True,
        encoding="utf-8",
    ).stdout
    title = " ".join(["mobilevit", *command])
    return f"---\nhide: [toc]\n---\n\n# {title}\n\n```text\n{output}```\n"


def _measurements() -> str:
    """A page that links to the measurements in benchmarks/."""
    lines = ["# Measurements", "", "| file | content |", "|---|---|"]
    for path in sorted(ROOT.glob("benchmarks/**/*.md")):
        name = path.relative_to(ROOT / "benchmarks").as_posix()
        title = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        lines.append(f"| [{name}]({name}) | {title} |")
    return "\n".join(lines) + "\n"


def _public_names() -> str:
    """A table of the names of `mobilevit` with links to their documentation; a missing one fails the strict build."""
    package = griffe.load("mobilevit", search_paths=[ROOT / "src"], resolve_aliases=True)
    lines = ["| name | description |", "|---|---|"]
    for name in sorted(mobilevit.__all__, key=str.lower):
        docstring = package[name].docstring
        first = docstring.value.partition("\n\n")[0] if docstring else ""
        lines.append(f"| [`{name}`][mobilevit.{name}] | {' '.join(first.split())} |")
    return "\n".join(lines) + "\n"
