"""`refrag export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from ..config import BUNDLED_MODEL, resolve_model
from .options import Messages


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write the decoder with its tokenizer, LoRA merged, in the precision it was saved in: a folder that vLLM and other engines load."""

    what: Positional[Literal["decoder"]]
    """What to write."""
    model: str = BUNDLED_MODEL
    """A folder, a name on the Hugging Face hub, or `bundled`: the tiny model that comes with refrag."""
    output_dir: Path
    """Folder to write: a new one, an empty one, or an earlier export, which is replaced."""
    messages: Messages

    def run(self) -> int:
        """Prints the folder; the command that serves it goes to stderr."""
        console = self.messages.console()
        from transformers.utils.logging import disable_progress_bar

        from ..hub import check_export_folder
        from ..model import RefragModel

        check_export_folder(self.output_dir)  # before the model is loaded
        disable_progress_bar()
        RefragModel.from_pretrained(resolve_model(self.model), dtype="auto").export_decoder(self.output_dir)
        print(self.output_dir)
        console.print(f"Serve it with  vllm serve {self.output_dir} --enable-prompt-embeds", markup=False, soft_wrap=True)
        return 0
