"""Requests made from our own OpenAPI description, good and bad ones: none may meet a 5xx. Slow, and needs the extra `fuzz`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from serving import serving

from refrag import Passage, PassageIndex, Refrag
from refrag.server import ServerSettings

SCHEMATHESIS = os.environ.get("SCHEMATHESIS") or shutil.which("schemathesis", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(SCHEMATHESIS is None, reason="needs schemathesis: pip install 'refrag[fuzz]', or its path in SCHEMATHESIS")]


def test_no_request_meets_a_server_error(tiny_model, tmp_path) -> None:
    index = PassageIndex.create(tmp_path / "index", tiny_model)
    index.add([Passage("velmoor", "The harbour of Velmoor was founded in 1742 by the shipwright Anna Torrel.", "Velmoor")])
    settings = ServerSettings(model_name="tiny", allow_writes=True, allow_filters=True, max_new_tokens=4, default_new_tokens=4)
    assert SCHEMATHESIS is not None
    with serving(Refrag(tiny_model, index=index), settings) as served:
        command = [SCHEMATHESIS, "--no-color", "run", f"{served.url}/openapi.json", "--checks", "not_a_server_error", "--max-examples", "60"]
        more = ["--phases", "examples,coverage,fuzzing", "--mode", "all", "--seed", "7", "--suppress-health-check", "all", "--request-timeout", "60"]
        finished = subprocess.run([*command, *more], capture_output=True, text=True, cwd=tmp_path, check=False)
        assert finished.returncode == 0, finished.stdout[-6000:] + finished.stderr[-2000:]
        assert "Test cases" in finished.stdout or "generated" in finished.stdout, finished.stdout[-3000:]
        assert served.get("/health").status_code == 200
        assert served.service.running == served.service.waiting == 0
