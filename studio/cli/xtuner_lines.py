"""XTuner's command lines, read by its own grammar: words, flags and defaults of 0.1.23."""

from __future__ import annotations

import argparse
import ast
import os
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from studio.errors import StudioError

PROGRAM = "xtuner"
ELSEWHERE = {
    "mmbench": "judging models that see images",
    "eval-refcoco": "judging models that see images",
}
PREPROCESSORS_ELSEWHERE = {"refcoco": "models that see images"}
NO_LATER = "It comes with models that see images, in a later version; here only text models are trained."
XTUNERS_DTYPE = "float16"  # what XTuner's conversion and merge write unless told otherwise
FLAG = re.compile(r"--[a-z][a-z-]*")
OUR_COMMAND = re.compile(r"`?retune [^`\n]*`?")  # a whole one may be typed as it stands
# Command -> a flag that a hint names, and what does the same in XTuner's grammar.
HINTS = {
    "convert": {"--base": "--cfg-options model.llm.pretrained_model_name_or_path=…"},
}
SEES_IMAGES = ("llava", "visual_encoder", "image")


class _Parser(argparse.ArgumentParser):
    """Errors are sentences and end with a code that is not 0."""

    def error(self, message: str) -> NoReturn:
        raise StudioError(f"{self.prog}: {message}.", f"Its form: retune {self.prog} --help")


def parse_line(words: Sequence[str]) -> argparse.Namespace:
    """The command (`command`, and `action` of convert and preprocess) with its values. Raises StudioError."""
    parsed = _grammar().parse_args([_hyphens(word, number) for number, word in enumerate(words)])
    if parsed.command in ELSEWHERE:
        raise StudioError(f"{PROGRAM} {parsed.command} is for {ELSEWHERE[parsed.command]}.", NO_LATER)
    if parsed.command == "preprocess" and parsed.action in PREPROCESSORS_ELSEWHERE:
        raise StudioError(f"{PROGRAM} preprocess {parsed.action} is for models that see images.", NO_LATER)
    for name in SEES_IMAGES:
        if getattr(parsed, name, None):
            raise StudioError(f"--{name.replace('_', '-')} is for models that see images.", NO_LATER)
    return parsed


def in_their_words(line: argparse.Namespace, error: StudioError) -> str:
    """The hint of an error as this line may follow it: flags of our commands as XTuner's, or told to be ours."""
    hint = error.hint
    for ours, theirs in HINTS.get(line.command, {}).items():
        hint = hint.replace(ours, theirs)
    told = OUR_COMMAND.sub("", f"{error.message} {hint}")
    odd = [flag for flag in FLAG.findall(told) if flag not in _flags(line)]
    return f"{hint} ({odd[0]} belongs to the retune command above.)".strip() if odd else hint


def _flags(line: argparse.Namespace) -> set[str]:
    """The flags of a line's command in XTuner's grammar."""
    return {_option(name) for name in vars(line)}


def _hyphens(word: str, number: int) -> str:
    """Options and commands with hyphens, however they were typed; values stay as they are."""
    if number == 0 or word in ("pth_to_hf",):
        return word.lower().replace("_", "-")
    if not word.startswith("--"):
        return word
    name, sign, value = word.partition("=")
    return name.replace("_", "-") + sign + value


def _grammar() -> argparse.ArgumentParser:
    top = _Parser(prog=PROGRAM, allow_abbrev=False)
    commands = top.add_subparsers(dest="command", required=True, parser_class=_Parser)
    _lists(commands)
    _train(commands.add_parser("train", allow_abbrev=False))
    _test(commands.add_parser("test", allow_abbrev=False))
    _chat(commands.add_parser("chat", allow_abbrev=False))
    _convert(commands.add_parser("convert", allow_abbrev=False))
    _preprocess(commands.add_parser("preprocess", allow_abbrev=False))
    for name in ELSEWHERE:
        commands.add_parser(name, allow_abbrev=False).add_argument("rest", nargs=argparse.REMAINDER)
    return top


def _lists(commands: Any) -> None:
    commands.add_parser("help")
    commands.add_parser("version")
    commands.add_parser("list-dataset-format", allow_abbrev=False)
    listing = commands.add_parser("list-cfg", allow_abbrev=False)
    listing.add_argument("-p", "--pattern", default="")
    copying = commands.add_parser("copy-cfg", allow_abbrev=False)
    copying.add_argument("config_name")
    copying.add_argument("save_dir")
    logging = commands.add_parser("log-dataset", allow_abbrev=False)
    logging.add_argument("config")
    logging.add_argument("--show", choices=("text", "masked_text", "input_ids", "labels", "all"), default="text")
    commands.add_parser("check-custom-dataset", allow_abbrev=False).add_argument("config")


def _runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config")
    parser.add_argument("--work-dir", default="")
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--launcher", choices=("none", "pytorch", "slurm", "mpi"), default="none")
    parser.add_argument("--local-rank", type=int, default=0)


