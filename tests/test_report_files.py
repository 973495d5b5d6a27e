"""Tables, styles and pages as files: what is escaped, that it reads back, that the same input gives the same bytes.

LaTeX is checked here by rules (every special character is commanded, braces balance, only known letters remain), since
no TeX is needed to test this package.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import os
import re
import string
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from vlnorm_verl.report import page, style, writers
from vlnorm_verl.report.estimates import Estimate
from vlnorm_verl.report.style import Figure
from vlnorm_verl.report.table import Cell, Table

HOSTILE = (
    "<script>alert('x')</script> | a_b & 100% of $x^2$ #1 {y} ~ \\input{/etc/passwd} `code` *b* [l](u) √(A/H) α 中"
)


@pytest.fixture
def table() -> Table:
    rows: list[list[Cell]] = [
        [HOSTILE, Estimate(0.6151, 0.598, 0.632, "one seed"), 3, None],
        ["VL Norm (α = 1)", Estimate(-0.02), -4, 0.12345],
        ["two\nlines", Estimate(0.9, 0.8, 0.95, "one seed"), np.int64(7), math.nan],
        ["never", "not reached", 10**6, np.float32(0.5)],
    ]
    return Table("nasty_x", "A & B: 50% | τ_b", ["method", "Avg@8", "steps", "Δ"], rows, ["Foot: |x|_1 < 5% & more."])


@pytest.fixture
def figure() -> Figure:
    return draw("one", "<b>title</b> & more")


def draw(name: str, title: str) -> Figure:
    import matplotlib.pyplot as plt

    with style.use_style():
        drawn, axes = plt.subplots()
        axes.plot([0, 1, 2], [0.1, 0.4, 0.3], "o-", label=style.figure_text(HOSTILE.removesuffix(" 中")))
        axes.fill_between([0, 1, 2], [0, 0.3, 0.2], [0.2, 0.5, 0.4])
        axes.set_title(style.figure_text("$a_{x$ b"))
        axes.legend()
        return style.render(drawn, name, title, "a caption & <i>more</i>")


# ---------------------------------------------------------------------------------------------------------- tables


def cells_of_line(line: str) -> list[str]:
    """Cells of a line of a GitHub table: split at pipes that aren't escaped."""
    return [cell.strip() for cell in re.split(r"(?<!\\)(?:\\\\)*\|", line)[1:-1]]


def test_markdown_has_its_cells_whatever_is_in_them(table: Table) -> None:
    lines = writers.to_markdown(table).splitlines()
    body = [line for line in lines if line.startswith("|")]
    assert len(body) == 2 + len(table.rows)
    assert {len(cells_of_line(line)) for line in body} == {4}
    assert cells_of_line(body[1]) == ["---", "---:", "---:", "---:"]
    assert cells_of_line(body[2])[1:] == ["0.615 [0.598, 0.632]<sup>a</sup>", "3", "–"]
    assert cells_of_line(body[3]) == ["VL Norm (α = 1)", "−0.020", "−4", "0.123"]
    assert cells_of_line(body[4]) == ["two lines", "0.900 [0.800, 0.950]<sup>a</sup>", "7", "–"]
    assert cells_of_line(body[5]) == ["never", "not reached", "1000000", "0.500"]
    assert "- <sup>a</sup> one seed" in lines


def test_markdown_shows_markup_as_text(table: Table) -> None:
    text = writers.to_markdown(table).replace("<sup>a</sup>", "")
    assert "<" not in text
    assert "&lt;script&gt;" in text
    for character in "$#`*_~":
        assert not re.search(rf"(?<!\\)(?:\\\\)*{re.escape(character)}", text.replace("### ", "")), character
    assert r"\\input" in text
    assert r"\[l\](u)" in text


