"""`dipper report`: what all experiments found, on one page for people, in docs/results.md, and in the README.

    report = Report.of("experiments")
    report.html()                     # one page that needs nothing else: styles and figures are in it
    report.markdown("../experiments/figures")
    report.headline                   # what is published beside what was found here

The same results give the same bytes: nothing here looks at a clock.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dipper.drawings import draw_all, shown
from dipper.drawings.abstract import NOTES, headline_table
from dipper.errors import ConfigError
from dipper.files import check_target, whole_file
from dipper.sheets import NOT_MEASURED, Book, Sheet, Table

if TYPE_CHECKING:
    from jinja2 import Template

    from dipper.experiment import Experiment

__all__ = ["Report", "Section", "put_between_markers", "write_report"]

MARKERS = ("<!-- results -->", "<!-- /results -->")
TITLE = "dipper: the paper's tables and figures, rerun"
ABOUT = (
    "What arXiv 2412.01380 (Dynamic Input Pruning and cache-aware masking) shows, measured and simulated again, and "
    "what goes beyond it. Every caption says what is real, simulated or generated. `dipper reproduce NAME` measures "
    "one again."
)
FOLDED = 14  # a longer table opens when it is asked for
WRAPPED = 36  # letters of a cell from which on a table's lines are broken


# ------------------------------------------------------------------------------------------------ sections


@dataclass(frozen=True, kw_only=True)
class Section:
    """One experiment on the page.

    Attributes:
        marks: what is stale or missing, in words.
        sources: lines of provenance.
        figure: the SVG; None: nothing to draw.
    """

    name: str
    title: str
    published: str
    caption: str
    marks: tuple[str, ...]
    tables: tuple[Table, ...]
    sources: tuple[str, ...]
    figure: str | None

    @property
    def state(self) -> str:
        """done, partly or missing."""
        return "missing" if not self.tables else "partly" if self.marks else "done"


def _section(book: Book, experiment: Experiment, drawn: Mapping[str, Path]) -> Section:
    sheets = book.sheets(experiment.name)
    figure = drawn.get(experiment.name)
    return Section(
        name=experiment.name,
        title=experiment.title,
        published=experiment.published,
        caption=experiment.caption,
        marks=tuple(_marks(book, experiment, sheets)),
        tables=tuple(t for t in shown(book, experiment.name).tables if t["rows"]) if sheets else (),
        sources=tuple(_sources(sheets)),
        figure=None if figure is None else figure.read_text(encoding="utf-8"),
    )


def _marks(book: Book, experiment: Experiment, sheets: Sequence[Sheet]) -> Iterator[str]:
    for sheet in sheets:
        states = {"stale, the code has changed since": "stale", NOT_MEASURED: "missing"}
        told = [f"{n} {words}" for words, state in states.items() if (n := sheet.count(state))]
        if told:
            yield f"{sheet.title}, of {len(sheet.cells)} cells: {'; '.join(told)}"
    unmeasured = book.unmeasured(experiment.name)
    if unmeasured:
        yield f"{NOT_MEASURED}: {', '.join(unmeasured)}"


def _sources(sheets: Sequence[Sheet]) -> Iterator[str]:
    """Where results are from: the model, then every run that added to them; then the data of all."""
    data: dict[str, str] = {}
    for sheet in sheets:
        content = sheet.content
        sha256 = content["model"]["sha256"]
        runs = list(dict.fromkeys(_run(run) for run in content["runs"]))
        yield f"{sheet.title}: {f'sha256 {sha256[:12]}' if sha256 else 'a shape without weights'}; {'; '.join(runs)}"
        data |= content["data"]
    if data:
        yield "Data: " + ", ".join(f"{name} {sha256[:12]}" for name, sha256 in sorted(data.items()))


def _run(run: Mapping[str, Any]) -> str:
    commit = run.get("commit")
    words = ["commit unknown" if commit is None else f"commit {commit[:9]}{' (dirty)' if run.get('dirty') else ''}"]
    words += [str(run["time"])[:10]] if run.get("time") else []
    words += [str(run.get("gpu") or run.get("cpu") or "device unknown")]
    versions = {"dipper": "dipper", "python": "Python", "torch": "torch", "numpy": "NumPy"}
    words += [f"{name} {run[key]}" for key, name in versions.items() if run.get(key)]
    return ", ".join(words)


# ------------------------------------------------------------------------------------------------ the report


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that is told, before it has a form."""

    headline: Table
    sections: tuple[Section, ...]

    @classmethod
    def of(cls, folder: str | os.PathLike[str]) -> Report:
        """Reads the results of a folder of experiments, and draws their figures.

        Raises:
            ConfigError: there are no experiments, a file is damaged, or matplotlib is missing.
        """
        book = Book.open(folder)
        drawn = draw_all(folder, book)
        sections = (_section(book, experiment, drawn) for experiment in book.experiments.values())
        return cls(headline=headline_table(book), sections=tuple(sections))

    def html(self) -> str:
        """One page that needs nothing else."""
        return _template().render(
            title=TITLE, about=ABOUT, notes=NOTES, headline=self.headline, sections=self.sections, folded=FOLDED
        )

    def markdown(self, figures: str) -> str:
        """The same for docs.

        Args:
            figures: their folder, as seen from the file.
        """
        parts = [f"# {TITLE}", "Written by `dipper report`; do not edit.", ABOUT, *self._headline_parts()]
        for section in self.sections:
            parts += [f"## {section.title}", *_section_parts(section, figures)]
        return "\n\n".join(parts) + "\n"

    def summary(self, details: str) -> str:
        """The headline alone, for the README.

        Args:
            details: where all results are, as seen from the README.
        """
        return "\n\n".join([*self._headline_parts(), f"All tables and figures: [{Path(details).name}]({details})."])

    def _headline_parts(self) -> list[str]:
        rows = [[cell.replace("; ", "<br>") for cell in row] for row in self.headline["rows"]]
        shown_table = _markdown_table({**self.headline, "rows": rows})
        return [f"**{self.headline['title']}**", shown_table, "\n".join(f"- {note}" for note in NOTES)]


