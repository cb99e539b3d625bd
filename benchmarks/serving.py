"""Load, equality, throughput, overhead and SIGTERM of `refrag serve` with the bundled model, against the engine's own answers.

    python benchmarks/serving.py --out results/serving.json

A server process answers almanac questions over an index. First every question is answered by the engine in this process, by the
command line and by the server: the greedy answers must be the same. Then one and several clients take turns (throughput, and what
HTTP, JSON and scheduling add to the engine's own time). Then many clients ask for minutes, streaming, going away in the middle and
sending nonsense: every answer is compared with the engine's, every bad request must be a 4xx, memory must stay flat. In the end the
server gets SIGTERM under that load: what it accepted must finish, or end with an error that says so.
"""

import asyncio
import contextlib
import io
import itertools
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx2
import tyro

from refrag import PassageIndex, Refrag
from refrag.cli import main as refrag_command
from refrag.demo.almanac import evaluation_cases
from refrag.evaluation.provenance import result, write_result
from refrag.evaluation.statistics import percentile

CHAT = "/v1/chat/completions"
MALFORMED: tuple[tuple[str, bytes], ...] = (
    (CHAT, b"{"),
    (CHAT, b""),
    (CHAT, b'{"messages": []}'),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "colour": "red"}'),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "temperature": "hot"}'),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": 100000}'),
    (CHAT, json.dumps({"messages": [{"role": "user", "content": "word " * 6000}], "documents": [], "stream": True}).encode()),
    (CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}]}'),
    ("/v1/answer", b'{"question": "  "}'),
    ("/v1/answer", b'{"question": "a", "expand_fraction": 0.5, "max_slots": 7}'),
    ("/v1/passages", b'{"passages": [{"id": "a", "text": "b"}]}'),
    ("/v1/nothing", b"{}"),
)


@dataclass(frozen=True)
class Arguments:
    """Proof of `refrag serve` under load."""

    clients: int = 32
    """Concurrent clients of the long load."""
    seconds: float = 300.0
    """Length of the long load."""
    questions: int = 100
    """Almanac questions; each has the passages of its case in the index."""
    rounds: int = 5
    """Turns of one client and of `some_clients`, for throughput."""
    round_seconds: float = 10.0
    """Length of a turn."""
    some_clients: int = 8
    """Clients that are compared with one."""
    warm_up: float = 0.4
    """Share of the long load after which memory must not grow any more."""
    seed: int = 0
    """Which questions, and what each client does."""
    out: Path | None = None
    """JSON file for the result."""


@dataclass(frozen=True)
class Ask:
    """One request and what the engine answers to it."""

    body: dict[str, Any]
    expected: str


@dataclass
class Tally:
    """What happened to the requests of a load."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    """The first answers that were not the engine's, and bad requests that were not refused."""
    latencies: list[float] = field(default_factory=list)
    tokens: int = 0

    def note(self, outcome: str, problem: str | None = None) -> None:
        self.outcomes[outcome] += 1
        if problem is not None:
            self.outcomes["wrong"] += 1
            self.wrong = [*self.wrong, problem][:5]


