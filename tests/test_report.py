import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from dipper.cli import main
from dipper.drawings import abstract
from dipper.drawings.abstract import headline_table
from dipper.errors import ConfigError
from dipper.experiment import results_path
from dipper.report import Report, put_between_markers, write_report
from dipper.savings import PAPER, savings
from dipper.sheets import Book
from samples import CONFIGS, write_samples

pytest.importorskip("matplotlib")

VOID = {"meta", "link", "br", "hr", "img", "input"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_samples(tmp_path_factory.mktemp("experiments") / "e", without=1, stale=True)


@pytest.fixture(scope="module")
def report(folder):
    return Report.of(folder)


@pytest.fixture(scope="module")
def page(report):
    return report.html()


class Checker(HTMLParser):
    """Whether elements are closed in order, what is loaded, and which ids there are."""

    def __init__(self):
        super().__init__()
        self.open, self.loaded, self.ids, self.tags = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.loaded += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def checked(page):
    checker = Checker()
    checker.feed(page)
    checker.close()
    return checker


def test_the_page_is_well_formed_and_has_everything(page, checked):
    assert checked.open == []
    assert len(checked.ids) == len(set(checked.ids))
    assert checked.tags.count("svg") == len(CONFIGS)
    for name in CONFIGS:
        assert f'<section id="{name}">' in page


def test_the_page_needs_nothing_else(page, checked):
    assert "script" not in checked.tags
    assert "link" not in checked.tags
    assert all(target.startswith("#") for target in checked.loaded), checked.loaded
    assert not re.search(r"url\((?!#)", page)
    assert "@import" not in page


def test_links_within_figures_lead_somewhere(page, checked):
    targets = {target[1:] for target in checked.loaded} | set(re.findall(r"url\(#([^)]+)\)", page))
    assert targets <= set(checked.ids)


def test_stale_and_missing_are_marked(report, page):
    density = report.sections[0]
    assert density.marks == (
        "Model small, of 17 cells: 1 stale, the code has changed since; 1 not measured",
        "not measured: other",
    )
    assert density.state == "partly"
    assert page.count("stale, the code has changed since") == len(CONFIGS) + 1  # headline has two models
    assert f"- **{density.marks[0]}**" in report.markdown("figures")


def test_provenance_is_told(report):
    assert report.sections[0].sources == (
        "Model small: sha256 abababababab; commit 012345678, 2026-01-02, A CPU, dipper 0.1.0, Python 3.11.7, "
        "torch 2.4.0",
        "Data: wiki.test.raw cdcdcdcdcdcd",
    )
    (phi,) = [line for line in report.sections[1].sources if "phi" in line]
    assert phi.startswith("Model phi-3-medium: a shape without weights; ")


def test_text_is_escaped_and_code_is_code(page):
    assert "Reads are not <code>free</code>." in page
    assert "<h2>Split of a density: a &lt; b</h2>" in page


def test_the_same_results_give_the_same_bytes(folder, page, report):
    again = Report.of(folder)
    assert again.html() == page
    assert again.markdown("f") == report.markdown("f")


def test_the_headline_says_what_cannot_be_had(tmp_path):
    table = headline_table(Book.open(write_samples(tmp_path / "e")))
    memory, throughput, perplexity = table["rows"]
    assert memory[1] == "−46\u00a0%"
    assert re.sub(r"\d+\u00a0%", "N", memory[2]).split("; ") == [
        f"{way} lfu, density {density}: −N, of the MLP's −N"
        for density in (0.8, 0.5)
        for way in ("dip", "dip-ca γ 0.5")
    ]
    assert throughput[3] == "Model small: −9\u00a0% (−22 to +4\u00a0%), dip lfu, density 0.8"
    assert throughput[4].replace("\u00a0", " ").split("; ") == [
        "Model small, held disk: +150 % (planes 20 % : 20 %, 3.6b), +50 % (planes 40 % : 20 %, 2.7b)",
        "Model small, disk as it is: +10 % (planes 20 % : 20 %, 3.6b), +30 % (planes 50 % : 20 %, 2.7b)",
    ]
    assert perplexity[2].replace("\u00a0", " ").split("; ") == [
        "cannot be had: needs the weights. The small models lose with", "dip, density 0.8: +2 %",
        "dip-ca γ 0.5, density 0.8: +3 %", "dip, density 0.5: +12 %", "dip-ca γ 0.5, density 0.5: +20 %",
    ]  # fmt: skip
    assert perplexity[3] == "Model small: +2.0 ± 0.0\u00a0%"
    assert perplexity[4].replace("\u00a0", " ") == (
        "Model small: +1.3 ± 0.3 % on 8,192 tokens (planes 20 % : 20 %, 3.6b), "
        "+2.0 ± 0.3 % on 8,192 tokens (planes 40 % : 20 %, 2.7b)"
    )


def test_the_headline_tells_what_reads_that_cost_leave(tmp_path, monkeypatch):
    book = Book.open(write_samples(tmp_path / "e"))
    flat = savings(book.sheets("headline"), book)
    costly = [
        replace(s, place=s.place._replace(cost_per_read_us=8), gains={gb: gain - 0.5 for gb, gain in s.gains.items()})
        for s in flat
    ]
    monkeypatch.setattr(abstract, "savings", lambda sheets, book: [*flat, *costly])
    rows = headline_table(book)["rows"]
    assert [row[0] for row in rows][2] == "throughput, at equal memory, with 8 µs a read"
    assert [row for row in rows if row is not rows[2]] == headline_rows(book, flat, monkeypatch)
    assert rows[2][1:3] != rows[1][1:3]
    small = rows[2][3].replace("\u00a0", " ")
    assert small == "Model small: −59 % (−72 to −46 %), dip lfu, density 0.8, which loses +2.0 ± 0.0 %"


def headline_rows(book, found, monkeypatch):
    monkeypatch.setattr(abstract, "savings", lambda sheets, book: found)
    return headline_table(book)["rows"]


def change_results(folder, name, change):
    path = results_path(folder, name, "small")
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content["cells"])
    path.write_text(json.dumps(content), encoding="utf-8")


