"""Whoever decodes: the narrow place between a compressed prompt and the tokens of its answer.

Everything before it (retrieval, vectors, policy, layout, projection: `Refrag.prepare`) and after it (text, stop strings,
citations, usage, timings: `TextFeed`, `Prepared.answer`) is ours whoever decodes. So a backend sees embeddings and gives token ids.

    async with aclosing(backend.decode(prompt_embeds, settings)) as tokens:
        async for token_ids in tokens:
            for token_id in token_ids:
                feed.push(token_id)
            if feed.finished:  # a stop string
                break
"""

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from ..config import GenerationSettings


@runtime_checkable
class Backend(Protocol):
    """Decodes many prompts at once, each from its embeddings. Used from one event loop; a fake one of ten lines is a valid one.

    What every backend keeps, and `tests/test_engine_batching.py` shows for the one in this process:

    * **Same tokens.** With `temperature` 0 the tokens are those that `Refrag.answer` decodes from the same prompt alone
      (in float32), whatever else is decoded at the same time. When sampling, the same seed gives the same tokens again.
    * **Nobody else's.** Requests never see each other's tokens, and one that fails or is closed disturbs no other.
    * **Closing stops.** When the generator is closed, or the task that reads it is cancelled, decoding of this prompt stops
      soon, and what it held (cache rows, connections) is free. Closing one that was never read is fine.
    """

    name: str
    """For `/health`, metrics and messages: `in-process`, `vllm`, …"""

    def decode(self, prompt_embeds: Float[Tensor, "slot hidden"], settings: GenerationSettings) -> AsyncGenerator[Sequence[int]]:
        """The token ids of one answer, as soon as they are there, in runs of one or more.

        `prompt_embeds` are the decoder's inputs of one prompt, unpadded, in the decoder's dtype, on the model's device; slot 0
        has position 0. They are the caller's: do not change them. That prompt and `max_new_tokens` fit was checked.

        The run ends after the first end-of-sequence token, which is the last id given (append one if the engine swallows it),
        or after `settings.max_new_tokens` ids. Stop strings are not the backend's business: the reader finds them, and closes.
        Of `settings` these count: max_new_tokens, temperature, top_p, top_k, repetition_penalty (over the answer's own tokens), seed.

        Raises BackendError, one sentence for the user, when it cannot decode, before the first id or in between. A backend
        tries again by itself only while it has given no id yet.
        """
        ...

    async def check(self) -> None:
        """Returns when it can decode now; raises BackendError, saying why, when it cannot. Quick: `/ready` calls it."""
        ...

    async def aclose(self) -> None:
        """Frees what it holds. Prompts still decoding end with BackendError; `decode` may not be called again."""
        ...
