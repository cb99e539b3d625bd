"""The live page: what it shows (`views`, plain HTML) and the Gradio app around it (`app`)."""

from .app import check_installed, mount, serve
from .views import Reading, View, views

__all__ = ["Reading", "View", "check_installed", "mount", "serve", "views"]
