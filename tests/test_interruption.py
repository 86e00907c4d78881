"""A run that is killed at any moment goes on from its last complete checkpoint, as if nothing had happened."""

import multiprocessing
import os
import random
import shutil
import time
import warnings
from pathlib import Path

import pytest
import torch
from interruption_runs import NUM_STEPS, build_run, get_trained, run
from safetensors.torch import load_file

from peft_prefix_plus.cli.main import main
from peft_prefix_plus.interruption import find_checkpoint_damage, find_last_complete_checkpoint

NUM_KILLS = 20
# In the order of saving.
FILES = (
    "first/adapter_model.safetensors",
    "first/adapter_config.json",
    "other/adapter_model.safetensors",
    "other/adapter_config.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
)


@pytest.fixture(scope="module")
def processes():
    """New processes in milliseconds: they are forked from a server that has imported everything and has no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["interruption_runs"])
    with pytest.MonkeyPatch.context() as patch:
        # The server does not see the paths that pytest has added.
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        patch.setenv("OMP_NUM_THREADS", "1")
        first = context.Process(target=os.getpid)
        first.start()
        first.join()
    return context


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Directory and result of a run that nothing has interrupted."""
    directory = tmp_path_factory.mktemp("whole")
    trainer = build_run(directory)
    trainer.train()
    return directory, get_trained(trainer.model)


def kill_while_saving(process, output_dir: Path, step: int, file: str, delay: float) -> None:
    """Kill a process a little after a file of a checkpoint has appeared."""
    path = output_dir / f"checkpoint-{step}" / file
    while process.is_alive() and not path.exists():
        time.sleep(1e-4)
    time.sleep(delay)
    process.kill()
    process.join()


@pytest.mark.slow
def test_killed_at_random_moments_of_saving_a_run_reaches_the_end_of_the_whole_run(processes, whole, tmp_path):
    draw, num_torn, num_rescued = random.Random(0), 0, 0
    for i in range(NUM_KILLS):
        output_dir, result = tmp_path / str(i), tmp_path / f"{i}.pt"
        settings = {"save_total_limit": draw.choice([None, 1])}
        process = processes.Process(target=run, args=(output_dir, None, result, settings))
        process.start()
        moment = (draw.randint(1, NUM_STEPS), draw.choice(FILES), draw.uniform(0, 5e-3))
        kill_while_saving(process, output_dir, *moment)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            checkpoint = find_last_complete_checkpoint(output_dir)
        num_torn += any("is passed over" in str(warning.message) for warning in caught)
        num_rescued += checkpoint is not None
        process = processes.Process(target=run, args=(output_dir, checkpoint, result, settings))
        process.start()
        process.join()
        assert process.exitcode == 0, moment
        given, expected = torch.load(result), whole[1]
        assert given.keys() == expected.keys()
        assert all(torch.equal(given[name], expected[name]) for name in given), moment
        shutil.rmtree(output_dir)
    # Otherwise the kills came too late or too early to test anything.
    assert num_torn >= NUM_KILLS // 4
    assert num_rescued >= NUM_KILLS // 4


def copy_checkpoints(whole, output_dir: Path) -> Path:
    """Copy the last two checkpoints; the directory of the last."""
    for step in (NUM_STEPS - 1, NUM_STEPS):
        shutil.copytree(whole[0] / f"checkpoint-{step}", output_dir / f"checkpoint-{step}")
    return output_dir / f"checkpoint-{NUM_STEPS}"


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [remove, empty, halve])
def test_a_damaged_checkpoint_is_named_and_passed_over(whole, tmp_path, file, damage):
    last = copy_checkpoints(whole, tmp_path)
    assert find_checkpoint_damage(last) is None
    assert find_last_complete_checkpoint(tmp_path) == str(last)
    damage(last / file)
    assert file in find_checkpoint_damage(last)
    with pytest.warns(UserWarning, match=f"{last} is passed over: .*{file}"):
        assert find_last_complete_checkpoint(str(tmp_path)) == str(tmp_path / f"checkpoint-{NUM_STEPS - 1}")


@pytest.mark.parametrize("names", [FILES[:count] for count in range(len(FILES))], ids=len)
def test_whatever_saving_has_not_reached_yet_is_missed(whole, tmp_path, names):
    last = copy_checkpoints(whole, tmp_path)
    for file in set(FILES) - set(names):
        (last / file).unlink()
    assert find_checkpoint_damage(last) is not None


def test_a_missing_checkpoint_is_called_missing(tmp_path):
    assert find_checkpoint_damage(tmp_path / "checkpoint-3") == "it is no directory."


def test_steps_are_compared_as_numbers(whole, tmp_path):
    for step in (9, 10):
        shutil.copytree(whole[0] / f"checkpoint-{NUM_STEPS}", tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-11").write_text("no directory")
    (tmp_path / "checkpoint-12-old").mkdir()
    assert find_last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


@pytest.mark.parametrize("name", ["empty", "absent"])
def test_without_a_checkpoint_there_is_none(tmp_path, name):
    (tmp_path / "empty").mkdir()
    assert find_last_complete_checkpoint(tmp_path / name) is None


def test_a_checkpoint_without_an_optimizer_would_end_elsewhere(whole, tmp_path):
    """Why it counts as damaged: `Trainer` goes on from it without a word."""
    last = copy_checkpoints(whole, tmp_path)
    middle = shutil.copytree(whole[0] / "checkpoint-3", tmp_path / "checkpoint-3")
    shutil.rmtree(last)
    (middle / "optimizer.pt").unlink()
    trainer = build_run(tmp_path, save_strategy="no")
    trainer.train(resume_from_checkpoint=str(middle))
    given = get_trained(trainer.model)
    assert not all(torch.equal(given[name], expected) for name, expected in whole[1].items())
    assert "optimizer.pt" in find_checkpoint_damage(middle)


@pytest.fixture
def train(tiny_model_dir, tmp_path):
    """Run the command; its exit code."""
    file = tmp_path / "data.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n' * 4)

    def run_command(*words: str) -> int:
        options = ["--model_name_or_path", tiny_model_dir, "--train_file", str(file), "--max_steps", "4"]
        options += ["--output_dir", str(tmp_path / "run"), "--save_steps", "1", "--use_cpu", "--disable_tqdm", "True"]
        return main(["train", *options, *words])

    return run_command


def test_the_command_goes_on_from_the_last_complete_checkpoint(train, tmp_path, capsys):
    train()
    expected = load_file(tmp_path / "run" / "adapter_model.safetensors")
    halve(tmp_path / "run" / "checkpoint-4" / "adapter_model.safetensors")
    (tmp_path / "run" / "checkpoint-3" / "trainer_state.json").unlink()
    assert train("--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-4")) == 1
    assert "adapter_model.safetensors is not complete" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="passed over"):
        train("--resume_from_checkpoint", "last")
    given = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert given.keys() == expected.keys()
    assert all(torch.equal(given[name], expected[name]) for name in given)
