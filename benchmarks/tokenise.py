"""Rows per second from a file of chats to token ids and labels on disk, beside `datasets` + TRL.

    python benchmarks/tokenise.py [--rows 1000000] [--trl-rows 0] [--trl FOLDER]

Makes Alpaca-like rows (all different, some with an input, every thirtieth word one that hardly comes again), then
tokenises the same file with the starter's tokenizer and chat template, cut at 512 tokens, labels on the answers: once
by the studio (JSONL -> template -> tokenizer -> cache, with as many processes as it takes by itself), then by TRL's
own preparation (`SFTTrainer._prepare_dataset` on a dataset that `load_dataset` read), with one process, TRL's default,
and with one a core. Each in a process of its own; imports and loading of the tokenizer are
not counted. CPU seconds are those of all processes of a way: unlike rows per second they hardly depend on what else
the machine does, and the load is told with each. Peak memory is the process tree's own (USS, mapped files left out).
The ids and labels of both are compared. Needs TRL (`pip install trl`, or `pip install --no-deps --target FOLDER trl`).
Writes benchmarks/results/tokenise.md.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import distributions, version
from itertools import islice
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from studio.data.general import general_prompts  # noqa: E402
from studio.models import require  # noqa: E402
from studio.paths import atomic_write_text, human_bytes  # noqa: E402

RESULT = Path(__file__).parent / "results" / "tokenise.md"
MAX_LENGTH = 512
CHECKED_ROWS = 500
RARE_WORDS = 1 / 30
SOUNDS = [f"{begin}{end}" for begin in "bdfgklmnprstvz" for end in ("a", "en", "i", "or", "u")]
# The starter's template with the marks that TRL wants around what the assistant says; it renders the same text.
MARKED_ANSWER = (
    "{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endif %}"
)
PLAIN_ANSWER = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"


@dataclass(frozen=True)
class Measured:
    """One way: what it took, with how many processes waiting for a core before and after, and what came out."""

    name: str
    load: tuple[float, float]
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    num_rows: int
    num_tokens: int
    compared_tokens: int  # of the rows that all ways were given
    sample: list[Any]

    @property
    def rows_per_second(self) -> float:
        return self.num_rows / self.seconds

    @property
    def rows_per_cpu_second(self) -> float:
        return self.num_rows / self.cpu_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--trl-rows", type=int, default=0, help="give TRL only the first rows; 0 gives it all")
    parser.add_argument("--trl", default="", help="folder that TRL was installed into with --target")
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        part = ours if options.part == "ours" else theirs
        print(json.dumps(part(options.file, options.processes, options.trl_rows)))
        return
    with tempfile.TemporaryDirectory(prefix="retune-bench-") as folder:
        file = Path(folder) / "rows.jsonl"
        write_rows(file, options.rows)
        first = first_rows(file, options.trl_rows) if options.trl_rows else file
        cores = len(os.sched_getaffinity(0))
        found = [measure("Retune Studio", file, "ours", 1, options)]
        for processes in sorted({1, cores}):
            name = f"datasets + TRL, {processes} process{'es' if processes > 1 else ''}"
            found.append(measure(name, first, "theirs", processes, options))
            require_equal(found[0], found[-1])
        size = file.stat().st_size
    report(found, size, cores, options)


def first_rows(file: Path, num_rows: int) -> Path:
    """The first rows of a file, in a file of their own."""
    beginning = file.with_name("first.jsonl")
    with open(file, "rb") as source, open(beginning, "wb") as target:
        target.writelines(islice(source, num_rows))
    return beginning


def write_rows(path: Path, num_rows: int) -> None:
    """Chats of a question, with an input in two of five, and an answer of 5 to 120 words; no two are equal."""
    prompts = general_prompts(["en"])
    questions = [prompt.text for prompt in prompts.train + prompts.held_out]
    words = sorted({word.strip(".,?!:;'\"()").lower() for question in questions for word in question.split()} - {""})
    chance = random.Random(0)

    def made_up() -> str:
        return "".join(chance.choices(SOUNDS, k=chance.randint(3, 5)))

    def text(low: int, high: int) -> str:
        sentences, left = [], chance.randint(low, high)
        while left > 0:
            length = min(left, chance.randint(5, 16))
            said = [made_up() if chance.random() < RARE_WORDS else word for word in chance.choices(words, k=length)]
            sentences.append(" ".join(said).capitalize() + ".")
            left -= length
        return " ".join(sentences)

    with open(path, "w", encoding="utf-8") as file:
        for number in range(num_rows):
            question = f"{chance.choice(questions)} ({number})"
            if chance.random() < 0.4:
                question += "\n" + text(5, 60)
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": text(5, 120)}]
            file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")


def measure(name: str, file: Path, part: str, processes: int, options: argparse.Namespace) -> Measured:
    """Run one way in a process of its own and watch its memory."""
    command = [sys.executable, __file__, "--part", part, "--file", str(file), "--processes", str(processes)]
    command += ["--trl-rows", str(options.trl_rows)]
    path = os.pathsep.join(filter(None, [str(REPOSITORY), options.trl]))
    environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "true", "HF_HUB_OFFLINE": "1"}
    load = os.getloadavg()[0]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        peak = PeakMemory(process.pid)
        output, _ = process.communicate()
        peak.stop()
    if process.returncode:
        sys.exit(f"{name} failed with exit code {process.returncode}.")
    loads = (load, os.getloadavg()[0])
    measured = Measured(name, loads, peak_bytes=peak.num_bytes, **json.loads(output.splitlines()[-1]))
    speeds = f"{measured.rows_per_second:,.0f} rows/s, {measured.rows_per_cpu_second:,.0f} rows per CPU second"
    print(f"{name}: {speeds}, {human_bytes(measured.peak_bytes)}", flush=True)
    return measured


class PeakMemory:
    """Watches the memory that a process and its children have for themselves."""

    def __init__(self, pid: int) -> None:
        self.num_bytes = 0
        self._process = psutil.Process(pid)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.2):
            self.num_bytes = max(self.num_bytes, sum(self._own_bytes()))

    def _own_bytes(self) -> Iterator[int]:
        try:
            family = [self._process, *self._process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for each in family:
            try:
                yield each.memory_full_info().uss
            except psutil.Error:  # it ended between the two looks
                continue


def ours(file: Path, _processes: int, compared: int) -> dict[str, Any]:
    """The studio's way, as the `tokenize` job takes it."""
    from studio.data.cache import open_or_build
    from studio.data.named import load_template
    from studio.data.tokens import TextTokenizer

    folder = require("starter")
    template, tokenizer = load_template("", folder), TextTokenizer.load(folder)
    watch = Watch()
    tokens = open_or_build(file.parent, "rows", file, template, tokenizer, MAX_LENGTH, "assistant")
    took = watch.took()
    sample = [[example.input_ids, example.labels] for example in tokens.rows()[:CHECKED_ROWS]]
    lengths = tokens.files.lengths()
    numbers = {"num_rows": tokens.info.num_rows, "num_tokens": int(lengths.sum())}
    return took | numbers | {"compared_tokens": int(lengths[: compared or None].sum()), "sample": sample}


