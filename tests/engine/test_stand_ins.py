"""Built-in configs on a tiny model of their architecture: built, planned, and trained for three steps.

All families and names: benchmarks/families.py. Here some: Gemma 2 has no SDPA attention, DeepSeek-V2 and StarCoder an
attention of their own, Mixtral experts without linear layers; the last learn from pairs or pictures, and their language
model's part is made.
"""

import math
from pathlib import Path

import pytest

from benchmarks.families import outcome
from studio.config import catalog


@pytest.mark.parametrize("name", ["gemma2_2b_it_lora_alpaca_e3", "qwen3_0_6b_full_alpaca_zh_e1",
                                  "internlm2_chat_1_8b_qlora_alpaca_e3", "deepseek_v2_lite_chat_full_alpaca_e3",
                                  "starcoder_qlora_custom_sft_e1", "mixtral_8x7b_qlora_oasst1_e3"])  # fmt: skip
def test_a_config_of_the_family_trains(name: str, tmp_path: Path) -> None:
    found = outcome(catalog.entry(name), tmp_path, steps=3)
    assert found.problem == ""
    assert len(found.losses) == 3 and all(math.isfinite(loss) for loss in found.losses)
    assert found.losses[-1] < found.losses[0] and found.num_learning > 0


@pytest.mark.parametrize("name", ["minicpm_2b_dpo_qlora", "internvl_v2_phi3_4b_lora_finetune"])
def test_the_language_model_of_other_tasks_is_constructed(name: str, tmp_path: Path) -> None:
    entry = catalog.entry(name)
    found = outcome(entry, tmp_path, steps=0)
    assert found.problem == "" and found.num_learning > 0 and entry.missing
