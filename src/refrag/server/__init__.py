"""OpenAI-shaped HTTP over the engine: `create_app` makes the application, `run` serves it until SIGTERM."""

from typing import Any

from ..errors import missing_extra
from .settings import ServerSettings

__all__ = ["ServerSettings", "create_app", "run"]


def __getattr__(name: str) -> Any:
    """Imported on first use, so that the command line can read ServerSettings without the extra `serve`."""
    if name not in ("create_app", "run"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from . import app, running
    except ImportError as error:
        if error.name not in ("fastapi", "uvicorn", "prometheus_client", "starlette"):
            raise
        raise missing_extra(error.name, "serve", "The server") from error
    return app.create_app if name == "create_app" else running.run