def theirs(file: Path, processes: int, _compared: int) -> dict[str, Any]:
    """TRL's preparation, as its trainer calls it, without a trainer's model."""
    from datasets import disable_progress_bars, load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(require("starter"))
    trainer = SFTTrainer.__new__(SFTTrainer)
    trainer._tokenizer, trainer.completion_only_loss = tokenizer, False
    trainer.chat_template = tokenizer.chat_template.replace(PLAIN_ANSWER, MARKED_ANSWER)
    arguments = SFTConfig(
        output_dir=str(file.parent / "trl"), max_length=MAX_LENGTH, assistant_only_loss=True, use_cpu=True, bf16=False,
        dataset_num_proc=processes if processes > 1 else None,
    )  # fmt: skip
    cache = file.parent / f"datasets-{processes}"
    watch = Watch()
    rows = load_dataset("json", data_files=str(file), split="train", cache_dir=str(cache))
    prepared = trainer._prepare_dataset(rows, tokenizer, arguments, False, None, "train")
    took = watch.took()
    sample = [[row["input_ids"], row["labels"]] for row in prepared.select(range(min(CHECKED_ROWS, len(prepared))))]
    num_tokens = sum(len(ids) for batch in prepared.iter(10_000) for ids in batch["input_ids"])
    numbers = {"num_rows": len(prepared), "num_tokens": num_tokens, "compared_tokens": num_tokens}
    return took | numbers | {"sample": sample}


