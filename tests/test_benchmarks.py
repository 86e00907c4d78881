"""The quality benchmark: its methods leave the base model as it was, its runs and scores are what they claim to be."""

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import draw_tokens
from tiny_models import build_chat_tokenizer, build_model
from transformers import BertConfig, BertForSequenceClassification, DataCollatorForSeq2Seq

from benchmarks.peak_memory import read_peak_memory, reset_peak_memory
from benchmarks.quality.bootstrap import compare
from benchmarks.quality.experiment_files import load_experiment, merge_settings
from benchmarks.quality.initial_tokens import build_initial_tokens, fit_tokens
from benchmarks.quality.method_results import collect_results
from benchmarks.quality.methods import CONFIG_CLASSES, PEFT_TYPES, build_method, remove_method
from benchmarks.quality.page import NO_RESULTS, write_page
from benchmarks.quality.results_file import BASE_MODEL, ResultsFile, choose_learning_rate
from benchmarks.quality.run import Benchmark
from benchmarks.quality.segment_scores import SCORES, count_text_records, score_records
from benchmarks.quality.tasks import ClassificationTask, GenerationTask
from peft_prefix_plus.evaluation import compute_loss, generate_texts
from peft_prefix_plus.examples import Example
from peft_prefix_plus.metrics import compute_text_metrics

BENCHMARKS = Path(__file__).parents[1] / "benchmarks" / "quality"
EXPERIMENTS = sorted((BENCHMARKS / "experiments").glob("*.json"))
INIT_TEXT = "Write it:\n"
FROM_TEXT = {"num_virtual_tokens": 4, "init": {"text": "$init_text"}}
SETTINGS = {
    "prefix": ("PREFIX_PLUS", {**FROM_TEXT, "projection": "none"}),
    "lora": ("LORA", {"r": 2, "target_modules": ["q_proj"]}),
    "ia3": ("IA3", {}),
    "cartridge": ("CARTRIDGE", {"num_virtual_tokens": 4}),
    "cartridge text": ("CARTRIDGE", FROM_TEXT),
    "peft prefix": ("PREFIX_TUNING", {"num_virtual_tokens": 4}),
    "peft prefix zero": ("PREFIX_TUNING", {"num_virtual_tokens": 4, "init_weights": "zero"}),
    "peft prefix text": ("PREFIX_TUNING", FROM_TEXT),
    "p-tuning": ("P_TUNING", {"num_virtual_tokens": 4}),
    "prompt": ("PROMPT_TUNING", {"num_virtual_tokens": 4}),
    "prompt text": ("PROMPT_TUNING", FROM_TEXT),
    "full": ("FULL", {}),
    "full float32": ("FULL", {"dtype": "float32"}),
}
every_method = pytest.mark.parametrize("name", SETTINGS)
EXAMPLES = [Example(f"a: {'x' * i}\n", (f"b{i}.", "It is c.")) for i in range(6)]
TEXTS = ["the cat sat on the mat", "a dog", "", "blue birds fly over the old town", "no match here at all"]
REFERENCES = [
    ["the cat sat on a mat", "a cat was on the mat there"],
    ["a dog barks"],
    ["something"],
    ["blue birds fly over the town", "birds fly", "over the old town fly blue birds"],
    ["zzz"],
]


def apply_method(name, model, tokenizer):
    peft_type, settings = SETTINGS[name]
    torch.manual_seed(0)
    return build_method(peft_type, settings, model, tokenizer, INIT_TEXT, EXAMPLES)


def build_task(model, tokenizer, **generation):
    """A task around a given model, without files."""
    task = GenerationTask.__new__(GenerationTask)
    task.model, task.tokenizer, task._generation = model, tokenizer, generation
    task.collator = DataCollatorForSeq2Seq(tokenizer)
    task._evaluations, task._counts_exact = {"dev": EXAMPLES}, False
    return task


def take_steps(method, ids):
    """Train for two steps, far enough that everything has moved."""
    optimizer = torch.optim.SGD(method.trainable.values(), lr=0.5)
    method.model.train()
    for _ in range(2):
        optimizer.zero_grad()
        method.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    method.model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_method
