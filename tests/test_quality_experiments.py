"""Experiments of the quality benchmark run what their files say, once, and give a page."""

import json
import multiprocessing
from pathlib import Path

import pytest
import torch
from quality_settings import INIT_TEXT, SETTINGS
from tiny_models import build_chat_tokenizer, build_model
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.quality.experiment_files import load_experiment, merge_settings
from benchmarks.quality.method_results import MethodResults, collect_results
from benchmarks.quality.methods import CONFIG_CLASSES, PEFT_TYPES
from benchmarks.quality.page import NO_RESULTS, build_cost_table, write_page
from benchmarks.quality.results_file import BASE_MODEL, ResultsFile, choose_learning_rate
from benchmarks.quality.run import Benchmark
from benchmarks.quality.summary import build_summary
from benchmarks.quality.tasks import ClassificationTask, draw_sample, take_first
from benchmarks.quality.trial import build_trial

EXPERIMENTS = Path(__file__).parents[1] / "benchmarks" / "quality" / "experiments"


def test_a_prompted_task_reads_the_text_in_training_and_in_evaluation(small_experiment):
    path, _, results = small_experiment
    benchmark = Benchmark(path, path.parent, results)
    trial = build_trial(benchmark.experiment, benchmark.task, "lora", 0.01, 0)
    task = trial.task
    rows, plain = task.tokenize(trial.examples), benchmark.task.tokenize(trial.examples)
    added = len(rows[0]["input_ids"]) - len(plain[0]["input_ids"])
    in_front = rows[0]["input_ids"][:added]
    assert task.tokenizer.decode(in_front).endswith(INIT_TEXT)
    assert [row["input_ids"] for row in rows] == [in_front + row["input_ids"] for row in plain]
    assert [row["labels"] for row in rows] == [[-100] * added + row["labels"] for row in plain]
    with pytest.raises(ValueError, match="remove `prompt`"):
        ClassificationTask.__new__(ClassificationTask).prompted("Sort:")


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.json")), ids=lambda path: path.stem)
def test_experiments_name_known_methods_and_fields_and_give_all_the_same_number_of_rates(path):
    methods = load_experiment(path)["methods"]
    for method in methods.values():
        assert method["peft_type"] in PEFT_TYPES
        fields = {
            name: value for name, value in method["config"].items() if name not in ("init", "num_trained_tokens")
        }
        if method["peft_type"] in CONFIG_CLASSES:
            CONFIG_CLASSES[method["peft_type"]](**fields)
    assert len({len(method["learning_rates"]) for method in methods.values()}) == 1


def test_an_experiment_changes_the_one_that_it_extends(tmp_path):
    settings = {"a": {"b": 1, "c": [1, 2]}, "d": 3}
    assert merge_settings(settings, {"a": {"c": [3], "e": 4}, "d": None}) == {"a": {"b": 1, "c": [3], "e": 4}}
    assert settings == {"a": {"b": 1, "c": [1, 2]}, "d": 3}
    base = load_experiment(EXPERIMENTS / "e2e.json")
    limited = load_experiment(EXPERIMENTS / "e2e_50.json")
    assert limited["task"] == {**base["task"], "train_limit": 50} and limited["methods"] == base["methods"]
    path = tmp_path / "e.json"
    path.write_text(json.dumps({**base, "task": {**base["task"], "trian_limit": 3}}))
    with pytest.raises(ValueError, match="trian_limit"):
        load_experiment(path)
    path.write_text(json.dumps({**base, "task": {**base["task"], "evaluations": {"test": {"path": "x"}}}}))
    with pytest.raises(ValueError, match="'dev'"):
        load_experiment(path)


def test_an_experiment_has_only_the_methods_that_it_names(tmp_path):
    base = load_experiment(EXPERIMENTS / "e2e.json")
    path = tmp_path / "e.json"
    path.write_text(json.dumps({**base, "only": ["LoRA r=4", "PrefixPlus"]}))
    names = ("LoRA r=4", "PrefixPlus")
    assert load_experiment(path) == {**base, "methods": {name: base["methods"][name] for name in names}}
    path.write_text(json.dumps({**base, "only": ["LoRA r=5"]}))
    with pytest.raises(ValueError, match=r"`only` has \['LoRA r=5'\]; the methods are \['PrefixPlus'"):
        load_experiment(path)


