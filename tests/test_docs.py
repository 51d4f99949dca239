"""README.md and docs/: their code runs, their links lead somewhere, the commands and options they name exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from peer_blocks import LegacyBottleneck
from torch import nn

from senet_fused.cli import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]

pytestmark = pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="there is no README.md beside the tests")


def code(text: str, language: str) -> list[str]:
    """The blocks of a page in this language, without those that say why they are not run."""
    found = re.findall(rf"(<!-- not run: [^\n]+ -->\n)?```{language}\n(.*?)```", text, re.DOTALL)
    return [block for reason, block in found if not reason]


def headings(text: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    without_code = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", without_code, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path, text: str) -> list[str]:
    """The relative links of a page that lead to no file, or to no heading."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        is_page = target.suffix == ".md" and target.is_file()
        known = headings(text if target == page else target.read_text(encoding="utf-8")) if is_page else set()
        if not target.exists() or (anchor and anchor not in known):
            broken.append(link)
    return broken


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(subcommand, options) of every `senet-fused ...` in a page, in blocks and within lines."""
    lines = [line for block in code(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL).replace("\n", " "))
    found = []
    for line in lines:
        match = re.search(
            r"(?:senet-fused|-m senet_fused) ((?:bench (?:model|compare)|[a-z-]+)\b)(.*)", line.split("#")[0]
        )
        if match:
            found.append((match[1], re.findall(r"(?<=\s)--[a-z-]+", match[2])))
    return found


def test_the_readme_is_read_in_a_minute():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("name", [name for name in NAMES if code((ROOT / name).read_text(encoding="utf-8"), "python")])
def test_python_runs(name, monkeypatch):
    """The blocks of a page one after another, with a small network of timm's blocks in the place of timm's own."""
    timm = types.ModuleType("timm")
    timm.create_model = lambda name, pretrained=False: nn.Sequential(LegacyBottleneck(16, 4), LegacyBottleneck(16, 4))
    monkeypatch.setitem(sys.modules, "timm", timm)
    names: dict[str, object] = {}
    for block in code((ROOT / name).read_text(encoding="utf-8"), "python"):
        exec(compile(block, name, "exec"), names)


@pytest.fixture(scope="module")
def options_of():
    """The options of a subcommand, as --help lists them."""
    known: dict[str, set[str]] = {}

    def options(command: str, capsys) -> set[str]:
        if command not in known:
            with pytest.raises(SystemExit) as stopped:
                main([*command.split(), "--help"])
            assert stopped.value.code == 0, command
            known[command] = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
        return known[command]

    return options


@pytest.mark.parametrize("name", [name for name in NAMES if commands((ROOT / name).read_text(encoding="utf-8"))])
def test_commands_and_their_options_exist(name, options_of, capsys):
    for command, options in commands((ROOT / name).read_text(encoding="utf-8")):
        assert set(options) <= options_of(command, capsys), command


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):(?!=)", makefile, re.MULTILINE))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        named = re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE)
        assert set(named) <= targets, page.name


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md"])
def test_the_headline_figures_are_those_of_the_saved_runs(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    runs = sorted(ROOT.glob("benchmarks/results/cpu-amx-*.json"))
    assert len(runs) == 4
    for path in runs:
        for row in json.loads(path.read_text())["rows"]:
            if page != "README.md" or row["provider"] != "no-se+compile":
                time = f"{1e3 * row['median_s']:.0f} ± {500 * row['iqr_s']:.0f}"
                ratio = "" if row["provider"] == "stock" else rf"\W+{row['speedup_vs_stock']:.2f}\b"
                assert re.search(time + ratio, text), (path.name, row["provider"], time, ratio)


def test_the_picture_of_saved_runs(tmp_path):
    pytest.importorskip("matplotlib")
    script, runs = ROOT / "benchmarks/model_picture.py", sorted(ROOT.glob("benchmarks/results/cpu-amx-*.json"))
    subprocess.run([sys.executable, script, tmp_path / "out.png", *runs], check=True, timeout=120)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_the_scans_find_what_is_wrong(tmp_path):
    page = tmp_path / "page.md"
    text = (
        "# A `first` title\n[a](page.md#a-first-title) [b](missing.md) [c](#a-title) [d](https://x.y/z)\n"
        "`senet-fused bench model --batch 8 x` and\n"
        "```bash\nsenet-fused train --no-such \\\n    --epochs 1  # --comment\n```\n"
        "<!-- not run: a reason -->\n```python\n1 / 0\n```\n```python\nx = 1\n```\n"
    )
    page.write_text(text)
    assert broken_links(page, text) == ["missing.md", "#a-title"]
    assert commands(text) == [("train", ["--no-such", "--epochs"]), ("bench model", ["--batch"])]
    assert code(text, "python") == ["x = 1\n"]
