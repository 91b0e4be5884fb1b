"""Serving what was tuned, as the `openai` client asks for it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, cast

import openai
import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient

from fedsp import api
from fedsp.deployment.model_server import engine as engine_module
from fedsp.deployment.model_server.engine import Engine, Full, Wanted
from fedsp.deployment.model_server.openai_api import Answer, Served, make_app
from fedsp.deployment.model_server.server import listen, read_key, served_by_name
from fedsp.errors import ConfigurationError, DataError, RunError
from fedsp.models.prompted_lm import PromptedLM
from fedsp.models.running_texts import RunningTexts, runs_together
from fedsp.training.answers import AnswersAlone
from support.small_runs import ROWS, settings
from support.tiny_families import LONG_ROPE, tiny_causal_lm

TEXTS = [f"Question: {row['question']}\nAnswer:" for row in ROWS[:3]] + ["The river", "One day the"]
KEY = "a-key-of-more-than-sixteen-letters"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A run that tuned a prompt, and one that tuned adapters in distilled layers too."""
    place = tmp_path_factory.mktemp("served")
    client = {"prompt_steps": 6, "learning_rate": 0.02}
    adapters: dict[str, Any] = {"preset": "messenger", "messenger": {"layers": "all", "rank": 4}}
    found = []
    for name, changes in {"prompted": {}, "adapted": adapters}.items():
        values = settings(place / name, round={"rounds": 2}, client=client, **changes)
        if changes:
            del values["prompt"]
        api.run({**values, "output": str(place / f"{name}-run")})
        found.append(place / f"{name}-run")
    return found


@pytest.fixture(scope="module")
def address(runs: list[Path]) -> Iterator[str]:
    answers, tokenizer = served_by_name(runs, "global", 1.0)
    engine = Engine(answers)
    rooms = {name: one.room() for name, one in answers.items()}
    served = Served(engine=engine, tokenizer=tokenizer, rooms=rooms, most=32, key=KEY)
    with listen("127.0.0.1", 0) as found:
        server = uvicorn.Server(
            uvicorn.Config(make_app(served), log_level="warning", lifespan="off")
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [found]})
        engine.start()
        thread.start()
        yield f"http://127.0.0.1:{found.getsockname()[1]}/v1"
        server.should_exit = True
        thread.join()
        engine.stop()


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=address, api_key=KEY, max_retries=0) as client:
        yield client


@cache
def alone(folder: Path, text: str, **changes: Any) -> str:
    """What `fedsp generate` writes."""
    return api.generate(folder, text, most=10, **changes)


def test_each_run_and_the_base_model_answer_as_generate_does(
    client: openai.OpenAI, runs: list[Path]
) -> None:
    """All at once, so that they are written together, and the model changes its numbers."""
    names = [*(run.name for run in runs), "base"]
    assert [model.id for model in client.models.list()] == names
    assert client.models.retrieve("base").owned_by == "fedsp"
    asked = [(name, text) for text in TEXTS for name in names]

    def written(one: tuple[str, str]) -> str:
        name, text = one
        made = client.completions.create(model=name, prompt=text, max_tokens=10, temperature=0)
        return made.choices[0].text

    with ThreadPoolExecutor(len(asked)) as pool:
        found = dict(zip(asked, pool.map(written, asked), strict=True))
    for run in runs:
        assert [found[run.name, text] for text in TEXTS] == [alone(run, text) for text in TEXTS]
    bare = [alone(runs[0], text, zero_shot=True) for text in TEXTS]
    assert [found["base", text] for text in TEXTS] == bare
    differing = {tuple(found[name, text] for text in TEXTS) for name in names}
    assert len(differing) == 3


