"""Tables 7 and 8 of the paper (the training data, the sampling schemes), computed from the cards.

Table 7: training examples (pairs of neighbouring frames), tokens per example and tokens in all. Table 8: the share of
each dataset under four sampling schemes, and how far each scheme is from proportional sampling.
"""

import math
from collections.abc import Mapping, Sequence

from data_pipeline.cards.registry import Card, Registry
from data_pipeline.windows.schedule import Source, sampling_shares

DATASETS = (  # the paper's eight, in the order of its tables; cards beyond them do not belong in these tables
    "active_matter",
    "gray_scott_reaction_diffusion",
    "rayleigh_benard",
    "shear_flow",
    "turbulent_radiative_layer_2D",
    "viscoelastic_instability",
    "acoustic_scattering_maze",
    "helmholtz_staircase",
)
TEMPERATURE = 0.2
SCHEMES = {"proportional": "prop", "uniform": "uniform", "temperature": f"temp {TEMPERATURE}", "sqrt": "sqrt"}


def paper_tables(registry: Registry) -> str:
    """Both tables as Markdown text; UserError if the registry lacks one of the eight datasets."""
    cards = [registry.card(name) for name in DATASETS]
    return f"Table 7. Training data\n\n{_table7(cards)}\n\nTable 8. Sampling shares\n\n{_table8(cards)}\n"


def _table7(cards: Sequence[Card]) -> str:
    rows = [["dataset", "", "examples", "tokens / example", "total tokens"]]
    for card in cards:
        counts = (card.windows, card.tokens, card.windows * card.tokens)
        rows.append([card.name, card.abbreviation, *(f"{count:,}" for count in counts)])
    examples = sum(card.windows for card in cards)
    tokens = sum(card.windows * card.tokens for card in cards)
    rows.append(["total", "", f"{examples:,}", "", f"{tokens:,}"])
    return _markdown(rows, text_columns=2)


def _table8(cards: Sequence[Card]) -> str:
    sources = [Source(card.name, card.windows, card.tokens, (card.windows,)) for card in cards]
    shares = {scheme: sampling_shares(sources, scheme, TEMPERATURE) for scheme in SCHEMES}
    rows = [["dataset", "", *SCHEMES.values()]]
    for card in cards:
        rows.append([card.name, card.abbreviation, *(f"{shares[scheme][card.name]:.4f}" for scheme in SCHEMES)])
    divergence = [_divergence(shares[scheme], shares["proportional"]) for scheme in SCHEMES]
    rows.append(["KL(q, prop) in nats", "", *(f"{value:.4f}" for value in divergence)])
    return _markdown(rows, text_columns=2)


def _divergence(q: Mapping[str, float], p: Mapping[str, float]) -> float:
    """Kullback-Leibler divergence KL(q || p) in nats."""
    return sum(share * math.log(share / p[name]) for name, share in q.items())


def _markdown(rows: Sequence[Sequence[str]], text_columns: int) -> str:
    """A Markdown table with aligned columns; the first row is the header, columns after the text ones are numbers."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    aligned = [str.ljust] * text_columns + [str.rjust] * (len(widths) - text_columns)
    rules = ["-" * width for width in widths[:text_columns]] + [
        "-" * (width - 1) + ":" for width in widths[text_columns:]
    ]
    lines = []
    for row in (rows[0], rules, *rows[1:]):
        cells = [align(cell, width) for cell, width, align in zip(row, widths, aligned, strict=True)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
