"""What the operator of a server allows: a plain dataclass, read by the command line too."""

from dataclasses import dataclass

from ..config import POLICIES, PolicyName, check_whole
from ..errors import InputError


@dataclass(frozen=True)
class ServerSettings:
    """Limits of the server; what goes beyond them is refused with 400, 403, 413 or 429."""

    model_name: str | None = None
    """The name that requests ask for and /v1/models shows; by default that of --model."""
    max_running: int = 8
    """Requests decoded at the same time."""
    max_waiting: int = 64
    """Requests that may wait for their turn; the next one gets 429 with Retry-After."""
    max_batch_slots: int = 65_536
    """Slots of key-value cache that running requests may reserve together: requests x (longest prompt + answer)."""
    max_body_bytes: int = 8 << 20
    """Largest request body, in bytes."""
    max_passage_tokens: int = 2048
    """Tokens of a passage that is added to the index, its title included."""
    max_changes: int = 4
    """Changes of the index that may run (one at a time) or wait; the next one gets 429."""
    max_documents: int = 128
    """Passages that one request may bring, those of its history included, or retrieve."""
    max_prompt_slots: int | None = None
    """Decoder slots of one prompt; by default what the decoder's positions allow."""
    max_new_tokens: int = 1024
    """Longest answer that a request may ask for, in tokens."""
    default_new_tokens: int = 64
    """Longest answer where the request does not say."""
    policies: tuple[PolicyName, ...] = POLICIES
    """Policies that requests may choose. The perplexity ones run the decoder over all passages first."""
    allow_writes: bool = False
    """Let requests add, change and delete passages of the index."""
    allow_filters: bool = False
    """Let requests filter the index by SQL of their own (`where`)."""
    request_timeout_s: float = 300.0
    """Seconds after which a request is given up with 504, time in the queue included."""
    shutdown_s: float = 30.0
    """Seconds that accepted requests get to finish after SIGTERM; then they end with an error."""
    allowed_hosts: tuple[str, ...] = ()
    """Values of the Host header that are answered. By default any, or only this machine's own names when bound to them:
    a web page elsewhere could otherwise reach the server by a name that it points here."""
    log_requests: bool = False
    """Write questions and answers to the log."""

    def __post_init__(self) -> None:
        """Raises InputError for limits that allow nothing and for unknown policies."""
        for name in ("max_running", "max_batch_slots", "max_body_bytes", "max_passage_tokens", "max_changes", "max_documents", "max_new_tokens", "default_new_tokens"):
            check_whole(name, getattr(self, name), minimum=1)
        check_whole("max_waiting", self.max_waiting, minimum=0)
        if self.max_prompt_slots is not None:
            check_whole("max_prompt_slots", self.max_prompt_slots, minimum=1)
        if self.default_new_tokens > self.max_new_tokens:
            raise InputError(f"default_new_tokens must be at most max_new_tokens ({self.max_new_tokens}), was {self.default_new_tokens}.")
        for name in ("request_timeout_s", "shutdown_s"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be above 0, was {getattr(self, name)}.")
        unknown = [name for name in self.policies if name not in POLICIES]
        if unknown or not self.policies:
            raise InputError(f"policies must be some of {', '.join(POLICIES)}, was {', '.join(self.policies) or 'empty'}.")
