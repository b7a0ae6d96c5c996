"""Draws docs/arena.svg and docs/adapters.svg, pictures of the README: run it again after changing it."""

from __future__ import annotations

from pathlib import Path

WIDTH, HEIGHT = 860, 330
ADAPTERS_HEIGHT = 250
INK, PALE = "#1f2933", "#7b8794"
BUFFER, CACHE, NURSERY, FREE = "#f0b429", "#8ed1b2", "#a3c8f0", "#eef1f4"


def text(
    x: float, y: float, words: str, size: int = 13, colour: str = INK, anchor: str = "middle", weight: str = "normal"
) -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="{anchor}" font-weight="{weight}">{words}</text>'


def box(x: float, y: float, width: float, height: float, colour: str, words: str = "", size: int = 13) -> str:
    shape = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="3" fill="{colour}" stroke="{INK}"/>'
    return shape + (text(x + width / 2, y + height / 2 + 5, words, size) if words else "")


def arrow(x1: float, y1: float, x2: float, y2: float, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{INK}" stroke-width="1.5"{dash} marker-end="url(#tip)"/>'


def sheet(height: int, parts: list[str]) -> str:
    return (
        "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="system-ui, sans-serif">',
                f'<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto"><path d="M0 0 8 4 0 8z" fill="{INK}"/></marker></defs>',
                f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
                *parts,
                "</svg>",
            ]
        )
        + "\n"
    )


def arena() -> str:
    parts = [
        *(box(40 + 150 * n, 20, 120, 40, "white", f"worker {n + 1}") for n in range(3)),
        box(660, 20, 160, 40, "white", "broker"),
        arrow(460, 40, 660, 40, dashed=True),
        text(560, 32, "ZeroMQ + msgpack", 12, PALE),
        text(560, 56, "alloc_contig, types, statistics", 11, PALE),
        f'<text x="26" y="168" font-size="14" font-weight="bold" fill="{INK}" text-anchor="middle" transform="rotate(-90 26 168)">arena</text>',
        box(40, 140, 90, 56, FREE, "tables"),
        box(130, 140, 150, 56, NURSERY, "nursery"),
        box(280, 140, 170, 56, BUFFER, "buffer 64 MiB"),
        box(450, 140, 60, 56, BUFFER, "buffer", 12),
        *(box(510 + 15.5 * n, 140, 15.5, 56, CACHE if n != 3 else FREE) for n in range(20)),
        text(650, 215, "cached pages: dropped at once for a buffer", 12, PALE),
        text(205, 215, "clients write here", 12, PALE),
        text(365, 215, "whoever holds it reads and writes", 12, PALE),
        arrow(110, 60, 190, 138),
        text(104, 100, "store", 12, PALE, "end"),
        arrow(590, 138, 410, 62),
        text(545, 100, "load: no broker, no lock", 12, PALE, "start"),
        arrow(250, 60, 330, 138),
        text(308, 92, "view", 12, PALE, "start"),
        arrow(740, 60, 740, 138),
        text(750, 92, "promotes,", 12, PALE, "start"),
        text(750, 108, "evicts, takes", 12, PALE, "start"),
        box(130, 262, 690, 44, "white"),
        text(
            475,
            289,
            "spill files: one per swap type, slot n at n × page size; every page is here before it enters an area",
            13,
        ),
        arrow(205, 224, 205, 260),
        text(214, 248, "written through, or behind in batches", 12, PALE, "start"),
    ]
    return sheet(HEIGHT, parts)


def adapters() -> str:
    """One array for three workers: through pipes, and through the arena."""
    workers = (320, 500, 680)
    parts = [
        text(430, 24, "one array, a task for each of three workers", 13, PALE),
        text(20, 66, "ProcessPoolExecutor", 13, INK, "start", "bold"),
        box(30, 80, 150, 34, BUFFER, "array"),
        arrow(180, 97, 318, 97),
        text(249, 89, "3 × pickle, pipe", 11, PALE),
        *(box(x, 46, 150, 28, "white", f"worker {n + 1}") for n, x in enumerate(workers)),
        *(box(x, 80, 150, 34, BUFFER, "a copy of its own", 12) for x in workers),
        f'<line x1="20" y1="136" x2="840" y2="136" stroke="{FREE}" stroke-width="2"/>',
        text(20, 172, "ArenaExecutor", 13, INK, "start", "bold"),
        box(30, 196, 150, 34, BUFFER, "array"),
        arrow(180, 213, 318, 213),
        text(249, 205, "1 × copied,", 11, PALE),
        text(249, 230, "or built there", 11, PALE),
        *(box(x, 150, 150, 28, "white", f"worker {n + 1}") for n, x in enumerate(workers)),
        *(arrow(x + 75, 178, x + 75, 196) for x in workers),
        box(320, 196, 510, 34, BUFFER, "the same memory, in the arena"),
    ]
    return sheet(ADAPTERS_HEIGHT, parts)


if __name__ == "__main__":
    for name, picture in (("arena", arena), ("adapters", adapters)):
        (Path(__file__).parent / f"{name}.svg").write_text(picture())
