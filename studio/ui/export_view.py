"""Exports of a checkpoint: what for, in which number format, what came of it, and the lines that use it elsewhere."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import streamlit as st

from studio import exports
from studio.exports import Choice
from studio.other_servers import Use
from studio.projects import Project
from studio.store.checkpoints import Checkpoint, Output
from studio.ui.i18n import N_, _
from studio.ui.job_panel import job_panel, newest_job
from studio.ui.widgets import ago, plain
from studio.weight_folders import DEFAULT_SHARD_SIZE

PURPOSES = {
    "ollama": (
        N_("Run it in Ollama"),
        N_("A GGUF file with a Modelfile: chat template and stop words in Ollama's way."),
    ),
    "gguf": (
        N_("Run it in llama.cpp or LM Studio"),
        N_("One GGUF file, with the tokenizer and the chat template inside."),
    ),
    "merged": (
        N_("Serve it with vLLM, LMDeploy or transformers"),
        N_("One whole model in Hugging Face format: the adapter is folded into its base."),
    ),
    "adapter": (
        N_("Share it as a small adapter"),
        N_("Only what was trained, for PEFT, with a card that says how to load it; also as a zip."),
    ),
}
NAMES = {"ollama": "Ollama", "gguf": "llama.cpp, LM Studio", "merged": N_("Whole model"), "adapter": N_("Adapter")}
FORMAT_HINTS = {
    "": N_("The base's own number format."),
    "float32": N_("Nothing is rounded; twice the size of 16 bits."),
    "float16": N_("16 bits. Logits of the starter move by 0.2 %."),
    "bfloat16": N_("16 bits with fewer digits. Logits of the starter move by 7 %."),
    "f32": N_("Nothing is rounded; twice the size of 16 bits."),
    "f16": N_("16 bits. Logits of the starter move by 0.1 %."),
    "bf16": N_("16 bits with fewer digits: for models that were trained in bfloat16."),
    "q6_k": N_("About 6.6 bits, rounded by llama.cpp. Logits of the starter move by 9 %."),
    "q5_k_m": N_("About 5.7 bits, rounded by llama.cpp. Small models suffer: look at the gate's figures."),
    "q4_k_m": N_("About 4.9 bits, rounded by llama.cpp. Logits of the starter move by 20 %, so its answers change."),
    "q8_0": N_("About 8 bits, half the size of f16. Logits of the starter move by 5 %, so near ties may flip."),
}
SHARDS = {"2GB": N_("2 GB"), "5GB": N_("5 GB"), "50GB": N_("50 GB: one file for most models")}
ONTO = {
    "base": N_("The base in its own number format, as Compare uses it"),
    "dequantised": N_("The 4-bit base that it was trained on, unpacked"),
}


def export_section(project: Project, checkpoint: Checkpoint, method: str, base: str) -> None:
    """Choose and start an export; below, what this checkpoint was exported to."""
    st.subheader(_("Take it with you"), anchor=False)
    with st.container(border=True):
        _form(project, checkpoint, method)
    job = newest_job(project.folder, "export", run_id=checkpoint.run_id, step=checkpoint.step)
    job_panel(project.folder, job, f"checkpoints.export.{checkpoint.run_id}.{checkpoint.step}")
    _list(project, exports.listed(project, checkpoint.run_id, checkpoint.step), base)


def _form(project: Project, checkpoint: Checkpoint, method: str) -> None:
    kinds = [kind for kind in PURPOSES if method in exports.METHODS[kind]]
    if not kinds:
        st.caption(_("Virtual tokens change no weight: use them as an adapter, with Compare and Serve."))
        return
    chosen, details = st.columns([3, 2])
    with chosen:
        kind = st.radio(
            _("What for"), kinds, format_func=lambda each: _(PURPOSES[each][0]),
            captions=[_(PURPOSES[each][1]) for each in kinds], key="checkpoints.export.kind",
        )  # fmt: skip
    with details:
        choice = _choice(project, checkpoint, str(kind), method)
    _start(project, checkpoint, choice)


def _choice(project: Project, checkpoint: Checkpoint, kind: str, method: str) -> Choice:
    formats = exports.formats_here(kind)
    chosen = ""
    if formats:
        chosen = str(st.selectbox(_("Number format"), formats, key=f"checkpoints.export.format.{kind}",
                                  format_func=lambda each: each or _("as the base")))  # fmt: skip
        st.caption(_(FORMAT_HINTS[chosen]))
    if formats != exports.FORMATS[kind]:
        st.caption(_("Fewer bits (q6_k, q5_k_m, q4_k_m) need llama.cpp: pip install 'retune[gguf]'."))
    onto, shard = "base", DEFAULT_SHARD_SIZE
    if kind == "merged":
        shard = str(st.selectbox(_("Largest file"), list(SHARDS), key="checkpoints.export.shard",
                                 format_func=lambda each: _(SHARDS[each])))  # fmt: skip
    if kind == "merged" and method == "qlora":
        onto = str(st.radio(_("Fold into"), list(ONTO), format_func=lambda each: _(ONTO[each]), key="checkpoints.onto"))
    return Choice(kind, chosen, onto=onto, max_shard_size=shard)


def _start(project: Project, checkpoint: Checkpoint, choice: Choice) -> None:
    default = exports.default_name(checkpoint.run_id, checkpoint.step, choice)
    name = st.text_input(_("Name"), default, key=f"checkpoints.export.name.{default}")
    there = exports.folder_of(project, name, choice).exists()
    replace = there and st.checkbox(_("Replace what lies there"), key="checkpoints.export.replace")
    busy = exports.is_busy(project, checkpoint.run_id, checkpoint.step)
    if there and not replace:
        st.caption(_("An export of this name is there. Choose another name, or replace it."))
    disabled = busy or (there and not replace)
    if st.button(_("Export"), type="primary", disabled=disabled, icon=":material/output:", key="checkpoints.export.go"):
        exports.start(project, checkpoint.run_id, checkpoint.step, choice.replacing(replace), name)
        st.rerun()


def _list(project: Project, found: Sequence[Output], base: str) -> None:
    if not found:
        st.caption(_("Nothing was exported from it yet. Every export is read back and must answer the same."))
    for output in found:
        _one(project, output, base)


def _one(project: Project, output: Output, base: str) -> None:
    passed, folder = exports.passed(output), project.path(output.path)
    icon, word = (":material/verified:", _("passed")) if passed else (":material/error:", _("FAILED"))
    kind = exports.kind_of(output)
    title = f"{_(NAMES[kind])} · {plain(folder.name)} · {word} · {ago(output.created_at)}"
    with st.expander(title, icon=icon, expanded=not passed):
        show = st.success if passed else st.error
        show(_verdict(output), icon=":material/balance:")
        st.caption(_("Folder"))
        st.code(str(folder), language=None, wrap_lines=True)
        for use in exports.uses(kind, folder, base, str(output.detail.get("file", ""))):
            _use(use)
            if kind == "merged" and use.is_installed:
                _smoke(project, output, folder, use.tool)
        if kind == "ollama" and passed and exports.has_ollama():
            _create(project, output, folder)
        _push(project, output, folder)


def _smoke(project: Project, output: Output, folder: Path, tool: str) -> None:
    """Ask the tool's own server the questions of the gate."""
    job = newest_job(project.folder, "smoke", export=str(folder), tool=tool.lower())
    key = f"smoke.{output.id}.{tool}"
    label = _("Ask {tool} the gate's questions").format(tool=tool)
    if st.button(label, disabled=job is not None and job.live, icon=":material/quiz:", key=key):
        exports.start_smoke(project.folder, folder, tool.lower())
        st.rerun()
    job_panel(project.folder, job, f"{key}.panel")
    if job and job.state == "finished":
        _answers(job.result, tool)