def test_a_set_is_limited_to_its_first_records_or_to_a_sample():
    rows = list(range(50))
    assert take_first(rows, None) == rows == draw_sample(rows, None, 0) and take_first(rows, 5) == rows[:5]
    drawn = draw_sample(rows, 5, 0)
    assert drawn == draw_sample(rows, 5, 0) != draw_sample(rows, 5, 1)
    assert len(set(drawn)) == 5 and set(drawn) < set(rows) and drawn != rows[:5]
    with pytest.raises(ValueError, match="The limit is 51, but the set has 50"):
        take_first(rows, 51)
    with pytest.raises(ValueError, match="The limit is 51, but the set has 50"):
        draw_sample(rows, 51, 0)


def test_a_rate_that_is_not_listed_any_more_is_never_chosen():
    runs = [make_run(rate=0.1, loss=2.0), make_run(rate=0.01, loss=1.0)]
    (result,) = collect_results({"experiment": make_experiment(), "runs": runs})
    assert result.learning_rate == 0.1 and result.first_seed_runs == runs[:1]


def test_costs_are_ratios_to_the_first_lora_that_has_them_all():
    plain, timed = ({"machine": "m", "adapter_bytes": 1024, "trainable_parameters": 8} for _ in range(2))
    timed |= {"train_cpu_seconds": 2.0, "peak_memory_mib": 4}
    costly = timed | {"train_cpu_seconds": 3.0}
    results = [
        MethodResults(name, "LORA", 0.1, [run], []) for name, run in zip("abc", (plain, timed, costly), strict=True)
    ]
    table = "\n".join(build_cost_table(results))
    assert "CPU time of training / b | peak memory / b" in table
    assert "| a | 8 | 1 | – | – |" in table and "| c | 8 | 1 | 1.50 | 1.00 |" in table


def test_the_summary_has_every_lora_and_the_best_of_each_family_unless_it_is_larger():
    records = {"loss": [1.0, 2.0], "tokens": [1, 1], "label": [0, 1], "predicted": [0, 1]}
    methods = {
        "worse prefix": ("PREFIX_PLUS", 1.1, 10),
        "prefix": ("PREFIX_PLUS", 1.0, 100),
        "lora": ("LORA", 2.0, 100),
        "other lora": ("LORA", 1.9, 125),
        "large lora": ("LORA", 0.9, 126),
        "cartridge": ("CARTRIDGE", 1.5, 100),
        "peft prefix": ("PREFIX_TUNING", 1.4, 100),
        "ia3": ("IA3", 0.8, 5),
        "prompt": ("PROMPT_TUNING", 1.3, 5),
        "full": ("FULL", 0.5, 50),
    }
    experiment = make_experiment(*methods)
    runs = []
    for name, (peft_type, loss, size) in methods.items():
        experiment["methods"][name]["peft_type"] = peft_type
        runs.append(make_run(name, peft_type=peft_type, trainable_parameters=size))
        runs[-1] |= {"scores": {"dev": {"loss": loss, "accuracy": 50.0}}, "records": {"dev": records}}
    rows = [line.split(" | ")[1] for line in build_summary({"e": {"experiment": experiment, "runs": runs}})[2:]]
    assert rows == ["prefix", "lora", "other lora", "peft prefix", "ia3"]


def make_run(method="a", rate=0.1, seed=0, loss=1.0, **fields):
    return {"method": method, "learning_rate": rate, "seed": seed, "diverged": False} | {
        "peft_type": "LORA",
        "config": {},
        "scores": {"dev": {"loss": loss}},
        "records": {"dev": {"loss": [loss], "tokens": [1]}},
        **fields,
    }


def make_experiment(*names):
    return {
        "name": "e",
        "task": {"train": "t", "evaluations": {"dev": {"path": "d"}}},
        "seeds": [0, 1],
        "methods": {name: {"peft_type": "LORA", "config": {}, "learning_rates": [0.1]} for name in names or ("a",)},
    }


def add_runs(path, method):
    results = ResultsFile(path, make_experiment("a", "b"))
    for seed in range(30):
        results.add(make_run(method, seed=seed))


def test_two_processes_that_add_runs_lose_none(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=add_runs, args=(tmp_path / "r.json", method)) for method in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    runs = ResultsFile(tmp_path / "r.json", make_experiment("a", "b")).runs
    assert sorted((run["method"], run["seed"]) for run in runs) == [(name, i) for name in "ab" for i in range(30)]
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_results_are_merged_by_run_and_replaced_when_the_method_changes(tmp_path):
    experiment = make_experiment()
    results = ResultsFile(tmp_path / "r.json", experiment)
    results.add(make_run())
    results.add(make_run(scores={"test": {"loss": 2.0}}, records={"test": {}}))
    assert list(results.find("a", 0.1, 0)["scores"]) == ["dev", "test"]
    experiment["methods"]["a"]["config"] = {"r": 2}
    assert results.find("a", 0.1, 0) is None
    results.add(make_run(config={"r": 2}, loss=3.0))
    assert [run["scores"] for run in results.runs] == [{"dev": {"loss": 3.0}}]
    task = experiment["task"]
    more = {**task, "evaluations": {**task["evaluations"], "test": {"path": "t"}}}
    assert ResultsFile(tmp_path / "r.json", {**experiment, "task": more, "seeds": [0]}).runs == results.runs
    with pytest.raises(ValueError, match=r"another experiment: task\.train_limit differ"):
        ResultsFile(tmp_path / "r.json", {**experiment, "task": {**task, "train_limit": 2}})
    with pytest.raises(ValueError, match=r"another experiment: task\.evaluations\.dev differ"):
        ResultsFile(tmp_path / "r.json", {**experiment, "task": {**task, "evaluations": {"dev": {"path": "e"}}}})