def test_a_method_is_trained_and_leaves_nothing_behind(name, dtype):
    tokenizer = build_chat_tokenizer()
    model, ids = build_model("llama", vocab_size=len(tokenizer), dtype=dtype), draw_tokens()
    expected = model(ids).logits
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    method = apply_method(name, model, tokenizer)
    before = {key: parameter.detach().clone() for key, parameter in method.trainable.items()}
    assert method.count_parameters() == sum(parameter.numel() for parameter in before.values()) > 0
    assert method.measure_bytes() > 0
    take_steps(method, ids)
    assert not torch.equal(method.model(input_ids=ids).logits[:, -1], expected[:, -1])
    assert any(not torch.equal(parameter, before[key]) for key, parameter in method.trainable.items())
    base = remove_method(method)
    assert base is model and type(base).__name__ == "LlamaForCausalLM"
    assert list(base.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[key]) for key, tensor in base.state_dict().items())
    assert {parameter.dtype for parameter in base.parameters()} == {dtype}
    assert torch.equal(base(ids).logits, expected)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in base.parameters())


@pytest.mark.parametrize("name", ["prefix", "cartridge text", "peft prefix text", "prompt text"])
def test_a_method_that_starts_from_a_text_is_that_text(name):
    tokenizer = build_chat_tokenizer()
    model, ids = build_model("llama", vocab_size=len(tokenizer)), draw_tokens()
    text = torch.tensor([tokenizer(INIT_TEXT, add_special_tokens=False)["input_ids"][:4]] * len(ids))
    with torch.no_grad():
        expected = model(torch.cat([text, ids], dim=1)).logits[:, 4:]
        method = apply_method(name, model, tokenizer)
        found = method.model.eval()(input_ids=ids).logits[:, -ids.shape[1] :]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@every_method
def test_kept_parameters_give_the_trained_model_again(name, tmp_path):
    tokenizer = build_chat_tokenizer()
    model, ids = build_model("llama", vocab_size=len(tokenizer)), draw_tokens()
    method = apply_method(name, model, tokenizer)
    take_steps(method, ids)
    expected = method.model(input_ids=ids).logits
    method.save_trainable(tmp_path / "kept.pt")
    method = apply_method(name, remove_method(method), tokenizer)
    method.load_trainable(tmp_path / "kept.pt")
    assert torch.equal(method.model.eval()(input_ids=ids).logits, expected)


