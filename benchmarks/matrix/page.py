"""Writes docs/supported_models.md from what matrix.py measured."""

from collections import defaultdict
from pathlib import Path

from peft_prefix_plus.supported import FAIL, NOT_APPLICABLE, PASS, SupportedModel, read_matrix

PAGE = Path(__file__).parents[2] / "docs" / "supported_models.md"
TITLES = {
    "causal": "Causal language models",
    "seq2seq": "Encoder-decoder models, text and speech",
    "encoder": "Encoders",
    "multimodal": "Multimodal models",
    "vision": "Vision models",
}
MARKS = {PASS: "yes", NOT_APPLICABLE: "–", FAIL: "**no**"}
CHECKS = ("forward", "gradients", "disabled", "saved", "cached", "padding", "exact")

INTRODUCTION = """# Supported models

Made by `make matrix` with {versions}.

For every model type that transformers lists in a group, a tiny random model is built and checked; nothing is left out:
types that cannot be built are listed with the reason. The same run checks PEFT's own `PREFIX_TUNING`. The data is in
`peft_prefix_plus/supported_models.json`, and `peft_prefix_plus.supported_model_types()` returns it.

| check | what holds |
|---|---|
| forward | the model takes a prefix, and the prefix changes the outputs |
| gradients | all prefix parameters get gradients, and nothing else does |
| disabled | with the adapter disabled the outputs are the base model's, bit for bit |
| saved | saved and loaded again, the outputs are the same, bit for bit |
| cached | greedy generation with a cache gives the tokens of generation without one |
| padding | left padding changes nothing (where it changes nothing for the base model) |
| exact | a prefix of real tokens acts exactly like the tokens as a prompt |

"yes": holds. "–": says nothing about the type; the reasons are below each table. "no": does not hold; see below.
Empty: no tiny model of the type can be built. [Architectures](architectures.md) says where the prefix goes.
The last column is PEFT `PREFIX_TUNING` on the same checks, but for the last. Many of its failures have one of two
causes: it cannot generate without a cache, which is the reference of "cached", and it ignores what left padding does
to positions.
"""


def summarize_peft(outcomes: dict[str, str]) -> str:
    """One cell for PEFT's own method."""
    failed = [name for name, outcome in outcomes.items() if outcome.startswith(FAIL)]
    if not outcomes or outcomes.get("forward", "").startswith(NOT_APPLICABLE):
        return "–"
    return f"**no** ({', '.join(failed)})" if failed else "yes"


def write_summary(rows: list[dict]) -> str:
    """Counts by group."""
    lines = [
        "| group | types | not buildable | no full softmax attention | PrefixPlus: works | exact "
        "| PEFT `PREFIX_TUNING`: takes a prefix | works |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for group, title in TITLES.items():
        members = [row for row in rows if row["group"] == group]
        built = [row for row in members if "unbuildable" not in row]
        models = [SupportedModel(group, row["model_type"], row["prefix_plus"]) for row in built]
        without = [model for model in models if model.outcomes["forward"].startswith(NOT_APPLICABLE)]
        applicable = [m for m in models if m.works and not m.outcomes["exact"].startswith(NOT_APPLICABLE)]
        exact = f"{sum(m.is_exact for m in applicable)} of {len(applicable)}" if applicable else "–"
        work = f"{sum(model.works for model in models)} of {len(built) - len(without)}"
        takes = sum(row["prefix_tuning"]["forward"] == PASS for row in built)
        peft = sum(summarize_peft(row["prefix_tuning"]) == "yes" for row in built)
        counts = (title, len(members), len(members) - len(built), len(without), work, exact, takes, peft)
        lines.append(f"| {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


def write_group(group: str, rows: list[dict]) -> str:
    """The table of a group, and the reasons behind its marks."""
    lines = [f"## {TITLES[group]}", "", f"| type | {' | '.join(CHECKS)} | PEFT |", "|---" * (len(CHECKS) + 2) + "|"]
    reasons: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        name = f"`{row['model_type']}`"
        if "unbuildable" in row:
            lines.append(f"| {name} | {' | '.join('' for _ in CHECKS)} | |")
            reasons[f"cannot be built tiny: {row['unbuildable']}"].append(name)
            continue
        outcomes = row["prefix_plus"]
        cells = []
        for check in CHECKS:
            outcome = outcomes.get(check, NOT_APPLICABLE)
            kind, _, reason = outcome.partition(": ")
            cells.append(MARKS[kind])
            if reason:
                reasons[f"{check}: {'**no**, ' if kind == FAIL else ''}{escape(reason)}"].append(name)
        lines.append(f"| {name} | {' | '.join(cells)} | {summarize_peft(row['prefix_tuning'])} |")
    lines += ["", "Reasons:", ""]
    lines += [f"- {reason} ({', '.join(names)})" for reason, names in sorted(reasons.items())]
    return "\n".join(lines)


def escape(text: str) -> str:
    """Keep angle brackets and bars out of Markdown's way."""
    return text.replace("<", "&lt;").replace("|", "\\|").replace("_", "\\_").replace("*", "\\*")


def main() -> None:
    """Write the page."""
    matrix = read_matrix()
    rows = matrix["models"]
    versions = ", ".join(f"{name} {number}" for name, number in matrix["versions"].items())
    parts = [INTRODUCTION.format(versions=versions), write_summary(rows)]
    parts += [write_group(group, [row for row in rows if row["group"] == group]) for group in TITLES]
    PAGE.write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
