"""README and docs/: every snippet runs, every command, link, path and figure is right."""

import itertools
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from markdown_it import MarkdownIt
from PIL import Image

from parnet_kernels import ParNetConfig, Preprocessing, save
from parnet_kernels.app.cli import app
from parnet_kernels.model import ParNet

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
TOKENS = {page: MarkdownIt().enable("table").parse(page.read_text()) for page in PAGES}


def fences(language: str) -> list[tuple[str, str]]:
    """(page and line, text) of the fenced blocks in `language`."""
    return [
        (f"{page.relative_to(ROOT)}:{token.map[0] + 1}", token.content)
        for page, tokens in TOKENS.items()
        for token in tokens
        if token.type == "fence" and token.map and token.info.strip() == language
    ]


SNIPPETS = fences("python")
COMMANDS = [
    (where, line.partition("#")[0].strip())
    for where, block in fences("")
    for line in block.splitlines()
    if line.partition("#")[0].strip()
]
CALLS = [
    (where, command)
    for command, where in {command: where for where, command in reversed(COMMANDS)}.items()
    if command.startswith("parnet ") and command.split()[1] not in ("demo", "bench")
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that README names, small."""
    model = ParNet(ParNetConfig((4, 6, 8, 8), (2, 2, 2), num_classes=5)).eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "model.pth.tar")
    deployed = model.deploy()
    deployed.preprocessing = Preprocessing(32)
    deployed.class_names = ("cat", "dog", "fox", "hen", "owl")
    (tmp_path / "labels.txt").write_text("cat\ndog\nfox\nhen\nowl")
    save(deployed, tmp_path / "net.safetensors")
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    for part, name in itertools.product(("train", "val"), ("cat", "dog")):
        (tmp_path / "pictures" / part / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(pixels + i).save(tmp_path / "pictures" / part / name / f"{i}.jpg")
    (tmp_path / "run.yaml").write_text("".join(text for _, text in fences("yaml")))
    (tmp_path / "photos").mkdir()
    Image.fromarray(pixels).save(tmp_path / "photos" / "a.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def skip_without_packages(text: str) -> None:
    """Where an optional package that the text needs is not installed; `make test-integrations` has them all."""
    for word, package in {".onnx": "onnx", "timm": "timm"}.items():
        if word in text:
            pytest.importorskip(package)


@pytest.mark.parametrize(("where", "code"), SNIPPETS, ids=[where for where, _ in SNIPPETS])
def test_snippet(where: str, code: str, folder: Path) -> None:
    skip_without_packages(code)
    exec(compile(code, where, "exec"), {})


@pytest.mark.parametrize(("where", "command"), CALLS, ids=[command for _, command in CALLS])
def test_parnet_command(where: str, command: str, folder: Path) -> None:
    skip_without_packages(command)
    _, *arguments = shlex.split(command)
    if arguments[0] == "train":  # a step of it
        pytest.importorskip("kornia")
        arguments += shlex.split("--epochs 1 --cooldown 0 --warmup 0 --limit 2 --batch 4 --ema 0 --size 32 --threads 1")
        arguments += [] if "--init" in arguments else ["--model", "cifar", "--width", "4"]
    program = [sys.executable, "-c", "from parnet_kernels.app.cli import main; main()"]
    done = subprocess.run([*program, *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{where}: {command}\n{done.stdout}{done.stderr}"


def test_other_commands() -> None:
    """Those that take minutes are checked by name, those of pip and git by form."""
    assert {command for _, command in COMMANDS if command.startswith("make ")}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    subcommands = {command.name or command.callback.__name__ for command in app.registered_commands}
    for where, command in COMMANDS:
        program, *words = shlex.split(command)
        if program == "make":
            assert words[0] in targets, f"{where}: {command}"
        elif program == "parnet":
            assert words[0] in subcommands, f"{where}: {command}"
        elif program == "torchrun":
            assert words[2:4] == ["-m", "parnet_kernels.train"], f"{where}: {command}"
        else:
            assert (program, words[0]) == ("pip", "install"), f"{where}: what is {command!r}?"


def anchors(page: Path) -> set[str]:
    tokens = TOKENS[page]
    titles = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links(page: Path) -> None:
    """Files and headings that a page links to are there."""
    inline = [child for token in TOKENS[page] for child in token.children or []]
    targets = [str(child.attrs.get("href") or child.attrs.get("src") or "") for child in inline]
    for target in filter(None, targets):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), f"{page.name} links to {target}, which is not there"
        assert not anchor or anchor in anchors(there), f"{page.name} links to {target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_paths_and_tables(page: Path) -> None:
    """Paths in code spans exist in the repository; the rows of a table have as many cells as its header."""
    inline = [child for token in TOKENS[page] for child in token.children or []]
    for span in (child.content for child in inline if child.type == "code_inline"):
        if re.fullmatch(r"(csrc|parnet_kernels|tests|bench|docs)/[\w./-]*", span):
            assert (ROOT / span).exists(), f"{page.name} names {span}, which is not there"
    width = None
    fenced = False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fenced ^= line.startswith("```")
        if fenced or not line.startswith("|"):
            width = None
            continue
        cells = len(re.sub(r"`[^`]*`", "", line).strip().strip("|").split("|"))
        width = width or cells
        assert cells == width, f"{page.name}:{number} has {cells} cells, the table {width}"


def test_pages_are_short_and_listed() -> None:
    nav = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES:
        if page.parent == ROOT / "docs":
            assert len(page.read_text().splitlines()) <= 200, page.name
            assert f": {page.name}\n" in nav, f"{page.name} is not in mkdocs.yml"


def test_figures_are_drawn_from_the_pages() -> None:
    for name, draw in runpy.run_path(str(ROOT / "docs" / "figures.py"))["FIGURES"].items():
        assert (ROOT / "docs" / name).read_text() == draw(), f"{name} is old: python docs/figures.py"


def test_readme_repeats_the_benchmarks() -> None:
    """README's table is part of that of docs/benchmarks.md."""
    all_rows = {}
    for line in (ROOT / "docs" / "benchmarks.md").read_text().splitlines():
        cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        if len(cells) == 10:
            all_rows[cells[0], cells[1]] = cells
    rows = re.findall(
        r"^\| ([SM]), (\d) threads? \| (\S+) \| (\S+) \| (\S+) \| \*\*(\S+)\*\* \|$",
        (ROOT / "README.md").read_text(),
        re.MULTILINE,
    )
    assert len(rows) == 4
    for variant, threads, *times in rows:
        cells = all_rows[f"{variant}, AVX-512, AMD", threads]
        best = min(cells[4:8], key=float)
        assert times == [cells[2], cells[3], best, cells[8]]