def test_csv_reads_back(table: Table) -> None:
    rows = list(csv.DictReader(io.StringIO(writers.to_csv(table))))
    assert list(rows[0]) == ["method", "Avg@8", "Avg@8 low", "Avg@8 high", "Avg@8 note", "steps", "Δ"]
    assert [row["method"] for row in rows] == [row[0] for row in table.rows]
    assert [float(rows[0][f"Avg@8{part}"]) for part in ("", " low", " high")] == [0.6151, 0.598, 0.632]
    assert rows[0]["Avg@8 note"] == "one seed"
    assert (rows[1]["Avg@8"], rows[1]["Avg@8 low"], rows[1]["Avg@8 note"]) == ("-0.02", "", "")
    assert (rows[3]["Avg@8"], rows[3]["Avg@8 high"]) == ("not reached", "")
    assert [row["steps"] for row in rows] == ["3", "-4", "7", "1000000"]
    assert [row["Δ"] for row in rows] == ["", "0.12345", "", "0.5"]


def test_no_text_of_a_csv_is_a_formula() -> None:
    texts = ["=1+1", "+1", "-x", "@SUM(A1)", "\tx", "\r=x"]
    rows: list[list[Cell]] = [[text, Estimate(-0.5, note=text)] for text in texts]
    heading, *written = csv.reader(io.StringIO(writers.to_csv(Table("t", "t", ["=a", "b"], rows)), newline=""))
    assert heading == ["'=a", "b", "b low", "b high", "b note"]
    shown = [f"'{text}".replace("\r", "\n") for text in texts]
    assert written == [[text, "-0.5", "", "", text] for text in shown]
    assert writers.to_csv(Table("t", "t", ["a"], [["x\r=1"]])) == 'a\n"x\n=1"\n', "one row"


def test_json_is_json(table: Table) -> None:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    content = json.loads(writers.to_json(table), parse_constant=refuse)
    assert content["rows"][0] == [HOSTILE, {"value": 0.6151, "low": 0.598, "high": 0.632, "note": "one seed"}, 3, None]
    assert content["rows"][1][1] == {"value": -0.02, "low": None, "high": None, "note": ""}
    assert content["rows"][2][2:] == [7, None]
    assert (content["columns"], content["foot"], content["title"]) == (table.columns, table.foot, table.title)


def test_latex_commands_every_special_character() -> None:
    assert writers.latex_escape("a_b & 100% #1 $x$ {y}") == r"a\_b \& 100\% \#1 \$x\$ \{y\}"
    assert writers.latex_escape(r"\input{x}") == r"{\textbackslash}input\{x\}"
    assert writers.latex_escape("~^") == r"{\textasciitilde}{\textasciicircum}"
    assert writers.latex_escape("α √(A/H) ‖g‖²") == (
        r"\ensuremath{\alpha} \ensuremath{\surd}(A/H) \ensuremath{\Vert}g\ensuremath{\Vert}{\texttwosuperior}"
    )
    assert writers.latex_escape("[x] --no ,,") == r"{[}x{]} -{}-no ,{},"
    assert writers.latex_escape("é ß 中 😀") == r"\'e {\ss} U+4E2D U+1F600"


def test_latex_leaves_nothing_that_tex_would_read() -> None:
    everything = string.printable + "".join(map(chr, range(0xA0, 0x2300))) + "中😀\u202e\ud800"
    for character in everything:
        escaped = writers.latex_escape(f"x{character}x")
        # What is left after commands and accents is plain ASCII that TeX prints.
        rest = re.sub(r"\\[A-Za-z]+ ?|\\[#$%&_{}'`^~=.\"]|[{}]", "", escaped)
        rest = rest.replace("~", "" if character == "\xa0" else "~")
        assert not set(rest) & set("\\{}$&#^_%~\n"), (character, escaped)
        assert rest.isascii(), (character, escaped)
        assert escaped.count("{") - escaped.count(r"\{") == escaped.count("}") - escaped.count(r"\}"), escaped


def test_latex_table_is_whole(table: Table) -> None:
    text = writers.to_latex(table)
    without = re.sub(r"\\[\\{}]", "", text)
    assert without.count("{") == without.count("}")
    assert re.findall(r"\\(begin|end)\{(\w+)\}", text) == [
        ("begin", "table"),
        ("begin", "tabular"),
        ("end", "tabular"),
        ("begin", "minipage"),
        ("end", "minipage"),
        ("end", "table"),
    ]
    assert r"\begin{tabular}{lrrr}" in text
    for package in ("booktabs", "graphicx", "textcomp"):
        assert package in text.splitlines()[0]
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 1 + len(table.rows)
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {3}
    assert r"0.615 {[}0.598, 0.632{]}\textsuperscript{a}" in text
    assert r"\textsuperscript{a} one seed\par" in text


