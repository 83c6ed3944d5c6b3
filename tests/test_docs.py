"""README.md, CONTRIBUTING.md and the pages in docs: links, commands, examples and tables."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import typer

import siren
from siren.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = {"siren", "make", "python", "pytest", "pip", "torchrun", "cat"}
COMMAND = typer.main.get_command(app)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

all_pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of that language; a block without a language holds commands."""
    return [code for name, code in FENCE.findall(page.read_text(encoding="utf-8")) if name == language]


def anchors(page: Path) -> set[str]:
    """What a link may name after #, as GitHub makes it of headings."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command: the lines of command blocks, and code in the text that begins like one."""
    for block in blocks(page, ""):
        for line in filter(None, block.replace("\\\n", " ").splitlines()):
            yield shlex.split(line, comments=True)
    for code in re.findall(r"`([^`]+)`", prose(page)):
        words = code.split()
        if words[0] in ("siren", "python") and len(words) > 1:
            yield words


@all_pages
def test_links_lead_somewhere(page: Path) -> None:
    """Relative links and images name files of the repository, and headings that are there."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.is_relative_to(ROOT.resolve()), target
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_the_index_leads_to_every_page() -> None:
    """Every page of docs, README and CONTRIBUTING; and README leads to the index."""
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / name).resolve() for name in re.findall(r"\]\(([^)#\s]+)\)", prose(index))}
    assert {page.resolve() for page in PAGES if page != index} <= linked
    assert "](docs/index.md)" in prose(PAGES[0])


@all_pages
def test_commands_are_known(page: Path) -> None:
    """Command blocks begin with known programs; siren's commands and options, scripts and make targets are there."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for words in commands(page):
        program = words[0]
        assert program in PROGRAMS, words
        if program == "torchrun" and "siren" in words:
            check_siren(words[words.index("siren") :])
        if program == "siren":
            check_siren(words)
        elif program == "python" and words[1:] and words[1] != "-m":
            assert (ROOT / words[1]).is_file(), words
        elif program == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), words


def check_siren(words: list[str]) -> None:
    """The command exists and has these options; a word in capitals stands for any."""
    command, rest = COMMAND, words[1:]
    while rest and hasattr(command, "commands") and re.fullmatch(r"[a-z-]+", rest[0]) and rest[0][0] != "-":
        assert rest[0] in command.commands, words
        command, rest = command.commands[rest[0]], rest[1:]
    if rest and rest[0].isupper() and hasattr(command, "commands"):
        return
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    for word in rest:
        if word.startswith("--"):
            assert word.partition("=")[0] in known | {"--help", "--version"}, words


@all_pages
def test_python_examples_use_names_that_exist(page: Path) -> None:
    """They parse, and what they take from siren is there."""
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "siren":
                assert hasattr(siren, node.attr), node.attr


def test_the_examples_of_decode_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another, as they stand; shapes in their comments are right."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    shapes = 0
    for code in blocks(ROOT / "docs" / "decode.md", "python"):
        for statement in ast.parse(code).body:
            alone = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Attribute)
            line = code.splitlines()[statement.lineno - 1]
            exec(f"value = {line}" if alone else compile(ast.Module([statement], []), "decode.md", "exec"), names)
            if alone and (shape := re.search(r"# [^\[]*(\[\d[\d, ]*\])", line)):
                assert list(getattr(names["value"], "shape", names["value"])) == ast.literal_eval(shape[1]), line
                shapes += 1
    assert shapes == 5
    for name, sizes in {"sound": (3, 1, 16000), "codes": (2, 12), "inputs": (6, 2, 128)}.items():
        assert tuple(getattr(names[name], "shape", ())) == sizes
    assert [path.name for path in tmp_path.iterdir()] == ["rain.wav"]


@all_pages
def test_nothing_names_a_place_of_one_machine(page: Path) -> None:
    """No absolute paths, no home folders."""
    text = re.sub(r"<!--.*?-->", "", page.read_text(encoding="utf-8"))
    assert not re.findall(r"(?:^|[\s`\"'(=])~?/[A-Za-z][\w.-]*", text)


@all_pages
def test_lines_have_a_length(page: Path) -> None:
    """120 characters but in tables, and on the page that a benchmark writes."""
    for line in page.read_text(encoding="utf-8").splitlines():
        assert len(line) <= 120 or line.startswith(("|", '{"')) or page.name == "retrieval.md", line


def test_the_tables_are_those_of_the_committed_results(capsys: pytest.CaptureFixture[str]) -> None:
    """What benchmarks/docs.py makes of benchmarks/results stands on the pages."""
    command = [sys.executable, ROOT / "benchmarks" / "docs.py", "--check"]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """benchmarks/docs.py over an empty repository."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import docs

    monkeypatch.setattr(docs, "ROOT", tmp_path)
    monkeypatch.setattr(docs, "SECTIONS", {"one": lambda: "| new |"})
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("# Title\n")
    return docs


def test_stale_pages_are_named_and_written(writer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--check says which page; without it the page is written, and only between its markers."""
    page = tmp_path / "docs" / "page.md"
    page.write_text("before\n\n<!-- one -->\n| old |\n<!-- /one -->\n\nafter\n")
    monkeypatch.setattr(sys, "argv", ["docs.py", "--check"])
    with pytest.raises(SystemExit, match=r"^docs/page\.md: not what benchmarks/results says"):
        writer.main()
    monkeypatch.setattr(sys, "argv", ["docs.py"])
    writer.main()
    assert page.read_text() == "before\n\n<!-- one -->\n\n| new |\n\n<!-- /one -->\n\nafter\n"
    assert (tmp_path / "README.md").read_text() == "# Title\n"
    monkeypatch.setattr(sys, "argv", ["docs.py", "--check"])
    with pytest.raises(SystemExit) as ended:
        writer.main()
    assert not ended.value.code


@pytest.mark.parametrize("text", ["<!-- two -->\n<!-- /two -->\n", "<!-- one -->\n", "<!-- /one -->\n"])
def test_markers_that_are_none(writer: ModuleType, tmp_path: Path, text: str) -> None:
    """An unknown name, and one end without the other."""
    (tmp_path / "docs" / "page.md").write_text(text)
    with pytest.raises(ValueError, match=r"^page\.md: <!-- /?(one|two) --> is no section"):
        writer.main()