def test_the_headline_tells_the_disk_where_one_setting_lost_differently_on_each(tmp_path):
    folder = write_samples(tmp_path / "e")

    def score(cells):
        (row,) = [r for c in cells if c["kind"] == "benchmark" for r in c["result"]["results"] if r.get("r") == 1.1]
        row |= {"relative": 0.014, "relative_stderr": 0.003}

    change_results(folder, "beyond", score)
    told = headline_table(Book.open(folder))["rows"][2][4].replace("\u00a0", " ")
    assert "+1.3 ± 0.3 % on 8,192 tokens (planes 20 % : 20 %, 3.6b, held disk)" in told
    assert "+1.4 ± 0.3 % (planes 20 % : 20 %, 3.6b, disk as it is)" in told


@pytest.mark.parametrize(
    ("name", "kind", "is_stale"),
    [("headline", "simulate", True), ("density", "perplexity", True), ("beyond", "benchmark", True),
     ("caches", "simulate", False), ("density", "tasks", False)],
)  # fmt: skip
def test_the_headline_is_stale_with_what_it_rests_on(tmp_path, name, kind, is_stale):
    folder = write_samples(tmp_path / "e")

    def spoil(cells):
        for cell in cells:
            cell["code"] = "0" * 64 if cell["kind"] == kind else cell["code"]

    assert "stale" not in headline_table(Book.open(folder))["title"]
    change_results(folder, name, spoil)
    assert ("(of stale results)" in headline_table(Book.open(folder))["title"]) == is_stale
    if is_stale:
        pytest.importorskip("matplotlib")
        report = Report.of(folder)
        assert "(of stale results)" in report.markdown("f").partition("## ")[0]
        assert "(of stale results)" in report.summary("d")