def test_the_rate_is_chosen_on_the_first_seed_among_runs_that_did_not_diverge():
    runs = [
        make_run(rate=rate, seed=seed, loss=loss)
        for seed, rate, loss in [(0, 0.1, 2.0), (0, 0.2, 1.5), (1, 0.2, 1.9), (1, 0.1, 1.0)]
    ]
    diverged = make_run(rate=0.4, diverged=True, scores={}, records={})
    assert choose_learning_rate([*runs, diverged], "a", 0) == 0.2
    experiment = make_experiment()
    experiment["methods"]["a"]["learning_rates"] = [0.1, 0.2, 0.4]
    (result,) = collect_results({"experiment": experiment, "runs": [*runs, diverged]})
    assert result.get_scores("dev", "loss") == [1.5, 1.9]
    assert result.diverged == 1
    assert choose_learning_rate([diverged], "a", 0) is None


@pytest.fixture
def small_experiment(tmp_path):
    """Data, an experiment on a tiny model, and where its results go."""
    tokenizer = build_chat_tokenizer()
    build_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"source": f"n {i}", "references": [f"it is {i}", f"{i} it is"]} for i in range(12)]
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    experiment = {
        "name": "Small",
        "model": str(tmp_path / "model"),
        "dtype": "float32",
        "task": {
            "train": "train.jsonl",
            "train_limit": 5,
            "evaluations": {"dev": {"path": "dev.jsonl", "limit": 4}, "test": {"path": "test.jsonl"}},
            "init_text": INIT_TEXT,
        },
        "training": {"max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True},
        "generation": {"max_new_tokens": 4},
        "seeds": [0, 1],
        "methods": {
            name: {"peft_type": SETTINGS[name][0], "config": SETTINGS[name][1], "learning_rates": [0.01, 0.1]}
            for name in ("prefix", "lora", "full")
        },
    }
    experiment["methods"]["lora"]["prompt"] = {"text": "$init_text", "examples": 1}
    path = tmp_path / "small.json"
    path.write_text(json.dumps(experiment))
    return path, experiment, tmp_path / "results"


@pytest.mark.slow
def test_an_experiment_runs_once_and_gives_a_page(small_experiment, tmp_path):
    path, experiment, results = small_experiment
    Benchmark(path, path.parent, results).run(["lora"])
    Benchmark(path, path.parent, results).run()
    written = (results / "small.json").read_text()
    Benchmark(path, path.parent, results).run()
    assert (results / "small.json").read_text() == written
    runs = json.loads(written)["runs"]
    assert len(runs) == 1 + 3 * (2 + 1)
    for name in experiment["methods"]:
        own = [run for run in runs if run["method"] == name]
        chosen = choose_learning_rate(own, name, 0)
        assert {(run["learning_rate"], run["seed"]) for run in own} == {(0.01, 0), (0.1, 0), (chosen, 1)}
        for run in own:
            expected = {"dev", "test"} if run["learning_rate"] == chosen else {"dev"}
            assert set(run["scores"]) == set(run["records"]) == expected
            assert len(run["records"]["dev"]["loss"]) == 4 and len(run["samples"]) == 3
    pages = [write_page(results, tmp_path / name) for name in ("first", "second")]
    text = pages[0].read_text()
    assert text == pages[1].read_text()
    for name in (BASE_MODEL, *experiment["methods"], "prefix minus the others", "test: BLEU"):
        assert name in text
    assert "| Small: test | prefix |" in text
    alone = json.loads(written) | {"runs": [run for run in runs if run["method"] in (BASE_MODEL, "prefix")]}
    assert build_summary({"small": json.loads(written)}) and not build_summary({"small": alone})
    figures = sorted(path.name for path in (tmp_path / "first" / "images").iterdir())
    assert figures == ["small_parameters.svg", "small_rates.svg"]
    for name in figures:
        assert f"(images/{name})" in text
        first, second = (tmp_path / folder / "images" / name for folder in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
def test_the_chosen_run_is_the_same_with_and_without_its_kept_parameters(small_experiment, tmp_path):
    path, _, results = small_experiment
    Benchmark(path, path.parent, results).run(["prefix"])
    at_once = json.loads((results / "small.json").read_text())["runs"]
    cut = [
        {**run, "scores": {"dev": run["scores"]["dev"]}, "records": {"dev": run["records"]["dev"]}} for run in at_once
    ]
    report = json.loads((results / "small.json").read_text()) | {"runs": cut}
    (results / "small.json").write_text(json.dumps(report))
    Benchmark(path, path.parent, results).run(["prefix"])
    again = json.loads((results / "small.json").read_text())["runs"]
    for first, second in zip(at_once[:-1], again[:-1], strict=True):
        assert first["scores"] == second["scores"] and first["train_cpu_seconds"] == second["train_cpu_seconds"]


@pytest.mark.parametrize(("rates", "chosen", "expected"), [((1, 2, 3), 2, False), ((1, 2), 2, True), ((2,), 2, False)])
def test_a_rate_is_at_an_end_only_of_others(rates, chosen, expected):
    runs = [{"learning_rate": rate} for rate in rates]
    assert MethodResults("any", "LORA", chosen, [], runs).rate_is_at_an_end == expected


def test_a_run_that_diverges_is_recorded_as_such(small_experiment, tmp_path):
    path, experiment, results = small_experiment
    experiment["methods"] = {"full": {"peft_type": "FULL", "config": {}, "learning_rates": [0.01, float("inf")]}}
    path.write_text(json.dumps(experiment))
    Benchmark(path, path.parent, results).run()
    runs = json.loads((results / "small.json").read_text())["runs"]
    assert [run["diverged"] for run in runs if run["seed"] == 0] == [False, True]
    assert "Diverged: full at inf (seed 0)" in write_page(results, tmp_path / "docs").read_text()


def test_the_training_set_is_the_same_for_a_seed_and_another_for_another(small_experiment):
    path, _, results = small_experiment
    task = Benchmark(path, path.parent, results).task
    assert task.draw_examples(0) == task.draw_examples(0) != task.draw_examples(1)
    assert len(task.draw_examples(0)) == 5


def test_a_page_without_results_says_so(tmp_path):
    assert NO_RESULTS in write_page(tmp_path / "none", tmp_path / "docs").read_text()


CLASSIFIERS = {
    "prefix": ("PREFIX_PLUS", {"num_virtual_tokens": 4}),
    "lora": ("LORA", {"r": 2, "target_modules": ["query"]}),
    "ia3": ("IA3", {}),
    "peft prefix": ("PREFIX_TUNING", {"num_virtual_tokens": 4}),
    "p-tuning": ("P_TUNING", {"num_virtual_tokens": 4}),
    "head": ("HEAD", {}),
    "full": ("FULL", {}),
}


@pytest.mark.slow
def test_every_method_classifies(tmp_path):
    tokenizer = build_chat_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"source": "x" * (i % 5 + 1), "label": "ab"[i % 2]} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    experiment = {
        "name": "Labels",
        "model": str(tmp_path / "model"),
        "dtype": "float32",
        "task": {"kind": "classification", "train": "rows.jsonl", "evaluations": {"dev": {"path": "rows.jsonl"}}},
        "training": {"max_steps": 2, "use_cpu": True},
        "seeds": [0],
        "methods": {
            name: {"peft_type": peft_type, "config": config, "learning_rates": [0.01]}
            for name, (peft_type, config) in CLASSIFIERS.items()
        },
    }
    (tmp_path / "labels.json").write_text(json.dumps(experiment))
    benchmark = Benchmark(tmp_path / "labels.json", tmp_path, tmp_path / "results")
    state = {key: tensor.clone() for key, tensor in benchmark.task.model.state_dict().items()}
    benchmark.run()
    assert all(torch.equal(tensor, state[key]) for key, tensor in benchmark.task.model.state_dict().items())
    runs = benchmark.results.runs
    assert [run["method"] for run in runs] == [*CLASSIFIERS, BASE_MODEL]
    head = 16 * 2 + 2
    counts = {run["method"]: run["trainable_parameters"] for run in runs}
    assert counts["head"] == head and all(
        count > head for name, count in counts.items() if name not in ("head", BASE_MODEL)
    )
    for run in runs:
        assert set(run["scores"]["dev"]) == {"loss", "accuracy", "macro_f1"}
    assert "macro F1" in write_page(tmp_path / "results", tmp_path / "docs").read_text()