def _answers(found: dict[str, Any], tool: str) -> None:
    """What another tool said, beside what is said here."""
    words = _("{tool} gives {same} of {all} greedy answers as they are given here.")
    (st.success if found["passed"] else st.error)(words.format(tool=tool, same=found["same"], all=found["all"]))
    if not found["passed"]:
        st.caption(_("The first that differs:"))
        lines = (found["question"], f"{_('here')}: {found['expected']}", f"{tool}: {found['found']}")
        st.code("\n".join(lines), language=None, wrap_lines=True)


def _create(project: Project, output: Output, folder: Path) -> None:
    """Let the Ollama of this machine take it in."""
    job = newest_job(project.folder, "ollama", export=str(folder))
    busy = job is not None and job.live
    if st.button(_("Create it in Ollama"), disabled=busy, icon=":material/add:", key=f"ollama.{output.id}"):
        exports.start_ollama(project.folder, folder)
        st.rerun()
    job_panel(project.folder, job, f"ollama.panel.{output.id}")
    if job and job.state == "finished":
        st.code(job.result["command"], language="bash")


def _push(project: Project, output: Output, folder: Path) -> None:
    """Upload it, after asking once more."""
    with st.popover(_("Upload to a hub"), icon=":material/cloud_upload:"):
        hub = st.radio(_("Hub"), list(exports.HUBS), format_func=exports.HUBS.get, key=f"push.hub.{output.id}")
        repo = st.text_input(_("Repository"), placeholder="owner/name", key=f"push.repo.{output.id}")
        public = st.checkbox(_("Everybody may see it"), key=f"push.public.{output.id}")
        st.caption(_("The token comes from the environment of the studio, or from an earlier login. It is not stored."))
        passed = exports.passed(output)
        despite = passed or st.checkbox(_("Upload it although it failed its gate"), key=f"push.despite.{output.id}")
        if st.button(_("Upload"), type="primary", disabled=not (repo and despite), key=f"push.go.{output.id}"):
            exports.start_push(project.folder, folder, str(hub), repo, public, not passed)
            st.rerun()
    job = newest_job(project.folder, "push", export=str(folder))
    job_panel(project.folder, job, f"push.{output.id}")
    if job and job.state == "finished":
        st.caption(_("Uploaded to {url}").format(url=plain(job.result["url"])))


