"""A real server process, asked by the real `openai` client and by ours."""

import json
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from studio import chat_client, jobs, request_log
from studio.chat_client import Column, Connection, Sampling
from studio.engine.weights import weights_hash
from studio.errors import ChatTooLongError, ServerError
from studio.models import model_fingerprint
from studio.projects import Project, create_project
from studio.ui.serve_view import curl_example, openai_example
from tests.engine.folders import lora_model

ANSWER = Sampling(10)
HELLO = [{"role": "user", "content": "Who are you?"}]
LONGEST = 3000  # tokens of an answer: seconds of work, for those who leave before it is done


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.setenv("RETUNE_HOME", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def own_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One home for all tests here: they share a server."""
    monkeypatch.setenv("RETUNE_HOME", str(home))
    return home


@pytest.fixture(scope="module")
def patient_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny one with room for long answers."""
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("models") / "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    return folder


@pytest.fixture(scope="module")
def served(home: Path, patient_model: Path) -> Iterator[tuple[Project, jobs.Job, Connection]]:
    project = create_project("Served")
    for seed in (1, 2):
        model = lora_model(patient_model, seed)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data *= 20
        model.save_pretrained(project.path("hf", f"tuned-{seed}"))
    args = {"base": str(patient_model), "adapters": [{"name": "tuned-1", "path": "hf/tuned-1"}], "port": 0}
    # In bfloat16 a row rounds otherwise beside others than alone, and a random model has near ties everywhere.
    args |= {"max_answer_tokens": LONGEST, "dtype": "float32"}
    job = jobs.start(project.folder, "serve", args, needs_device=False)
    try:
        yield project, job, chat_client.wait_until_ready(project.folder, job, 120)
    finally:
        jobs.kill(project.folder, job.id)


@pytest.fixture
def connection(served: tuple[Project, jobs.Job, Connection]) -> Connection:
    return served[2]


@pytest.fixture
def client(connection: Connection) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{connection.url}/v1", api_key=connection.token, max_retries=0)


def test_connection_file_is_for_its_owner_alone(served: tuple[Project, jobs.Job, Connection]) -> None:
    project, job, connection = served
    path = project.path("jobs", job.id, "connection.json")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert connection.token not in repr(connection)
    assert connection.token not in Path(job.log_path).read_text()


def test_models_are_listed_with_the_base_first(client: openai.OpenAI, patient_model: Path) -> None:
    assert [model.id for model in client.models.list()][:2] == [str(patient_model), "tuned-1"]


def test_chat_and_its_stream_agree(client: openai.OpenAI) -> None:
    options = {"model": "tuned-1", "messages": HELLO, "max_tokens": 12, "temperature": 0.8, "seed": 3}
    whole = client.chat.completions.create(**options)
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert whole.usage.completion_tokens <= 12
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert whole.system_fingerprint == chunks[0].system_fingerprint


def test_base_and_adapter_answer_differently(client: openai.OpenAI) -> None:
    answers = [
        client.chat.completions.create(model=model, messages=HELLO, max_tokens=16, temperature=0).choices[0]
        for model in ("base", "tuned-1")
    ]
    assert answers[0].message.content != answers[1].message.content


def test_a_stop_text_ends_the_answer(client: openai.OpenAI) -> None:
    options = {"model": "base", "messages": HELLO, "temperature": 0, "max_tokens": 24}
    text = client.chat.completions.create(**options).choices[0].message.content
    stop = text[len(text) // 2 :][:3]
    cut = client.chat.completions.create(**options, stop=stop).choices[0]
    assert cut.message.content == text[: text.index(stop)]
    assert cut.finish_reason == "stop"


@pytest.mark.parametrize(
    ("change", "status", "word"),
    [
        ({"model": "nobody"}, 404, "tuned-1"),
        ({"temperature": 9}, 400, "temperature"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 4000}, 400, "tokens"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "long " * 2000}]}, 400, "Shorten"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "I"}]}, 400, "user"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "text parts"),
    ],
)
def test_bad_requests_are_told_why(connection: Connection, change: dict, status: int, word: str) -> None:
    body = {"model": "base", "messages": HELLO, "max_tokens": 4} | change
    response = post(connection, "/v1/chat/completions", body)
    assert response.status_code == status
    assert word in response.json()["error"]["message"]