def _train(parser: argparse.ArgumentParser) -> None:
    _runs(parser)
    parser.add_argument("--deepspeed", default="")
    parser.add_argument("--resume", nargs="?", const="auto", default="")
    parser.add_argument("--seed", type=int)


def _test(parser: argparse.ArgumentParser) -> None:
    _runs(parser)
    parser.add_argument("--checkpoint", default="")


def _chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_name_or_path")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--adapter", default="")
    weights.add_argument("--llava", default="")
    parser.add_argument("--visual-encoder", default="")
    parser.add_argument("--visual-select-layer", type=int, default=-2)
    parser.add_argument("--image", default="")
    parser.add_argument("--torch-dtype", choices=("fp16", "bf16", "fp32", "auto"), default="auto")
    parser.add_argument("--prompt-template", default="")
    systems = parser.add_mutually_exclusive_group()
    systems.add_argument("--system", default="")
    systems.add_argument("--system-template", default="")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=0)
    parser.add_argument("--bot-name", default="BOT")
    parser.add_argument("--with-plugins", nargs="+", choices=("calculate", "solve", "search"), default=[])
    parser.add_argument("--no-streamer", action="store_true")
    parser.add_argument("--lagent", action="store_true")
    parser.add_argument("--stop-words", nargs="+", default=[])
    parser.add_argument("--command-stop-word", default="")
    parser.add_argument("--answer-stop-word", default="")
    parser.add_argument("--offload-folder", default="")
    parser.add_argument("--max-new-tokens", type=int, default=2048)
    parser.add_argument("--temperature", type=float, default=0.1)
    parser.add_argument("--top-k", type=int, default=40)
    parser.add_argument("--top-p", type=float, default=0.75)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)


def _convert(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, parser_class=_Parser)
    to_hf = actions.add_parser("pth-to-hf", allow_abbrev=False)
    for name in ("config", "pth_model", "save_dir"):
        to_hf.add_argument(name)
    to_hf.add_argument("--fp32", action="store_true")
    to_hf.add_argument("--max-shard-size", default="2GB")
    to_hf.add_argument("--safe-serialization", action="store_true")
    to_hf.add_argument("--save-format", choices=("xtuner", "official", "huggingface"), default="xtuner")
    to_hf.add_argument("--cfg-options", nargs="+", default=[])
    merge = actions.add_parser("merge", allow_abbrev=False)
    for name in ("model_name_or_path", "adapter_name_or_path", "save_dir"):
        merge.add_argument(name)
    merge.add_argument("--max-shard-size", default="2GB")
    merge.add_argument("--is-clip", action="store_true")
    merge.add_argument("--safe-serialization", action="store_true")
    merge.add_argument("--device", choices=("cuda", "cpu", "auto"), default="auto")
    split = actions.add_parser("split", allow_abbrev=False)
    split.add_argument("src_dir")
    split.add_argument("dst_dir")


def _preprocess(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, parser_class=_Parser)
    arxiv = actions.add_parser("arxiv", allow_abbrev=False)
    arxiv.add_argument("src_file")
    arxiv.add_argument("dst_file")
    arxiv.add_argument("--categories", nargs="+", default=["cs.AI", "cs.CL", "cs.CV"])
    arxiv.add_argument("--start-date", default="2020-01-01")
    actions.add_parser("refcoco").add_argument("rest", nargs=argparse.REMAINDER)


# --cfg-options: where a setting of an XTuner config ends up, by its place in the config or the name it has there.
SETTINGS = {
    ("train_cfg.max_epochs", "max_epochs"): "train.num_epochs",
    ("optim_wrapper.optimizer.lr", "lr"): "train.learning_rate",
    ("optim_wrapper.optimizer.weight_decay", "weight_decay"): "train.weight_decay",
    ("optim_wrapper.clip_grad.max_norm", "max_norm"): "train.max_grad_norm",
    ("optim_wrapper.accumulative_counts", "accumulative_counts"): "train.gradient_accumulation_steps",
    ("train_dataloader.batch_size", "batch_size"): "train.micro_batch_size",
    ("train_dataloader.dataset.max_length", "max_length"): "data.max_length",
    ("model.llm.pretrained_model_name_or_path", "pretrained_model_name_or_path"): "model.base",
    ("model.lora.r",): "lora.rank",
    ("model.lora.lora_alpha",): "lora.alpha",
    ("model.lora.lora_dropout",): "lora.dropout",
    ("default_hooks.checkpoint.max_keep_ckpts", "save_total_limit"): "record.keep_last",
    ("randomness.seed",): "train.seed",
    ("custom_hooks.1.max_new_tokens",): "record.sample_max_new_tokens",
    ("warmup_ratio",): "train.warmup_ratio",
}
ITERATIONS = {  # counted in micro-batches there, in steps here
    ("train_cfg.max_iters", "max_iters"): "train.num_steps",
    ("default_hooks.checkpoint.interval", "save_steps"): "record.save_every_steps",
    ("evaluation_freq",): "record.sample_every_steps",
}
PLACES = {place: ours for table in (SETTINGS, ITERATIONS) for places, ours in table.items() for place in places}
KEEP_ALL = 1000


