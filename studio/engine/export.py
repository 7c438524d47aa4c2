"""`export`: a checkpoint becomes files for another tool, and they are read back and held against what was trained."""

import json
import shutil
import zipfile
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from studio.data.named import NamedTemplate, as_jinja
from studio.data.talk import GATE_FILE, WEIGHTS_FILE
from studio.data.tokens import TextTokenizer
from studio.engine import merge
from studio.engine.adapter_files import Adapter, read_adapter
from studio.engine.card import STARTER_LICENSE, export_card, public_base, use_of
from studio.engine.checkpoint import versions
from studio.engine.convert import weights_of_run
from studio.engine.devices import pick_device, set_threads
from studio.engine.equivalence import Expected, Verdict, expected_of, folding_error, verdict_of_adapter
from studio.engine.folding import FoldedWeights
from studio.engine.gguf import checking, k_quants, writer
from studio.engine.gguf.vocabulary import Vocabulary, vocabulary_of
from studio.engine.job import JobContext
from studio.engine.lineage import lineage_of
from studio.engine.ollama import MODELFILE, modelfile, with_modelfile
from studio.engine.tools import run_tool
from studio.engine.weights import CARD_FILE, Base, known_base, output_folder, read_seal
from studio.errors import StudioError
from studio.machine import INSTALL_QUANTIZE, QUANTIZE_TOOL
from studio.models import STARTER
from studio.paths import atomic_write_json, atomic_write_text, inside, sha256_of
from studio.store import checkpoints as store
from studio.store import open_db
from studio.weight_folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, require_free

CPU = torch.device("cpu")
SCRATCH = "exports/.scratch"


@dataclass(frozen=True)
class Source:
    """What is exported: weights on a base, or a full model (then `base` is that model, and there is no adapter)."""

    base: Base
    adapter: Adapter | None
    folder: Path
    seal: dict[str, Any]

    @property
    def run_id(self) -> str:
        return str(self.seal.get("run_id") or "")

    @property
    def step(self) -> int:
        return int(self.seal.get("step") or 0)


def run(job: JobContext) -> dict[str, Any]:
    """Args: kind (gguf, ollama, adapter or merged); run_id and step, or weights (a folder) and base; out; format,
    overwrite; of a merged model onto and max_shard_size.

    Returns the verdict of the gate; a failed export is kept, and marked as such in gate.json and in the store.
    """
    set_threads()
    out = Path(job.args["out"])
    require_free(out, bool(job.args.get("overwrite")))
    with weights_of(job) as folder:
        source = read_source(job, folder)
        return EXPORTS[str(job.args["kind"])](job, source, out)


def weights_of(job: JobContext) -> AbstractContextManager[Path]:
    """The folder to export; a run's checkpoint is converted for it where that was not done."""
    args = job.args
    if not args.get("run_id"):
        return nullcontext(Path(args["weights"]))
    return weights_of_run(job, str(args["run_id"]), int(args["step"]), inside(job.folder, SCRATCH))