def test_sixteen_clients_stream_at_once_and_each_gets_its_own(connection: Connection) -> None:
    """Every client asks something else, of the base or the adapter, for another length; some leave in the middle."""

    def ask(number: int, stream: bool) -> tuple[str, str]:
        client = openai.OpenAI(base_url=f"{connection.url}/v1", api_key=connection.token, max_retries=0)
        question = [{"role": "user", "content": f"Question {number * 7919}: tell me about {'x' * number}"}]
        options = {"model": ("base", "tuned-1")[number % 2], "messages": question, "temperature": 0}
        answer = client.chat.completions.create(**options, max_tokens=8 + number, stream=stream)
        if not stream:
            return answer.choices[0].message.content, answer.choices[0].finish_reason
        chunks = [chunk.choices[0] for chunk in answer]
        return "".join(chunk.delta.content or "" for chunk in chunks), chunks[-1].finish_reason

    def leave() -> None:
        client = openai.OpenAI(base_url=f"{connection.url}/v1", api_key=connection.token, max_retries=0)
        options = {"model": "base", "messages": HELLO, "temperature": 2, "max_tokens": LONGEST, "seed": 5}
        with client.chat.completions.create(**options, stream=True, user="leaver") as answer:
            next(iter(answer))

    with ThreadPoolExecutor(20) as threads:
        leaving = [threads.submit(leave) for _ in range(4)]
        together = list(threads.map(lambda number: ask(number, True), range(16)))
        for each in leaving:
            each.result()
    assert together == [ask(number, False) for number in range(16)]
    assert len({text for text, _ in together}) > 8


def test_who_leaves_is_written_down_and_holds_no_place(
    connection: Connection, client: openai.OpenAI, served: tuple[Project, jobs.Job, Connection]
) -> None:
    project, job, _ = served
    for stream in (True, False):  # a whole answer, too, is not computed for nobody
        options = {
            "model": "base",
            "messages": HELLO,
            "max_tokens": LONGEST,
            "temperature": 0,
            "user": f"gone-{stream}",
        }
        if stream:
            with client.chat.completions.create(**options, stream=True) as answer:
                next(iter(answer))
        else:
            with pytest.raises(openai.APITimeoutError):
                client.with_options(timeout=0.3).chat.completions.create(**options)
    folder = project.path("jobs", job.id)
    wait_for(lambda: {f"gone-{stream}" for stream in (True, False)} <= {each.who for each in request_log.read(folder)})
    ends = {each.who: each for each in request_log.read(folder)}
    assert {ends["gone-True"].end, ends["gone-False"].end} == {"cancelled"}
    wait_for(lambda: chat_client.status(connection).num_answering == 0)


def test_requests_are_written_down_without_their_words(
    client: openai.OpenAI, served: tuple[Project, jobs.Job, Connection]
) -> None:
    project, job, _ = served
    secret = [{"role": "user", "content": "my secret question"}]
    answer = client.chat.completions.create(model="tuned-1", messages=secret, max_tokens=5, temperature=0, user="Ann")
    folder = project.path("jobs", job.id)
    newest = request_log.read(folder)[0]
    assert (newest.who, newest.model, newest.answer_tokens) == ("Ann", "tuned-1", answer.usage.completion_tokens)
    assert newest.end in ("stop", "length") and newest.seconds > 0 and newest.prompt_tokens > 10
    text = (folder / request_log.FILE).read_text()
    assert "secret" not in text and answer.choices[0].message.content not in text
    assert stat.S_IMODE((folder / request_log.FILE).stat().st_mode) == 0o600


def test_longer_answers_than_allowed_are_refused_as_openai_does(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=f"at most {LONGEST}"):
        client.chat.completions.create(model="base", messages=HELLO, max_tokens=LONGEST + 1)


def test_weights_are_let_go_and_come_back_with_the_next_request(connection: Connection) -> None:
    before = chat_client.chat(connection, "tuned-1", HELLO, Sampling(8))
    wait_for(lambda: chat_client.unload(connection))
    assert not chat_client.status(connection).loaded
    assert [each.kind for each in chat_client.status(connection).models][:2] == ["base", "adapter"]
    assert chat_client.chat(connection, "tuned-1", HELLO, Sampling(8)) == before
    assert chat_client.status(connection).loaded