def _section_parts(section: Section, figures: str) -> Iterator[str]:
    yield f"`{section.name}`" + (f": {section.published}." if section.published else ": not in the paper.")
    if section.marks:
        yield "\n".join(f"- **{mark}**" for mark in section.marks)
    if section.figure is not None:
        yield f"![{section.title}]({figures}/{section.name}.svg)"
    yield section.caption
    for shown_table in section.tables:
        rows = _markdown_table(shown_table)
        if len(shown_table["rows"]) > FOLDED:
            yield f"<details><summary>{shown_table['title']}</summary>\n\n{rows}\n\n</details>"
        else:
            yield f"**{shown_table['title']}**\n\n{rows}"
    if section.sources:
        yield "\n".join(["Provenance:", "", *(f"- {line}" for line in section.sources)])


def _markdown_table(shown_table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    columns = shown_table["columns"]
    return "\n".join([line(columns), "|" + "---|" * len(columns), *map(line, shown_table["rows"])])


# ------------------------------------------------------------------------------------------------ files


def put_between_markers(text: str, content: str, where: str) -> str:
    """A text with what stands between the markers replaced.

    Raises:
        ConfigError: the markers are missing, more than one pair, or the wrong way round.
    """
    first, last = MARKERS
    if text.count(first) != 1 or text.count(last) != 1 or text.index(first) > text.index(last):
        raise ConfigError(
            f"{where} has no place for the results: write one line {first} and below it one line {last} where they "
            "belong"
        )
    before, after = text[: text.index(first)], text[text.index(last) :]
    return f"{before}{first}\n\n{content}\n\n{after}"


def write_report(
    experiments: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None,
    docs: str | os.PathLike[str] | None,
    readme: str | os.PathLike[str] | None,
) -> list[Path]:
    """Draws all figures and writes the page, the document and the README's table; None: not that one.

    Returns:
        What was written.

    Raises:
        ConfigError: as `Report.of` and `put_between_markers`, or a folder is missing; nothing is written then.
    """
    for path in (out, docs):
        check_target(path)
    told = None if readme is None else _read_marked(readme)  # before figures are drawn
    report = Report.of(experiments)
    contents: dict[Path, str] = {}
    if out is not None:
        contents[Path(out)] = report.html()
    if docs is not None:
        contents[Path(docs)] = report.markdown(_seen_from(docs, Path(experiments) / "figures"))
    if readme is not None and told is not None:
        details = _seen_from(readme, Path(docs if docs is not None else "docs/results.md"))
        contents[Path(readme)] = put_between_markers(told, report.summary(details), str(readme))
    for path, content in contents.items():
        with whole_file(path) as file:
            file.write(content.encode())
    return list(contents)


def _read_marked(readme: str | os.PathLike[str]) -> str:
    """A README that has the markers."""
    try:
        text = Path(readme).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{readme} cannot be read ({error.strerror}): give the README as --readme FILE") from None
    put_between_markers(text, "", str(readme))
    return text


def _seen_from(file: str | os.PathLike[str], target: Path) -> str:
    """A path as a link in a file has it."""
    return Path(os.path.relpath(target, Path(file).parent)).as_posix()


# ------------------------------------------------------------------------------------------------ HTML


@lru_cache(maxsize=1)
def _template() -> Template:
    from importlib import resources

    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["inline"] = _inline
    environment.filters["code"] = _code
    environment.filters["wide"] = lambda rows: any(len(cell) > WRAPPED for row in rows for cell in row)
    source = resources.files("dipper").joinpath("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source)


def _inline(svg: str, name: str, title: str) -> Any:
    """An SVG file as an element of the page: ids of its own, scalable, named for those who do not see it."""
    from markupsafe import Markup, escape

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    width, height = (float(size) for size in re.findall(r'(?:width|height)="([\d.]+)pt"', svg)[:2])
    natural = width * 4 / 3  # pt to CSS px; on a phone one panel fills the screen
    head = f'<svg role="img" aria-label="{escape(title)}" style="--wide:{natural:.0f}px;--phone:{0.92 * natural:.0f}px"'
    svg = re.sub(r"<svg", head, svg, count=1)
    svg = svg.replace(f'width="{width:g}pt"', "", 1).replace(f'height="{height:g}pt"', "", 1)
    return Markup(svg)


def _code(text: str) -> Any:
    """Escaped, with `code` as such."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))
