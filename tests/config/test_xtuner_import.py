"""XTuner's Python configs are read, whole and without running anything; what cannot be read is listed with its line."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from studio.config.xtuner.importing import Imported, import_file, import_text
from studio.config.xtuner.reading import MAX_BYTES, Ref, Unread, read_file, read_text
from studio.config.xtuner.terms import Terms, convert
from studio.errors import ConfigError

FIXTURES = Path(__file__).parent / "fixtures"
WRITTEN = (FIXTURES / "written.py.txt").read_text(encoding="utf-8")
TUTORIAL = (FIXTURES / "tutorial.py.txt").read_text(encoding="utf-8")
DUMPED = (FIXTURES / "dumped_zero2.py.txt").read_text(encoding="utf-8")


def test_the_tutorials_config_is_read_whole() -> None:
    """As printed in the tutorial on a personal assistant (seed 001)."""
    found = import_text(TUTORIAL, "internlm2_1_8b_qlora_alpaca_e3_copy")
    assert found.unread == () and found.notes == ()
    config = found.config
    assert (config.method, config.model.base, config.data.template) == ("qlora", "/root/ft/model", "default")
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (64, 16, 0.1)
    assert config.data.recipes["personal_assistant"].model_dump() == {
        "source": "/root/ft/data/personal_assistant.json", "format": "openai", "split": "train", "subset": ""
    }  # fmt: skip
    assert config.data.sources == {"personal_assistant": "all"} and config.data.max_length == 1024
    train, record = config.train, config.record
    assert (train.num_epochs, train.micro_batch_size, train.gradient_accumulation_steps) == (2, 1, 16)
    assert (train.learning_rate, train.warmup_ratio, train.beta2, train.max_grad_norm) == (2e-4, 0.03, 0.999, 1.0)
    assert (record.save_every_steps, record.keep_last, record.sample_every_steps) == (19, 3, 19)
    assert record.sample_prompts == ("请你介绍一下你自己", "你是谁", "你是我的小助手吗")
    assert "XTuner: 300 micro-batches; 300 / 16 in a step = 18.75, so 19" in found.text


def test_written_and_dumped_form() -> None:
    written, dumped = import_text(WRITTEN, "tiny"), import_text(DUMPED, "tiny")
    assert written.unread == dumped.unread == ()
    for section in ("lora", "data", "model"):
        assert getattr(written.config, section).model_dump(exclude={"dtype"}) == getattr(
            dumped.config, section
        ).model_dump(exclude={"dtype"})
    assert written.config.model.dtype == "float32"  # OptimWrapper: no mixed precision
    # a run with --deepspeed keeps accumulation and clipping in its strategy
    assert dumped.config.distributed.strategy == "deepspeed" and dumped.config.distributed.deepspeed == "zero2"
    assert (dumped.config.train.gradient_accumulation_steps, dumped.config.train.max_grad_norm) == (16, 1.0)
    assert (written.config.train.num_epochs, dumped.config.train.num_epochs) == (3, 6)
    assert (written.config.record.save_every_steps, dumped.config.record.save_every_steps) == (2, 3)


def changed(old: str, new: str, text: str = WRITTEN) -> Imported:
    assert old in text
    return import_text(text.replace(old, new), "changed")


def test_kinds_of_adapters_and_the_weights_to_begin_with() -> None:
    found = changed("lora_alpha=", "use_dora=True, use_rslora=True, rank_pattern=dict(), lora_alpha=")
    assert found.unread == () and found.config.lora.dora and found.config.lora.rslora
    begun = changed("load_from = None", "load_from = './work_dirs/iter_1.pth'")
    assert begun.unread == () and begun.config.model.continue_from == "./work_dirs/iter_1.pth"
    adapter = changed("    type=SupervisedFinetune,", "    type=SupervisedFinetune,\n    peft_model='hf/lora',")
    assert adapter.unread == () and adapter.config.model.continue_from == "hf/lora"


@pytest.mark.parametrize(
    ("old", "new", "listed"),
    [
        ("optim_type = AdamW", "optim_type = my.Lion", "my.Lion: my: the name is not set"),
        ("optim_type = AdamW", "optim_type = torch.optim.SGD", "optimizer is torch.optim.SGD"),
        ("betas = (0.9, 0.999)", "betas = get_betas()", "get_betas(): a call, which would have to be run"),
        ("max_length = 128", "max_length = tokenizer_limit(128)", "tokenizer_limit(128)"),
        ("openai_map_fn,\n", "my_own_map_fn_of_mine(),\n", "my_own_map_fn_of_mine()"),
        ("evaluation_inputs = [", "evaluation_inputs = [open('/etc/passwd').read(), ", "evaluation_inputs"),
        ("resume = False", "resume = True", "resume is True"),
        ("lora_alpha=", "init_lora_weights='pissa', lora_alpha=", "init_lora_weights is pissa"),
        ("lora_alpha=", "rank_pattern=dict(q_proj=4), lora_alpha=", "rank_pattern is a dict"),
        ("weight_decay=weight_decay", "amsgrad=True, weight_decay=weight_decay", "amsgrad is True"),
        ("    clip_grad=", "    paramwise_cfg=dict(norm_decay_mult=0), clip_grad=", "paramwise_cfg is a dict"),
        ("bias='none'", "bias='all'", "bias is all"),
        ("save_total_limit = 2", "save_total_limit = [2][0]\nfor i in range(9): lr = i", "a loop"),
    ],
)
def test_what_cannot_be_taken_over_is_listed_with_its_line(old: str, new: str, listed: str) -> None:
    if "lr = i" in new:
        with pytest.raises(ConfigError, match="learning rate.*a loop, which would have to be run"):
            changed(old, new)
        return
    found = changed(old, new)
    assert any(listed in each for each in found.unread), found.unread
    assert all("line " in each for each in found.unread if "which has no reading here" not in each)
    assert "NOT TAKEN OVER" in found.text


@pytest.mark.parametrize(
    ("old", "new", "path"),
    [
        ("model = dict(", "model = build(", "model"),
        ("lr = 2e-4", "lr = find_lr()", "optim_wrapper.optimizer.lr"),
        ("pretrained_model_name_or_path = '/ft/base/tiny-llama'", "from os import sep as pretrained_model_name_or_path",
         "model.llm"),
        ("train_cfg = dict(", "train_cfg = loop(", "train_cfg"),
        ("    dataset=alpaca_en,\n", "    dataset=load(),\n", "train_dataloader.dataset"),
        ("optim_wrapper = dict(", "optim_wrapper = wrap(", "optim_wrapper"),
        ("type=SupervisedFinetune", "type=Diffusion", "model.type"),
    ],
)  # fmt: skip
def test_without_some_things_there_is_no_run(old: str, new: str, path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        changed(old, new)
    assert caught.value.problems[0].path == path


CHILD = """from mmengine.config import read_base
from torch.optim import AdamW as A
import os.path as osp
with read_base():
    from .base import *
