"""`accelerate launch`: more processes, the same training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file


def launch(num_processes: int, batch_size: int, model_dir: str, data: Path, output_dir: Path) -> list[float]:
    """Train with the console script under `accelerate launch`; returns the losses of all steps."""
    words = ["--model_name_or_path", model_dir, "--train_file", str(data), "--output_dir", str(output_dir)]
    words += ["--per_device_train_batch_size", str(batch_size), "--max_steps", "5", "--logging_steps", "1"]
    words += ["--use_cpu", "--learning_rate", "0.05", "--disable_tqdm", "true", "--save_strategy", "no"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--num_processes", str(num_processes), "--main_process_port", "0", "--dynamo_backend", "no"]
    words += ["--ddp_backend", "gloo"] if num_processes > 1 else []
    # Several processes on one machine are started by the launcher that is named after GPUs, also for the CPU.
    command += ["--multi_gpu"] if num_processes > 1 else ["--cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(
        [*command, "-m", "peft_prefix_plus.cli.main", "train", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.slow
def test_one_and_two_processes_give_the_same_curve_and_adapter(tiny_model_dir, tmp_path):
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{i}+{i}=", "completion": f"{2 * i}" + "!" * (i % 3)} for i in range(24)]
    data.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    one = launch(1, 4, tiny_model_dir, data, tmp_path / "one")
    two = launch(2, 2, tiny_model_dir, data, tmp_path / "two")
    assert len(one) == 5
    assert two == pytest.approx(one, abs=2e-4)
    expected = load_file(tmp_path / "one" / "adapter_model.safetensors")
    given = load_file(tmp_path / "two" / "adapter_model.safetensors")
    assert expected.keys() == given.keys()
    assert max(float((expected[key] - given[key]).abs().max()) for key in expected) < 1e-3