def test_console_prints_values_notes_and_feet(table: Table) -> None:
    console = Console(width=250, file=io.StringIO(), color_system=None)
    writers.print_table(table, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "0.615 [0.598, 0.632] (a)" in printed
    assert "(a) one seed" in printed
    assert "[l](u)" in printed
    assert table.foot[0] in printed


def test_console_that_is_narrow_cuts_nothing(table: Table) -> None:
    console = Console(width=60, file=io.StringIO(), color_system=None)
    writers.print_table(table, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in printed
    assert printed.count("Avg@8") == len(table.rows)
    assert "0.615 [0.598, 0.632] (a)" in printed


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0004, "0.000"), (-0.0004, "0.000"), (-0.0006, "−0.001"), (math.inf, "∞"), (-math.inf, "−∞"), (True, "1")],
)
def test_numbers(value: float, shown: str) -> None:
    assert f"| {shown} |" in writers.to_markdown(Table("t", "t", ["x"], [[value]]))


def test_many_notes_have_marks_of_their_own() -> None:
    rows: list[list[Cell]] = [[Estimate(0.5, note=f"note {index}")] for index in range(30)]
    marks = re.findall(r"^- <sup>(\w+)</sup>", writers.to_markdown(Table("t", "t", ["x"], rows)), re.MULTILINE)
    assert len(set(marks)) == 30
    assert (marks[0], marks[25], marks[26]) == ("a", "z", "aa")


