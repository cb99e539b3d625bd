"""The live page: what it shows (`views`, plain HTML) and the Gradio app around it (`app`)."""

from .app import check_installed, mount, serve
from .views import Reading

__all__ = ["Reading", "check_installed", "mount", "serve"]
