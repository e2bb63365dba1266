"""Draws the SVG figures of the documentation; `python docs/figures.py` writes them beside itself.

latency.svg: times of ParNet-S out of the first table of benchmarks.md. tile.svg: a tile of F(4, 3).
devices.svg: what runs on which of three ranks, by the graph of ParNet-S.
"""

from __future__ import annotations

from pathlib import Path

from parnet_kernels.config import VARIANTS
from parnet_kernels.distributed.cut import cut

HERE = Path(__file__).parent
OURS, OTHERS, INK, LINE = "#e6550d", "#9fb3c8", "#222222", "#8894a0"


def text(x: float, y: float, words: str, anchor: str = "start", size: int = 14, weight: str = "normal") -> str:
    style = f'font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" fill="{INK}"'
    return f'<text x="{x:g}" y="{y:g}" {style}>{words}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, stroke: str = "none") -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" stroke="{stroke}"/>'


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    body = "\n".join([f"<title>{title}</title>", box(0, 0, width, height, "#ffffff"), *parts])
    return f'{head} font-family="Helvetica, Arial, sans-serif">\n{body}\n</svg>\n'


def latency() -> str:
    """Bars of the line "S, AVX-512, AMD" on one thread."""
    lines = (HERE / "benchmarks.md").read_text().splitlines()
    header = next(line for line in lines if line.startswith("| network"))
    line = next(line for line in lines if line.startswith("| S, AVX-512, AMD | 1 |"))
    names, cells = ([cell.strip(" *") for cell in row.strip("|").split("|")] for row in (header, line))
    bars = [(name, cell, float(cell)) for name, cell in zip(names[2:-1], cells[2:-1], strict=True)]
    bars.sort(key=lambda bar: -bar[2])
    scale = 440 / bars[0][2]
    parts = [text(20, 26, "ParNet-S, one 224×224 image, one thread of an AMD EPYC, ms (less is better)", size=15)]
    for i, (name, cell, ms) in enumerate(bars):
        y, ours = 44 + 26 * i, name == "parnet-kernels"
        weight = "bold" if ours else "normal"
        parts.append(text(150, y + 15, name, "end", weight=weight))
        parts.append(box(160, y, ms * scale, 20, OURS if ours else OTHERS))
        parts.append(text(166 + ms * scale, y + 15, cell, weight=weight))
    return svg(680, 54 + 26 * len(bars), "latency of ParNet-S on one thread", parts)


def grid(x: float, y: float, cells: int, side: float, fill: str) -> list[str]:
    return [box(x + side * j, y + side * i, side, side, fill, LINE) for i in range(cells) for j in range(cells)]


def tile() -> str:
    """From the inputs of a tile to its outputs."""
    side, y = 18, 60

    def arrow(x: float, label: str) -> list[str]:
        middle = y + 3 * side
        head = f'<path d="M{x + 70:g} {middle - 5} l9 5 l-9 5 z" fill="{INK}"/>'
        stem = f'<path d="M{x:g} {middle} h70" stroke="{INK}" stroke-width="1.5" fill="none"/>'
        return [stem, head, text(x + 38, middle - 10, label, "middle", 12)]

    parts = [text(20, 28, "One tile and one channel of F(4, 3), stride 1", size=15)]
    columns = (
        (20, 6, "#dbe4ee", "6×6 inputs", "4×4 pixels and border"),
        (225, 6, "#fdd0a2", "v: 36 values", "one for each pair of points"),
        (430, 6, "#fdae6b", "m: 36 products", "summed over all channels"),
        (653, 4, "#e6550d", "4×4 outputs", "then gate, skip, φ"),
    )
    for x, cells, fill, name, note in columns:
        top = y + (6 - cells) / 2 * side
        parts += grid(x, top, cells, side, fill)
        middle = x + cells * side / 2
        parts += [text(middle, 192, name, "middle", 13, "bold"), text(middle, 210, note, "middle", 11)]
    parts += grid(20 + side, y + side, 4, side, "#b3c7dc")
    parts += [*arrow(138, "transform"), *arrow(343, "times u"), *arrow(556, "inverse")]
    return svg(760, 226, "a tile of F(4, 3)", parts)


def devices() -> str:
    """Each rank starts from the image: its part of the trunk, its stream; rank 0 also the fusion."""
    pieces = cut(VARIANTS["s"])
    step, high, left, gap = 38, 44, 96, 78
    parts = [text(20, 28, "ParNet-S on three ranks: a box a layer; time runs to the right", size=15)]
    owners = (2, 0, 1)  # the stream of each rank
    ends = []
    for rank, stream in enumerate(owners):
        y, x = 48 + gap * rank, left
        parts.append(text(20, y + 27, f"rank {rank}", size=14, weight="bold"))
        runs = ((pieces.trunk_between(0, stream), "#dbe4ee", "trunk"), (pieces.streams[stream], "#fdae6b", "stream"))
        for layers, fill, name in runs:
            parts += [box(x + step * i, y, step - 4, high, fill, LINE) for i in range(len(layers))]
            number = f" {stream}" if name == "stream" else ""
            parts.append(text(x + step * len(layers) / 2 - 2, y + 27, name + number, "middle", 12))
            x += step * len(layers)
        ends.append((x, y))
    fusion_at = max(x for x, _ in ends) + 46
    y = 48
    count = len(pieces.fusion)
    parts += [box(fusion_at + step * i, y, step - 4, high, OURS, LINE) for i in range(count)]
    parts.append(text(fusion_at + step * count / 2 - 2, y + 27, "fusion", "middle", 12))
    for x, top in ends[1:]:
        path = f"M{x:g} {top + high / 2:g} H{fusion_at + 17:g} V{y + high + 5:g}"
        parts.append(f'<path d="{path}" stroke="{INK}" stroke-width="1.5" fill="none"/>')
    parts.append(f'<path d="M{fusion_at + 12} {y + high + 8} l5 -9 l5 9 z" fill="{INK}"/>')
    parts.append(text(fusion_at + 28, 48 + gap + 27, "maps and their channel sums", size=12))
    return svg(760, 270, "what runs where on three ranks", parts)


FIGURES = {"latency.svg": latency, "tile.svg": tile, "devices.svg": devices}

if __name__ == "__main__":
    for name, draw in FIGURES.items():
        (HERE / name).write_text(draw())