def test_memory_of_the_process_and_of_the_mlp_are_of_one_gamma(tmp_path, monkeypatch):
    book = Book.open(write_samples(tmp_path / "e"))
    one = next(s for s in savings(book.sheets("headline"), book) if s.model == PAPER and s.gamma == 0.5)
    found = [
        replace(one, gamma=0.5, dram_saved=0.3, mlp_dram_saved=0.6),
        replace(one, gamma=0.2, dram_saved=0.4, mlp_dram_saved=0.5),
    ]
    monkeypatch.setattr(abstract, "savings", lambda sheets, book: found)
    told = headline_table(book)["rows"][0][2].replace("\u00a0", " ")
    assert told == f"{one.setting}: −40 %, of the MLP's −50 %"


def test_without_simulations_the_headline_is_not_measured(tmp_path):
    folder = write_samples(tmp_path / "e")
    for path in (folder / "results").glob("*.json"):
        if path.name != "density-small.json":
            path.unlink()
    rows = headline_table(Book.open(folder))["rows"]
    assert [row[2:] for row in rows[:2]] == [["not measured"] * 3] * 2


def test_a_readme_that_is_not_there_is_an_error(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read .* give the README as --readme FILE"):
        write_report(folder, out=None, docs=None, readme=tmp_path / "none.md")


# ------------------------------------------------------------------------------------------------ files


def test_markers_hold_what_is_between_them():
    text = "# A\n<!-- results -->\nold\n<!-- /results -->\nend\n"
    new = put_between_markers(text, "new", "README.md")
    assert new == "# A\n<!-- results -->\n\nnew\n\n<!-- /results -->\nend\n"
    assert put_between_markers(new, "new", "README.md") == new


@pytest.mark.parametrize(
    "text", ["", "<!-- results -->", "<!-- /results --><!-- results -->", 2 * "<!-- results --><!-- /results -->"]
)
def test_missing_markers_are_an_error(text):
    with pytest.raises(ConfigError, match="README has no place for the results: write one line <!-- results --> and"):
        put_between_markers(text, "new", "README")


def test_all_files_are_written_with_links_as_they_see_them(folder, tmp_path):
    (tmp_path / "docs").mkdir()
    readme, docs, out = tmp_path / "README.md", tmp_path / "docs" / "results.md", tmp_path / "r.html"
    readme.write_text("a\n<!-- results -->\n<!-- /results -->\n", encoding="utf-8")
    assert write_report(folder, out=out, docs=docs, readme=readme) == [out, docs, readme]
    figures = re.findall(r"!\[.*?\]\((.*?)\)", docs.read_text(encoding="utf-8"))
    assert len(figures) == len(CONFIGS)
    assert all((docs.parent / figure).is_file() for figure in figures)
    assert "[results.md](docs/results.md)" in readme.read_text(encoding="utf-8")
    assert readme.read_text(encoding="utf-8").startswith("a\n<!-- results -->\n")


def test_without_markers_nothing_is_written(folder, tmp_path):
    readme, out = tmp_path / "README.md", tmp_path / "r.html"
    readme.write_text("none", encoding="utf-8")
    with pytest.raises(ConfigError, match="has no place for the results"):
        write_report(folder, out=out, docs=None, readme=readme)
    assert not out.exists()


def test_the_verb_prints_what_it_wrote(folder, tmp_path, capsys):
    out = tmp_path / "r.html"
    assert main(["report", "--experiments", str(folder), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert main(["report", "--experiments", str(tmp_path), "--out", str(out)]) == 1
    assert "holds no experiment" in capsys.readouterr().err


def test_markdown_tables_have_as_many_cells_in_every_row(report):
    for block in re.findall(r"(?:^\|.*\|$\n?)+", report.markdown("f"), flags=re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.strip().splitlines()}
        assert len(widths) == 1, block
