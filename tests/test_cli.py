"""The console script, run on a tiny model as a user would run it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from behaviours.hub_client import OWNER, get_hub, in_client
from peft import PeftModel
from transformers import AutoModelForCausalLM, T5Config, TrainingArguments

from peft_prefix_plus import PrefixPlusConfig
from peft_prefix_plus.cli.evaluate import load_adapter
from peft_prefix_plus.cli.main import COMMANDS, main
from peft_prefix_plus.cli.train import check_processes

ROWS = [{"source": f"{a} plus {b}", "references": [f"{a + b}", f"it is {a + b}"]} for a in range(4) for b in range(3)]


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    return str(path)


@pytest.fixture
def train(tiny_model_dir: str, data: str, tmp_path: Path):
    """Run `train` with a few steps; returns its output directory."""

    def run(*words: str, output_dir: str = "out", status: int = 0) -> Path:
        directory = tmp_path / output_dir
        fixed = ["--model_name_or_path", tiny_model_dir, "--train_file", data, "--output_dir", str(directory)]
        fixed += ["--max_steps", "4", "--per_device_train_batch_size", "4", "--use_cpu", "--disable_tqdm", "true"]
        assert main(["train", *fixed, *words]) == status
        return directory

    return run


def read_losses(directory: Path) -> list[float]:
    history = json.loads((directory / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def load_weights(directory: Path, tiny_model_dir: str) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), directory)
    return {key: value for key, value in model.state_dict().items() if ".prefix_plus_" in key}


def test_a_token_that_would_be_written_to_a_file_is_refused(tiny_model_dir, data, tmp_path, capsys):
    words = ["--model_name_or_path", tiny_model_dir, "--train_file", data, "--output_dir", str(tmp_path / "run")]
    assert main(["train", *words, "--hub_token", "hf_secret"]) == 1
    output = capsys.readouterr()
    assert "HF_TOKEN" in output.err and "hf_secret" not in output.err + output.out
    assert not (tmp_path / "run").exists()


def test_train_evaluate_generate_fold(train, data, tiny_model_dir, tmp_path, capsys):
    directory = train("--prefix_init_text", "Add the numbers:", "--eval_file", data, "--learning_rate", "0.05")
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["num_virtual_tokens"] == len("Add the numbers:")
    assert json.loads((directory / "eval_results.json").read_text())["eval_loss"] > 0

    report = tmp_path / "report.json"
    words = ["--adapter", str(directory), "--eval_file", data, "--max_new_tokens", "5"]
    capsys.readouterr()
    assert main(["evaluate", *words, "--output_file", str(report)]) == 0
    assert "base model" in capsys.readouterr().out
    scores = json.loads(report.read_text())
    assert scores["adapter"]["loss"] < scores["base_model"]["loss"]
    assert len(scores["texts"]) == len(ROWS)

    folded = tmp_path / "folded"
    assert main(["fold", "--adapter", str(directory), "--output_dir", str(folded)]) == 0
    capsys.readouterr()
    outputs = []
    for adapter in (directory, folded):
        assert main(["generate", "--adapter", str(adapter), "--prompt", "1 plus 1", "--max_new_tokens", "5"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    expected = scores["texts"][[row["source"] for row in ROWS].index("1 plus 1")]
    assert outputs[0].strip("\n") == expected


def test_yaml_equals_the_command_line_which_wins(train, tmp_path, tiny_model_dir):
    options = {"projection": "none", "num_virtual_tokens": 3, "learning_rate": "2e-2", "layers_to_transform": [1]}
    path = tmp_path / "options.yaml"
    path.write_text(yaml.safe_dump(options))
    words = ["--projection", "none", "--num_virtual_tokens", "3", "--learning_rate", "0.02"]
    from_words = load_weights(train(*words, "--layers_to_transform", "1", output_dir="a"), tiny_model_dir)
    from_yaml = load_weights(train("--config", str(path), output_dir="b"), tiny_model_dir)
    assert from_words.keys() == from_yaml.keys()
    assert all(torch.equal(from_words[key], from_yaml[key]) for key in from_words)
    winner = train("--config", str(path), "--num_virtual_tokens", "5", output_dir="c")
    assert json.loads((winner / "adapter_config.json").read_text())["num_virtual_tokens"] == 5


@pytest.mark.parametrize("command", ["evaluate", "fold"])
def test_options_that_a_command_needs_may_be_in_the_yaml_file(train, data, tmp_path, capsys, command):
    options = {"adapter": str(train()), "eval_file": data, "max_new_tokens": 2, "output_dir": str(tmp_path / "folded")}
    names = {"evaluate": ["adapter", "eval_file", "max_new_tokens"], "fold": ["adapter", "output_dir"]}[command]
    path = tmp_path / "options.yaml"
    path.write_text(yaml.safe_dump({name: options[name] for name in names}))
    assert main([command, f"--config={path}"]) == 0
    path.write_text(yaml.safe_dump({name: options[name] for name in names[1:]}))
    with pytest.raises(SystemExit):
        main([command, "--config", str(path)])
    assert "required: --adapter" in capsys.readouterr().err
    path.write_text("adapter: null\n")
    assert main([command, "--config", str(path)]) == 1
    assert "gives no value to adapter. The command needs one" in capsys.readouterr().err


@in_client
def test_a_revision_of_the_base_model_stays_with_the_adapter(tiny_model_dir, data, tmp_path):
    files = {path.name: path.read_bytes() for path in Path(tiny_model_dir).iterdir()}
    repository = get_hub().put(f"{OWNER}/base", {"config.json": files["config.json"]})
    repository.add_commit("v1", files, "Weights")
    adapter = tmp_path / "adapter"
    words = ["--model_name_or_path", f"{OWNER}/base", "--model_revision", "v1", "--train_file", data, "--use_cpu"]
    words += ["--max_steps", "1", "--output_dir", str(adapter), "--prefix_init_text", "Add:"]
    assert main(["train", *words]) == 0
    assert PrefixPlusConfig.from_pretrained(adapter).revision == "v1"
    assert main(["generate", "--adapter", str(adapter), "--prompt", "1 plus 1", "--max_new_tokens", "2"]) == 0


def test_help_tells_the_defaults(capsys):
    for command, parts in (("train", ["(default: 0.03)", r"(default: {source}\n)"]), ("fold", [])):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert "(default: None)" not in text
        assert all(part in text for part in parts)


def test_resumed_training_equals_uninterrupted(train, tiny_model_dir):
    settings = ["--prefix_dropout", "0.3", "--logging_steps", "1", "--save_steps", "2"]
    whole = train(*settings, output_dir="whole")
    # The schedule is that of four steps; the run stops after two, as if it had been killed.
    stopped = train(*settings, output_dir="stopped")
    resumed_from = stopped / "checkpoint-2"
    resumed = train(*settings, "--resume_from_checkpoint", str(resumed_from), output_dir="resumed")
    assert read_losses(resumed) == read_losses(whole)
    expected, given = load_weights(whole, tiny_model_dir), load_weights(resumed, tiny_model_dir)
    assert all(torch.equal(expected[key], given[key]) for key in expected)


def test_resume_from_the_last_checkpoint(train, capsys):
    directory = train("--save_steps", "2")
    train("--save_steps", "2", "--resume_from_checkpoint", "last", "--max_steps", "6")
    assert (directory / "checkpoint-6").is_dir()
    path = directory / "options.yaml"
    for word, steps in (("true", 8), ("false", 6)):
        path.write_text(f"resume_from_checkpoint: {word}\n")
        train("--save_steps", "2", "--config", str(path), "--max_steps", str(steps))
        assert (directory / f"checkpoint-{steps}").is_dir()
    train("--resume_from_checkpoint", "last", output_dir="empty", status=1)
    assert "no checkpoint" in capsys.readouterr().err


def test_a_prefix_starts_from_training_examples(train):
    config = json.loads((train("--num_init_examples", "2") / "adapter_config.json").read_text())
    drawn = {line for line in config["prefix_init_text"].splitlines() if " plus " in line}
    assert len(drawn) == 2 <= config["num_virtual_tokens"] and drawn <= {row["source"] for row in ROWS}
    both = train("--num_init_examples", "2", "--prefix_init_text", r"Add:\n", output_dir="both")
    text = json.loads((both / "adapter_config.json").read_text())["prefix_init_text"]
    assert text == config["prefix_init_text"] + "Add:\n"
    chosen = train("--num_init_examples", "2", "--num_init_draws", "3", output_dir="chosen")
    text = json.loads((chosen / "adapter_config.json").read_text())["prefix_init_text"]
    assert len({line for line in text.splitlines() if " plus " in line} & {row["source"] for row in ROWS}) == 2


def test_json_options_and_patterns(train):
    directory = train("--num_virtual_tokens_pattern", '{"layers.0.self_attn": 0}', "--num_virtual_tokens", "4")
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["num_virtual_tokens_pattern"] == {"layers.0.self_attn": 0}


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--projection", "linear", "--num_virtual_tokens", "0"], "num_virtual_tokens"),
        (["--num_virtual_tokens_pattern", "{"], "num_virtual_tokens_pattern"),
        (["--prompt_template", "x"], "{source}"),
        (["--train_file", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--dtype", "float99"], "float99"),
        (["--prefix_init_text", "a", "--prefix_init_token_ids", "3"], "not both"),
        (["--max_length", "-5"], "--max_length"),
        (["--max_length", "1"], "--max_length"),
        (["--max_train_examples", "0"], "--max_train_examples"),
        (["--num_init_examples", "13"], "--num_init_examples is 13, but --train_file has 12"),
        (["--num_init_examples", "2", "--prefix_init_token_ids", "3"], "'tokens'"),
        (["--num_init_examples", "2", "--prefix_init", "random"], "--num_init_examples"),
        (["--num_init_draws", "2"], "--num_init_examples"),
        (["--num_init_examples", "2", "--num_init_draws", "0"], "--num_init_draws"),
    ],
)
def test_bad_input_gives_one_line_and_status_1(train, capsys, words, part):
    directory = train(*words, status=1)
    assert part in capsys.readouterr().err.strip().splitlines()[-1]
    assert not directory.exists()


def test_an_adapter_needs_a_directory(tiny_model_dir, data, capsys):
    assert main(["train", "--model_name_or_path", tiny_model_dir, "--train_file", data, "--use_cpu"]) == 1
    assert "--output_dir" in capsys.readouterr().err


def test_models_that_are_not_for_the_commands_are_named(train, tmp_path, capsys):
    T5Config(num_layers=1).save_pretrained(tmp_path / "t5")
    train("--model_name_or_path", str(tmp_path / "t5"), status=1)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "'t5'" in last and "SEQ_2_SEQ_LM" in last


def test_an_adapter_is_loaded_onto_the_accelerator(train, monkeypatch):
    adapter = str(train())
    assert load_adapter(adapter, None, "auto")[0].device == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("meta"))
    model, _ = load_adapter(adapter, None, "auto")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_settings_of_sampling_without_sampling_are_refused(train, capsys):
    words = ["generate", "--adapter", str(train()), "--prompt", "1 plus 1", "--max_new_tokens", "2"]
    for name in ("--temperature", "--top_p"):
        assert main([*words, name, "0.5"]) == 1
        assert name in capsys.readouterr().err
        assert main([*words, name, "0.5", "--do_sample"]) == 0


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path, monkeypatch):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    check_processes(arguments)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched"):
        check_processes(arguments)


def test_yaml_numbers_of_another_kind_are_named(train, tmp_path, capsys):
    path = tmp_path / "options.yaml"
    path.write_text("num_init_examples: 2.0\n")
    train("--config", str(path), status=1)
    assert "--num_init_examples must be an integer" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["max_length", "prompt_template", "learning_rate"])
def test_yaml_options_without_a_value_are_named(train, tmp_path, capsys, option):
    path = tmp_path / "options.yaml"
    path.write_text(f"{option}: null\n")
    train("--config", str(path), status=1)
    assert f"gives no value to {option}" in capsys.readouterr().err.strip().splitlines()[-1]


def test_yaml_in_another_encoding_is_named(tmp_path, capsys):
    path = tmp_path / "options.yaml"
    path.write_bytes("prompt: Fähre".encode("latin-1"))
    assert main(["generate", "--adapter", "somewhere", "--config", str(path)]) == 1
    assert str(path) in capsys.readouterr().err


def test_a_chat_takes_no_template_of_its_own(capsys):
    words = ["generate", "--adapter", "somewhere", "--prompt", "1", "--chat"]
    assert main([*words, "--prompt_template", "{source}"]) == 1
    assert "--prompt_template" in capsys.readouterr().err
    assert main(words) == 1
    assert "--prompt_template" not in capsys.readouterr().err


def test_one_prompt_in_yaml_is_one_prompt(train, tmp_path, capsys):
    adapter = str(train())
    path = tmp_path / "options.yaml"
    path.write_text("prompt: 1 plus 1\nmax_new_tokens: 3\n")
    capsys.readouterr()
    assert main(["generate", "--adapter", adapter, "--config", str(path)]) == 0
    given = capsys.readouterr().out
    assert main(["generate", "--adapter", adapter, "--prompt", "1 plus 1", "--max_new_tokens", "3"]) == 0
    assert given == capsys.readouterr().out


def test_a_regular_expression_in_yaml_stays_one(train, tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text(r"target_modules: .*\.1\.self_attn" + "\nmodules_to_save: norm\n")
    config = json.loads((train("--config", str(path)) / "adapter_config.json").read_text())
    assert config["target_modules"] == r".*\.1\.self_attn" and config["modules_to_save"] == ["norm"]


@pytest.mark.parametrize(
    "text", ["prompt:\n- ferry: Puffin", "prompt: [yes]", "prompt_template: true", "dtype: off", "adapter: 2024-01-01"]
)
def test_yaml_that_is_no_text_where_one_is_needed_is_named(tmp_path, capsys, text):
    path = tmp_path / "options.yaml"
    path.write_text(f"{text}\n")
    assert main(["generate", "--adapter", "somewhere", "--config", str(path)]) == 1
    error = capsys.readouterr().err
    assert "which is no text. Put texts between quotes" in error and text.partition(":")[0] in error


def test_yaml_of_the_trainer_may_say_no_and_hold_mappings(train, tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("save_strategy: no\nlr_scheduler_kwargs: {}\nreport_to: [none]\n")
    assert not list(train("--config", str(path)).glob("checkpoint-*"))


def test_a_wrong_word_gives_few_lines(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--max_steps", "many"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) < 4 and "--max_steps" in lines[-1]


def test_yaml_numbers_that_stand_for_text_are_text(train, tmp_path, tiny_model_dir):
    path = tmp_path / "options.yaml"
    path.write_text("prefix_init_text: 12\n")
    given = load_weights(train("--config", str(path)), tiny_model_dir)
    expected = load_weights(train("--prefix_init_text", "12", output_dir="expected"), tiny_model_dir)
    assert given.keys() == expected.keys() and all(torch.equal(given[key], expected[key]) for key in given)


def test_a_template_that_would_drop_the_prompt_is_refused(train, capsys):
    words = ["generate", "--adapter", str(train()), "--prompt", "1 plus 1", "--prompt_template", "{prompt}"]
    assert main(words) == 1
    assert "must contain '{source}'" in capsys.readouterr().err


def test_unknown_yaml_options_are_named(train, tmp_path, capsys):
    path = tmp_path / "options.yaml"
    path.write_text("projektion: none\n")
    train("--config", str(path), status=1)
    assert "projektion" in capsys.readouterr().err


def test_a_base_model_that_has_moved_is_named_with_the_remedy(train, tiny_model_dir, capsys, tmp_path):
    adapter = train()
    config = json.loads((adapter / "adapter_config.json").read_text())
    for place in (str(tmp_path / "gone"), "a/b/c"):
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": place}))
        words = ["generate", "--adapter", str(adapter), "--prompt", "1", "--max_new_tokens", "2"]
        assert main(words) == 1
        error = capsys.readouterr().err
        assert place in error and str(adapter) in error and "--model_name_or_path" in error
        assert main([*words, "--model_name_or_path", tiny_model_dir]) == 0


def test_an_adapter_that_is_not_there_is_named(data, tmp_path, capsys):
    assert main(["evaluate", "--adapter", str(tmp_path / "none"), "--eval_file", data]) == 1
    assert "none" in capsys.readouterr().err
    assert main(["fold", "--adapter", str(tmp_path / "none"), "--output_dir", str(tmp_path / "x")]) == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{garbage", "does not hold a JSON object"),
        ("", "does not hold a JSON object"),
        ("[1, 2]", "must hold a JSON object"),
        ('{"projection": "none"}', "peft_type"),
        ('{"peft_type": "LORA", "r": 4}', "LORA"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "fold"])
def test_a_damaged_configuration_is_named(train, tmp_path, capsys, content, part, command):
    directory = train()
    (directory / "adapter_config.json").write_text(content)
    words = {"generate": ["--prompt", "1"], "fold": ["--output_dir", str(tmp_path / "folded")]}[command]
    assert main([command, "--adapter", str(directory), *words]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(directory) in last
    assert part in last


def test_missing_weights_and_wrong_numbers_are_named_before_the_model_is_loaded(train, data, capsys):
    directory = train()
    words = ["evaluate", "--adapter", str(directory), "--eval_file", data]
    for extra, part in (
        (["--batch_size", "0"], "--batch_size"),
        (["--max_length", "-4"], "--max_length"),
        (["--output_file", "/nowhere/x.json"], "/nowhere/x.json"),
        (["--output_file", str(directory)], "is a directory"),
    ):
        assert main([*words, *extra]) == 1
        assert part in capsys.readouterr().err
    (directory / "adapter_model.safetensors").unlink()
    assert main(words) == 1
    assert "adapter_model.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert f"prefix-plus {command}" in capsys.readouterr().out


def test_the_program_without_a_command_and_with_a_wrong_one(capsys):
    assert main([]) == 2
    assert "train" in capsys.readouterr().out
    assert main(["trian"]) == 2
    assert "trian" in capsys.readouterr().err
    assert main(["--version"]) == 0


def test_the_installed_script_runs():
    script = Path(sys.executable).parent / "prefix-plus"
    result = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("prefix-plus ")
