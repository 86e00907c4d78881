"""The methods of the quality benchmark, small."""

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
