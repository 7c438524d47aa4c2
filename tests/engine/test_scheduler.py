"""Requests join and leave a batch between two tokens, and each gets what it would have got alone."""

import asyncio
import json
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from studio.engine import scheduler as scheduling
from studio.engine.api import Answering, _Stream, _written, make_app
from studio.engine.gate import Gate
from studio.engine.generate import Sampling
from studio.engine.mixing import BASE_ADAPTER
from studio.engine.scheduler import Ask, Piece, Scheduler
from studio.engine.served import ModelPool
from studio.errors import ServerBusyError
from studio.request_log import RequestLog
from tests.engine.folders import lora_model, make_base

CPU = torch.device("cpu")
PROMPTS = ([5, 6, 7], [9, 10, 11, 12, 13, 14, 15], [20], list(range(30, 70)), [8, 8])


@pytest.fixture(scope="module")
def pool(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelPool:
    """The tiny base with two adapters that change what it says."""
    made = ModelPool("tiny", tiny_model, torch.float32, CPU)
    for seed in (1, 2):
        model = lora_model(tiny_model, seed)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data *= 20
        folder = tmp_path_factory.mktemp("adapters") / f"tuned-{seed}"
        model.save_pretrained(folder)
        made.add(f"tuned-{seed}", folder)
    return made


@pytest.fixture
def scheduler(pool: ModelPool) -> Iterator[Scheduler]:
    made = Scheduler(pool)
    made.start()
    yield made
    made.stop()


def in_a_loop(work: Coroutine[Any, Any, Any]) -> Any:
    """In a thread of its own: a browser driven by another test leaves a loop running in this one."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(asyncio.run, work).result(30)


class Asking:
    """An ask, and the news of it."""

    def __init__(self, pool: ModelPool, name: str, prompt: list[int], num_tokens: int = 12, **sampling: float) -> None:
        self.pieces: queue.Queue[Piece] = queue.Queue()
        self.ask = Ask(pool.find(name), prompt, Sampling(num_tokens, **sampling), self.pieces.put)  # type: ignore[arg-type]

        self.seen: list[Piece] = []

    def first(self) -> Piece:
        self.seen.append(self.pieces.get(timeout=60))
        return self.seen[-1]

    def end(self) -> tuple[str, Piece]:
        """(whole text, last piece)."""
        while not (self.seen and self.seen[-1].finish_reason):
            self.first()
        return "".join(piece.text for piece in self.seen), self.seen[-1]


@pytest.fixture(scope="module")
def alone(pool: ModelPool, tiny_model: Path) -> Callable[[str, Sequence[int], int], str]:
    """What a model says greedily when transformers (and PEFT) decode for it alone."""
    models: dict[str, Any] = {}

    def say(name: str, prompt: Sequence[int], num_tokens: int = 12) -> str:
        if name not in models:
            base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
            folder = pool.find(name).folder
            models[name] = (base if name == "tiny" else PeftModel.from_pretrained(base, str(folder))).eval()
        ids = torch.tensor([list(prompt)])
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": num_tokens}
        answer = models[name].generate(input_ids=ids, **options)[0, ids.shape[1] :].tolist()
        loaded = pool.ready(pool.find(name)).loaded
        return loaded.tokenizer.decode([token for token in answer if token != 2], skip_special_tokens=True)

    return say


def test_base_and_adapters_in_one_batch_say_what_each_says_alone(
    pool: ModelPool, scheduler: Scheduler, alone: Callable[..., str]
) -> None:
    asked = [(name, list(prompt)) for prompt in PROMPTS for name in ("tiny", "tuned-1", "tuned-2")]
    askings = [Asking(pool, name, prompt) for name, prompt in asked]
    scheduler.ask(*(each.ask for each in askings))
    texts = [each.end()[0] for each in askings]
    wanted = [alone(name, prompt) for name, prompt in asked]
    assert texts == wanted
    assert len(set(wanted)) > len(PROMPTS)  # the adapters do change something


def test_where_layers_mix_rows_each_adapter_is_a_batch_of_its_own(tmp_path: Path) -> None:
    """A mixture of experts: its base and its adapters are asked at once, as Compare asks them."""
    base = make_base(tmp_path / "base")
    config = AutoConfig.from_pretrained(base).to_dict() | {"num_local_experts": 4, "num_experts_per_tok": 2}
    kept = {name: value for name, value in config.items() if name not in ("model_type", "architectures")}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **kept)).save_pretrained(base)
    pool = ModelPool("base", base, torch.float32, CPU)
    scheduler = Scheduler(pool)
    scheduler.start()
    try:
        texts = {}
        for names in (("base",), ("tuned",), ("base", "tuned", "base", "tuned")):
            if "tuned" in names and len(pool.listed()) == 1:
                lora_model(base).save_pretrained(tmp_path / "tuned")
                scheduler.call(lambda: pool.add("tuned", tmp_path / "tuned")).result(60)
            askings = [Asking(pool, name, [5, 6, 7]) for name in names]
            scheduler.ask(*(each.ask for each in askings))
            for name, asking in zip(names, askings, strict=True):
                text, last = asking.end()
                assert last.finish_reason in ("stop", "length"), last.error
                assert texts.setdefault(name, text) == text
        assert texts["base"] != texts["tuned"]
    finally:
        scheduler.stop()


def test_latecomers_join_and_change_nothing(
    pool: ModelPool, scheduler: Scheduler, alone: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts longer and shorter than what is being decoded, read in small parts while others go on."""
    monkeypatch.setattr(scheduling, "READ_TOKENS", 8)
    names = ("tiny", "tuned-1", "tuned-2", "tiny", "tuned-2")
    asked = list(zip(names, PROMPTS, (40, 3, 25, 30, 1), strict=True))
    wanted = [alone(*each) for each in asked]
    askings = [Asking(pool, name, list(prompt), num_tokens) for name, prompt, num_tokens in asked]
    for asking in askings:
        scheduler.ask(asking.ask)
        asking.first()  # it has begun before the next one comes
    assert [asking.end()[0] for asking in askings] == wanted


def test_a_long_prompt_is_read_in_parts_while_others_get_tokens(
    pool: ModelPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduling, "READ_TOKENS", 4)
    lane = scheduling._Lane(pool.ready(pool.find("tiny")))
    running, late = Asking(pool, "tiny", [5, 6, 7], 200), Asking(pool, "tuned-1", list(range(10, 130)), 1)
    lane.add([running.ask], pool)
    lane.advance()
    lane.add([late.ask], pool)
    for _ in range(29):  # 120 tokens, 4 at a time
        lane.advance()
    assert late.pieces.empty()
    [row] = lane._decoding.running
    assert len(row.answer) == 31  # one each time, and one of its own prompt
    lane.advance()
    assert late.end()[1].num_tokens == 1
    assert len(row.answer) == 32 and lane.asks == [running.ask]


def test_who_goes_away_frees_the_place(pool: ModelPool, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "MAX_ROWS", 1)
    first, second = (Asking(pool, "tiny", [5, 6], 450) for _ in range(2))
    scheduler.ask(first.ask)
    first.first()
    scheduler.ask(second.ask)
    first.ask.cancel()
    assert first.end()[1].finish_reason == "cancelled"
    assert second.first().finish_reason == ""
    second.ask.cancel()


def test_more_than_may_wait_are_refused(pool: ModelPool, scheduler: Scheduler) -> None:
    scheduler.max_waiting = 2
    askings = [Asking(pool, "tiny", [5, 6]) for _ in range(3)]
    with pytest.raises(ServerBusyError, match="more than 2 may not"):
        scheduler.ask(*(each.ask for each in askings))


def test_a_full_queue_is_told_as_openai_does(pool: ModelPool, tmp_path: Path) -> None:
    full = Scheduler(pool, max_waiting=0)
    full.start()
    with TestClient(make_app(full, tmp_path, RequestLog(tmp_path))) as client:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
        answer = client.post("/v1/chat/completions", json=body)
    full.stop()
    assert answer.status_code == 429 and int(answer.headers["Retry-After"]) > 0
    assert (
        answer.json()["error"] | {"type": "rate_limit_error", "code": "rate_limit_exceeded"} == answer.json()["error"]
    )


def test_a_request_says_how_long_it_is_and_stops_are_short(
    pool: ModelPool, scheduler: Scheduler, tmp_path: Path
) -> None:
    gate = Gate(make_app(scheduler, tmp_path, RequestLog(tmp_path)), "key", {"127.0.0.1:9"})
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    client = TestClient(gate, base_url="http://127.0.0.1:9", headers={"Authorization": "Bearer key"})
    path = "/v1/chat/completions"
    assert client.post(path, content=iter([json.dumps(body).encode()])).status_code == 411
    assert client.post(path, json=body | {"stop": ["a", "b" * 256]}).status_code == 200
    assert client.post(path, json=body | {"stop": ["a", "b" * 257]}).status_code == 400
    assert client.post(path, json=body | {"stop": ["a"] * 65}).status_code == 400


def test_a_client_that_goes_before_the_first_event_frees_its_place(pool: ModelPool) -> None:
    async def gone() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None: ...

    async def events() -> AsyncIterator[dict[str, str]]:
        yield {}

    async def left() -> Ask:
        weights = pool.find("tiny")
        answering = Answering(weights, pool.ready(weights), [5], Sampling(400), [])
        await _Stream([answering], events())({"type": "http", "asgi": {"spec_version": "2.3"}}, gone, send)
        return answering.ask

    assert in_a_loop(left()).cancelled


def test_clients_that_go_free_their_places_in_a_second(
    pool: ModelPool, scheduler: Scheduler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token takes a twentieth of a second here, so the answers that are left would take twenty of them. Tokens are
    counted, not seconds: a machine with other work is slow in both."""
    monkeypatch.setattr(pool.ready(pool.find("tiny")).loaded, "eos_ids", [])
    advance, rounds = scheduling._Lane.advance, []

    def slowly(lane: scheduling._Lane) -> None:
        advance(lane)
        rounds.append(len(lane.asks))
        time.sleep(0.05)

    def until_there_are(number: int) -> int:
        """How many rounds the scheduler has made until so many are answered."""
        before, deadline = len(rounds), time.monotonic() + 120
        while len(rounds) < 2 or rounds[-1] != number:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return len(rounds) - before

    monkeypatch.setattr(scheduling._Lane, "advance", slowly)
    with served_at(make_app(scheduler, tmp_path, RequestLog(tmp_path))) as url:
        options = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 400}
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0)
        streams = [client.chat.completions.create(**options, stream=True) for _ in range(16)]  # type: ignore[call-overload]
        until_there_are(16)
        for stays in (8, 0):
            for stream in streams[stays:]:
                stream.close()
            streams = streams[:stays]
            assert until_there_are(stays) <= 20


@contextmanager
def served_at(app: Any) -> Iterator[str]:
    """The address of an app that is served in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(30)


def test_newcomers_that_cannot_begin_leave_nothing_behind(pool: ModelPool, scheduler: Scheduler) -> None:
    there = Asking(pool, "tiny", [5, 6], 20)
    scheduler.ask(there.ask)
    there.first()
    good, empty = Asking(pool, "tiny", [5, 6]), Asking(pool, "tiny", [])
    scheduler.ask(good.ask, empty.ask)
    assert "at least one token" in empty.end()[1].error and good.end()[1].error
    assert there.end()[1].finish_reason in ("stop", "length")
    assert scheduler.call(lambda: [lane.asks for lane in scheduler._lanes.values()]).result(30) in ([], [[]])
    assert scheduler.status()["num_answering"] == 0


def test_an_event_is_one_line_whatever_a_model_says() -> None:
    async def events() -> AsyncIterator[dict[str, str]]:
        yield {"delta": "one\u2028two\x85好"}

    async def lines() -> list[str]:
        return [line async for text in _written(events()) for line in text.splitlines() if line]

    first, last = in_a_loop(lines())
    assert json.loads(first.removeprefix("data: ")) == {"delta": "one\u2028two\x85好"} and last == "data: [DONE]"


def test_weights_that_are_taken_out_end_their_answers(pool: ModelPool, tmp_path: Path) -> None:
    lane = scheduling._Lane(pool.ready(pool.find("tiny")))
    stays, goes = Asking(pool, "tiny", [5, 6, 7], 8), Asking(pool, "tuned-2", [5, 6, 7], 400)
    lane.add([stays.ask, goes.ask], pool)
    lane.advance()
    weights = pool.find("tuned-2")
    pool.remove("tuned-2")
    lane.end(weights)
    assert "taken out" in goes.end()[1].error
    while lane.asks:
        lane.advance()
    assert stays.end()[1].num_tokens == 8
    pool.add("tuned-2", weights.folder)


def test_base_rows_wear_nothing(pool: ModelPool) -> None:
    assert pool.find("tiny").adapter == BASE_ADAPTER


def test_a_failure_ends_the_answers_of_its_model_alone(
    pool: ModelPool, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken: Callable[..., None] = lambda *_: 1 / 0  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(scheduling.Decoding, "read", broken)
        asking = Asking(pool, "tiny", [5, 6])
        scheduler.ask(asking.ask)
        _, last = asking.end()
    assert last.finish_reason == "error" and "ZeroDivisionError" in last.error
    again = Asking(pool, "tiny", [5, 6])
    scheduler.ask(again.ask)
    assert again.end()[1].finish_reason in ("stop", "length")
