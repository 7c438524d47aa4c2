"""The built-in configs as rows: searched, and marked by what a machine has room for."""

import pytest

from studio import built_in
from studio.built_in import search
from studio.config.catalog import entry
from studio.machine import card

GIB = 2**30


def test_every_config_is_a_row_and_newer_models_have_some() -> None:
    rows = built_in.listed(card(80 * GIB))
    names = [row.name for row in rows]
    assert len(names) == len(set(names)) and len(names) > 800
    assert {"qwen3_8b_qlora_alpaca_e3", "internlm2_1_8b_qlora_alpaca_e3", "llava_v15_7b_pretrain"} <= set(names)
    assert all(entry(name) for name in names[::50])


def test_the_memory_that_configs_need_is_in_order() -> None:
    needs = {row.name: row.memory_bytes / GIB for row in built_in.listed(card(80 * GIB))}
    assert needs["qwen_1_8b_qlora_alpaca_e3"] < needs["qwen_7b_qlora_alpaca_e3"] < needs["qwen_72b_qlora_alpaca_e3"]
    assert (
        needs["minicpm_2b_qlora_alpaca_zh_e3"]
        < needs["minicpm_2b_lora_alpaca_zh_e3"]
        < needs["minicpm_2b_full_alpaca_zh_e3"]
    )
    assert needs["mixtral_8x7b_full_oasst1_e3"] > 46.7 * 12  # all experts count, though a token takes two


@pytest.mark.parametrize(("gib", "fits"), [(8, False), (24, True)])
def test_what_fits_is_marked(gib: int, fits: bool) -> None:
    rows = {row.name: row for row in built_in.listed(card(gib * GIB))}
    assert rows["internlm2_chat_1_8b_qlora_alpaca_e3"].fits
    assert rows["llama2_7b_qlora_alpaca_e3"].fits == fits
    assert not rows["qwen_72b_qlora_alpaca_e3"].fits


def test_search() -> None:
    rows = built_in.listed(card(24 * GIB))
    assert [row.name for row in search(rows, "InternLM2_1_8b  qlora")] == ["internlm2_1_8b_qlora_alpaca_e3"]
    assert {row.recipe for row in search(rows, "chinese law")} == {"lawyer"}
    found = search(rows, families=["qwen1_5"], methods=["full"], recipes=["alpaca"], only_fitting=True)
    assert found and all(row.fits and row.method == "full" and row.family == "qwen1_5" for row in found)
    small = search(rows, max_billions=2, max_memory_gib=12)
    assert small and all(row.billions <= 2 and row.memory_bytes <= 12 * GIB for row in small)
    assert {row.method for row in search(rows, "llama2_7b_", max_memory_gib=12)} == {"qlora"}
    assert search(rows, "no such words") == [] and len(search(rows)) == len(rows)