@every_method
def test_batches_change_neither_losses_nor_texts(name, monkeypatch):
    tokenizer = build_chat_tokenizer()
    model = build_model("llama", vocab_size=len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight *= 5  # no near ties
    method = apply_method(name, model, tokenizer)
    task = build_task(model, tokenizer, batch_size=6, max_new_tokens=8)
    records, _ = task.evaluate(method.model, "dev")
    texts = task._generate(method.model, [example.prompt for example in EXAMPLES])
    assert texts == [task._generate(method.model, [example.prompt])[0] for example in EXAMPLES]
    monkeypatch.setattr("benchmarks.quality.tasks.BATCH_SIZE", 1)
    alone, _ = task.evaluate(method.model, "dev")
    assert alone["tokens"] == records["tokens"]
    assert alone["loss"] == pytest.approx(records["loss"], abs=2e-3)


@pytest.mark.parametrize("name", ["prefix", "cartridge text", "peft prefix text", "prompt text"])
def test_losses_of_a_start_from_a_text_are_those_of_prompts_with_the_text(name):
    tokenizer = build_chat_tokenizer()
    model = build_model("llama", vocab_size=len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight *= 5  # no near ties
    task = build_task(model, tokenizer, max_new_tokens=4)
    expected, texts = task.prompted(INIT_TEXT[:4]).evaluate(model, "dev")
    found, own_texts = task.evaluate(apply_method(name, model, tokenizer).model, "dev")
    assert own_texts == texts
    assert found["tokens"] == expected["tokens"]
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-3)


def test_losses_and_scores_are_those_of_the_package():
    tokenizer = build_chat_tokenizer()
    model = build_model("llama", vocab_size=len(tokenizer))
    task = build_task(model, tokenizer, max_new_tokens=8)
    records, samples = task.evaluate(model, "dev")
    texts = generate_texts(model, tokenizer, [example.prompt for example in EXAMPLES], max_new_tokens=8)
    expected = compute_text_metrics(texts, [example.references for example in EXAMPLES])
    expected["loss"] = compute_loss(model, tokenizer, EXAMPLES)
    assert score_records(records) == pytest.approx(expected, abs=1e-4)
    assert samples == texts[:3]
    task._counts_exact = True
    task._evaluations["dev"] = [Example(EXAMPLES[0].prompt, ("no", texts[0])), *EXAMPLES[1:]]
    assert score_records(task.evaluate(model, "dev")[0])["exact_match"] == pytest.approx(100 / 6)


@pytest.mark.parametrize("chosen", [[0, 1, 2, 3, 4], [0, 0, 3], [1], [2], [4, 2], [1, 1, 4], [0, 2, 3, 3]])
def test_sums_of_statistics_give_the_scores_of_sacrebleu(chosen):
    texts, references = [TEXTS[i] for i in chosen], [REFERENCES[i] for i in chosen]
    records = count_text_records(TEXTS, REFERENCES)
    found = score_records({name: [column[i] for i in chosen] for name, column in records.items()})
    assert found == pytest.approx(compute_text_metrics(texts, references), abs=1e-4)


def test_scores_of_labels_are_those_of_their_definitions():
    scores = score_records({"label": [0, 0, 1, 2], "predicted": [0, 1, 1, 1], "loss": [1.0] * 4, "tokens": [1] * 4})
    assert scores == pytest.approx({"loss": 1.0, "accuracy": 50.0, "macro_f1": 100 * (2 / 3 + 1 / 2 + 0) / 3})


def draw_records(seed, count=40):
    generator = np.random.default_rng(seed)
    words = np.array(["the", "cat", "sat", "on", "a", "red", "mat", "and", "saw", "blue", "birds"])
    references = [[" ".join(generator.choice(words, 8))] for _ in range(count)]
    texts = [" ".join(word if generator.random() < 0.8 else "x" for word in own[0].split(" ")) for own in references]
    tokens = generator.integers(5, 15, count)
    records = count_text_records(texts, references) | {"loss": list(tokens * 1.5), "tokens": list(tokens)}
    records["exact"] = list(tokens % 2)
    return records | {"label": list(tokens % 3), "predicted": list(tokens % 2)}


@pytest.mark.parametrize("name", SCORES)
def test_a_method_does_not_differ_from_itself(name):
    records = [draw_records(0), draw_records(1)]
    assert compare(records, records[::-1], name, resamples=200) == pytest.approx((0, 0, 0), abs=1e-9)


def test_a_shift_of_every_loss_is_the_difference_in_every_resample():
    first = [draw_records(0), draw_records(1)]
    second = [
        {**own, "loss": [loss + 0.25 * n for loss, n in zip(own["loss"], own["tokens"], strict=True)]} for own in first
    ]
    assert compare(first, second, "loss", resamples=200) == pytest.approx((-0.25, -0.25, -0.25))
    assert compare(first, second, "loss", resamples=200).excludes_zero


@pytest.mark.parametrize("name", ["bleu", "chrf", "loss", "accuracy"])
def test_the_interval_is_that_of_resampling_one_by_one(name):
    first, second = draw_records(0), draw_records(1)
    score, generator = SCORES[name], np.random.default_rng(5)
    rows = [score.select(records) for records in (first, second)]
    differences = []
    for _ in range(4000):
        chosen = generator.integers(0, 40, 40)
        differences.append(score.compute(rows[0][chosen].sum(0)) - score.compute(rows[1][chosen].sum(0)))
    found = compare([first], [second], name, resamples=4000)
    assert found.value == pytest.approx(score.score(first) - score.score(second))
    spread = np.std(differences)
    assert (found.lower, found.upper) == pytest.approx(np.percentile(differences, [2.5, 97.5]), abs=0.15 * spread)


def test_methods_must_share_their_records():
    with pytest.raises(ValueError, match=r"same records, got runs of \[39, 40\]"):
        compare([draw_records(0, 40)], [draw_records(0, 39)], "loss")


def test_initial_tokens_are_the_same_examples_in_front_of_the_text():
    tokenizer = build_chat_tokenizer()
    ids = build_initial_tokens({"text": "$init_text", "examples": 2}, tokenizer, INIT_TEXT, EXAMPLES)
    text = tokenizer.decode(ids)
    shown = [example for example in EXAMPLES if f"{example.prompt}{example.references[0]}\n" in text]
    assert text.endswith(INIT_TEXT) and len(shown) == 2
    assert ids == build_initial_tokens({"text": INIT_TEXT, "examples": 2}, tokenizer, "", EXAMPLES)
    assert fit_tokens([1, 2, 3], 5) == [1, 2, 3, 1, 2] and fit_tokens([1, 2, 3], 2) == [1, 2]
    with pytest.raises(ValueError, match="6 examples there are, got 7"):
        build_initial_tokens({"examples": 7}, tokenizer, INIT_TEXT, EXAMPLES)
    with pytest.raises(ValueError, match="fields 'text' and 'examples'"):
        build_initial_tokens({"texts": INIT_TEXT}, tokenizer, INIT_TEXT)


def test_a_prompted_task_reads_the_text_in_training_and_in_evaluation(small_experiment):
    path, _, results = small_experiment
    benchmark = Benchmark(path, path.parent, results)
    _, task, examples = benchmark._build("lora", 0)
    rows, plain = task.tokenize(examples), benchmark.task.tokenize(examples)
    added = len(rows[0]["input_ids"]) - len(plain[0]["input_ids"])
    in_front = rows[0]["input_ids"][:added]
    assert task.tokenizer.decode(in_front).endswith(INIT_TEXT)
    assert [row["input_ids"] for row in rows] == [in_front + row["input_ids"] for row in plain]
    assert [row["labels"] for row in rows] == [[-100] * added + row["labels"] for row in plain]
    with pytest.raises(ValueError, match="remove `prompt`"):
        ClassificationTask.__new__(ClassificationTask).prompted("Sort:")


def test_a_prefix_of_examples_trains_its_last_tokens_only():
    tokenizer = build_chat_tokenizer()
    model = build_model("llama", vocab_size=len(tokenizer), max_position_embeddings=256)
    config = {"projection": "none", "init": {"text": "$init_text", "examples": 2}, "num_trained_tokens": 5}
    method = build_method("PREFIX_PLUS", config, model, tokenizer, INIT_TEXT, EXAMPLES)
    flat = {"projection": "none", "num_virtual_tokens": 5, "init": {"text": "$init_text"}}
    settings = method.model.active_peft_config
    assert settings.num_virtual_tokens == len(settings.prefix_init_token_ids) == settings.num_frozen_tokens + 5
    count = method.count_parameters()
    assert count == build_method("PREFIX_PLUS", flat, remove_method(method), tokenizer, INIT_TEXT).count_parameters()


@pytest.mark.parametrize(("peft_type", "word"), [("LORA", "remove `init`"), ("NONE", "use one of"), ("HEAD", "only")])
def test_a_method_that_cannot_be_built_is_named(peft_type, word):
    tokenizer = build_chat_tokenizer()
    with pytest.raises(ValueError, match=word):
        build_method(peft_type, {"init": {"text": "a"}}, build_model("llama"), tokenizer)


@pytest.mark.parametrize("settings", [{"num_virtual_tokens": 4}, {}])
def test_a_prefix_cannot_train_more_tokens_than_it_has(settings):
    with pytest.raises(ValueError, match="`num_trained_tokens` is 5, of"):
        build_method("PREFIX_PLUS", {**settings, "num_trained_tokens": 5}, build_model("llama"), None)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
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
    base = load_experiment(BENCHMARKS / "experiments" / "e2e.json")
    limited = load_experiment(BENCHMARKS / "experiments" / "e2e_50.json")
    assert limited["task"] == {**base["task"], "train_limit": 50} and limited["methods"] == base["methods"]
    path = tmp_path / "e.json"
    path.write_text(json.dumps({**base, "task": {**base["task"], "trian_limit": 3}}))
    with pytest.raises(ValueError, match="trian_limit"):
        load_experiment(path)
    path.write_text(json.dumps({**base, "task": {**base["task"], "evaluations": {"test": {"path": "x"}}}}))
    with pytest.raises(ValueError, match="'dev'"):
        load_experiment(path)


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
    (result,) = collect_results({"experiment": make_experiment(), "runs": [*runs, diverged]})
    assert result.get_scores("dev", "loss") == [1.5, 1.9]
    assert result.diverged == 1
    assert choose_learning_rate([diverged], "a", 0) is None


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak memory")
def test_the_peak_is_that_since_the_reset():
    reset_peak_memory()
    before = read_peak_memory()
    torch.ones(50 * 2**20, dtype=torch.float32)
    assert 150 << 20 < read_peak_memory() - before < 300 << 20
    reset_peak_memory()
    assert read_peak_memory() - before < 100 << 20


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
    for first, second in zip(at_once[1:], again[1:], strict=True):
        assert first["scores"] == second["scores"] and first["train_cpu_seconds"] == second["train_cpu_seconds"]


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
    assert [run["method"] for run in runs] == [BASE_MODEL, *CLASSIFIERS]
    head = 16 * 2 + 2
    counts = {run["method"]: run["trainable_parameters"] for run in runs}
    assert counts["head"] == head and all(
        count > head for name, count in counts.items() if name not in ("head", BASE_MODEL)
    )
    for run in runs:
        assert set(run["scores"]["dev"]) == {"loss", "accuracy", "macro_f1"}
    assert "macro F1" in write_page(tmp_path / "results", tmp_path / "docs").read_text()


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "results").glob("*.json")), ids=lambda path: path.stem)
def test_committed_scores_are_those_of_their_records(path):
    for run in json.loads(path.read_text())["runs"]:
        for evaluation, scores in run["scores"].items():
            assert score_records(run["records"][evaluation]) == pytest.approx(scores)
