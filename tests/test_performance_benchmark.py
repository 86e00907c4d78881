"""The performance benchmark runs from the measurement to its page, and its rounds are fair."""

import json
import time
from pathlib import Path

import pytest
import torch
from tiny_models import build_model

from benchmarks.instructions import count_instructions
from benchmarks.peak_memory import read_peak_memory, reset_peak_memory
from benchmarks.performance.cases import count_saved_bytes, draw_ids, generate, measure_peak, truncate_layers
from benchmarks.performance.measure import DTYPES, Measurement, list_missing, note_machine, read_report
from benchmarks.performance.page import describe_missing, write_page
from benchmarks.performance.rivals import BARE, CONFIGS, PREFIX, build_rivals, share_weights
from benchmarks.performance.rounds import subtract, summarize, time_rounds

SETTING = {
    "rounds": 2,
    "cases": {
        "steps": [{"batch": 2, "length": 8}, {"batch": 2, "length": 8, "checkpointing": True}],
        "generation": [{"batch": 2, "context": 8, "new": 3}],
        "lengths": [{"num_virtual_tokens": 1}],
        "depths": [{"depth": 1}],
        "adapters": [{}],
        "mixed_batches": [{"context": 4, "new": 2}],
    },
}


def test_what_is_measured_makes_a_page(tmp_path):
    base = build_model("llama", max_position_embeddings=512)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    measurement, results = Measurement(base, SETTING["rounds"]), {}
    for kind, case in list_missing(SETTING, "float32", {}):
        results.setdefault(kind, []).append(measurement.measure(kind, case))
    assert list(measurement.models[PREFIX].peft_config) == ["default"]
    assert list(list_missing(SETTING, "float32", results)) == []
    unfinished = results | {"steps": results["steps"][1:]}
    assert list(list_missing(SETTING, "float32", unfinished)) == [("steps", {"batch": 2, "length": 8})]
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert set(results["steps"][0]["times"]) == {BARE, *CONFIGS}
    assert all(step["times"][BARE]["ratio"] == 1 for step in results["steps"])
    report = {
        "model": "tiny",
        "threads": 1,
        "setting": SETTING,
        "versions": {},
        "dtypes": dict.fromkeys(DTYPES, results),
        "machines": {"float32": {"processor": "tiny chip", "instructions": "NONE"}},
    }
    write_page({"short": report}, tmp_path)
    page = (tmp_path / "performance.md").read_text()
    assert "step, 2 x 8 tokens, checkpointing" in page
    counts = count_instructions(list) is not None
    assert ("instructions, 2 x 8 tokens" in page) == ("instructions, step, 1 layer" in page) == counts
    assert "Not measured yet" not in page
    assert page.count("Measured on tiny chip, NONE.") == 1
    figures = ["performance_short.png", "performance_short_lengths.png"]
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == figures
    assert all((tmp_path / "images" / name).stat().st_size > 1000 and f"(images/{name})" in page for name in figures)
    unfinished = {"depths": results["depths"], "steps": results["steps"][1:]}
    write_page({"full": report | {"dtypes": {"bfloat16": unfinished}}}, tmp_path / "other")
    page = (tmp_path / "other" / "performance.md").read_text()
    assert (
        "in bfloat16: 1 of 2 steps, 1 of 1 generation, 1 of 1 lengths, 1 of 1 adapters, 1 of 1 mixed batches." in page
    )
    assert "Nothing has been measured in float32 yet." in page
    assert "inference" not in page
    assert [path.name for path in (tmp_path / "other" / "images").iterdir()] == ["performance_full.png"]


def test_a_setting_can_leave_out_what_is_too_large_for_a_dtype():
    setting = SETTING | {"most_tokens": {"float32": 15}}
    assert {kind for kind, _ in list_missing(setting, "bfloat16", {})} == set(SETTING["cases"])
    left_out = set(SETTING["cases"]) - {kind for kind, _ in list_missing(setting, "float32", {})}
    assert left_out == {"steps", "generation"}
    report = {"setting": setting, "dtypes": {"float32": {"lengths": [{"case": {"num_virtual_tokens": 1}}]}}}
    most, missing, nothing = describe_missing(report)[::2]
    assert most.startswith("In float32, cases of more than 15 tokens are left out")
    assert missing == "Not measured yet in float32: 1 of 1 depths, 1 of 1 adapters, 1 of 1 mixed batches."
    assert nothing == "Nothing has been measured in bfloat16 yet."