# ── the server ───────────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def server(index: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`refrag serve` in a process of its own, and its address."""
    command = [sys.executable, "-m", "refrag.cli", "serve", "--model", "bundled", "--device", "cpu", "--index", str(index), "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        said: list[str] = []
        while (line := process.stderr.readline()) and "http://" not in line:
            said.append(line)
        found = re.search(r"http://\S+:\d+", line)
        if found is None:
            raise SystemExit("The server did not start:\n" + "".join(said))
        yield process, found.group()
    finally:
        process.kill()
        process.wait()


def resident_mib(pid: int) -> float:
    """Resident memory of a process."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024


# ── what is asked ────────────────────────────────────────────────────────────────────────────────────────────────────


def asks(engine: Refrag, questions: Sequence[str]) -> list[Ask]:
    """Every question, with settings that differ from one to the next, and the engine's own answer."""
    variants: list[dict[str, Any]] = [{}, {"policy": "none"}, {"policy": "first", "expand_chunks": 4}, {"top_k": 3}, {"max_slots": 150, "top_k": 4}]
    made = []
    for number, question in enumerate(questions):
        options = variants[number % len(variants)]
        answer = engine.answer(question, **{"max_new_tokens": 32, **options})
        made.append(Ask({"messages": [{"role": "user", "content": question}], "max_tokens": 32, **options}, answer.text))
    return made


def long_asks(questions: Sequence[str]) -> list[Ask]:
    """Answers of up to 64 tokens: at this temperature any token may come, so that the end hardly ever does. Not compared."""
    return [
        Ask({"messages": [{"role": "user", "content": question}], "max_tokens": 64, "temperature": 50.0, "seed": number}, "")
        for number, question in enumerate(questions)
    ]


async def ask_whole(client: httpx2.AsyncClient, ask: Ask, tally: Tally, *, compare: bool = True) -> None:
    """One whole answer."""
    begin = time.perf_counter()
    response = await client.post(CHAT, json=ask.body)
    tally.latencies.append(time.perf_counter() - begin)
    if response.status_code != 200:
        tally.note(f"status {response.status_code}")
        return
    body = response.json()
    text = body["choices"][0]["message"]["content"]
    tally.tokens += body["usage"]["completion_tokens"]
    tally.note("whole", None if text == ask.expected or not compare else f"{text!r} instead of {ask.expected!r}")


async def ask_streamed(client: httpx2.AsyncClient, ask: Ask, tally: Tally, *, leave: bool) -> None:
    """One streamed answer, or only its first piece."""
    text, ended = "", ""
    async with client.stream("POST", CHAT, json=ask.body | {"stream": True}) as response:
        if response.status_code != 200:
            await response.aread()
            tally.note(f"status {response.status_code}")
            return
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                ended = "done"
            elif line.startswith("data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    ended = "error"
                    break
                text += event["choices"][0]["delta"].get("content", "")
            if leave and text:
                tally.note("went away", None if ask.expected.startswith(text) else f"{text!r} does not begin {ask.expected!r}")
                return
    if ended == "error":
        tally.note("error event")
    elif ended == "done":
        tally.note("streamed", None if text == ask.expected else f"{text!r} instead of {ask.expected!r}")
    else:
        tally.note("lost", f"a stream ended after {text!r}")


async def send_nonsense(client: httpx2.AsyncClient, number: int, tally: Tally) -> None:
    """One bad request, which must be refused with a 4xx in OpenAI's shape."""
    path, content = MALFORMED[number % len(MALFORMED)]
    response = await client.post(path, content=content, headers={"Content-Type": "application/json"})
    is_fine = 400 <= response.status_code < 500 and "error" in response.json()
    tally.note("malformed", None if is_fine else f"{path} {content[:60]!r} gave {response.status_code}")


async def mixed(client: httpx2.AsyncClient, made: Sequence[Ask], rng: random.Random, tally: Tally) -> None:
    """One request of the long load."""
    ask, draw = rng.choice(made), rng.random()
    if draw < 0.5:
        await ask_whole(client, ask, tally)
    elif draw < 0.75:
        await ask_streamed(client, ask, tally, leave=False)
    elif draw < 0.9:
        await ask_streamed(client, ask, tally, leave=True)
    else:
        await send_nonsense(client, rng.randrange(1000), tally)


# ── loads ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.asynccontextmanager
async def connections(url: str, *, keep: bool = True) -> AsyncGenerator[httpx2.AsyncClient]:
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None if keep else 0)
    async with httpx2.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        yield client


async def closed_loop(clients: int, seconds: float, work: Callable[[int], Awaitable[None]]) -> float:
    """Each client asks again as soon as it has its answer; returns the seconds until the last one had it."""
    begin = time.perf_counter()

    async def one(number: int) -> None:
        while time.perf_counter() - begin < seconds:
            await work(number)

    await asyncio.gather(*map(one, range(clients)))
    return time.perf_counter() - begin


async def throughput(url: str, made: Sequence[Ask], arguments: Arguments) -> dict[str, Any]:
    """One client and several take turns; a ratio is taken within each pair of turns."""
    turns = itertools.count()
    rounds = []
    async with connections(url) as client:

        async def turn(clients: int, seconds: float) -> dict[str, float]:
            tally = Tally()
            wall = await closed_loop(clients, seconds, lambda _: ask_whole(client, made[next(turns) % len(made)], tally, compare=bool(made[0].expected)))
            assert not tally.wrong and tally.outcomes["whole"] == len(tally.latencies), tally
            rates = {"answers_per_s": len(tally.latencies) / wall, "tokens_per_s": tally.tokens / wall}
            return rates | {"latency_p50_s": median(tally.latencies), "latency_p95_s": percentile(tally.latencies, 0.95)}

        await turn(arguments.some_clients, min(3.0, arguments.round_seconds))
        for _ in range(arguments.rounds):
            rounds.append({"one": await turn(1, arguments.round_seconds), "several": await turn(arguments.some_clients, arguments.round_seconds)})
    ratios = [own["several"]["answers_per_s"] / own["one"]["answers_per_s"] for own in rounds]
    means = {who: {key: median(own[who][key] for own in rounds) for key in rounds[0][who]} for who in ("one", "several")}
    return {"clients": arguments.some_clients, **means, "ratio": median(ratios), "ratios": ratios}


async def overhead(url: str, engine: Refrag, questions: Sequence[str], repeats: int = 3) -> dict[str, float]:
    """Question by question, in turns: the engine in this process, and one client of the server."""
    own, over_http, inside = [], [], []
    async with connections(url) as client:
        for question in [*questions[:10], *list(questions) * repeats]:
            begin = time.perf_counter()
            engine.answer(question, max_new_tokens=32)
            middle = time.perf_counter()
            response = await client.post(CHAT, json={"messages": [{"role": "user", "content": question}], "max_tokens": 32})
            own.append(middle - begin)
            over_http.append(time.perf_counter() - middle)
            inside.append(response.json()["refrag"]["timings"]["total_s"])
    own, over_http, inside = own[10:], over_http[10:], inside[10:]
    ratios = [theirs / mine for mine, theirs in zip(own, over_http, strict=True)]
    outside = [(whole - part) / part for whole, part in zip(over_http, inside, strict=True)]
    return {
        "engine_p50_s": median(own),
        "server_p50_s": median(over_http),
        "server_over_engine": median(ratios),
        "overhead": median(ratios) - 1,
        "http_and_json_share": median(outside),
    }


async def long_load(url: str, pid: int, made: Sequence[Ask], arguments: Arguments) -> dict[str, Any]:
    """The mixed load, and the server's memory while it lasts."""
    tally, rngs = Tally(), [random.Random(arguments.seed * 1000 + number) for number in range(arguments.clients)]
    memory: list[float] = []

    async def watch() -> None:
        while True:
            memory.append(resident_mib(pid))
            await asyncio.sleep(min(1.0, arguments.seconds / 50))

    async with connections(url) as client:
        watcher = asyncio.create_task(watch())
        wall = await closed_loop(arguments.clients, arguments.seconds, lambda number: mixed(client, made, rngs[number], tally))
        watcher.cancel()
        await asyncio.sleep(1)  # what was just left is cleared away
        metrics = (await client.get("/metrics")).text
    warm = memory[int(len(memory) * arguments.warm_up) :]
    half = len(warm) // 2
    growth = median(warm[half:]) - median(warm[:half])
    left = {name: float(re.search(rf"^refrag:{name} (\S+)", metrics, re.M)[1]) for name in ("num_requests_running", "num_requests_waiting")}  # type: ignore[index]
    return {
        "clients": arguments.clients,
        "seconds": wall,
        "outcomes": dict(tally.outcomes),
        "wrong": tally.wrong,
        "memory_mib": {"first": memory[0], "after_warm_up": median(warm[:half]), "end": median(warm[half:]), "most": max(memory), "growth": growth},
        "left_in_the_server": left,
    }


async def stopped(url: str, process: subprocess.Popen[str], made: Sequence[Ask], arguments: Arguments) -> dict[str, Any]:
    """SIGTERM while all clients ask; each request has a connection of its own, so that none is lost to a reused one."""
    tally, rngs = Tally(), [random.Random(arguments.seed * 1000 + 500 + number) for number in range(arguments.clients)]
    told: list[float] = []

    async def one(number: int) -> None:
        async with connections(url, keep=False) as client:
            while process.poll() is None:
                try:
                    await mixed(client, made, rngs[number], tally)
                except (httpx2.ConnectError, httpx2.ConnectTimeout):
                    tally.note("not connected")
                    return
                except httpx2.TransportError as error:
                    is_late = bool(told) and time.perf_counter() - told[0] < 0.5
                    tally.note("closed before it was accepted" if is_late else "lost", None if is_late else repr(error))
                    return

    async def stop() -> None:
        await asyncio.sleep(min(5.0, arguments.seconds / 4))
        told.append(time.perf_counter())
        process.send_signal(signal.SIGTERM)
        while process.poll() is None:
            await asyncio.sleep(0.02)
        told.append(time.perf_counter())

    await asyncio.gather(stop(), *map(one, range(arguments.clients)))
    return {"clients": arguments.clients, "outcomes": dict(tally.outcomes), "wrong": tally.wrong, "seconds_to_stop": told[1] - told[0], "exit_status": process.returncode}


# ── equality ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def by_command_line(question: str, index: Path) -> str:
    """What `refrag ask --json` prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
        status = refrag_command(["ask", question, "--index", str(index), "--model", "bundled", "--device", "cpu", "--max-new-tokens", "32", "--json", "--quiet"])
    assert status == 0, said.getvalue()
    return json.loads(said.getvalue())["text"]


def equality(url: str, engine: Refrag, index: Path, questions: Sequence[str]) -> dict[str, Any]:
    """Greedy answers of engine, server and command line."""
    differing = []
    for question in questions:
        own = engine.answer(question, max_new_tokens=32).text
        served = httpx2.post(url + "/v1/answer", json={"question": question, "max_tokens": 32}, timeout=60).json()["text"]
        command = by_command_line(question, index)
        if not own == served == command:
            differing.append({"question": question, "engine": own, "server": served, "command line": command})
    return {"questions": len(questions), "different": differing}


def main(arguments: Arguments) -> dict[str, Any]:
    """Everything, in the order of the module's text."""
    cases = list(evaluation_cases(arguments.questions, split="held-out", seed=arguments.seed))
    questions = [question.text for _, question in cases]
    model = Refrag.from_pretrained("bundled", device="cpu").model
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "almanac"
        index = PassageIndex.create(path, model)
        index.add(passage for case, _ in cases for passage in case.passages)
        engine = Refrag(model, index=index)
        made = asks(engine, questions)
        with server(path, "--max-waiting", str(2 * arguments.clients), "--log-level", "warning") as (process, url):
            stages: dict[str, Callable[[], Any]] = {
                "equal": lambda: equality(url, engine, path, questions),
                "throughput": lambda: asyncio.run(throughput(url, made, arguments)),
                "throughput_long_answers": lambda: asyncio.run(throughput(url, long_asks(questions), arguments)),
                "overhead": lambda: asyncio.run(overhead(url, engine, questions)),
                "load": lambda: asyncio.run(long_load(url, process.pid, made, arguments)),
                "sigterm": lambda: asyncio.run(stopped(url, process, made, arguments)),
            }
            values = {}
            for name, measure in stages.items():
                values[name] = measure()
                print(f"{name}: {json.dumps(values[name])}", file=sys.stderr, flush=True)
    return result("serving", settings={key: value for key, value in asdict(arguments).items() if key != "out"}, values=values, seed=arguments.seed)


if __name__ == "__main__":
    given = tyro.cli(Arguments)
    measured = main(given)
    if given.out is not None:
        write_result(given.out, measured)
    print(json.dumps({key: value for key, value in measured.items() if key != "provenance"}, indent=1))