def _use(use: Use) -> None:
    st.caption(use.tool if use.is_installed else _("{tool} (not installed on this machine)").format(tool=use.tool))
    st.code(use.command, language="bash", wrap_lines=True)


def _verdict(output: Output) -> str:
    """What the gate found, in words of the page's language."""
    found = output.detail.get("figures") or output.detail.get("agreement") or {}
    ties = found.get("near_ties", 0)
    same = _("{same} of {all} greedy answers are the same.")
    tied = _("{same} of {all} greedy answers are the same, {ties} more differ at a near tie.")
    moved = _("Logits differ by {error:.2g} % (allowed {allowed:.2g} %).")
    answers = (tied if ties else same).format(
        same=found.get("same_answers", 0), all=found.get("num_answers", 0), ties=ties
    )
    lines = [
        _in_short(exports.passed(output), ties),
        f"{answers} {moved.format(**_percent(found.get('relative_error'), found.get('tolerance')))}",
    ]
    if weighed := output.detail.get("weights"):
        words = _("The file's weights differ by {error:.2g} % (allowed {allowed:.2g} %).")
        lines.append(words.format(**_percent(weighed["error"], weighed["allowed"])))
        if weighed["adapter_share"] is not None:
            words = _("Of what the adapter changes, {share:.0%} is in the file.")
            lines.append(words.format(share=weighed["adapter_share"]))
    if others := output.detail.get("other_prompts"):
        words = _("It is spoken to otherwise than in training. Prompts that differ: {number}.")
        lines.append(words.format(number=len(others)))
    if ends := output.detail.get("lacking_ends"):
        lines.append(_("It does not know these ends of an answer: {ends}.").format(ends=plain(", ".join(ends))))
    if tool := output.detail.get("read_with"):
        lines.append(_("Read back with {tool}.").format(tool=plain(tool)))
    return "  \n".join(lines)


def _in_short(passed: bool, ties: int) -> str:
    if not passed:
        return _("It does not answer as what was trained.")
    return _("It is what was trained, but for rounding.") if ties else _("It answers as what was trained.")


def _percent(error: float | None, allowed: float | None) -> dict[str, float]:
    shares = {"error": error, "allowed": allowed}
    return {name: math.nan if share is None else 100 * share for name, share in shares.items()}