def test_several_texts_streamed_pieces_drawn_tokens_and_stops(
    client: openai.OpenAI, runs: list[Path]
) -> None:
    name, expected = runs[1].name, [alone(runs[1], text) for text in TEXTS]
    together = client.completions.create(model=name, prompt=TEXTS, max_tokens=10, temperature=0)
    assert [choice.text for choice in together.choices] == expected
    assert together.usage is not None and together.usage.completion_tokens <= 50
    pieces = list(
        client.completions.create(
            model=name,
            prompt=TEXTS[0],
            max_tokens=10,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == expected[0]
    assert sum(bool(piece.choices) for piece in pieces) > 2
    assert pieces[-1].usage is not None and pieces[-1].usage.total_tokens > 10
    assert pieces[-2].choices[0].finish_reason in ("length", "stop")

    drawn = [
        client.completions.create(model=name, prompt=TEXTS[3], max_tokens=10, seed=seed)
        .choices[0]
        .text
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] == alone(runs[1], TEXTS[3], temperature=1.0, seed=1) != drawn[2]

    word = expected[0].split()[-1][:3]
    cut = client.completions.create(
        model=name, prompt=TEXTS[0], max_tokens=10, temperature=0, stop=[word, "never"]
    ).choices[0]
    assert cut.text == expected[0][: expected[0].index(word)] and cut.finish_reason == "stop"


@pytest.mark.parametrize(
    ("asked", "status", "sentence"),
    [
        ({"model": "adapted"}, 404, "did you mean 'adapted-run'"),
        ({"prompt": "a", "max_tokens": 33}, 400, "writes at most 32"),
        ({"prompt": "a " * 300, "max_tokens": 3}, 400, "and 3 are to be written, but the model"),
        ({"prompt": ""}, 400, "no token of the text"),
        ({"prompt": [], "max_tokens": 2}, 400, "prompt"),
        ({"n": 2}, 400, "n cannot be taken: input should be 1"),
        ({"stop": ["x", ""]}, 400, "an empty text would end"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty cannot be taken"),
        ({"temperature": -1}, 400, "temperature cannot be taken"),
        ({"max_tokens": True}, 400, "max_tokens cannot be taken: input should be a valid number"),
        ({"max_tokens": "3"}, 400, "max_tokens cannot be taken: input should be a valid number"),
        ({"max_tokens": 2.5}, 400, "max_tokens cannot be taken: input should be a valid integer"),
        ({"temperature": True}, 400, "temperature cannot be taken: input should be a valid number"),
        ({"seed": "3"}, 400, "seed cannot be taken"),
        ({"prompt": 3}, 400, "prompt cannot be taken"),
        ({"prompt": []}, 400, "prompt cannot be taken: list should have at least 1 item"),
        ({"stop": 3}, 400, "stop cannot be taken"),
        ({"stop": ["a", 1]}, 400, "stop.1 cannot be taken: input should be a valid string"),
        ({"extra_body": {"top_k": 3}}, 400, "top_k is not supported"),
        ({"extra_body": {"strict": True}}, 400, "strict is not supported"),
        ({"stream": 5}, 400, "stream cannot be taken"),
        ({"stream_options": 3}, 400, "stream_options cannot be taken"),
        ({"stop": "b" * 1001}, 400, "stop cannot be taken: string should have at most 1000"),
        ({"stop": ["b"] * 17}, 400, "stop cannot be taken: list should have at most 16"),
        ({"extra_body": {"store": True}}, 400, "store is not supported"),
    ],
)
def test_what_cannot_be_done_is_a_sentence(
    client: openai.OpenAI, asked: dict[str, Any], status: int, sentence: str
) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        client.completions.create(**{"model": "base", "prompt": "a", **asked})
    assert refused.value.status_code == status and sentence in str(refused.value.body)


def test_options_that_are_null_or_ask_for_nothing_are_left_out(
    client: openai.OpenAI, runs: list[Path]
) -> None:
    nothing: dict[str, Any] = {"logit_bias": {}, "tools": [], "response_format": {"type": "text"}}
    nothing |= dict.fromkeys(("temperature", "top_p", "stream", "tool_choice", "metadata"))
    made = client.completions.create(
        model=runs[1].name,
        prompt=TEXTS[0],
        max_tokens=10,
        extra_body=nothing | {"store": False, "temperature": 0},
    )
    assert made.choices[0].text == alone(runs[1], TEXTS[0])


def test_what_may_become_a_text_that_ends_the_answer_is_looked_for_in_what_is_there() -> None:
    """However long that text is: at most as many starts of it as the answer has characters."""

    class Text(str):
        starts = 0

        def __getitem__(self, part: Any) -> str:
            Text.starts += 1
            return super().__getitem__(part)

    answer = Answer(cast(Any, None), cast(Any, None), [Text("ab" + "c" * 900)])
    assert answer._unsettled("xxab") == 2 and Text.starts <= 4


def test_only_who_has_the_key_is_answered(address: str) -> None:
    for key in ("another-key", ""):
        with (
            openai.OpenAI(base_url=address, api_key=key or "x", max_retries=0) as stranger,
            pytest.raises(openai.AuthenticationError, match="the key is missing or wrong"),
        ):
            stranger.completions.create(model="base", prompt="a")


def test_a_conversation_is_answered_by_the_chat_template(
    client: openai.OpenAI, runs: list[Path]
) -> None:
    said: Any = [{"role": "user", "content": "Who?"}]
    with pytest.raises(openai.BadRequestError, match="has no chat template"):
        client.chat.completions.create(model="base", messages=said)
    answers, tokenizer = served_by_name(runs[:1], "global", 1.0)
    tokenizer.chat_template = (
        "{% for one in messages %}{{ one.role }}: {{ one.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    engine = Engine(answers)
    engine.start()
    rooms = {name: one.room() for name, one in answers.items()}
    app = make_app(Served(engine=engine, tokenizer=tokenizer, rooms=rooms, most=9))
    http = TestClient(app)
    assert http.get("/healthz").json() == {"status": "ok"}
    parts = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "o?"}]
    body = {"model": "base", "temperature": 0, "messages": [{"role": "user", "content": parts}]}
    whole = http.post("/v1/chat/completions", json=body).json()
    text = whole["choices"][0]["message"]["content"]
    asked = "user: Who?\nassistant:"
    assert text == api.generate(runs[0], asked, most=9, zero_shot=True)
    assert whole["usage"]["completion_tokens"] == 9
    with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as streamed:
        lines = [line for line in streamed.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines[:-1]]
    assert len(deltas) > 1 and [delta.get("role") for delta in deltas] == [
        "assistant",
        *[None] * (len(deltas) - 1),
    ], "clients join what the pieces say"
    assert "".join(delta["content"] for delta in deltas) == text
    for where, raw in (
        ("completions", '{"model": "base", "prompt": "\\ud800a"}'),
        (
            "chat/completions",
            '{"model": "base", "messages": [{"role": "\\ud800", "content": "a"}]}',
        ),
    ):
        half = http.post(f"/v1/{where}", content=raw, headers={"content-type": "application/json"})
        assert half.status_code == 400 and "half of a surrogate pair" in half.text
    broken = http.post("/v1/completions", content="{", headers={"content-type": "application/json"})
    assert broken.json()["error"]["message"] == "the request is not JSON"
    too_long = http.post("/v1/completions", content=b"x" * (5 << 20))
    assert too_long.status_code == 413 and "at most" in too_long.json()["error"]["message"]
    engine.stop()


@pytest.mark.parametrize("answering", ["mean", "auxiliary"])
def test_others_than_the_global_model_answer(runs: list[Path], answering: Any) -> None:
    answers, tokenizer = served_by_name(runs, answering, 1.0)
    engine = Engine(answers)
    engine.start()
    rooms = {name: one.room() for name, one in answers.items()}
    http = TestClient(make_app(Served(engine=engine, tokenizer=tokenizer, rooms=rooms, most=10)))
    for run in reversed(runs):
        body = {"model": run.name, "prompt": TEXTS[:2], "max_tokens": 10, "temperature": 0}
        written = [one["text"] for one in http.post("/v1/completions", json=body).json()["choices"]]
        assert written == [alone(run, text, answers=answering) for text in TEXTS[:2]]
    engine.stop()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mpt", "bloom", "gemma3_text", "opt"])
def test_texts_that_run_together_read_as_alone(kind: str) -> None:
    """Joining and leaving at any time, with a prefix and without, whether a family has positions,
    rotations, or measures places in the row."""
    model = PromptedLM(tiny_causal_lm(kind), kind)
    assert runs_together(model)
    shape = (3, model.shape.layers, 2, model.shape.heads, model.shape.head_size)
    drawn = torch.Generator().manual_seed(1)
    for prefix in (None, torch.randn(shape, generator=drawn)):
        check_running(model, prefix, drawn)


def check_running(model: PromptedLM, prefix: torch.Tensor | None, drawn: torch.Generator) -> None:
    whole = [torch.randint(3, 40, (size,), generator=drawn) for size in (2, 7, 4)]
    running, read = RunningTexts(model, prefix), [model.reader(prefix) for _ in whole]

    def check(found: torch.Tensor, rows: list[int]) -> None:
        expected = torch.stack([read[row](whole[row]) for row in rows])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    def step(rows: list[int]) -> None:
        tokens = torch.randint(3, 40, (len(rows),), generator=drawn)
        for row, token in zip(rows, tokens, strict=True):
            whole[row] = torch.cat([whole[row], token[None]])
        check(running.step(tokens), rows)

    check(running.join(whole[0])[None], [0])
    step([0])
    check(running.join(whole[1])[None], [1])
    step([0, 1])
    check(running.join(whole[2])[None], [2])
    step([0, 1, 2])
    running.keep([0, 2])  # the longest leaves
    step([0, 2])
    step([0, 2])
    running.keep([])
    read[1] = model.reader(prefix)
    check(running.join(whole[1])[None], [1])


def test_rotations_that_depend_on_the_length_of_a_call_are_left_alone() -> None:
    assert not runs_together(PromptedLM(tiny_causal_lm("phi3", **LONG_ROPE), "phi3"))


class Slow:
    """Answers whose every token waits to be let through."""

    def __init__(self, fail: bool = False) -> None:
        self.go, self.begun, self.fail = threading.Semaphore(0), threading.Event(), fail
        self.sides = [type("S", (), {"model": type("M", (), {"device": torch.device("cpu")})})]

    def reader(self) -> Any:
        def read(ids: torch.Tensor) -> torch.Tensor:
            self.begun.set()
            self.go.acquire()
            if self.fail:
                raise RuntimeError("out of memory")
            return torch.tensor([0.0, 1.0])

        return read


def slow_engine(monkeypatch: pytest.MonkeyPatch, **answers: Slow) -> Engine:
    monkeypatch.setattr(engine_module, "runs_together", lambda model: False)
    engine = Engine(answers)  # type: ignore[arg-type]
    engine.start()
    return engine


def wanted(model: str, told: list[Any], **changes: Any) -> Wanted:
    values: dict[str, Any] = {"ids": (1,), "most": 2, "ends": (), "told": told.append, **changes}
    return Wanted(model=model, choose=lambda scores: int(scores.argmax()), **values)


def test_first_come_first_served_until_too_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Slow(), Slow(fail=True)
    engine = slow_engine(monkeypatch, one=one, other=other)
    heard: list[list[Any]] = [[] for _ in range(4)]
    engine.ask(wanted("one", heard[0]))
    one.begun.wait()
    engine.ask(wanted("other", heard[1]), wanted("one", heard[2]))
    engine.ask(wanted("one", heard[3], left=True))
    with pytest.raises(Full):
        engine.ask(*[wanted("one", []) for _ in range(engine_module.MOST_WAITING - 1)])
    one.go.release(2)
    other.begun.wait()
    assert heard == [[1, 1, "length"], [], [], []]
    other.go.release()
    one.go.release(2)
    last: list[Any] = []
    done = threading.Event()
    final = wanted("one", last, ends=(1,))
    final.told = lambda told: (last.append(told), done.set())  # type: ignore[assignment,func-returns-value]
    engine.ask(final)
    one.go.release()
    done.wait()
    assert heard[1] == ["failed"] and heard[2] == [1, 1, "length"] and last == ["stop"]
    assert heard[3] == []  # nobody wanted it any more
    engine.stop()


def test_one_text_s_fault_is_not_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Slow()
    one.go.release(9)
    engine = slow_engine(monkeypatch, one=one)
    heard: list[list[Any]] = [[], []]
    done = threading.Event()

    def fails(scores: torch.Tensor) -> int:
        raise RuntimeError("not a number")

    bad, good = wanted("one", heard[0]), wanted("one", heard[1])
    bad.choose = fails
    good.told = lambda told: (heard[1].append(told), told == "length" and done.set())  # type: ignore[assignment,func-returns-value]
    engine.ask(bad, good)
    done.wait()
    assert heard == [["failed"], [1, 1, "length"]]
    engine.stop()


def test_a_name_that_cannot_answer_at_all_is_told_to_who_waits_for_it_and_to_nobody_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, other = Slow(), Slow()
    engine = slow_engine(monkeypatch, one=one, other=other)

    def lacks_memory(answers: Any) -> Any:
        if answers is other:
            raise MemoryError
        return AnswersAlone(answers)

    monkeypatch.setattr(engine_module, "AnswersAlone", lacks_memory)
    heard: list[list[Any]] = [[] for _ in range(3)]
    engine.ask(*[wanted("other", heard[0]), wanted("other", heard[1]), wanted("one", heard[2])])
    one.begun.wait()
    assert heard == [["failed"], ["failed"], []]
    one.go.release(2)
    engine.stop()


def test_who_has_hung_up_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Slow()
    engine = slow_engine(monkeypatch, one=one)
    engine.ask(wanted("one", []))
    one.begun.wait()
    for _ in range(3):
        gone = [wanted("one", []) for _ in range(engine_module.MOST_WAITING)]
        engine.ask(*gone)
        for text in gone:
            text.left = True
    one.go.release(2)
    engine.stop()


@pytest.mark.parametrize("length", [b"5", b"0"])
def test_a_body_of_no_length_is_refused_whatever_length_is_said_too(
    address: str, length: bytes
) -> None:
    host, port = address.removeprefix("http://").removesuffix("/v1").split(":")
    with socket.create_connection((host, int(port)), 10) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: " + length + b"\r\n"
            b"transfer-encoding: chunked\r\nauthorization: Bearer " + KEY.encode() + b"\r\n\r\n"
        )
        assert connection.recv(4096).split()[1] in (b"400", b"411")


def test_a_client_that_goes_is_not_answered_on(
    address: str, runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it streams or not."""
    asked: list[Wanted] = []
    ask = Engine.ask

    def seen(self: Engine, *texts: Wanted) -> None:
        asked.extend(texts)
        ask(self, *texts)

    monkeypatch.setattr(Engine, "ask", seen)
    host, port = address.removeprefix("http://").removesuffix("/v1").split(":")
    for stream in (False, True):
        body = json.dumps(
            {"model": "base", "prompt": "a", "max_tokens": 32, "temperature": 0, "stream": stream}
        )
        with socket.create_connection((host, int(port))) as gone:
            head = [
                "POST /v1/completions HTTP/1.1",
                "Host: x",
                f"Authorization: Bearer {KEY}",
                "Content-Type: application/json",
                f"Content-Length: {len(body)}",
            ]
            gone.sendall("\r\n".join([*head, "", body]).encode())
            while not asked:
                pass
        text = asked.pop()
        for _ in range(500):
            if text.left:
                break
            threading.Event().wait(0.01)
        assert text.left


def test_nothing_unsettled_is_given(runs: list[Path]) -> None:
    """Neither half a character nor the beginning of what would end the text."""
    _, tokenizer = served_by_name(runs[:1], "global", 1.0)
    ids = tokenizer.encode(" a café END of it", add_special_tokens=False)
    answer = Answer(tokenizer, wanted("base", [], ids=(ids[0],)), ["END"])
    given = []
    for token in ids[1:]:
        answer.hear(token)
        given.append(answer.take())
        if answer.reason:
            break
    assert "".join(given) == tokenizer.decode(ids)[len(tokenizer.decode(ids[:1])) :].split("END")[0]
    assert not any("\ufffd" in piece or piece.endswith("E") for piece in given)
    assert answer.reason == "stop" and answer.wanted.left
    half = Answer(tokenizer, wanted("base", []), ["\nEN"])
    assert half._unsettled("ok\nE\ufffd\ufffd") == 4 and half._unsettled("ok\nE") == 2
    answer.hear("length")
    assert answer.reason == "stop"  # of the text, whatever the engine went on to write


def test_runs_that_cannot_be_served_together_are_a_sentence(
    runs: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="named 'prompted-run' is served already"):
        served_by_name([runs[0], runs[0]], "global", 1.0)
    tuned = settings(tmp_path, method="finetune", round={"rounds": 1})
    whole = Path(api.run(tuned)["folder"])
    with pytest.raises(RunError, match="tuned weights of the model itself"):
        served_by_name([runs[0], whole], "global", 1.0)
    half = settings(tmp_path / "half", model={"name": "embedded", "precision": "bfloat16"})
    other = Path(api.run({**half, "round": {"rounds": 1}, "output": str(tmp_path / "o")})["folder"])
    with pytest.raises(RunError, match=r"runs share a model if their sections \[model\] are equal"):
        served_by_name([runs[0], other], "global", 1.0)


def test_an_address_and_a_key_that_cannot_be_used_are_a_sentence(tmp_path: Path) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match="give another --host or --port"):
            listen("127.0.0.1", port)
    with pytest.raises(ConfigurationError, match="other machines could use the model"):
        read_key(None, "0.0.0.0")
    key = tmp_path / "key"
    for text in ("short", "two words that are long", "k" * 20 + "\nk"):
        key.write_text(text)
        with pytest.raises(DataError, match="expected one line of at least 16"):
            read_key(key, "0.0.0.0")
    key.write_text(KEY + "\n")
    assert read_key(key, "0.0.0.0") == KEY
    with pytest.raises(DataError, match="cannot be read"):
        read_key(tmp_path / "none", "127.0.0.1")


@pytest.mark.study
def test_the_command_serves_until_it_is_ended(runs: list[Path]) -> None:
    command = [sys.executable, "-m", "fedsp", "serve-model", str(runs[0]), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert server.stdout is not None and server.stderr is not None
    said = server.stdout.readline()
    assert said.endswith("serves prompted-run, base\n")
    with openai.OpenAI(base_url=said.split()[0], api_key="none", max_retries=0) as client:
        made = client.completions.create(
            model="prompted-run", prompt=TEXTS[0], max_tokens=10, temperature=0
        )
    assert made.choices[0].text == alone(runs[0], TEXTS[0])
    server.terminate()
    assert server.wait(30) == 0 and "ended from outside" not in server.stderr.read()