def test_files_are_whole_or_not_there(table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writers.write_tables([table], tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"nasty_x.{e}" for e in ("md", "csv", "json", "tex")
    }
    before = (tmp_path / "out" / "nasty_x.md").read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    table.title = "another"
    with pytest.raises(OSError, match="no space"):
        writers.write_tables([table], tmp_path / "out")
    assert (tmp_path / "out" / "nasty_x.md").read_bytes() == before


def test_a_name_that_is_not_unicode_is_written(tmp_path: Path) -> None:
    broken = b"run-\xff".decode("utf-8", "surrogateescape")
    table = Table("t", broken, [broken], [[broken], [Estimate(0.5, note=broken)]], [broken])
    writers.write_tables([table], tmp_path)
    page.write_page(tmp_path / "page.html", broken, [], [table])
    writers.print_table(table, Console(file=io.TextIOWrapper(io.BytesIO(), "utf-8")))
    for path in tmp_path.iterdir():
        assert "run-" in path.read_text("utf-8")


# --------------------------------------------------------------------------------------------------------- figures


def test_figures_are_images_and_the_same_bytes_each_time(figure: Figure, tmp_path: Path) -> None:
    from matplotlib.image import imread

    again = draw("one", "<b>title</b> & more")
    assert (again.svg, again.png) == (figure.svg, figure.png)
    style.write_figures([figure], tmp_path)
    pixels = imread(tmp_path / "one.png")
    assert pixels.shape[:2] == (720, 960)
    assert pixels.std() > 0.01
    assert (tmp_path / "one.svg").read_text() == figure.svg


def test_text_of_an_svg_is_text(figure: Figure) -> None:
    assert "$a_{x$ b</text>" in figure.svg
    assert "&lt;script&gt;" in figure.svg
    assert "<script" not in figure.svg
    assert "dc:date" not in figure.svg


def test_render_closes_the_figure() -> None:
    import matplotlib.pyplot as plt

    draw("x", "x")
    assert plt.get_fignums() == []


def test_figures_are_drawn_from_a_notebook() -> None:
    """Its kernel names a backend that only the notebook's own environment has."""
    code = "from vlnorm_verl.report import style; import matplotlib.pyplot as plt; print(plt.get_backend())"
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("Agg\n", "")


# ------------------------------------------------------------------------------------------------------------ page


class Page(HTMLParser):
    """What a page holds: elements by name, ids, targets, images, text of cells; and that its elements close."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.cells: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open
        self.ids, self.targets, self.images = (
            [value for name, value in self.attributes if name == key] for key in ("id", "href", "src")
        )

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "td":
            self.cells.append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open:
            self.cells[-1] += data


def write(tmp_path: Path, table: Table, figure: Figure) -> tuple[str, Page]:
    parts = [table, page.Fold(HOSTILE, [figure]), page.Fold(HOSTILE, [])]
    page.write_page(tmp_path / "report.html", HOSTILE, [HOSTILE, "two"], parts)
    text = (tmp_path / "report.html").read_text()
    return text, Page(text)


def test_page_needs_no_network_and_runs_nothing(table: Table, figure: Figure, tmp_path: Path) -> None:
    text, shown = write(tmp_path, table, figure)
    inlined = "".join(base64.b64decode(source.partition("base64,")[2]).decode() for source in shown.images)
    assert inlined.count("<svg") == 1
    allowed = r"https?://(?:www\.w3\.org/|purl\.org/dc/|creativecommons\.org/ns#|matplotlib\.org/)"
    # Those are names of namespaces and of the program that drew, not addresses that are loaded.
    assert re.findall(rf"(?!{allowed})https?://\S+", text + inlined) == []
    assert not {"script", "link", "iframe", "object", "form"} & set(shown.names)
    assert not re.search(r"@import|url\(", text)
    assert all(source.startswith("data:image/") for source in shown.images)
    assert not [one for one in shown.attributes if one[0].startswith("on")]
    assert not re.search(r"(?:href|src)=\"(?!#)[^\"]*:", inlined)


def test_page_holds_what_it_was_given(table: Table, figure: Figure, tmp_path: Path) -> None:
    text, shown = write(tmp_path, table, figure)
    assert shown.names.count("table") == shown.names.count("h3") == 1, "a fold of one part has its title"
    assert len(shown.cells) == 16
    assert shown.cells[0] == HOSTILE
    assert shown.cells[1] == "0.615a [0.598, 0.632]"
    assert [cell.strip() for cell in shown.cells[13:]] == ["not reached", "1000000", "0.500"]
    assert "Foot: |x|_1 &lt; 5% &amp; more." in text
    assert "a caption &amp; &lt;i&gt;more&lt;/i&gt;" in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert 'name="viewport"' in text


def test_links_of_a_page_lead_somewhere(table: Table, figure: Figure, tmp_path: Path) -> None:
    _, shown = write(tmp_path, table, figure)
    assert len(shown.ids) == len(set(shown.ids))
    inner = [target[1:] for target in shown.targets if target.startswith("#")]
    assert len(inner) == 3
    assert set(inner) <= set(shown.ids)
    files = [target for target in shown.targets if not target.startswith("#")]
    saved = [
        base64.b64decode(target.removeprefix("data:text/plain;charset=utf-8;base64,")).decode() for target in files
    ]
    assert saved == [make(table) for make in writers.FORMATS.values()], (
        "tables are in the page, wherever it is mailed to"
    )


def test_a_part_may_be_called_what_the_script_looks_for(table: Table, tmp_path: Path) -> None:
    page.write_page(tmp_path / "page.html", "t", [], [page.Fold("data", [table]), page.Fold("tools", [table])])
    ids = re.findall(r' id="([^"]+)"', (tmp_path / "page.html").read_text())
    assert {"data-2", "tools-2"} <= set(ids)
    assert len(ids) == len(set(ids))


def test_a_large_figure_is_put_in_as_png(figure: Figure, tmp_path: Path) -> None:
    figure.svg += f"<!--{'x' * page.SVG_LIMIT}-->"
    page.write_page(tmp_path / "page.html", "t", [], [figure])
    (source,) = Page((tmp_path / "page.html").read_text()).images
    assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == figure.png


def test_the_same_input_gives_the_same_page(table: Table, figure: Figure, tmp_path: Path) -> None:
    assert write(tmp_path / "a", table, figure)[0] == write(tmp_path / "b", table, figure)[0]


def test_a_column_may_have_decimals_of_its_own() -> None:
    cells: list[Cell] = [0.12345, Estimate(2.6666, 1.5, 3.0)]
    one = Table("t", "T", ["a", "b"], [cells], digits_of={"b": 2})
    assert "| 0.123 | 2.67 [1.50, 3.00] |" in writers.to_markdown(one)
