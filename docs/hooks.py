"""The site's pages of what lies outside docs/ and of the API, and the links between all of them."""

import ast
import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "training/README.md", "checkpoints/*/README.md")
SHOWN = [path.relative_to(ROOT).as_posix() for name in (*PAGES, "checkpoints/*/*.png") for path in ROOT.glob(name)]
LINK = re.compile(r"\[([^\]]+)\]\(([^)\s#:]+)(#[^)\s]*|)\)")  # of a page or a picture, not a URL


def on_config(config: Any) -> None:
    cards = sorted(path for path in SHOWN if path.startswith("checkpoints/") and path.endswith(".md"))
    next(entry for entry in config.nav if "Models" in entry)["Models"] = cards


def on_files(files: Files, config: Any) -> None:
    for path in SHOWN:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    for title, names in config.extra["api"].items():
        parts = [settings(name) if name.endswith("Settings") else f"::: ctrl_csc_hf.{name}" for name in names]
        files.append(File.generated(config, f"api/{title.lower()}.md", content="\n\n".join([f"# {title}", *parts])))


def settings(name: str) -> str:
    """A table of the flags of a dataclass of settings."""
    *module, title = name.split(".")
    tree = ast.parse((ROOT / "src" / "ctrl_csc_hf" / Path(*module)).with_suffix(".py").read_text(encoding="utf-8"))
    known: dict[str, Any] = {"option": lambda default, help, **_: (default, help)}
    known["field"] = lambda default_factory, metadata: (default_factory(), metadata["help"])
    rows = [f"## {title} {{ #ctrl_csc_hf.{name} }}", "", "| flag | default | meaning |", "| --- | --- | --- |"]
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SCHEDULERS":  # a meaning names them
            known["SCHEDULERS"] = ast.literal_eval(node.value)
        if isinstance(node, ast.ClassDef) and node.name == title:
            for entry in (entry for entry in node.body if isinstance(entry, ast.AnnAssign)):
                default, meaning = eval(ast.unparse(entry.value), known)
                rows.append(f"| `--{entry.target.id}` | `{default}` | {meaning.replace('|', '&#124;')} |")
    return "\n".join(rows)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Maps the repository's links to the site's, whose topmost folder is docs/."""
    here = page.file.src_uri
    in_repository = join("docs", here) if (ROOT / "docs" / here).exists() else here

    def link(match: re.Match[str]) -> str:
        path = normpath(join(dirname(in_repository), match[2]))
        if path.startswith("src/"):  # to the entry in the API of the name that is the link's text
            return f"[{match[1]}][{path[4:-3].replace('/', '.')}.{match[1].strip('`')}]"
        if files.get_file_from_path(path.removeprefix("docs/")):
            return f"[{match[1]}]({relpath(path.removeprefix('docs/'), dirname(here) or '.')}{match[3]})"
        return match[1] if (ROOT / path).exists() else match[0]

    return LINK.sub(link, markdown)