b.x.y += 4
b['x']['z'].append(a // 3)
c = [*b['x']['z'], -a % 3]
d = f'{a}-{c[0]}' if a > 1 and not None else 0
e, (f, g) = 1, (2, A)
if use := 1:
    pass
if a == 8:
    h = 'x' * 3 + 'y'
else:
    h = osp
b.update(dict(v=1), u=2)
"""


def test_arithmetic_names_and_inheritance(tmp_path: Path) -> None:
    (tmp_path / "base.py").write_text("a = 2 ** 3\nb = dict(x=dict(y=1, z=[1, 2]), w=int(2048 - (336 / 14) ** 2))\n")
    (tmp_path / "child.py").write_text(CHILD, encoding="utf-8")
    found = read_file(tmp_path / "child.py")
    names = found.names
    assert names["b"] == {"x": {"y": 5, "z": [1, 2, 2]}, "w": 1472, "v": 1, "u": 2}
    assert names["c"] == [1, 2, 2, 1] and names["d"] == "8-1" and names["h"] == "xxxy"
    assert (names["e"], names["f"], names["g"]) == (1, 2, Ref("torch.optim.AdamW"))
    assert [each.line for each in found.unread] == [11]  # the walrus
    (tmp_path / "old.py").write_text("_base_ = ['./base.py']\nb = dict(x=dict(y=9), w=dict(_delete_=True, q=1))\n")
    assert read_file(tmp_path / "old.py").names["b"] == {"x": {"y": 9, "z": [1, 2]}, "w": {"q": 1}}


HOSTILE = {
    "os.system": "import os\nos.system('touch {canary}')\n",
    "exec": "exec(\"open('{canary}', 'w')\")\n",
    "eval in a value": "lr = eval(\"open('{canary}', 'w')\")\n",
    "import hook": "x = __import__('os').system('touch {canary}')\n",
    "decorator": "@(lambda f: open('{canary}', 'w'))\ndef f(): pass\n",
    "default": "def f(x=open('{canary}', 'w')): pass\n",
    "class body": "class A:\n    open('{canary}', 'w')\n",
    "with": "with open('{canary}', 'w') as f:\n    pass\n",
    "try": "try:\n    open('{canary}', 'w')\nfinally:\n    pass\n",
    "comprehension": "x = [open('{canary}', 'w') for _ in (1,)]\n",
    "method": "x = ''.__class__.__mro__[1].__subclasses__()\n",
    "format": "x = '{{0.__class__}}'.format(1)\n",
    "walrus": "x = (y := open('{canary}', 'w'))\n",
    "star import": "from os import *\nsystem('touch {canary}')\n",
    "assert": "assert open('{canary}', 'w')\n",
    "f-string": "x = f\"{{open('{canary}', 'w')}}\"\n",
    "subscript": "x = dict(a=1)[open('{canary}', 'w')]\n",
    "decoded": "from base64 import b64decode\nexec(b64decode('eA=='))\n",
    "global": "global x\nx = open('{canary}', 'w')\n",
    "lambda": "x = (lambda: open('{canary}', 'w'))()\n",
}


@pytest.fixture
def canary(tmp_path: Path) -> Any:
    """Fails the test when reading a config opens a file, starts a process, compiles or imports."""
    seen: list[str] = []
    watching = [True]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if watching[0] and event in (
            "os.system",
            "subprocess.Popen",
            "exec",
            "socket.connect",
            "os.exec",
            "os.posix_spawn",
        ):
            seen.append(event)
        if watching[0] and event == "open" and "canary" in str(arguments[0]):
            seen.append(f"open {arguments[0]}")

    sys.addaudithook(hook)
    yield tmp_path / "canary"
    watching[0] = False
    assert seen == [] and not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_code_is_listed_and_never_run(name: str, canary: Path) -> None:
    found = read_text(HOSTILE[name].format(canary=canary))
    unread = [*found.unread, *(value for value in found.names.values() if isinstance(value, Unread))]
    assert unread and all(each.line >= 1 for each in unread)
    whole = import_text(HOSTILE[name].format(canary=canary) + WRITTEN, "hostile")
    assert whole.config.model.base == "/ft/base/tiny-llama"
    is_told = any(each.what in line for each in unread for line in (*whole.notes, *whole.unread))
    assert is_told or name == "eval in a value"  # which the config sets anew


BOMBS = {
    "power": "lr = 9 ** 9 ** 9\n",
    "power of powers": "a = 9 ** 80\n" + "".join(f"a{n} = a{n - 1 or ''} ** 9\n" for n in range(1, 9)),
    "text": "a = 'x' * 10 ** 9\n",
    "doubled text": "a = 'x' * 1000\n" + "a = a + a\n" * 60,
    "doubled list": "a = [0]\n" + "a = a + a\n" * 60,
    "extended list": "a = [0]\n" + "a.extend(a)\n" * 60,
    "many large ones": "a = 'x' * 100000\n" + "".join(f"b{n} = a + 'y'\n" for n in range(5000)),
    "nested sharing": "a = dict(x=1)\n" + "a = dict(l=a, r=a)\n" * 60 + "b = a == a\nc = str(a)\nd = f'{a}'\n",
    "own settings": WRITTEN + "a = [1]\n" + "a = [a, a]\n" * 40 + "retune = dict(name=a)\n",
    "minus": "a = " + "-" * 3000 + "1\n",
    "sum": "a = " + "+".join("1" for _ in range(3000)) + "\n",
    "attributes": "import a\nb = a" + ".c" * 3000 + "\n",
    "brackets": "a = " + "[" * 150 + "]" * 150 + "\n",
    "deep brackets": "a = " + "[" * 9000 + "]" * 9000 + "\n",
    "number": "a = " + "9" * 100000 + "\n",
    "hexadecimal": "a = 0x" + "f" * 100000 + "\n",
    "many parts": "a = [" + "1," * 90000 + "]\n",
    "elif": "if 0:\n    a = 1\n" + "elif 0:\n    a = 1\n" * 3000,
    "elif that Python takes": "if 0:\n    a = 1\n" + "elif 0:\n    a = 1\n" * 700,
    "added to an attribute": "a = 1\na" + ".b" * 600 + " += 1\n",
    "rounded": "a = round(5, -10 ** 12)\n",
    "text of a shared text": "a = ['x' * 100000] * 10000\nb = str(a)\n",
    "a value in itself": WRITTEN + "model.lora = model\n",
    "data in itself": WRITTEN
    + "d = dict(type='ConcatDataset', datasets=[])\nd.datasets.append(d)\ntrain_dataloader.dataset = d\n",
    "shared data": WRITTEN
    + "d = train_dataloader.dataset\n"
    + "d = dict(type='ConcatDataset', datasets=[d, d])\n" * 50
    + "train_dataloader.dataset = d\n",
    "nul": "a = 1\x00\n",
    "no python": "a = = 1\n",
    "latin": "# -*- coding: latin-1 -*-\na = 1\n",
}


@pytest.mark.parametrize("name", sorted(BOMBS))
def test_bombs_are_read_or_refused(name: str, canary: Path) -> None:
    text = BOMBS[name]
    try:
        found = import_text(text, "bomb") if text.startswith("# Copyright") else read_text(text)
    except ConfigError as error:
        assert len(str(error)) < 2000
        return
    names = getattr(found, "names", {})
    assert all(not isinstance(value, int) or value.bit_length() <= 256 for value in names.values())
    assert all(len(str(value)) < 2_000_000 for value in names.values() if isinstance(value, str | Unread))


def test_nothing_is_made_up_of_an_imported_thing() -> None:
    names = read_text("from torch.optim import AdamW\na = str(AdamW)\nb = bool(AdamW)\nc = (-1) ** 0.5\n").names
    assert all(isinstance(names[name], Unread) for name in "abc")


def test_files_that_are_none(tmp_path: Path) -> None:
    large = tmp_path / "large.py"
    with large.open("wb") as file:
        file.truncate(50_000_000)
    with pytest.raises(ConfigError, match="50,000,000 bytes long"):
        import_file(large)
    assert MAX_BYTES < 50_000_000
    os.mkfifo(tmp_path / "pipe.py")  # would be waited for, and a device has no end
    (tmp_path / "endless.py").symlink_to("/dev/zero")
    for name in ("pipe", "endless"):
        with pytest.raises(ConfigError, match="a pipe or a device"):
            import_file(tmp_path / f"{name}.py")
    (tmp_path / "gbk.py").write_bytes("# 中文\n".encode("gbk"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        import_file(tmp_path / "gbk.py")
    for path, text in {
        "a": "with read_base():\n    from .b import *\n",
        "b": "with read_base():\n    from .a import *\n",
    }.items():
        (tmp_path / f"{path}.py").write_text(f"from mmengine.config import read_base\n{text}", encoding="utf-8")
    with pytest.raises(ConfigError, match="inherits from itself"):
        import_file(tmp_path / "a.py")
    (tmp_path / "self.py").write_text("_base_ = './self.py'\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="inherits from itself"):
        import_file(tmp_path / "self.py")
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
    for name in ("binary.py", "missing.py", "."):
        with pytest.raises(ConfigError, match="cannot be read"):
            import_file(tmp_path / name)
    merged = "a = dict(x=1)\n" + "a = dict(l=a, r=a)\n" * 40
    (tmp_path / "base.py").write_text(merged, encoding="utf-8")
    (tmp_path / "merge.py").write_text("_base_ = './base.py'\n" + merged, encoding="utf-8")
    with pytest.raises(ConfigError, match="more settings than any config has"):
        import_file(tmp_path / "merge.py")


def test_where_all_checkpoints_are_kept_none_is_saved_by_time() -> None:
    """On a slow machine one every two minutes would fill the disk."""
    minutes = {keep: convert("run", Terms(keep=keep)).values["record"].get("save_every_minutes") for keep in (-1, 2)}
    assert minutes == {-1: 0, 2: None}