def read_source(job: JobContext, folder: Path) -> Source:
    """An adapter on its base, or a model. Raises CheckpointError for damaged weights or another base."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return Source(known_base(str(folder)), None, folder, read_seal(folder))
    job.phase("reading the adapter")
    adapter = read_adapter(folder)
    asked, own = str(job.args.get("base") or ""), adapter.config.get("base_model_name_or_path")
    name = asked or str(adapter.seal.get("base") or own or "")
    base = known_base(name, str(adapter.seal.get("base_fingerprint", "")), "The adapter's weights")
    return Source(base, adapter, folder, adapter.seal)


def to_gguf(job: JobContext, source: Source, out: Path) -> dict[str, Any]:
    """One GGUF file, with its card and gate.json; for Ollama a Modelfile too."""
    kind, form = str(job.args["kind"]), str(job.args.get("format") or "f16")
    tool = shutil.which(QUANTIZE_TOOL) if _format(form).kind in k_quants.K_QUANTS else None
    first = _format("f16" if tool else form)
    weights = FoldedWeights(source.base.folder, source.adapter)
    writer.require_writable(weights.config)
    vocabulary = vocabulary_of(TextTokenizer.load(source.base.folder), weights.config.vocab_size)
    num_weights = sum(shape.numel() for shape in weights.shapes.values())
    bits = _format(form).bits_per_weight + (first.bits_per_weight if tool else 0)
    with output_folder(out, int(num_weights * bits / 8) + 2**24) as folder:
        job.phase("answering with what was trained")
        expected = expected_of(source.base.folder, source.adapter, torch.float32, CPU)
        vocabulary = replace(vocabulary, adds_bos=vocabulary.adds_bos and _begin_with_bos(expected))
        file = folder / f"{out.name.removesuffix(f'-{form}')}-{form}.gguf"
        if kind == "ollama":
            context = writer.context_length(weights.config)
            text = modelfile(file.name, expected, vocabulary.adds_bos, source.folder, context)
            atomic_write_text(folder / MODELFILE, text)
        job.check_stop()
        written = file.with_suffix(".f16") if tool else file
        writer.write(job, written, weights, speech_of(vocabulary, expected), first, _about(source, out.name))
        job.check_stop()
        if written != file:
            _quantize(job, written, file, form)
        job.phase("reading the file back and comparing")
        verdict = _verdict_of_file(file, source, weights, expected, form)
        if kind == "ollama":
            text = (folder / MODELFILE).read_text(encoding="utf-8")
            verdict = with_modelfile(verdict, text, expected, vocabulary.adds_bos)
        facts = {"kind": kind, "format": form, "file": file.name, "sha256": sha256_of(file)}
        record = _finish(job, folder, source, verdict, facts)
    return _register(job, source, out, record)


def _quantize(job: JobContext, f16: Path, file: Path, form: str) -> None:
    """By llama.cpp's own tool, from a file that is not needed afterwards."""
    job.phase("rounding with llama-quantize")
    threads = str(torch.get_num_threads())
    run_tool(job, [QUANTIZE_TOOL, f16.name, file.name, form.upper(), threads], f16.parent, INSTALL_QUANTIZE)
    f16.unlink()
    if not file.is_file():
        raise StudioError(f"{QUANTIZE_TOOL} wrote no {file.name}.", "The job's log says more.")


def _verdict_of_file(file: Path, source: Source, weights: FoldedWeights, expected: Expected, form: str) -> Verdict:
    """The fold before it is rounded, the tensors of the file, and what llama.cpp answers with it."""
    folding = folding_error(source.base.folder, source.adapter, expected.reference, CPU) if source.adapter else None
    weighed = checking.weigh_file(file, weights, form)
    verdict = checking.verdict_of_file(file, expected, form, torch.get_num_threads())
    return replace(verdict, agreement=replace(verdict.agreement, folding_error=folding), weights=weighed)


def to_adapter(job: JobContext, source: Source, out: Path) -> dict[str, Any]:
    """The adapter for PEFT, with template, tokenizer and a card that says how to load it; and all of that as a zip."""
    if source.adapter is None:
        raise StudioError(f"{source.folder.name!r} is a whole model.", "Share its folder; only adapters are bundled.")
    size = sum(path.stat().st_size for path in source.folder.iterdir() if path.is_file())
    with output_folder(out, 2 * size) as folder:
        job.phase("answering with what was trained")
        expected = expected_of(source.base.folder, source.adapter, torch.float32, CPU).reference
        job.phase("copying the adapter")
        for path in source.folder.iterdir():
            if path.is_file() and path.name not in (WEIGHTS_FILE, GATE_FILE):
                shutil.copyfile(path, folder / path.name)
        _name_base(folder / ADAPTER_CONFIG, source.base)
        job.phase("reading the file back and comparing")
        verdict = verdict_of_adapter(source.base.folder, folder, expected)
        record = _finish(job, folder, source, verdict, {"kind": "adapter", "file": ADAPTER_WEIGHTS})
        _zip(folder, folder / f"{out.name}.zip")
        record["files"] = sorted([*record["files"], f"{out.name}.zip"])
        atomic_write_json(folder / GATE_FILE, record)
    return _register(job, source, out, record)


def to_merged(job: JobContext, source: Source, out: Path) -> dict[str, Any]:
    """One whole model in Hugging Face format, as `merge` makes it."""
    if source.adapter is None:
        raise StudioError(f"{source.folder.name!r} is a whole model already.", "Use its folder as it is.")
    form = merge.form_of(job.args | {"dtype": job.args.get("format")}, source.base)
    record = merge.merge(job, source.base, source.adapter, out, pick_device("auto"), form)
    merge.register(job, out, record)
    return {"kind": "merged", "passed": record["verified"], "message": record["message"], "path": str(out)}