def test_an_interrupted_measurement_goes_on_with_its_file(tmp_path):
    path, head = tmp_path / "full.json", {"threads": 2, "versions": {"torch": "2"}}
    report = {**head, "dtypes": {"float32": {"steps": []}}}
    path.write_text(json.dumps(report))
    assert read_report(path, head) == report
    with pytest.raises(ValueError, match="another threads"):
        read_report(path, head | {"threads": 1})


def test_cases_of_several_machines_are_not_mixed():
    report = {"dtypes": {"float32": {}, "bfloat16": {"steps": [{}]}}}
    for dtype in report["dtypes"]:
        note_machine(report, dtype)
    # That of the other's cases is not known.
    assert list(report["machines"]) == ["float32"]
    report["dtypes"]["float32"]["steps"] = [{}]
    note_machine(report, "float32")
    report["machines"]["float32"] = report["machines"]["float32"] | {"instructions": "another"}
    with pytest.raises(ValueError, match=r"float32 were measured on .*another"):
        note_machine(report, "float32")


def test_rivals_share_all_weights_of_the_base_model():
    base = build_model("llama")
    own = {tensor.data_ptr() for tensor in base.state_dict().values()}
    for name, model in build_rivals(base).items():
        assert own <= {tensor.data_ptr() for tensor in model.state_dict().values()}, name
    shallow = truncate_layers(share_weights(base), 1)
    assert len(shallow.model.layers) == 1 < len(base.model.layers)


def test_a_round_has_every_run_once_and_the_first_does_not_count():
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = time_rounds(runs, 3)
    assert all(len(own) == 3 for own in seconds.values())
    assert all(set(order[start : start + 3]) == set("abc") for start in range(0, 12, 3))
    assert len(order) == 12
    assert len({tuple(order[start : start + 3]) for start in range(0, 12, 3)}) > 1


def test_no_round_begins_once_the_budget_is_spent_and_three_are_done():
    assert len(time_rounds({"a": lambda: None}, 9, budget=0)["a"]) == 3
    assert len(time_rounds({"a": lambda: None}, 2, budget=0)["a"]) == 2
    assert len(time_rounds({"a": lambda: None}, 9, budget=60)["a"]) == 9


def test_the_first_token_comes_before_the_others():
    model = build_model("llama")
    generate(model, 2, 5, 3)
    start = time.perf_counter()
    first = generate(model, 2, 5, 40)
    assert 0 < first < (time.perf_counter() - start) / 4


def test_ratios_are_taken_within_a_round():
    # A slow phase of the machine hits both.
    seconds = {"own": [2.0, 20.0, 4.0], "base": [1.0, 10.0, 2.0]}
    assert summarize(seconds, "base")["own"] == {"seconds": 4.0, "ratio": 2.0, "quartiles": [2.0, 2.0]}
    assert subtract(seconds, {"own": [1.0, 1.0, 1.0], "base": [0.5, 0.5, 0.5]})["own"] == [1.0, 19.0, 3.0]


def test_saved_bytes_are_those_of_distinct_storages():
    layer = torch.nn.Linear(3, 3)
    inputs = torch.randn(5, 3, requires_grad=True)
    # Each factor is the input, or a view of it; the weight is a parameter.
    assert count_saved_bytes(layer, lambda: (layer(inputs) + inputs * inputs[:]).sum()) == 5 * 3 * 4


def test_the_peak_sees_what_is_freed_again():
    peak = measure_peak(lambda: torch.ones(50_000_000).sum())
    if peak is None:
        pytest.skip("the system does not tell the peak of the memory")
    assert peak > 150_000_000


def test_ids_are_drawn_from_the_vocabulary():
    model = build_model("llama")
    ids = draw_ids(model, 4, 50)
    assert ids.max() < model.config.vocab_size
    assert torch.equal(ids, draw_ids(model, 4, 50))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak memory")
def test_the_peak_is_that_since_the_reset():
    reset_peak_memory()
    before = read_peak_memory()
    torch.ones(50 * 2**20, dtype=torch.float32)
    assert 150 << 20 < read_peak_memory() - before < 300 << 20
    reset_peak_memory()
    assert read_peak_memory() - before < 100 << 20


def test_instructions_are_those_of_the_run():
    def work(rounds):
        product = torch.eye(32)
        for _ in range(rounds):
            product = product @ product

    threads = torch.get_num_threads()
    work(1)
    short, long = (count_instructions(lambda rounds=rounds: work(rounds)) for rounds in (200, 2000))
    assert torch.get_num_threads() == threads
    if short is None:
        pytest.skip("this system does not count instructions")
    assert 8 < long / short < 12
