"""Build the site from docs with zensical, strictly: `python docs/generate_site.py [-o site]`.

Pages and sources elsewhere in the repository that a page links to become pages of the site. Formulas become MathML,
which browsers draw themselves. A page that would fetch anything from another host is an error: the site needs no
network, neither to be built nor to be read. Its search works from disk, too, where a page can fetch no index and start
no worker.
"""

import argparse
import posixpath
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path
from tempfile import TemporaryDirectory

from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
OFFLINE = "offline.js"
"""What lets the search run from disk. The theme takes its index from `search.js` there, as `__index`."""
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "bench/README.md": "measurements.md",
}
"""Pages outside docs, and what they are on the site. The README's part is played by index.md."""
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".sh": "bash"}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)#\s]+)(#[^)]*)?\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.S)
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source|link(?![^>]*canonical))\b[^>]*?(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)"""
)


class SiteError(Exception):
    """What makes the site wrong."""


def main() -> int:
    """Build it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "site")
    output = parser.parse_args().output.resolve()
    try:
        with TemporaryDirectory() as folder:
            built = build(Path(folder))
            for page in built.rglob("*.html"):
                finish(page, page.relative_to(built))
            shutil.rmtree(output, ignore_errors=True)
            shutil.copytree(built, output)
    except SiteError as error:
        print(f"site: {error}", file=sys.stderr)
        return 1
    print(f"{output}/index.html")
    return 0


def build(folder: Path) -> Path:
    """Gather all pages in a folder and build there; returns where the site is."""
    shutil.copy(ROOT / "mkdocs.yml", folder)
    (folder / "src").symlink_to(ROOT / "src")
    for name, text in gather().items():
        (folder / "docs" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "docs" / name).write_text(text, encoding="utf-8")
    shutil.copytree(DOCS / "images", folder / "docs" / "images")
    shutil.copy(DOCS / OFFLINE, folder / "docs")
    for name in re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()):
        if not (folder / "docs" / name).is_file():
            raise SiteError(f"mkdocs.yml names {name}, which is not there")
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    told = re.sub(r"\x1b\[[\d;]*m", "", done.stdout + done.stderr)  # without colours
    if done.returncode or re.search("warning|error", told, re.I):
        raise SiteError(told.partition("Traceback")[0])
    site = folder / "site"
    scripts = "".join(path.read_text(encoding="utf-8") for path in site.glob("assets/javascripts/bundle.*.js"))
    if "search.js" not in scripts or "__index" not in scripts:
        raise SiteError("the theme reads its index from elsewhere now: search from disk has to be made anew")
    index = (site / "search.json").read_text(encoding="utf-8")
    (site / "search.js").write_text(f"var __index = {index};\n", encoding="utf-8")
    return site


def gather() -> dict[str, str]:
    """The site's pages by name: those of docs, those of `PAGES`, and the sources that they link to."""
    sources: set[Path] = set()
    paths = {path: path.name for path in DOCS.glob("*.md")}
    paths |= {ROOT / path: name for path, name in PAGES.items() if path != "README.md"}
    pages = {name: rewrite(path.read_text(encoding="utf-8"), path, sources) for path, name in paths.items()}
    for path in sources:
        text = path.read_text(encoding="utf-8")
        code = f"`````{LANGUAGES[path.suffix]}\n{text}\n`````\n"
        pages[_page_of(path)] = f"---\nsearch:\n  exclude: true\n---\n# {path.relative_to(ROOT)}\n\n{code}"
    return pages


def rewrite(markdown: str, page: Path, sources: set[Path]) -> str:
    """A page with its links as they are on the site; the sources that it links to are added to `sources`.

    Links to what the site does not have, such as folders, become plain text.
    """

    def one(match: re.Match[str]) -> str:
        picture, text, target, anchor = match.groups()
        if re.match(r"[a-z]+:", target):
            return match[0]
        path = (page.parent / target).resolve()
        path = path / "README.md" if (path / "README.md").is_file() else path
        if path.is_relative_to(DOCS):
            name = posixpath.relpath(path, DOCS)
        elif path.relative_to(ROOT).as_posix() in PAGES:
            name = PAGES[path.relative_to(ROOT).as_posix()]
        elif path.is_file() and path.suffix in LANGUAGES:
            sources.add(path)
            name = _page_of(path)
        elif path.exists():
            return str(text)
        else:
            raise SiteError(f"{page.relative_to(ROOT)} links to {target}, which is not there")
        return f"{picture}[{text}]({name}{anchor or ''})"

    return LINK.sub(one, markdown)


def _page_of(source: Path) -> str:
    return f"source/{source.relative_to(ROOT).with_suffix('.md').as_posix()}"


def finish(page: Path, name: Path) -> None:
    """Formulas as MathML, and nothing from elsewhere."""
    html = page.read_text(encoding="utf-8")
    if fetched := FETCHED.findall(html):
        raise SiteError(f"{name} would fetch {', '.join(fetched)}")
    page.write_text(FORMULA.sub(_formula, html), encoding="utf-8")


def _formula(match: re.Match[str]) -> str:
    display = "block" if match[1] == "div" else "inline"
    return str(convert(unescape(match[2]).strip()[2:-2], display=display))


if __name__ == "__main__":
    sys.exit(main())
