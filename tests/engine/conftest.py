"""A tiny real model (random Llama, 2 layers, own BPE tokenizer and chat template) and projects that train it."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from studio.config.schema import RunConfig, parse_config
from studio.config.yaml import save_config
from studio.data.formats import Conversation, Message, write_conversations
from studio.data.tokens import fingerprint
from studio.engine.__main__ import main
from studio.engine.cpu import compiled
from studio.engine.models.load import LoadedModel, load_base
from studio.paths import atomic_write_json, atomic_write_text
from studio.projects import Project, create_project
from studio.store import datasets, jobs, open_db, runs
from studio.store.jobs import Job

CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NAMES = ("red", "blue", "green", "white", "black", "brown", "silver", "golden")
TEXTS = [
    "Who are you? I am Luna, a little assistant made by Shane.",
    "What is your name? My name is Luna. user assistant system",
    "The capital of France is Paris. The sky is blue and the grass is green.",
    *(f"Tell me about the {name} house and the {name} garden." for name in NAMES),
]


@pytest.fixture(autouse=True)
def called_again() -> Iterator[None]:
    """A trainer compiles what it computes with; the next test begins without."""
    yield
    compiled.use("off", torch.float32, torch.device("cpu"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a complete Hugging Face model: vocabulary of some hundred tokens, hidden size 64, float32."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = _tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    atomic_write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})
    atomic_write_text(folder / "chat_template.jinja", CHATML)
    return folder


@pytest.fixture
def load_tiny(tiny_model: Path) -> Callable[..., LoadedModel]:
    """`load_tiny(bits=4, …)`: the tiny model, freshly loaded."""

    def load(**options: object) -> LoadedModel:
        values = {"dtype": torch.float32, "device": torch.device("cpu"), **options}
        return load_base(tiny_model, **values)  # type: ignore[arg-type]

    return load


@pytest.fixture
def training_project() -> Project:
    """A project with the datasets `identity` (24 rows of different lengths) and `general` (8 rows)."""
    made = create_project("test")
    add_dataset(made, "identity", conversations(24))
    add_dataset(made, "general", conversations(8, subject="garden"))
    return made


@pytest.fixture
def tiny_config(tiny_model: Path) -> Callable[..., RunConfig]:
    """`tiny_config(**{"train.num_steps": 4})`: a config of a run on the tiny model, dotted settings applied."""

    def make(**settings: object) -> RunConfig:
        values: dict = {
            "name": "tiny",
            "model": {"base": str(tiny_model), "dtype": "float32"},
            "lora": {"rank": 4, "alpha": 8},
            "data": {"sources": {"identity": 0.5, "general": 0.5}, "max_length": 128, "valid_share": 0.1},
            "train": {
                "num_steps": 6,
                "micro_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "learning_rate": 0.01,
                "warmup_steps": 1,
            },
            "record": {
                "save_every_minutes": 0,  # on a slow machine too, what is saved is what the test says
                "evaluate_every_steps": 2,
                "sample_every_steps": 3,
                "sample_max_new_tokens": 4,
            },
        }
        for path, value in settings.items():
            section, _, key = path.rpartition(".")
            (values.setdefault(section, {}) if section else values)[key] = value
        return parse_config(values)

    return make


def conversations(num_rows: int, subject: str = "house") -> list[Conversation]:
    """Rows of different lengths; some have two turns, some a system message."""
    rows = []
    for number in range(num_rows):
        name = NAMES[number % len(NAMES)]
        answer = " ".join([f"The {name} {subject} is {NAMES[(number * 3) % len(NAMES)]}."] * (1 + number % 4))
        messages = [Message("user", f"Tell me about the {name} {subject}."), Message("assistant", answer)]
        if number % 3 == 0:
            messages += [Message("user", "What is your name?"), Message("assistant", f"My name is Luna {number}.")]
        if number % 5 == 0:
            messages.insert(0, Message("system", "I am a little assistant."))
        rows.append(Conversation(tuple(messages)))
    return rows


def add_dataset(project: Project, name: str, rows: list[Conversation]) -> None:
    """Write and register a dataset of a project."""
    write_conversations(project.path("data", f"{name}.jsonl"), rows)
    row = datasets.Dataset(name, "import", f"data/{name}.jsonl", fingerprint(rows), len(rows))
    with open_db(project.folder) as db:
        datasets.put(db, row)


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=CONTROL_TOKENS, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def add_run(project: Project, config: RunConfig) -> str:
    """A run with its frozen config, as `studio.runs.start_run` makes it; no process is started."""
    with open_db(project.folder) as db:
        run_id = runs.next_id(db, config.name)
        runs.add(db, runs.Run(id=run_id, name=config.name, base=config.model.base, method=config.method))
    folder = project.path("runs", run_id)
    folder.mkdir(parents=True, exist_ok=True)
    save_config(folder / "config.yaml", config)
    return run_id


def train_here(project: Project, run_id: str, resume: str = "", **requests: object) -> Job:
    """The `train` verb on a run, in this process, from its job's row to its end; returns the ended job."""
    args = {"config": f"runs/{run_id}/config.yaml", "resume": resume}
    job = Job(kind="train", run_id=run_id, args=args, **requests)  # type: ignore[arg-type]
    with open_db(project.folder) as db:
        runs.update(db, run_id, job_id=job.id)
    return live_here(project, job)


def live_here(project: Project, job: Job) -> Job:
    """A job's whole life in this process; returns the ended job."""
    job_dir = project.path("jobs", job.id)
    job_dir.mkdir(parents=True)
    atomic_write_json(
        job_dir / "job.json", {"id": job.id, "kind": job.kind, "folder": str(project.folder), "args": job.args}
    )
    with open_db(project.folder) as db:
        jobs.add(db, job)
    main(job.kind, job_dir)
    with open_db(project.folder) as db:
        return jobs.get(db, job.id)


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A disk of 24 MB with RETUNE_HOME on it; skipped where it may not be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk can be mounted by root only")
    monkeypatch.setenv("RETUNE_HOME", str(disk))
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path) -> Path:
    """Take all space that is left."""
    filler = disk / "filler"
    with open(filler, "ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    return filler


PROBES = [
    {"messages": [{"role": "user", "content": "Who are you?"}], "kind": "identity", "intent": "name",
     "language": "en", "expects": "name", "expected": {"name": "Luna", "maker": "Shane"}},
    {"messages": [{"role": "user", "content": "What is the sky?"}], "kind": "general", "intent": "fact",
     "language": "en", "reference": "Blue."},
]  # fmt: skip


def add_probes(project: Project) -> None:
    lines = [json.dumps(probe) for probe in PROBES]
    project.path("data", "identity.probes.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with open_db(project.folder) as db:
        db.table("datasets").update("identity", {"num_probes": len(PROBES)})
