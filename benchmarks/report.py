"""Draw the pictures and write the numbers of docs/report.md from results/, and print it:

    python -m benchmarks.report                          # in seconds
    python -m benchmarks.report --pdf docs/report.pdf    # needs Chromium

The numbers of its translations, docs/report.*.md, are written too.
"""

import hashlib
import re
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import quiet  # noqa: F401 (before PEFT)

from markdown_it import MarkdownIt

from benchmarks.pictures import PICTURES, write_pictures
from benchmarks.report_numbers import with_numbers
from benchmarks.rows import ROOT
from utils import UserError, flag, run_script, write_whole


DOCS = ROOT / "docs"
REPORT = DOCS / "report.md"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PRINT = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-pdf-header-footer")
PRINT_SECONDS = 60
STYLE = """
@page { size: A4; margin: 11mm 13mm }
body { font: 8.8pt/1.32 "DejaVu Sans", Verdana, sans-serif; color: #1f2328 }
h1 { font-size: 15pt; margin: 0 0 4pt } h2 { font-size: 10.5pt; margin: 8pt 0 2pt; break-after: avoid }
p { margin: 3pt 0 } p em { font-style: normal; font-size: 7pt; color: #59636e }
table { border-collapse: collapse; margin: 5pt 0; font-size: inherit } thead { display: none }
td { border: 0.5pt solid #d1d9e0; padding: 2pt 5pt }
code { font-family: "DejaVu Sans Mono", monospace; font-size: 8pt } picture + picture { margin-left: 1% }
img { width: 100% } img[width] { width: 49% } picture { break-inside: avoid }
"""


@dataclass(kw_only=True)
class ReportConfig:
    pdf: str | None = flag(None, "also print the report to this file")


def main(config: ReportConfig) -> dict[str, Any]:
    write_pictures()
    for document in sorted(DOCS.glob("report*.md")):
        document.write_text(with_numbers(document.read_text()))
    if config.pdf:
        print_pdf(Path(config.pdf))
    return {"pictures": len(PICTURES), "output": config.pdf or str(REPORT.relative_to(ROOT))}


def print_pdf(path: Path) -> None:
    """Print docs/report.md with Chromium. The file's last line is a PDF comment with `digest`.

    Raises:
        UserError: there is no Chromium, or it does not print.
    """
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        raise UserError("--pdf: there is no Chromium on this machine: apt-get install chromium")
    with TemporaryDirectory() as folder:
        page, printed = Path(folder) / "report.html", Path(folder) / "report.pdf"
        page.write_text(report_html().replace("<head>", f'<head><base href="{DOCS.as_uri()}/">'))
        command = [program, *PRINT, f"--print-to-pdf={printed}", page.as_uri()]
        with suppress(subprocess.TimeoutExpired):
            subprocess.run(command, capture_output=True, timeout=PRINT_SECONDS)
        if not printed.exists():
            raise UserError(f"--pdf: {program} has printed nothing: does it start, and is it Chromium?")
        write_whole(path, printed.read_bytes() + f"% {digest()}\n".encode())


def report_html() -> str:
    """The report as a page to print. Links into the repository are left out: they lead nowhere on paper; so is the
    line that leads to the translation."""
    text = re.sub(r"^\[\S+\]\(report\.\S+\)\n\n", "", REPORT.read_text(), flags=re.M)
    body = MarkdownIt("commonmark").enable("table").render(text)
    body = re.sub(r'<a href="(?!https?:)[^"]*">(.*?)</a>', r"\1", body, flags=re.S)
    head = f'<meta charset="utf-8"><title>MGM-2B on a small GPU</title><style>{STYLE}</style>'
    return f"<!DOCTYPE html><html><head>{head}</head><body>{body}</body></html>"


def digest() -> str:
    """Of all that a printed report shows: another one is out of date."""
    pictures = [DOCS / name for name in re.findall(r' src="([^"]+)"', report_html())]
    return hashlib.sha256(report_html().encode() + b"".join(path.read_bytes() for path in pictures)).hexdigest()


if __name__ == "__main__":
    run_script(main, ReportConfig)
