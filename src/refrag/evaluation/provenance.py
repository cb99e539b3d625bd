"""Where a result comes from: machine, versions, commit, command, date. Every results file holds it under `provenance`."""

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import InputError

SCHEMA_VERSION = 1
"""Of results files. A reader refuses other versions (see `read_result`)."""

PACKAGES = ("torch", "transformers", "tokenizers", "lancedb", "pyarrow", "numpy")


def provenance(*, seed: int | None = None) -> dict[str, Any]:
    """Who measured what, where and when: plain values for JSON. No path and no name of the machine is recorded."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "commit": _commit(),
        "seed": seed,
        "versions": {"refrag": __version__, "python": platform.python_version(), **_versions()},
        "machine": _machine(),
    }


def result(kind: str, *, settings: Mapping[str, Any], values: Mapping[str, Any], seed: int | None = None) -> dict[str, Any]:
    """The envelope of every results file: schema version, kind, settings, values, provenance."""
    return {"schema": SCHEMA_VERSION, "kind": kind, "settings": dict(settings), **values, "provenance": provenance(seed=seed)}


def write_result(path: Path, content: Mapping[str, Any]) -> None:
    """Write a result as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(finite(content), indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    os.replace(partial, path)


def finite(value: Any) -> Any:
    """The same with None for what JSON has no number for: an interval that too few rounds leave open."""
    if isinstance(value, Mapping):
        return {key: finite(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [finite(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_result(path: Path, *, kind: str | None = None) -> dict[str, Any]:
    """A results file of one kind, or of any.

    Raises InputError when the file is not a result of this kind and schema version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"A result must be a JSON file, {path} could not be read as one: {error}") from error
    schema, own = (content.get("schema"), content.get("kind")) if isinstance(content, dict) else (None, None)
    if schema != SCHEMA_VERSION or not isinstance(own, str) or own != (kind or own):
        wanted = f"a {kind!r} result" if kind else "a result"
        raise InputError(f"{path} must hold {wanted} of schema {SCHEMA_VERSION}, holds {own!r} of schema {schema!r}: measure it again with this version.")
    return content


def peak_rss_bytes() -> int | None:
    """Largest resident memory of this process so far; None where the system does not tell."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would give a child the peak of the process that started it
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines() if ":" in line)
        if "VmHWM" in lines:
            return int(lines["VmHWM"].split()[0]) * 1024
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _command() -> str:
    """The command line, with paths cut to what means the same elsewhere: relative to the working folder, or the last part."""
    here = Path.cwd()

    def portable(argument: str) -> str:
        option, equals, value = argument.rpartition("=")
        path = Path(value)
        if not path.is_absolute():
            return argument
        short = str(path.relative_to(here)) if path.is_relative_to(here) else path.name
        return f"{option}{equals}{short}"

    return " ".join([Path(sys.argv[0]).name, *map(portable, sys.argv[1:])])


def _commit() -> str | None:
    """The commit of the checkout that this code lies in, `-dirty` where files differ; None for an installed package."""
    folder = Path(__file__).parent
    try:
        described = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=folder, capture_output=True, text=True, check=True)
        tracked = subprocess.run(["git", "ls-files", "--error-unmatch", "provenance.py"], cwd=folder, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip() if tracked.returncode == 0 else None


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _machine() -> dict[str, Any]:
    machine: dict[str, Any] = {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "environment": {name: os.environ[name] for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY") if name in os.environ},
    }
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        machine["threads"] = torch.get_num_threads()
        machine["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if hasattr(os, "sysconf"):
        machine["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return machine


def _processor() -> str:
    """The processor's name and the vector extensions that decide bf16 speed."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    fields = dict([part.strip() for part in line.split(":", 1)] for line in lines if ":" in line)
    name = fields.get("model name", platform.processor())
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in fields.get("flags", "").split()]
    return f"{name} ({' '.join(flags)})" if flags else name
