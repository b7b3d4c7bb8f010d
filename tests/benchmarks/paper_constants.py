"""Table of the constants of the paper's recipes: value, whether it is the paper's or inferred, and from where.

    python tests/benchmarks/paper_constants.py [recipes/fm_pretrain.yaml ...]

The recipes' comments hold the sources: `key: value  # paper, Appendix C` or `# inferred: why`. Constants that are no
settings stand in comments of the same form.
"""

import argparse
import re
from pathlib import Path

from data_pipeline.tables import markdown

RECIPES = Path(__file__).parents[2] / "recipes"
PAPER = (
    *("fm_pretrain", "fm_finetune", "bespoke_1m", "bespoke_1m_finetune", "bespoke_9m", "bespoke_9m_finetune"),
    "pdearena_1m",
)
LINE = re.compile(
    r"^(?:  (?P<comment>#   )?)(?P<key>[\w ]+):(?P<value> .*?)? +# (?P<origin>paper|inferred)[,:] (?P<why>.+)$"
)


def constants(recipe: Path) -> dict[str, tuple[str, str, str]]:
    """Return value, origin and source of the constants with a source, by section.key."""
    found, section = {}, ""
    for line in recipe.read_text().splitlines():
        if line[:1].isalpha():
            section = line.partition(":")[0]
        if match := LINE.match(line):
            value = (match["value"] or "").strip() or "see the recipe"
            found[f"{section}.{match['key']}"] = (value, match["origin"], match["why"])
    return found


def main() -> None:
    """Print a table for each recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", type=Path, default=[RECIPES / f"{name}.yaml" for name in PAPER])
    for recipe in parser.parse_args().recipes:
        rows = [[key, *facts] for key, facts in constants(recipe).items()]
        print(f"{recipe.stem}\n\n{markdown(['constant', 'value', 'from', 'source'], rows, num_text_columns=4)}\n")


if __name__ == "__main__":
    main()
