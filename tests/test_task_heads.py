"""Encoders under PEFT's task classes: the head that the task brings is trained and saved beside the prefix."""

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper

from peft_prefix_plus import PrefixPlusConfig

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
CONFIGS = {
    "Bert": {},
    "Roberta": {},
    "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "ModernBert": {"global_attn_every_n_layers": 2},
    "Deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "DebertaV2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "Electra": {"embedding_size": 32},
    "XLMRoberta": {},
    "Esm": {"mask_token_id": 4, "position_embedding_type": "rotary"},
}
TASKS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "FEATURE_EXTRACTION": "Model",
}
LABELS = {
    "SEQ_CLS": {"labels": torch.tensor([0, 2])},
    "TOKEN_CLS": {"labels": torch.randint(3, (2, 9))},
    "QUESTION_ANS": {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
    "FEATURE_EXTRACTION": {},
}


def build(name: str, task: str):
    model_class = getattr(transformers, name + TASKS[task], None)
    if model_class is None:
        pytest.skip(f"transformers has no {name}{TASKS[task]}")
    torch.manual_seed(0)
    num_labels = 2 if task == "QUESTION_ANS" else 3
    config = getattr(transformers, f"{name}Config")(**(SIZES | CONFIGS[name] | {"num_labels": num_labels}))
    return model_class(config).eval()


def draw_inputs():
    ids = torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, 6:], mask[1, 6:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def first(output) -> torch.Tensor:
    return next(value for key, value in output.items() if key != "loss")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_prefix_and_the_head_train_and_are_saved(name, task, tmp_path):
    model = get_peft_model(
        build(name, task), PrefixPlusConfig(task_type=task, num_virtual_tokens=4, projection="none")
    )
    inputs = draw_inputs()
    output = model(**inputs, **LABELS[task])
    (output["loss"] if "loss" in output else first(output).square().mean()).backward()
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    weights = {key: parameter for key, parameter in trained.items() if not key.endswith("bias")}
    assert weights and all(parameter.grad is not None and parameter.grad.any() for parameter in weights.values())
    has_head = any(isinstance(module, ModulesToSaveWrapper) for module in model.modules())
    # PEFT looks for `qa_outputs`, which ModernBERT calls otherwise.
    assert has_head == (task != "FEATURE_EXTRACTION" and (name, task) != ("ModernBert", "QUESTION_ANS"))
    with torch.no_grad():
        for parameter in trained.values():
            parameter -= 0.1 * parameter.grad.sign()
    expected = first(model.eval()(**inputs))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(name, task), tmp_path).eval()
    assert torch.equal(first(loaded(**inputs)), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_on_the_right_changes_nothing(name):
    model = get_peft_model(build(name, "SEQ_CLS"), PrefixPlusConfig(task_type="SEQ_CLS", num_virtual_tokens=4)).eval()
    inputs = draw_inputs()
    alone = model(input_ids=inputs["input_ids"][1:, :6], attention_mask=torch.ones(1, 6, dtype=torch.long)).logits
    torch.testing.assert_close(model(**inputs).logits[1:], alone, atol=1e-5, rtol=1e-4)
