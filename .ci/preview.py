"""`preview.py readme` writes README.md from nbs/index.ipynb; `preview.py site` writes _docs/ and checks its links.

Both start from what nbdev hands to Quarto. The published site is Quarto's; this one shows the same pages without it.
"""

import base64
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pypandoc
import yaml
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs

ROOT = Path(__file__).resolve().parents[1]
NBS, DOCS, FIGURES = ROOT / "nbs", ROOT / "_docs", "README_files"
DIRECTIVE = re.compile(r"^#\|\s*([\w-]+):?\s*(.*)\n?", re.MULTILINE)
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title$</title><style>
body { margin: 0; display: grid; grid-template-columns: 13rem minmax(0, 50rem); gap: 2rem; font: 16px/1.55 sans-serif }
nav { padding: 1rem; background: #f5f5f2; min-height: 100vh } nav ul { list-style: none; padding-left: .6rem }
main { padding: 1rem } img { max-width: 100% }
pre { background: #f7f7f7; padding: .6rem; overflow-x: auto; font-size: .85rem }
table { border-collapse: collapse } td, th { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: left }
@media (max-width: 50rem) { body { display: block } nav { min-height: 0 } }
$highlighting-css$
</style></head><body><nav>$sidebar$</nav><main><h1>$title$</h1>
$if(description)$<p><em>$description$</em></p>$endif$
$if(toc)$<details><summary>On this page</summary>$toc$</details>$endif$
$body$</main></body></html>
"""


def stage(pattern: str = "") -> list[Path]:
    "Let nbdev prepare the notebooks as it does for Quarto; the staged copies."
    refresh_quarto_yml()
    folder = proc_nbs(n_workers=0, force=True, file_glob=pattern)
    return sorted(folder.glob(pattern or "*.ipynb"))


def fence(text: str, language: str = "") -> str:
    marks = "`" * (1 + max((len(run) for run in re.findall("`{2,}", text)), default=2))
    return f"{marks}{language}\n{ANSI.sub('', text).rstrip()}\n{marks}"


def show_output(output: dict[str, Any], name: str, folder: Path, html: bool) -> str:
    "One output as markdown; a picture is written to `folder`."
    data = {kind: "".join(value) for kind, value in output.get("data", {}).items() if isinstance(value, str | list)}
    if "text/markdown" in data:
        return data["text/markdown"]
    if "image/png" in data:
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.png").write_bytes(base64.b64decode(data["image/png"]))
        return f"![]({folder.name}/{name}.png)"
    if html and "text/html" in data:
        return f"```{{=html}}\n{data['text/html']}\n```"
    text = data.get("text/plain") or "".join(output.get("text", output.get("traceback", "")))
    return fence(text) if text.strip() else ""


def read_page(staged: Path, folder: Path, html: bool) -> tuple[dict[str, str], str]:
    "Front matter and markdown of a staged notebook, with Quarto's `echo`, `include` and `output` obeyed."
    meta: dict[str, str] = {}
    parts: list[str] = []
    for number, cell in enumerate(json.loads(staged.read_text(encoding="utf-8"))["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "raw":
            meta |= yaml.safe_load(source.strip().strip("-")) or {}
        elif cell["cell_type"] == "markdown":
            parts.append(source)
        else:
            options = dict(DIRECTIVE.findall(source))
            if options.get("include") == "false":
                continue
            if options.get("echo") != "false" and (code := DIRECTIVE.sub("", source).strip()):
                parts.append(fence(code, "python"))
            if options.get("output") != "false":
                name = f"{staged.stem}-{cell.get('id', number)}"
                shown = [show_output(o, f"{name}-{i}", folder, html) for i, o in enumerate(cell["outputs"])]
                parts += [text for text in shown if text]
    return meta, "\n\n".join(parts) + "\n"


def relink(text: str, change: Callable[[str], str]) -> str:
    "Change the target of each markdown link that stays within the project."
    return re.sub(r"\]\((?!https?:|mailto:|#|README_files)([^)\s]+)\)", lambda m: f"]({change(m[1])})", text)


def write_readme() -> None:
    "README.md from the index: links lead to the notebooks, pictures to README_files/."
    shutil.rmtree(ROOT / FIGURES, ignore_errors=True)
    meta, body = read_page(stage("index.ipynb")[0], ROOT / FIGURES, html=False)
    rooms = {path.stem.split("_", 1)[-1]: path.name for path in NBS.glob("*.ipynb")}

    def to_notebook(target: str) -> str:
        if found := re.fullmatch(r"/(\w+)\.html(#.*)?", target):  # nbdev's own link to a symbol
            return f"nbs/{rooms[found[1]]}"
        return target.removeprefix("../") if target.startswith("../") else f"nbs/{target}"

    promise = f"> {meta['description'].strip()}\n\n" if meta.get("description") else ""
    warning = "<!-- Written by `make prep` from nbs/index.ipynb: edit that. -->"
    body = body.replace("<!-- WARNING: THIS FILE WAS AUTOGENERATED! DO NOT EDIT! -->\n\n", "")
    text = f"# {meta['title']}\n\n{warning}\n\n{promise}{relink(body, to_notebook)}"
    (ROOT / "README.md").write_text(text, encoding="utf-8")


def sidebar(contents: list[Any], titles: dict[str, str]) -> str:
    "The sidebar of _quarto.yml as nested lists."
    rows = []
    for entry in contents:
        if isinstance(entry, dict):
            rows.append(f"<li>{escape(entry['section'])}{sidebar(entry['contents'], titles)}</li>")
        elif entry in titles:
            rows.append(f'<li><a href="{page_name(entry)}">{escape(titles[entry])}</a></li>')
    return f"<ul>{''.join(rows)}</ul>"


def page_name(notebook: str) -> str:
    return re.sub(r"^\d+_", "", notebook).replace(".ipynb", ".html")


def write_site() -> None:
    "One page for each notebook, in _docs/."
    shutil.rmtree(DOCS, ignore_errors=True)
    DOCS.mkdir()
    pages = {path.name: read_page(path, DOCS / "figures", html=True) for path in stage()}
    for picture in [p for p in NBS.rglob("*") if p.suffix in {".png", ".jpg", ".svg", ".webp"}]:
        (DOCS / picture.relative_to(NBS)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, DOCS / picture.relative_to(NBS))
    titles = {name: meta["title"] for name, (meta, _) in pages.items()}
    menu = sidebar(yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["sidebar"]["contents"], titles)
    template = DOCS / "template.tmp"
    template.write_text(TEMPLATE, encoding="utf-8")
    for name, (meta, body) in pages.items():
        text = relink(body, lambda target: re.sub(r"^(\d+_)?(\w+)\.ipynb", r"\2.html", target.removeprefix("/")))
        about = [f"--metadata={key}={meta[key].strip()}" for key in ("title", "description") if meta.get(key)]
        options = [f"--template={template}", "--toc", "--toc-depth=3", "--mathml", f"--variable=sidebar={menu}", *about]
        pypandoc.convert_text(text, "html5", "markdown", options, outputfile=str(DOCS / page_name(name)))
    template.unlink()


class Targets(HTMLParser):
    "The ids of a page, and what it points to."

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            if key == "id":
                self.ids.add(value or "")
            elif key in {"href", "src"} and value:
                self.links.append(value)


def broken_links() -> Iterator[str]:
    "Links and pictures of the site that lead nowhere; the web outside is not asked."
    pages = {path.name: Targets(path) for path in sorted(DOCS.glob("*.html"))}
    for name, page in pages.items():
        for link in page.links:
            if re.match(r"[a-z]+:", link):
                continue
            file, _, anchor = link.partition("#")
            if file and not (DOCS / file).is_file():
                yield f"{name}: {link} does not exist"
            elif anchor and (file or name) in pages and anchor not in pages[file or name].ids:
                yield f"{name}: {link} has no such place"


def main() -> None:
    if sys.argv[1:] == ["readme"]:
        write_readme()
    elif sys.argv[1:] == ["site"]:
        write_site()
        if broken := list(broken_links()):
            sys.exit("\n".join([f"{len(broken)} broken links:", *broken]))
        print(f"{len(list(DOCS.glob('*.html')))} pages, no broken link: open _docs/index.html")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