def settings_of(options: Sequence[str], accumulation: int) -> list[str]:
    """`--cfg-options` as settings of ours; `accumulation` is the config's. Raises StudioError for what has none."""
    given: dict[str, str] = {}
    for option in options:
        place, sign, value = option.partition("=")
        if not sign or place not in PLACES:
            raise StudioError(
                f"--cfg-options {option!r} has no counterpart here.",
                f"Write it into the config, or give one of: {', '.join(PLACES)}.",
            )
        given[PLACES[place]] = value
    counts = int(_number(given.get("train.gradient_accumulation_steps", str(accumulation))))
    for ours in set(ITERATIONS.values()) & set(given):
        given[ours] = str(_steps(int(_number(given[ours])), counts))
    if int(_number(given.get("record.keep_last", "1"))) < 0:
        given |= {"record.keep_last": str(KEEP_ALL), "record.save_every_minutes": "0"}
    return [f"{ours}={value}" for ours, value in given.items()]


def base_of(options: Sequence[str]) -> str:
    """The base model that `--cfg-options` of a conversion name; "" for none. Raises StudioError for other settings."""
    given = dict(each.split("=", 1) for each in settings_of(options, 1))
    base = given.pop("model.base", "")
    if given:
        raise StudioError(
            f"--cfg-options {next(iter(given))} changes nothing: a checkpoint becomes what was trained.",
            "Only the base model can be another.",
        )
    return base


def _steps(iterations: int, accumulation: int) -> int:
    """Steps nearest to so many micro-batches; what is not positive switches off, as there."""
    return max(1, round(iterations / max(1, accumulation))) if iterations > 0 else 0


def _number(text: str) -> float:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None
    if not isinstance(value, int | float):
        raise StudioError(f"{text!r} is no number.", "Give one.")
    return float(value)


def process_settings(line: argparse.Namespace) -> list[str]:
    """How many processes train and what starts them: flags, and the variables that XTuner reads."""
    processes, nodes = map(_count, ("NPROC_PER_NODE", "NNODES"))
    if line.launcher == "mpi":
        raise StudioError("The launcher mpi is not here.", "Use --launcher pytorch or slurm.")
    settings = []
    if line.deepspeed or processes * nodes > 1 or line.launcher != "none":
        settings.append(f"distributed.strategy={'deepspeed' if line.deepspeed else 'ddp'}")
    if line.deepspeed:
        is_file = line.deepspeed.endswith(".json")
        name = os.path.abspath(line.deepspeed) if is_file else line.deepspeed.removeprefix("deepspeed_")
        settings.append(f"distributed.deepspeed={name}")
    if line.launcher != "none":
        settings.append(f"distributed.launcher={'slurm' if line.launcher == 'slurm' else 'torchrun'}")
    settings += [f"distributed.processes_per_node={processes}"] if processes > 1 else []
    return settings + ([f"distributed.nodes={nodes}"] if nodes > 1 else [])


def _count(variable: str) -> int:
    """The whole number in an environment variable; 1 where there is none. Raises StudioError."""
    text = os.environ.get(variable) or "1"
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise StudioError(f"{variable} cannot be {text!r}.", "Give a whole number from 1 on, or unset it.")
    return int(text)


def chat_words(line: argparse.Namespace) -> list[str]:
    """`retune chat …` for `xtuner chat …`; one model answers, as there."""
    words = ["chat", "--base", line.model_name_or_path]
    if line.adapter:
        words += ["--adapter", _as_folder(line.adapter), "--alone"]
    flags = ("prompt_template", "system", "system_template", "offload_folder")
    words += [word for flag in flags if getattr(line, flag) for word in (_option(flag), getattr(line, flag))]
    plugins = list(line.with_plugins) + (["search"] if line.lagent and "search" not in line.with_plugins else [])
    words += ["--with-plugins", ",".join(plugins)] if plugins else []
    for text in (*line.stop_words, line.command_stop_word, line.answer_stop_word):
        words += ["--stop-word", text] if text else []
    words += ["--bits", str(line.bits)] if line.bits else []
    words += ["--dtype", line.torch_dtype] if line.torch_dtype != "auto" else []
    words += ["--bot-name", line.bot_name] if line.bot_name != "BOT" else []
    words += ["--no-streamer"] if line.no_streamer else []
    numbers = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
    return words + [word for name in numbers for word in (_option(name), str(getattr(line, name)))]


def merge_words(line: argparse.Namespace) -> list[str]:
    """`retune convert merge …`, which replaces an earlier merge as XTuner does. Raises StudioError for CLIP."""
    if line.is_clip:
        raise StudioError("--is-clip is for models that see images.", NO_LATER)
    words = ["convert", "merge", line.model_name_or_path, line.adapter_name_or_path, line.save_dir]
    words += ["--max-shard-size", line.max_shard_size, "--device", line.device, "--dtype", XTUNERS_DTYPE]
    return [*words, "--overwrite"]


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _as_folder(text: str) -> str:
    """A relative folder as one: a bare word would name a run."""
    return text if "/" in text else f"./{text}"
