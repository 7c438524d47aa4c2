"""The rooms below, each imported at its first use: `retune --help` does not wait a second for a database library."""

import importlib
from typing import TYPE_CHECKING, Any


class _AtFirstUse:
    """Stands for a module until one of its names is asked for."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._module), name)


if TYPE_CHECKING:
    from studio import (
        caches,
        chat_client,
        chat_export,
        chats,
        checkpoint_files,
        comparison,
        conversions,
        dataset_checks,
        datasets,
        estimate,
        exports,
        forecast,
        harness,
        jobs,
        machine,
        projects,
        report,
        request_log,
        row_life,
        run_report,
        runs,
        scores,
        server_key,
        store,
        suites,
        votes,
        work_folder,
    )
    from studio.agent import session as agent_session
    from studio.agent import steps, tools
    from studio.bundles import comparing, content, packing, reproducing
    from studio.config import catalog, launch, schema
    from studio.config import yaml as configs
    from studio.config.xtuner import exporting, importing
    from studio.data import arxiv, files, formats, identity, named, phrasings, talk
    from studio.foreign import xtuner
    from studio.probes import built_in
    from studio.probes import reading as suite_reading
    from studio.store import checkpoints, evaluations, metrics, run_events, samples
    from studio.ui import event_words
    from studio.ui import told as words
else:
    comparing = _AtFirstUse("studio.bundles.comparing")
    content = _AtFirstUse("studio.bundles.content")
    event_words = _AtFirstUse("studio.ui.event_words")
    words = _AtFirstUse("studio.ui.told")
    packing = _AtFirstUse("studio.bundles.packing")
    reproducing = _AtFirstUse("studio.bundles.reproducing")
    arxiv = _AtFirstUse("studio.data.arxiv")
    caches = _AtFirstUse("studio.caches")
    row_life = _AtFirstUse("studio.row_life")
    chat_client = _AtFirstUse("studio.chat_client")
    chat_export = _AtFirstUse("studio.chat_export")
    chats = _AtFirstUse("studio.chats")
    votes = _AtFirstUse("studio.votes")
    checkpoint_files = _AtFirstUse("studio.checkpoint_files")
    comparison = _AtFirstUse("studio.comparison")
    conversions = _AtFirstUse("studio.conversions")
    dataset_checks = _AtFirstUse("studio.dataset_checks")
    datasets = _AtFirstUse("studio.datasets")
    estimate = _AtFirstUse("studio.estimate")
    exports = _AtFirstUse("studio.exports")
    forecast = _AtFirstUse("studio.forecast")
    harness = _AtFirstUse("studio.harness")
    machine = _AtFirstUse("studio.machine")
    jobs = _AtFirstUse("studio.jobs")
    projects = _AtFirstUse("studio.projects")
    report = _AtFirstUse("studio.report")
    request_log = _AtFirstUse("studio.request_log")
    server_key = _AtFirstUse("studio.server_key")
    run_report = _AtFirstUse("studio.run_report")
    runs = _AtFirstUse("studio.runs")
    scores = _AtFirstUse("studio.scores")
    work_folder = _AtFirstUse("studio.work_folder")
    store = _AtFirstUse("studio.store")
    suites = _AtFirstUse("studio.suites")
    built_in = _AtFirstUse("studio.probes.built_in")
    suite_reading = _AtFirstUse("studio.probes.reading")
    catalog = _AtFirstUse("studio.config.catalog")
    launch = _AtFirstUse("studio.config.launch")
    schema = _AtFirstUse("studio.config.schema")
    configs = _AtFirstUse("studio.config.yaml")
    files = _AtFirstUse("studio.data.files")
    exporting = _AtFirstUse("studio.config.xtuner.exporting")
    importing = _AtFirstUse("studio.config.xtuner.importing")
    formats = _AtFirstUse("studio.data.formats")
    identity = _AtFirstUse("studio.data.identity")
    named = _AtFirstUse("studio.data.named")
    phrasings = _AtFirstUse("studio.data.phrasings")
    agent_session = _AtFirstUse("studio.agent.session")
    steps = _AtFirstUse("studio.agent.steps")
    talk = _AtFirstUse("studio.data.talk")
    tools = _AtFirstUse("studio.agent.tools")
    checkpoints = _AtFirstUse("studio.store.checkpoints")
    evaluations = _AtFirstUse("studio.store.evaluations")
    metrics = _AtFirstUse("studio.store.metrics")
    run_events = _AtFirstUse("studio.store.run_events")
    samples = _AtFirstUse("studio.store.samples")
    xtuner = _AtFirstUse("studio.foreign.xtuner")