def test_the_examples_of_the_page_run(connection: Connection) -> None:
    environment = {**os.environ, "RETUNE_TOKEN": connection.token}
    for command in (
        ["bash", "-c", curl_example(connection.url, "tuned-1")],
        [sys.executable, "-c", openai_example(connection.url, "tuned-1")],
    ):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "error" not in done.stdout.lower() and done.stdout.strip()


def test_strangers_stay_outside(connection: Connection) -> None:
    url = f"{connection.url}/v1/models"
    good = {"Authorization": f"Bearer {connection.token}"}
    assert httpx.get(url, headers=good).status_code == 200
    assert httpx.get(url).status_code == 401
    assert httpx.get(url, headers={"Authorization": "Bearer no"}).status_code == 401
    assert httpx.get(url, headers=good | {"Host": "evil.example"}).status_code == 421
    assert httpx.post(url, headers=good, content=b"x" * 2_000_001).status_code == 413
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{connection.url}/v1", api_key="no", max_retries=0).models.list()
    with pytest.raises(ServerError, match="token"):
        chat_client.list_models(Connection(connection.url, "no"))


def test_columns_are_answered_together(connection: Connection, patient_model: Path, client: openai.OpenAI) -> None:
    other = [{"role": "user", "content": "What is your name?"}]
    columns = [Column("base", HELLO), Column("tuned-1", HELLO), Column("base", other)]
    events = list(chat_client.stream_compare(connection, columns, Sampling(10, 0.0)))
    for number, column in enumerate(columns):
        mine = [event for event in events if event.column == number]
        assert mine[0].weights
        assert mine[-1].finish_reason in ("stop", "length")
        assert 0 < mine[-1].num_tokens <= 10 and mine[-1].seconds > 0
        text = "".join(event.delta for event in mine)
        assert text == chat_client.chat(connection, column.model, column.messages, Sampling(10, 0.0))
    first = {event.column: event.weights for event in reversed(events) if event.weights}
    assert first[0] == first[2] == model_fingerprint(patient_model)
    assert first[1] != first[0]


def test_each_column_may_have_its_own_sampling(connection: Connection) -> None:
    own = Sampling(3, 0.0, seed=5)
    events = list(chat_client.stream_compare(connection, [Column("base", HELLO), Column("base", HELLO, own)], ANSWER))
    lengths = {event.column: event.num_tokens for event in events if event.finish_reason}
    assert lengths[1] <= 3 and (lengths[0] > 3 or lengths[0] == lengths[1])


def test_each_answer_says_what_made_it(connection: Connection, patient_model: Path) -> None:
    columns = [Column("base", HELLO), Column("tuned-1", HELLO)]
    events = list(chat_client.stream_compare(connection, columns, Sampling(4, 0.7, 0.9, seed=11)))
    base, tuned = ([event.proof for event in events if event.column == number and event.proof] for number in (0, 1))
    assert len(base) == len(tuned) == 1
    assert (base[0]["adapter"], tuned[0]["adapter"]) == ("off", "on")
    assert base[0]["base_fingerprint"] == tuned[0]["base_fingerprint"] == model_fingerprint(patient_model)
    assert base[0]["weights"] != tuned[0]["weights"]
    assert (
        base[0]["sampling"] | {"max_new_tokens": 4, "temperature": 0.7, "top_p": 0.9, "seed": 11} == base[0]["sampling"]
    )
    ended = [event for event in events if event.finish_reason]
    assert all(0 < event.first_token_seconds <= event.seconds for event in ended)
    prompt = chat_client.rendered_prompt(connection, "base", HELLO)
    assert prompt["text"] == "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"
    assert {key: base[0][key] for key in ("template", "prompt_sha256", "num_prompt_tokens")}.items() <= prompt.items()


def test_the_server_tests_itself(connection: Connection) -> None:
    found = chat_client.self_test(connection)
    assert found["off"] == {"bit_equal": True, "max_difference": 0.0}
    assert found["on"]["tuned-1"]["max_difference"] > 0