def _name_base(path: Path, base: Base) -> None:
    """By its id on the hub where it has one, else by the last part of its folder: others have no such path."""
    config = json.loads(path.read_text(encoding="utf-8"))
    atomic_write_json(path, config | {"base_model_name_or_path": public_base(base.name)})


def _zip(folder: Path, target: Path) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(folder.iterdir()):
            if path != target:
                archive.write(path, f"{target.stem}/{path.name}")


def _format(name: str) -> writer.Format:
    if name not in writer.FORMATS:
        raise StudioError(f"GGUF cannot be written as {name!r}.", f"Allowed: {', '.join(writer.FORMATS)}.")
    return writer.FORMATS[name]


def speech_of(vocabulary: Vocabulary, expected: Expected) -> writer.Speech:
    template = expected.template
    source = as_jinja(template) if isinstance(template, NamedTemplate) else template.source
    named = {"bos": "bos_token", "unknown": "unk_token", "padding": "pad_token"}
    found = {name: expected.tokenizer.token_id(template.special_tokens.get(token, "")) for name, token in named.items()}
    ids = {name: number for name, number in found.items() if number is not None}
    ends = dict(zip(checking.ENDS, expected.reference.ends, strict=False))
    return writer.Speech(vocabulary, source, ids | ends)


def _begin_with_bos(expected: Expected) -> bool:
    """Whether chats did in training. A file that says otherwise than its tokenizer keeps them so."""
    bos = expected.tokenizer.token_id(expected.template.special_tokens.get("bos_token", ""))
    return all(prompt[:1] == [bos] for prompt in expected.reference.prompts)


def _about(source: Source, name: str) -> dict[str, str]:
    return {"type": "model", "name": name, "finetune": source.run_id} | (
        {"license": STARTER_LICENSE} if source.base.name == STARTER else {}
    )


def _finish(job: JobContext, folder: Path, source: Source, verdict: Verdict, facts: dict[str, Any]) -> dict[str, Any]:
    """Write the card, and last gate.json, which tells of everything."""
    digest = source.adapter.hash if source.adapter else str(source.seal.get("sha256") or "")
    lineage = lineage_of(job.folder, source.seal, digest)
    about = {
        "run_id": source.run_id,
        "step": source.step,
        "method": source.seal.get("method", ""),
        "base": public_base(source.base.name),
        "base_fingerprint": source.base.fingerprint,
        "adapter_sha256": source.adapter.hash if source.adapter else "",
    }
    data = {"data_fingerprints": source.seal.get("data_fingerprints", {})}
    record = facts | about | data | verdict.to_row() | {"versions": versions()}
    told = {key.replace("_", " "): value for key, value in (facts | about).items()}
    told |= {"data": lineage.data, "gate": verdict.message, "made with": versions()}
    use = use_of(facts["kind"], folder_name=source.run_id or source.folder.name, file=facts["file"])
    atomic_write_text(folder / CARD_FILE, export_card(use[0], source.base.name, told, use[1], lineage.scorecard))
    record["files"] = sorted([*(path.name for path in folder.iterdir()), GATE_FILE])
    atomic_write_json(folder / GATE_FILE, record)
    return record


def _register(job: JobContext, source: Source, out: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Note the export in the project that it lies in; returns the job's result."""
    root, place = job.folder.resolve(), out.resolve()
    told = (
        "kind",
        "format",
        "file",
        "passed",
        "message",
        "read_with",
        "figures",
        "weights",
        "other_prompts",
        "lacking_ends",
    )
    detail = {key: record[key] for key in told if key in record}
    if root in place.parents and (job.folder / "project.json").is_file():
        with open_db(job.folder) as db:
            path = str(place.relative_to(root))
            store.put_output(db, store.Output("export", path, record["run_id"], record["step"], detail))
    return detail | {"path": str(out), "base": source.base.name}


EXPORTS = {"gguf": to_gguf, "ollama": to_gguf, "adapter": to_adapter, "merged": to_merged}
