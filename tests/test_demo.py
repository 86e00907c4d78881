"""The demo, from beginning to end, on a tiny model."""

import json
import re
from pathlib import Path

import peft_prefix_plus
from peft_prefix_plus.cli.main import main

DATA = Path(peft_prefix_plus.__file__).parent / "demo_data"


def test_the_demo_trains_saves_loads_and_reports(tiny_model_dir, tmp_path, capsys):
    words = ["--model_name_or_path", tiny_model_dir, "--output_dir", str(tmp_path), "--dtype", "float32"]
    assert main(["demo", *words, "--max_steps", "3", "--max_eval_examples", "4"]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    match = re.fullmatch(r"demo: loss (\S+) -> (\S+), BLEU \S+ -> \S+, adapter \d+ KB in (.+)", last)
    assert match, last
    assert float(match.group(1)) != float(match.group(2))
    assert (Path(match.group(3)) / "adapter_model.safetensors").is_file()
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert set(scores["before"]) == set(scores["after"]) == {"loss", "perplexity", "bleu", "chrf", "rouge_l"}
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Highland Rose" in page or "ferry:" in page


def test_the_data_of_the_demo_are_two_disjoint_sets():
    sources = {
        name: [json.loads(line)["source"] for line in (DATA / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "test")
    }
    assert (len(sources["train"]), len(sources["test"])) == (240, 32)
    assert not set(sources["train"]) & set(sources["test"])