def test_an_answer_is_continued_when_asked(connection: Connection) -> None:
    whole = chat_client.chat(connection, "base", HELLO, Sampling(12))
    begun = [*HELLO, {"role": "assistant", "content": "I am"}]
    pieces = list(chat_client.stream_chat(connection, "base", begun, Sampling(12)))
    assert "".join(pieces) and "".join(pieces) != whole
    stop = Sampling(12, stop=(whole[3:6],))
    assert "".join(chat_client.stream_chat(connection, "base", HELLO, stop)) == whole[: whole.index(whole[3:6])]


def test_an_answer_is_shortened_to_what_fits_side_by_side(connection: Connection) -> None:
    *_, last = chat_client.stream_compare(connection, [Column("base", HELLO)], Sampling(100_000, 2.0))
    assert last.finish_reason in ("length", "stop") and last.num_tokens <= 512
    with pytest.raises(ChatTooLongError, match="Shorten"):
        list(chat_client.stream_chat(connection, "base", [{"role": "user", "content": "long " * 2000}], Sampling(4)))


def test_leaving_early_frees_the_server(connection: Connection) -> None:
    events = chat_client.stream_compare(connection, [Column("base", HELLO)] * 3, Sampling(300, 1.0))
    assert next(events).weights
    events.close()
    assert isinstance(chat_client.chat(connection, "base", HELLO, Sampling(4)), str)


def test_an_adapter_joins_while_it_runs(connection: Connection, served: tuple[Project, jobs.Job, Connection]) -> None:
    project = served[0]
    digest = chat_client.add_adapter(connection, "tuned-2", "hf/tuned-2")
    assert digest == weights_hash(project.path("hf", "tuned-2"))
    assert "tuned-2" in chat_client.list_models(connection)
    assert chat_client.chat(connection, "tuned-2", HELLO, Sampling(8)) != chat_client.chat(
        connection, "base", HELLO, Sampling(8)
    )
    chat_client.remove_adapter(connection, "tuned-2")
    assert "tuned-2" not in chat_client.list_models(connection)
    with pytest.raises(ServerError, match="no model 'tuned-2'"):
        chat_client.chat(connection, "tuned-2", HELLO, Sampling(8))
    assert chat_client.chat(connection, "tuned-1", HELLO, Sampling(8))
    chat_client.add_adapter(connection, "tuned-2", "hf/tuned-2")
    with pytest.raises(ServerError, match="leads outside"):
        chat_client.add_adapter(connection, "tuned-3", "../../etc")
    with pytest.raises(ServerError, match="no weights"):
        chat_client.add_adapter(connection, "tuned-3", "hf/nothing")
    with pytest.raises(ServerError, match="other weights"):
        chat_client.add_adapter(connection, "tuned-2", "hf/tuned-1")


def test_a_full_model_is_served_beside_the_base(project: Project, tiny_model: Path) -> None:
    args = {"base": str(tiny_model), "adapters": [{"name": "whole", "path": str(tiny_model)}], "idle_seconds": 2}
    job = jobs.start(project.folder, "serve", args, needs_device=False)
    connection = chat_client.wait_until_ready(project.folder, job, 120)
    answers = {chat_client.chat(connection, model, HELLO, Sampling(8)) for model in ("base", "whole")}
    assert len(answers) == 1
    *_, ended = jobs.watch(project.folder, job.id)
    assert (ended.state, ended.result) == ("finished", {"ended": "idle"})
    assert chat_client.read_connection(project.folder, job) is None
    with pytest.raises(ServerError, match="does not answer"):
        chat_client.list_models(connection)


def test_a_server_that_cannot_start_says_why(project: Project, tiny_model: Path) -> None:
    args = {"base": str(tiny_model), "adapters": [{"name": "x", "path": "hf/nothing"}]}
    job = jobs.start(project.folder, "serve", args, needs_device=False)
    with pytest.raises(ServerError, match="There are no weights"):
        chat_client.wait_until_ready(project.folder, job, 120)


def post(connection: Connection, path: str, body: object) -> httpx.Response:
    headers = {"Authorization": f"Bearer {connection.token}"}
    return httpx.post(connection.url + path, json=body, headers=headers, timeout=60)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