class Watch:
    """Time since it was made: of the clock, and of the processor for this process and all it started."""

    def __init__(self) -> None:
        self._started, self._cpu = time.perf_counter(), self._cpu_seconds()

    def took(self) -> dict[str, float]:
        return {"seconds": time.perf_counter() - self._started, "cpu_seconds": self._cpu_seconds() - self._cpu}

    def _cpu_seconds(self) -> float:
        own = psutil.Process()
        family = [own, *own.children(recursive=True)]  # those that ended are counted with their parent
        return sum(sum(each.cpu_times()[:4]) for each in family)


def trl_version(folder: str) -> str:
    """The version of TRL, also where it was installed into a folder of its own."""
    found = list(distributions(name="trl", path=[folder, *sys.path] if folder else sys.path))
    return found[0].version if found else "unknown"


def require_equal(first: Measured, other: Measured) -> None:
    """The comparison holds only for the same work."""
    if (first.compared_tokens, first.sample) != (other.compared_tokens, other.sample):
        sys.exit(f"{other.name} made other tokens than {first.name}: the comparison would not be fair.")


def report(found: list[Measured], size: int, cores: int, options: argparse.Namespace) -> None:
    first = found[0]
    lines = [
        "# Tokenising: the studio beside `datasets` + TRL",
        "",
        f"{first.num_rows:,} Alpaca-like chats ({human_bytes(size)} of JSONL, {first.num_tokens:,} tokens), the",
        f"starter's tokenizer and template, cut at {MAX_LENGTH}, labels on the answers; from the file to ids and",
        "labels on disk. All ways gave the same number of tokens, and the same ids and labels in the first "
        f"{len(first.sample)} rows.",
        "",
        "| way | rows | rows/s | seconds | rows per CPU second | memory | load before, after | studio: rows/s, CPU |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in found:
        clock = first.rows_per_second / each.rows_per_second
        cpu = first.rows_per_cpu_second / each.rows_per_cpu_second
        cells = [
            each.name, f"{each.num_rows:,}",
            f"{each.rows_per_second:,.0f}", f"{each.seconds:.1f}", f"{each.rows_per_cpu_second:,.0f}",
            human_bytes(each.peak_bytes), f"{each.load[0]:.1f}, {each.load[1]:.1f}",
            f"{clock:.1f} and {cpu:.1f} times" if each is not first else "",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {version(name)}" for name in ("tokenizers", "datasets", "transformers"))
    lines += [
        "",
        "Without imports and loading of the tokenizer. Peak memory is the process tree's own (USS). Where the load is",
        "above what a way starts itself, other processes took part of the cores, and the CPU seconds compare better.",
        f"Machine: {platform.machine()}, {cores} cores, {human_bytes(psutil.virtual_memory().total)} memory, Python "
        f"{platform.python_version()}, {versions}, trl {trl_version(options.trl)}.",
        f"Command: `python benchmarks/tokenise.py --rows {options.rows} --trl-rows {options.trl_rows}`.",
    ]
    atomic_write_text(RESULT, "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
